"""Pages of runs, checkpoints and sessions: a key's own, or a team's and what other teams published."""

from collections.abc import Sequence
from dataclasses import dataclass

from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.storage.db import keyset, queries_resources
from selfloop.storage.db import queries_listings as queries
from selfloop.types.errors import NotFound
from selfloop.types.resources import Checkpoint, Run, Session
from selfloop.types.status import CheckpointTarget

Cut = keyset.Cut
Part = keyset.Part
Place = keyset.Place
part_of = keyset.part_of
part_of_sorted = keyset.part_of_sorted
Page = queries.Page
SessionSearch = queries.SessionSearch
SessionTotals = queries.SessionTotals
CheckpointSearch = queries.CheckpointSearch
NO_PROJECT = queries.NO_PROJECT


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run with what a listing shows of it.

    Args:
        is_own: of the caller's team; of another's run only what it published is shown.
        last_request_at: UNIX seconds of its last operation, or of its making.
    """

    run: Run
    is_own: bool
    last_request_at: float
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None


@dataclass(frozen=True, slots=True)
class Listed:
    """A page, and how many rows there are in all."""

    runs: Sequence[ListedRun]
    total: int


@dataclass(frozen=True, slots=True)
class FoundSession:
    session: Session
    totals: SessionTotals


class Listings:
    def __init__(self, context: Context) -> None:
        self._c = context

    async def runs(self, caller: Caller, page: Page, *, accessible: bool, project_id: str | None) -> Listed:
        """The runs of the caller's key; ``accessible`` adds the team's and those with something published."""
        owner = _owner(caller, whole_team=accessible)
        async with self._c.db.read() as session:
            rows, total = await queries.runs(session, owner, page, with_published=accessible, project_id=project_id)
        return Listed(await self._described(caller, rows), total)

    async def run(self, caller: Caller, id: str, *, accessible: bool) -> ListedRun:
        """A run of the team, or if ``accessible`` of another that published something of it."""
        async with self._c.db.read() as session:
            row = await queries_resources.run(session, id)
        if row is not None and (accessible or row.team_id == caller.team_id):
            (described,) = await self._described(caller, [row])
            if described.is_own or described.last_checkpoint or described.last_sampler_checkpoint:
                return described
            async with self._c.db.read() as session:
                published = await queries.checkpoints_of(session, id, keyset.Cut(1), public_only=True)
            if published.rows:
                return described
        raise NotFound("run", id)

    async def checkpoints_of(self, caller: Caller, run_id: str, cut: keyset.Cut) -> keyset.Part[Checkpoint]:
        """The checkpoints of a run, newest first; of another team's the published ones. Raises :class:`NotFound`."""
        run = await self.run(caller, run_id, accessible=True)
        async with self._c.db.read() as session:
            return await queries.checkpoints_of(session, run_id, cut, public_only=not run.is_own)

    async def checkpoints(self, caller: Caller, page: Page) -> tuple[Sequence[Checkpoint], int]:
        """A page of the checkpoints of the runs of the caller's key, and how many there are."""
        async with self._c.db.read() as session:
            return await queries.checkpoints(session, _owner(caller, whole_team=False), page)

    async def sessions(self, caller: Caller, page: Page, *, accessible: bool) -> Sequence[Session]:
        async with self._c.db.read() as session:
            return (await queries.sessions(session, _owner(caller, whole_team=accessible), page))[0]

    async def of_session(self, caller: Caller, id: str) -> tuple[Sequence[str], Sequence[str]]:
        """Ids of a session's runs and samplers. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            row = await queries_resources.session_row(session, id)
            if row is None or row.team_id != caller.team_id:
                raise NotFound("session", id)
            return await queries.of_session(session, id)

    async def search_checkpoints(self, search: CheckpointSearch) -> Sequence[Checkpoint]:
        async with self._c.db.read() as session:
            return await queries.search_checkpoints(session, search)

    async def search(self, search: SessionSearch) -> Sequence[FoundSession]:
        async with self._c.db.read() as session:
            rows = await queries.search_sessions(session, search)
            totals = await queries.session_totals(session, [row.id for row in rows])
        return [FoundSession(row, totals.get(row.id, SessionTotals(0, 0))) for row in rows]

    async def _described(self, caller: Caller, rows: Sequence[Run]) -> list[ListedRun]:
        ids = [row.id for row in rows]
        async with self._c.db.read() as session:
            checkpoints = await queries.last_checkpoints(session, ids, caller.team_id)
            requested = await queries.last_requests(session, ids)
        own = {row.id for row in rows if row.team_id == caller.team_id}
        last = {(checkpoint.run_id, checkpoint.target): checkpoint for checkpoint in checkpoints}
        return [
            ListedRun(
                run=row,
                is_own=row.id in own,
                last_request_at=requested.get(row.id, row.created_at),
                last_checkpoint=last.get((row.id, CheckpointTarget.TRAINER)),
                last_sampler_checkpoint=last.get((row.id, CheckpointTarget.SAMPLER)),
            )
            for row in rows
        ]


def _owner(caller: Caller, *, whole_team: bool) -> queries.Owner:
    return queries.Owner(caller.team_id, None if whole_team else caller.key_id)
