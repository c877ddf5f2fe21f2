"""Usage: what each run, sampler, key and team took, by the hour."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from selfloop.control.resources.access import Caller
from selfloop.storage.db import queries_observations
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.logline import current
from selfloop.types.operation import KINDS, ForwardBackward
from selfloop.types.resources import Sampler
from selfloop.types.result import LossResult, Result
from selfloop.types.sampling import SampleResult

HOUR_S = 3600
GroupBy = Literal["run", "key", "team"]
UsageKey = queries_observations.UsageKey
Counts = queries_observations.Counts


def counts_of(row: OperationRow, result: Result) -> Counts:
    """What one finished operation took. Trained tokens are those whose loss counted."""
    trained = 0
    if KINDS.get(row.kind) is ForwardBackward and isinstance(result, LossResult):
        trained = int(result.metrics.get("num_trained_tokens", 0))
    return Counts(
        operations=1,
        tokens_trained=trained,
        tokens_forwarded=result.spent.num_tokens,
        compute_s=result.spent.device_s,
    )


def operation_key(run: RunRow, row: OperationRow, now: float) -> UsageKey:
    """On whose account an operation goes: the key that sent it, or the run's where that is not known."""
    return UsageKey(run.team_id, _hour(now), row.key_id or run.key_id, run.id, "")


def _hour(now: float) -> int:
    return int(now) // HOUR_S * HOUR_S


@dataclass(frozen=True, slots=True)
class UsageLine:
    """A group's totals. ``id`` is the run's, key's or team's; empty for base models' samples.

    Args:
        label: name of the run, key or team.
        checkpoint_bytes: stored now, whatever the window.
    """

    id: str
    label: str
    counts: Counts = field(default_factory=Counts)
    checkpoint_bytes: int = 0


class Usage:
    """Sampling is gathered and written every few seconds: a sample need not wait for a disk."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._pending: dict[UsageKey, Counts] = {}
        self._flushing = asyncio.Lock()

    def sampled(self, sampler: Sampler, run_id: str | None, num_prompt_tokens: int, result: SampleResult) -> Counts:
        """Count one answered sampling request; with the key that asked, or the sampler's where that is not known.

        It counts for the sampler's run, else for ``run_id``, which trained the weights.
        """
        counts = Counts(
            samples=1,
            tokens_prefilled=num_prompt_tokens,
            tokens_sampled=sum(len(s.tokens) for s in result.sequences),
            compute_s=result.spent.device_s,
        )
        scope = current()
        key_id = scope.key_id if scope.key_id and scope.team_id == sampler.team_id else sampler.key_id
        key = UsageKey(sampler.team_id, _hour(time.time()), key_id, sampler.run_id or run_id or "", sampler.id)
        self._pending[key] = self._pending.get(key, Counts()) + counts
        return counts

    async def flush(self) -> None:
        async with self._flushing:
            pending, self._pending = self._pending, {}
            if not pending:
                return
            try:
                async with self._db.write() as session:
                    for key, counts in pending.items():
                        await queries_observations.add_usage(session, key, counts)
            except BaseException:
                for key, counts in pending.items():
                    self._pending[key] = self._pending.get(key, Counts()) + counts
                raise

    async def report(
        self,
        caller: Caller | None,
        group_by: GroupBy,
        *,
        run_id: str | None = None,
        whole_team: bool = True,
        start: float | None = None,
        end: float | None = None,
    ) -> Sequence[UsageLine]:
        """Totals a group, the most computing first.

        Args:
            caller: None for every team (the command line).
            whole_team: False for the caller's own key only.
            start: UNIX seconds; the hours that begin in [start's hour, end) count.
        """
        await self.flush()
        team_id = caller.team_id if caller else None
        key_id = caller.key_id if caller and not whole_team else None
        async with self._db.read() as session:
            totals = await queries_observations.usage(
                session,
                group_by,
                team_id=team_id,
                key_id=key_id,
                run_id=run_id,
                start=None if start is None else _hour(start),
                end=end,
            )
            stored = await queries_observations.checkpoint_bytes(
                session, group_by, team_id=team_id, key_id=key_id, run_id=run_id
            )
            labels = await queries_observations.labels(session, group_by, {*totals, *stored} - {""})
        lines = [
            UsageLine(id, labels.get(id, ""), totals.get(id, Counts()), stored.get(id, 0)) for id in {*totals, *stored}
        ]
        return sorted(lines, key=lambda line: (line.counts.compute_s, line.id), reverse=True)


def as_rows(lines: Sequence[UsageLine], group_by: GroupBy) -> list[dict[str, Any]]:
    """The report as the command line prints it for programs."""
    return [
        {f"{group_by}_id": line.id or None, "name": line.label, **msgspec.structs.asdict(line.counts)}
        | {"checkpoint_bytes": line.checkpoint_bytes}
        for line in lines
    ]
