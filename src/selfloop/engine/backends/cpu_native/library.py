"""The kernels' functions and structures, as Python sees them; the other side is ``kernels.cpp`` and ``layers.h``."""

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.cpu_native.instructions import Body

VERSION = 3
MAX_PARTS = 3
NUM_GROUPS = 4
LANES = 16
PAGE_TOKENS = 16
MAX_HEAD_DIM = 256


class Linear(Structure):
    _fields_ = [
        ("forward", c_void_p),
        ("backward", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
    ]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("linears", Linear * NUM_GROUPS),
    ]


class Model(Structure):
    _fields_ = [
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("heads", c_int32),
        ("groups", c_int32),
        ("head_dim", c_int32),
        ("eps", c_float),
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
    ]


class Lora(Structure):
    _fields_ = [
        ("a", c_void_p),
        ("a_back", c_void_p),
        ("b", c_void_p * MAX_PARTS),
        ("b_back", c_void_p * MAX_PARTS),
        ("at_a", c_int64),
        ("at_b", c_int64 * MAX_PARTS),
    ]


class Segment(Structure):
    _fields_ = [
        ("begin", c_int32),
        ("end", c_int32),
        ("rank", c_int32),
        ("padded_rank", c_int32),
        ("scaling", c_float),
        ("groups", POINTER(Lora)),
        ("grads", c_void_p),
    ]


class Chunk(Structure):
    _fields_ = [("begin", c_int32), ("end", c_int32), ("position", c_int32), ("pages", c_void_p)]


