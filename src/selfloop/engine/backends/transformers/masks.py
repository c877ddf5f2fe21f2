"""Masks of packed rows: each of a model's own masks, seen from inside each sequence.

transformers makes a layer's mask out of a function of two places in the batch: causal, or with a window, or in chunks.
While :func:`packed_rows` is in force that function is given positions in their sequence, and is false between two
sequences. So every kind of mask that a model has is exact, and nothing is guessed from position ids.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface


class PackedRows(NamedTuple):
    """Of each row of a batch: which sequence it is of, and its position there."""

    sequences_T: Tensor
    positions_T: Tensor


_packed: ContextVar[PackedRows | None] = ContextVar("packed", default=None)
_IMPLEMENTATIONS = ("sdpa", "eager")


@contextmanager
def packed_rows(rows: PackedRows) -> Generator[None]:
    """Masks that are made meanwhile are of these rows."""
    token = _packed.set(rows)
    try:
        yield
    finally:
        _packed.reset(token)


def _aware(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    """``make_mask``, which is left as it is where no rows are packed."""

    def make(*args: Any, **kwargs: Any) -> Any:
        rows = _packed.get()
        if rows is None:
            return make_mask(*args, **kwargs)
        inside = kwargs["mask_function"]

        def in_one_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = rows.sequences_T[query] == rows.sequences_T[key]
            return same & inside(batch, head, rows.positions_T[query], rows.positions_T[key])

        return make_mask(*args, **(kwargs | {"mask_function": in_one_sequence, "allow_is_causal_skip": False}))

    return make


for _name in _IMPLEMENTATIONS:
    AttentionMaskInterface.register(_name, _aware(ALL_MASK_ATTENTION_FUNCTIONS[_name]))
