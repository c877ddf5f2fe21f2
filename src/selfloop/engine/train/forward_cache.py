"""Forwards that are kept for the backward that follows them.

A loss that the client computes comes as two calls on the same data: a ``forward``, whose logprobs the client makes its
loss of, and a ``forward_backward`` with the loss's slopes as weights. What the first has computed the second needs
again, and gets bit for bit as long as the run's weights are the same. So forwards of runs that work like that are
computed with a graph, which is kept within a limit of memory; without it the backward just computes anew.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from selfloop.engine.backends.base import Scores
from selfloop.engine.train.batch import MicroBatch
from selfloop.engine.train.memory import PassMemory
from selfloop.engine.train.run import Run


class KeptForward(NamedTuple):
    """A micro-batch that went through the model.

    Args:
        digest: of its tokens and targets.
        num_top: how many of the likeliest tokens were asked for.
        leaf_P: the parameters, in the compute dtype, that the gradient reaches.
        scores: of its targets; they carry the graph.
        num_bytes: what all of it takes.
    """

    digest: bytes
    num_top: int
    leaf_P: Tensor
    scores: Scores
    num_bytes: int


@dataclass(slots=True)
class _OfRun:
    """What is known of a run at one state of its weights.

    Args:
        seen: digests that a forward had.
        forwards: what is kept, the oldest first.
        was_used: something that was kept, or could have been, had its backward.
    """

    run: Run
    step: int
    seen: set[bytes] = field(default_factory=set[bytes])
    forwards: list[KeptForward] = field(default_factory=list[KeptForward])
    was_used: bool = False


class ForwardCache:
    """Of all runs, within a limit of bytes: the oldest run's go first when it is exceeded.

    A run's forwards are kept when its last ones were followed by their backward; before anything is known of it, when
    their weights are all zero, as in the clients' first call of the two.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._runs: dict[str, _OfRun] = {}
        self._follows: dict[str, bool] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    def drop(self, run_id: str) -> None:
        """The run's weights change: nothing that was kept serves any more."""
        of = self._runs.pop(run_id, None)
        if of is not None:
            if of.was_used:
                self._follows[run_id] = True
            elif of.forwards:
                self._follows[run_id] = False
            self._num_bytes -= sum(kept.num_bytes for kept in of.forwards)

    def forget(self, run_id: str) -> None:
        """The run is removed."""
        self.drop(run_id)
        self._follows.pop(run_id, None)

    def begin_forward(self, run_id: str, run: Run, digests: Iterable[bytes], *, hinted: bool) -> bool:
        """Whether it is expected to be followed by its backward."""
        of = self._current(run_id, run)
        of.seen.update(digests)
        return of.was_used or self._follows.get(run_id, hinted)

    def begin_backward(self, run_id: str, run: Run, digests: Iterable[bytes]) -> None:
        of = self._current(run_id, run)
        of.was_used = of.was_used or not of.seen.isdisjoint(digests)

    def put(self, run_id: str, run: Run, kept: KeptForward) -> None:
        """Keep it, and let go of others until all fit the limit; what does not fit alone is not kept."""
        if kept.num_bytes > self._limit_bytes:
            return
        of = self._current(run_id, run)
        of.forwards.append(kept)
        self._num_bytes += kept.num_bytes
        # The run that is last here had its turn last.
        self._runs[run_id] = self._runs.pop(run_id)
        while self._num_bytes > self._limit_bytes:
            oldest = next(other for other in self._runs.values() if other.forwards)
            self._num_bytes -= oldest.forwards.pop(0).num_bytes

    def fits(self, num_bytes: int) -> bool:
        return num_bytes <= self._limit_bytes

    def find(self, run_id: str, run: Run, digest: bytes, num_top: int) -> KeptForward | None:
        forwards = self._current(run_id, run).forwards
        return next((kept for kept in forwards if (kept.digest, kept.num_top) == (digest, num_top)), None)

    def remove(self, run_id: str, kept: KeptForward) -> None:
        of = self._runs[run_id]
        # By identity: tensors have no plain equality.
        of.forwards = [other for other in of.forwards if other is not kept]
        self._num_bytes -= kept.num_bytes

    def _current(self, run_id: str, run: Run) -> _OfRun:
        """Never of other weights than the run has now, whoever has changed them."""
        of = self._runs.get(run_id)
        if of is None or of.run is not run or of.step != run.step:
            self.drop(run_id)
            of = self._runs[run_id] = _OfRun(run, run.step)
        return of


class RunForwards:
    """One operation's view of :class:`ForwardCache`.

    Args:
        keeps: the operation is a forward whose backward is expected.
    """

    def __init__(self, cache: ForwardCache, memory: PassMemory, run_id: str, run: Run, *, keeps: bool) -> None:
        self._cache = cache
        self._memory = memory
        self._run_id = run_id
        self._run = run
        self._keeps = keeps

    def wants(self, batch: MicroBatch) -> bool:
        """Whether this micro-batch of a forward is to be kept."""
        longest = self._memory.longest(self._run.shape, with_gradient=True)
        return self._keeps and batch.tokens_T.shape[0] <= longest and self._cache.fits(self._num_bytes(batch))

    def put(self, batch: MicroBatch, num_top: int, leaf_P: Tensor, scores: Scores) -> None:
        forward = KeptForward(batch.digest, num_top, leaf_P, scores, self._num_bytes(batch))
        self._cache.put(self._run_id, self._run, forward)

    def has(self, batch: MicroBatch, num_top: int) -> bool:
        return self._cache.find(self._run_id, self._run, batch.digest, num_top) is not None

    def take(self, batch: MicroBatch, num_top: int) -> KeptForward:
        """What :meth:`has` has found. It is kept no longer, as its graph serves one backward."""
        forward = self._cache.find(self._run_id, self._run, batch.digest, num_top)
        assert forward is not None
        self._cache.remove(self._run_id, forward)
        return forward

    def _num_bytes(self, batch: MicroBatch) -> int:
        num_tokens, shape = batch.tokens_T.shape[0], self._run.shape
        return self._memory.kept(num_tokens, shape, recompute=self._memory.recomputes(num_tokens, shape))