class Kept(Structure):
    _fields_ = [
        ("attention_unit", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("mlp_unit", c_void_p),
        ("gate_up", c_void_p),
        ("low_rank", c_void_p),
        ("qk_unit", c_void_p),
        ("attention_inverse", c_void_p),
        ("mlp_inverse", c_void_p),
        ("lse", c_void_p),
        ("qk_inverse", c_void_p),
        ("keeps", c_int32),
        ("low_rank_width", c_int32),
    ]


class Work(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("act", c_void_p),
        ("wide", c_void_p),
        ("d_wide", c_void_p),
        ("d_narrow", c_void_p),
        ("d_low", c_void_p),
        ("dq", c_void_p),
        ("dk", c_void_p),
        ("dv", c_void_p),
        ("d_low_rank", c_void_p),
        ("x_panels", c_void_p),
        ("dy_panels", c_void_p),
        ("x_turned", c_void_p),
        ("dy_turned", c_void_p),
        ("grad_b", c_void_p),
        ("threads", c_void_p),
        ("thread_bytes", c_int64),
    ]


class Pass(Structure):
    _fields_ = [
        ("model", POINTER(Model)),
        ("rows", c_int32),
        ("num_segments", c_int32),
        ("num_chunks", c_int32),
        ("num_threads", c_int32),
        ("h", c_void_p),
        ("h_inputs", c_void_p),
        ("h_again", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("segments", POINTER(Segment)),
        ("chunks", POINTER(Chunk)),
        ("cache", c_void_p),
        ("page_stride", c_int64),
        ("layer_stride", c_int64),
        ("kept", Kept),
        ("work", Work),
        ("final_unit", c_void_p),
        ("final_inverse", c_void_p),
        ("out", c_void_p),
        ("d_out", c_void_p),
    ]


class RowLogprobs(NamedTuple):
    """Of rows of logits: logprobs of targets, what those are less than their logits, sums of e^(logit - largest)."""

    logprobs_N: Tensor
    normalisers_N: Tensor
    sums_N: Tensor


class _Kind(NamedTuple):
    """What rows (activations, adapters, keys and values) and base weights are; the number is that of kernels.cpp."""

    number: int
    rows: torch.dtype
    weights: torch.dtype


_LOW_IN_LOW = _Kind(0, torch.bfloat16, torch.bfloat16)
_FULL_IN_LOW = _Kind(1, torch.float32, torch.bfloat16)
_FULL_IN_FULL = _Kind(2, torch.float32, torch.float32)


class Kernels:
    """The functions of a loaded library. All tensors are on the CPU; what is written must be contiguous.

    Args:
        body: what the library is compiled for.
        dtype: of the model: base weights are in it.
        low_rows: rows are bfloat16 where base weights are; by default where the body multiplies that.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        body: Body,
        dtype: torch.dtype = torch.bfloat16,
        *,
        low_rows: bool | None = None,
    ) -> None:
        self.library, self.body = library, body
        low = body.multiplies_bfloat16 if low_rows is None else low_rows
        kind = _FULL_IN_FULL if dtype == torch.float32 else _LOW_IN_LOW if low else _FULL_IN_LOW
        self._kind, self.rows, self.weights = kind
        for name, result, arguments in (
            ("kernels_version", c_int32, []),
            ("thread_bytes", c_int64, [c_int32, c_int32, c_int32]),
            ("pack", None, [c_int32, c_void_p, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int32]),
            ("unpack", None, [c_int32, c_void_p, c_int32, c_int32, c_void_p]),
            ("pack_all", None, [c_int32, c_void_p, c_int32, c_int32]),
            (
                "multiply",
                None,
                [c_int32, c_void_p, c_int64, c_int32, c_void_p, c_int32, c_int32, c_void_p, c_int64, c_int32],
            ),
            (
                "target_logprobs",
                None,
                [c_int32, c_void_p, c_int64, c_int32, c_int32, *[c_void_p] * 4, c_int64, c_void_p, c_int32],
            ),
            ("draw", None, [c_void_p, c_int64, *[c_int32] * 3, *[c_void_p] * 5, c_int32]),
            ("forward", None, [c_int32, c_void_p]),
            ("backward", None, [c_int32, c_void_p]),
        ):
            function: Any = getattr(library, f"selfloop_{name}")
            function.restype, function.argtypes = result, arguments

    def of(self, dtype: torch.dtype) -> "Kernels":
        """The same library for models in ``dtype``."""
        return Kernels(self.library, self.body, dtype)

    @property
    def words(self) -> str:
        """What computes, for people."""
        weights = ", bfloat16 weights" if self.rows != self.weights else ""
        return f"CPU kernels ({self.body.name}{weights})"

    @property
    def version(self) -> int:
        return self.library.selfloop_kernels_version()

    def thread_bytes(self, longest_backward: int, head_dim: int) -> int:
        """Scratch of each thread; ``longest_backward`` tokens are in the longest sequence of a backward, or 0."""
        return self.library.selfloop_thread_bytes(self._kind, longest_backward, head_dim)

    def pack(self, weight_NK: Tensor, panels: Tensor) -> None:
        """Fill panels of 16 columns n from a matrix of any strides, in the type of base weights."""
        n, k = weight_NK.shape
        n_stride, k_stride = weight_NK.stride()
        assert weight_NK.dtype == panels.dtype == self.weights
        self.library.selfloop_pack(
            panels.itemsize, weight_NK.data_ptr(), n_stride, k_stride, n, k, panels.data_ptr(), num_threads()
        )

    def unpack(self, panels: Tensor, out_NK: Tensor) -> None:
        n, k = out_NK.shape
        self.library.selfloop_unpack(panels.itemsize, panels.data_ptr(), n, k, out_NK.data_ptr())

    def pack_all(self, packs_N8: Tensor) -> None:
        """Matrices in the type of rows: from (address), n_stride, k_stride, n, k, pairs, to (address), panel_stride."""
        self.library.selfloop_pack_all(self.rows.itemsize, packs_N8.data_ptr(), packs_N8.shape[0], num_threads())

    def multiply(self, x_MK: Tensor, panels: Tensor, n: int, out_MN: Tensor) -> None:
        """Rows x times panels of ``n`` columns into float32, whose rows have room for a multiple of 16."""
        rows, k = x_MK.shape
        x, to = x_MK.data_ptr(), out_MN.data_ptr()
        self.library.selfloop_multiply(
            self._kind, x, x_MK.stride(0), rows, panels.data_ptr(), n, k, to, out_MN.stride(0), num_threads()
        )

    def target_logprobs(self, logits_NV: Tensor, targets_N: Tensor, weights_NV: Tensor | None) -> "RowLogprobs":
        """``weights_NV``, as rows are, become e^(logit - largest), less the row's sum of those at its target."""
        num, vocab_size = logits_NV.shape
        found = RowLogprobs(*(torch.empty(num) for _ in range(3)))
        weights, ldw = (None, 0) if weights_NV is None else (weights_NV.data_ptr(), weights_NV.stride(0))
        self.library.selfloop_target_logprobs(
            self._kind, logits_NV.data_ptr(), logits_NV.stride(0), num, vocab_size, targets_N.data_ptr(),
            found.logprobs_N.data_ptr(), found.normalisers_N.data_ptr(), weights, ldw, found.sums_N.data_ptr(),
            num_threads(),
        )  # fmt: skip
        return found

    def draw(
        self, logits_BV: Tensor, num_tokens: int, temperatures: list[float], uniforms: list[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A token of each row, among the first ``num_tokens``; its logprob; and what that is less than its logit.

        At temperature 0 it is the likeliest.
        """
        num, vocab_size = logits_BV.shape
        tokens_B, logprobs_B, normalisers_B = torch.empty(num, dtype=torch.int64), torch.empty(num), torch.empty(num)
        temperatures_B, uniforms_B = torch.tensor(temperatures), torch.tensor(uniforms, dtype=torch.float64)
        self.library.selfloop_draw(
            logits_BV.data_ptr(), logits_BV.stride(0), num, vocab_size, num_tokens, temperatures_B.data_ptr(),
            uniforms_B.data_ptr(), tokens_B.data_ptr(), logprobs_B.data_ptr(), normalisers_B.data_ptr(), num_threads(),
        )  # fmt: skip
        return tokens_B, logprobs_B, normalisers_B

    def forward(self, on: Pass) -> None:
        self.library.selfloop_forward(self._kind, byref(on))

    def backward(self, on: Pass) -> None:
        self.library.selfloop_backward(self._kind, byref(on))


def num_threads() -> int:
    return torch.get_num_threads()
