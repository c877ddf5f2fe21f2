"""What one run has accepted and not sent to its worker, in order; a place that is missing holds up those behind it."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from selfloop.control.queue.stored_states import Position
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.operation import traits_of

# Small payloads that the queue keeps at hand; saves are looked through by name.
_KEPT_PAYLOADS = 64


@dataclass(order=True, slots=True)
class Queued:
    """One in the queue; ``num_attempts`` have ended their worker, the last one by ``cause``."""

    position: Position
    row: OperationRow = field(compare=False)
    num_attempts: int = field(compare=False)
    cause: str = field(default="", compare=False)

    @property
    def is_exclusive(self) -> bool:
        return traits_of(self.row.kind).exclusive

    def blame(self, cause: str) -> None:
        """It was under way when its worker died."""
        self.num_attempts += 1
        self.cause = cause


class RunQueue:
    """A heap by (epoch, seq). The run's row says how far its order has arrived: before ``next_seq`` all is ready."""

    def __init__(self, run: RunRow) -> None:
        self._run = run
        self._heap: list[Queued] = []
        self._out_of_order: set[int] = set()
        self._seen_at = (run.epoch, run.next_seq)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Queued]:
        """In no particular order."""
        return iter(self._heap)

    @property
    def ready(self) -> Queued | None:
        """The next one, if nothing before it is missing."""
        return self._heap[0] if self._heap and self._is_ready(self._heap[0]) else None

    @property
    def missing_seq(self) -> int | None:
        """The sequence id that everything here waits for."""
        return self._run.next_seq if self._heap and self.ready is None else None

    def push(self, row: OperationRow) -> None:
        """Add what was accepted just now."""
        if len(self._heap) >= _KEPT_PAYLOADS and not traits_of(row.kind).writes_checkpoint:
            # The journal has it: a queue may be thousands long, and wait for long for the one that it misses.
            row.payload = None
        queued = Queued((row.epoch, row.seq), row, row.num_attempts)
        assert queued.position <= (self._run.epoch, row.seq), "an operation of an epoch that has not begun"
        heapq.heappush(self._heap, queued)
        if not self._is_ready(queued):
            self.out_of_order_seqs().add(row.seq)

    def pop(self) -> Queued:
        """Take the next one out; it must be ready."""
        assert self.ready is not None, "nothing is sent before what it must wait for"
        return heapq.heappop(self._heap)

    def put_back(self, returned: Iterable[Queued]) -> None:
        """What was sent and has no outcome is next again."""
        for queued in returned:
            assert self._is_ready(queued), "it was sent once"
            heapq.heappush(self._heap, queued)

    def remove(self, operation_id: str) -> bool:
        """Take an operation out; False when it is not here."""
        kept = [queued for queued in self._heap if queued.row.id != operation_id]
        is_removed = len(kept) < len(self._heap)
        self._heap = kept
        heapq.heapify(self._heap)
        self.out_of_order_seqs().intersection_update(q.row.seq for q in kept if not self._is_ready(q))
        return is_removed

    def clear(self) -> list[Queued]:
        """Empty it; returns what it held, in order."""
        held = sorted(self._heap)
        self._heap.clear()
        self._out_of_order.clear()
        return held

    def out_of_order_seqs(self) -> set[int]:
        """Sequence ids of the present epoch that came before one they must wait for."""
        epoch, next_seq = self._run.epoch, self._run.next_seq
        if self._seen_at != (epoch, next_seq):
            # Kept from call to call: every acceptance asks, and a queue can be thousands long.
            self._out_of_order = {seq for seq in self._out_of_order if seq >= next_seq and epoch == self._seen_at[0]}
            self._seen_at = (epoch, next_seq)
        return self._out_of_order

    def check_integrity(self) -> None:
        """Assert what must always hold; for tests, as it looks at everything."""
        held = sorted(self._heap)
        assert all(held[0].position <= queued.position for queued in self._heap[:1])
        assert len({queued.position for queued in held}) == len(held), "one operation a place"
        ahead = {queued.row.seq for queued in held if not self._is_ready(queued)}
        assert self.out_of_order_seqs() == ahead, "what came out of order is what is not ready"
        assert self._run.next_seq not in ahead, "what is missing is not here"

    def _is_ready(self, queued: Queued) -> bool:
        epoch, seq = queued.position
        return epoch < self._run.epoch or seq < self._run.next_seq
