"""The states of a run that are stored: the newest, and the one before it."""

from dataclasses import dataclass

from selfloop.storage.db.tables import RunRow

Position = tuple[int, int]
"""Of an operation in its run: epoch and sequence id."""


@dataclass(frozen=True, slots=True)
class StoredState:
    """What a run can be brought back from; ``key`` None is its start.

    Args:
        position: of the last operation that it holds.
        num_changes: how many operations that it holds changed the run; None where that was not counted.
    """

    key: str | None
    position: Position
    num_changes: int | None


def newest_state(run: RunRow) -> StoredState:
    changes = 0 if run.snapshot_key is None else run.snapshot_changes
    return StoredState(run.snapshot_key, (run.snapshot_epoch, run.snapshot_seq), changes)


def older_state(run: RunRow) -> StoredState | None:
    """The state to go back to where the newest is damaged; None where there is none."""
    if run.older_epoch is None or run.older_seq is None:
        return None
    return StoredState(run.older_key, (run.older_epoch, run.older_seq), run.older_changes)
