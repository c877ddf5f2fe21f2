"""What a piece of PyTorch work takes of memory, as a function of tokens and rank.

The work is done a few times, small. Every tensor that it makes is noted when it comes and when it goes. The operators
are the same each time, so each tensor's size gives what it has of every token, of every token and unit of rank, and
besides. So the most at a time is known for any number of tokens, whatever is largest in a small work.
Memory that an operator takes within itself is not seen.
"""

import gc
import math
import weakref
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[int, int], Generator[None]]
"""Work on so many times ``UNIT`` tokens, with such a rank. It yields when all that is given to it is there, and once
more where it pauses."""

UNIT = 12
_UNITS, _RANKS = (1, 3), (8, 16)


class Taken(NamedTuple):
    """Bytes of each token, and of each token for each unit of the rank; what does not grow with tokens is left out."""

    token: int
    rank: int


class Profile(NamedTuple):
    """``left`` is what is there when the work pauses; ``most`` the most that is there at a time."""

    left: Taken
    most: Taken


def profile(work: Work) -> Profile:
    traces = _traces(work)
    assert len({trace.pause for trace in traces}) == 1, "the operators depend on the size"
    few, more, few_wide, more_wide = (trace.changes for trace in traces)
    tokens, ranks = UNIT * (_UNITS[1] - _UNITS[0]), _RANKS[1] - _RANKS[0]
    token_live = rank_live = 0.0
    lives: list[tuple[float, float]] = []
    for sizes in zip(few, more, few_wide, more_wide, strict=True):
        assert len({size > 0 for size in sizes}) == 1, "the operators depend on the size"
        narrow, wide = (sizes[1] - sizes[0]) / tokens, (sizes[3] - sizes[2]) / tokens
        each = (wide - narrow) / ranks
        token_live, rank_live = token_live + narrow - each * _RANKS[0], rank_live + each
        lives.append((token_live, rank_live))
    left = Taken(*(math.ceil(part) for part in lives[traces[0].pause - 1]))
    return Profile(left, Taken(*(math.ceil(max(parts)) for parts in zip(*lives, strict=True))))


def _traces(work: Work) -> list["_Trace"]:
    was_enabled = gc.isenabled()
    # What is freed must go where it goes each time.
    gc.disable()
    try:
        # Not noted: what is laid out at the first use.
        _trace(work, _UNITS[0], _RANKS[0])
        return [_trace(work, units, rank) for rank in _RANKS for units in _UNITS]
    finally:
        if was_enabled:
            gc.enable()


def _trace(work: Work, units: int, rank: int) -> "_Trace":
    steps, trace = work(units, rank), _Trace()
    next(steps)
    with trace:
        next(steps)
        trace.pause = len(trace.changes)
        assert next(steps, None) is None
    return trace


class _Trace(TorchDispatchMode):
    """Bytes of storages, positive when one is made and negative when it goes, in order; ``pause`` is a place in it."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[int] = []
        self.pause = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and keeping the compiler from it would import it.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Views, and what is changed in place, are of storages that were there.
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for made in _tensors(result):
            storage = made.untyped_storage()
            if id(storage) not in given | self._known:
                self._known.add(id(storage))
                self.changes.append(storage.nbytes())
                weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        return result

    def _gone(self, storage: int, num_bytes: int) -> None:
        self._known.remove(storage)
        self.changes.append(-num_bytes)


def _tensors(tree: Any) -> list[Tensor]:
    """Without weights in oneDNN's own layout, which have no storage that PyTorch knows."""
    leaves = _pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
