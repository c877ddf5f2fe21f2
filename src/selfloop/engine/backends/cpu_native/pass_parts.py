"""The parts of the memory of a pass by the kernels, and their sizes, which follow from the model's sizes alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from selfloop.engine.backends.cpu_native import library
from selfloop.engine.backends.cpu_native.library import LANES, NUM_GROUPS, Kernels
from selfloop.engine.backends.cpu_native.sizes import Sizes

ALIGN = 64
_FLOAT = 4  # bytes

Part = tuple[Any, str, int]
"""A structure, its pointer, and how many bytes that needs."""


class PassBytes(NamedTuple):
    """What a pass keeps for its backward, and what it works in beside that."""

    kept: int
    work: int


@dataclass(frozen=True, slots=True)
class PassParts:
    """Of the passes of a model; no weights are needed."""

    _kernels: Kernels
    _sizes: Sizes

    def bytes_of(self, num_rows: int, rank: int, *, backward: bool, recompute: bool) -> PassBytes:
        """Of a pass over one sequence, with an adapter of ``rank`` on every projection."""
        on = library.Pass()
        on.rows, on.num_threads = num_rows, library.num_threads()
        on.kept.low_rank_width = -(-rank // LANES) * LANES * library.MAX_PARTS
        longest = num_rows if backward else 0
        kept = self.kept(on, backward=backward, recompute=recompute)
        return PassBytes(_total(kept), _total(self.work(on, longest, recompute=recompute)))

    def kept(self, on: library.Pass, *, backward: bool, recompute: bool) -> list[Part]:
        """What lies there until the backward."""
        sizes, rows, width, keeps = self._sizes, on.rows, on.kept.low_rank_width, backward and not recompute
        each = rows * (sizes.num_layers if keeps else 1)
        item = self._kernels.rows.itemsize
        hidden, inner, heads, d = sizes.hidden_size, sizes.inner_size, sizes.num_heads, sizes.head_dim
        num_qk = heads + sizes.num_kv_heads
        parts: list[Part] = [
            (on, "final_unit", rows * hidden * item),
            (on, "final_inverse", rows * _FLOAT),
            (on.kept, "attention_unit", each * hidden * item),
            (on.kept, "mlp_unit", each * hidden * item),
            (on.kept, "qkv", each * (num_qk + sizes.num_kv_heads) * d * item),
            (on.kept, "attended", each * heads * d * item),
            (on.kept, "attention_inverse", each * _FLOAT),
            (on.kept, "mlp_inverse", each * _FLOAT),
            (on.kept, "low_rank", each * NUM_GROUPS * width * item),
        ]
        if backward:
            parts += [
                (on.kept, "gate_up", each * 2 * inner * item),
                (on.kept, "lse", each * heads * _FLOAT),
            ]
        if backward and sizes.qk_norm:
            parts += [
                (on.kept, "qk_unit", each * num_qk * d * item),
                (on.kept, "qk_inverse", each * num_qk * _FLOAT),
            ]
        if backward and recompute:
            parts.append((on, "h_inputs", rows * sizes.num_layers * hidden * _FLOAT))
        return parts

    def work(self, on: library.Pass, longest: int, *, recompute: bool) -> list[Part]:
        """What a pass works in beside that; ``longest`` is 0 without a backward."""
        sizes, rows, width = self._sizes, on.rows, on.kept.low_rank_width
        hidden, inner, d = sizes.hidden_size, sizes.inner_size, sizes.head_dim
        q, item = sizes.num_heads * d, self._kernels.rows.itemsize
        widest_in, widest_out = max(hidden, inner, q), max(q + 2 * sizes.num_kv_heads * d, 2 * inner, hidden)
        on.work.thread_bytes = self._kernels.thread_bytes(longest, d)
        parts: list[Part] = [
            (on.work, "x", rows * hidden * item),
            (on.work, "act", rows * inner * item),
            (on.work, "wide", rows * widest_out * _FLOAT),
            (on.work, "threads", on.work.thread_bytes * on.num_threads),
        ]
        if longest > 0:
            paired = rows + 1  # the last of an odd number of rows is paired with zeros
            parts += [
                (on.work, "d_wide", rows * widest_out * item),
                (on.work, "d_narrow", rows * max(hidden, q) * _FLOAT),
                (on.work, "d_low", rows * hidden * item),
                *((on.work, name, rows * q * _FLOAT) for name in ("dq", "dk", "dv")),
                (on.work, "d_low_rank", rows * width * item),
                (on.work, "x_panels", paired * widest_in * item),
                (on.work, "dy_panels", paired * widest_out * item),
                (on.work, "x_turned", paired * width * item),
                (on.work, "dy_turned", paired * width * item),
                (on.work, "grad_b", width * widest_out * _FLOAT),
            ]
            if recompute:
                parts.append((on, "h_again", rows * hidden * _FLOAT))
        return parts


def aligned(parts: list[Part]) -> list[int]:
    """Bytes of each, up to the next aligned one."""
    return [-(-num_bytes // ALIGN) * ALIGN for _, _, num_bytes in parts]


def _total(parts: list[Part]) -> int:
    return sum(aligned(parts)) + ALIGN
