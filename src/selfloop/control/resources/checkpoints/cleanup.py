"""Deleting checkpoints: one, or all that match a filter, first as a dry run. What is needed stays."""

import fnmatch
import time
from collections.abc import Sequence
from dataclasses import dataclass

from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints import pinned, retention
from selfloop.storage.db import queries_audit, queries_checkpoints, queries_resources
from selfloop.types.errors import BadRequest, Conflict, NotFound
from selfloop.types.resources import Checkpoint
from selfloop.types.status import CheckpointTarget

_OWN_USE = frozenset({CheckpointTarget.TRAINER, CheckpointTarget.SAMPLER})


@dataclass(frozen=True, slots=True)
class CheckpointFilter:
    """All that is given must hold.

    Args:
        name: a shell pattern of the names, e.g. ``step-*``.
        older_than_s: saved at least that long ago.
        keep_last: spare the newest so many of each run and target, counted over all that the run has.
        whole_team: of the whole team, not only of the caller's own runs.
    """

    run_id: str | None = None
    base_model: str | None = None
    target: CheckpointTarget | None = None
    name: str | None = None
    older_than_s: float | None = None
    keep_last: int | None = None
    whole_team: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint that matched and stays, and why."""

    checkpoint: Checkpoint
    reason: str


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was deleted, or would be."""

    deleted: Sequence[Checkpoint]
    kept: Sequence[Kept]


class Cleanup:
    def __init__(self, context: Context) -> None:
        self._c = context

    async def delete_one(self, caller: Caller, id: str, targets: frozenset[CheckpointTarget] = _OWN_USE) -> Checkpoint:
        """Delete a checkpoint for one of ``targets``.

        Raises:
            NotFound: no such checkpoint.
            Conflict: a live sampler or an accepted operation needs it.
        """
        async with self._c.db.write() as session:
            row = await queries_checkpoints.get(session, id)
            if row is None or row.team_id != caller.team_id or row.target not in targets:
                raise NotFound("checkpoint", id)
            needed = (await retention.needs(session)).of(row)
            if needed is not None:
                raise Conflict(f"checkpoint {pinned.uri_of(row)} stays: {needed}", reason="CHECKPOINT_IN_USE")
            await queries_checkpoints.remove(session, id)
            queries_audit.record_checkpoint(session, "deleted", row, caller.team_id, caller.key_id)
        await self._delete_files([row])
        return row

    async def delete_matching(self, caller: Caller, filter: CheckpointFilter, *, dry_run: bool) -> Cleaned:
        """Delete what matches, or only report what would be.

        Raises:
            BadRequest: nothing to filter by, or a value out of range.
            NotFound: no such run.
        """
        _check(filter)
        async with self._c.db.write() as session:
            if filter.run_id is not None:
                run = await queries_resources.run(session, filter.run_id)
                if run is None or run.team_id != caller.team_id:
                    raise NotFound("run", filter.run_id)
            key_id = None if filter.whole_team or filter.run_id is not None else caller.key_id
            rows = await queries_checkpoints.matching(
                session, caller.team_id, run_id=filter.run_id, base_model=filter.base_model, key_id=key_id
            )
            needs = await retention.needs(session)
            found = _matching(rows, filter)
            kept = [Kept(row, why) for row in found if (why := needs.of(row)) is not None]
            spared = {k.checkpoint.id for k in kept}
            deleted = [row for row in found if row.id not in spared]
            if not dry_run:
                for row in deleted:
                    await queries_checkpoints.remove(session, row.id)
                    queries_audit.record_checkpoint(session, "deleted", row, caller.team_id, caller.key_id)
        if not dry_run:
            await self._delete_files(deleted)
        return Cleaned(deleted, kept)

    async def _delete_files(self, rows: Sequence[Checkpoint]) -> None:
        for row in rows:
            await self._c.store.delete(row.id)


def _check(filter: CheckpointFilter) -> None:
    given = (filter.run_id, filter.base_model, filter.target, filter.name, filter.older_than_s, filter.keep_last)
    if all(value is None for value in given):
        raise BadRequest(
            "filter", "at least one of run_id, base_model, target, name, older_than_seconds, keep_last: see name='*'"
        )


def _matching(rows: Sequence[Checkpoint], filter: CheckpointFilter) -> list[Checkpoint]:
    """Of ``rows``, newest first, those that every condition holds for."""
    now = time.time()
    seen: dict[tuple[str, str], int] = {}
    found: list[Checkpoint] = []
    for row in rows:
        rank = seen.get((row.run_id, row.target), 0)
        seen[row.run_id, row.target] = rank + 1
        is_spared = filter.keep_last is not None and rank < filter.keep_last
        is_named = filter.name is None or fnmatch.fnmatchcase(row.name, filter.name)
        is_for = filter.target is None or row.target == filter.target
        is_old = filter.older_than_s is None or now - row.created_at >= filter.older_than_s
        if is_named and is_for and is_old and not is_spared:
            found.append(row)
    return found
