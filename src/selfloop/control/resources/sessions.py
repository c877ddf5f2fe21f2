"""Sessions that send heartbeats and end: what a script made for itself alone goes with it."""

import asyncio
import logging
import time
from collections.abc import Coroutine

import msgspec

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.context import Context
from selfloop.control.data_dir.transient_errors import tried
from selfloop.control.resources.access import Caller
from selfloop.control.resources.new_rows import new_sampler, new_session
from selfloop.control.sampling.futures import Jobs
from selfloop.storage.db import queries_audit, queries_checkpoints, queries_resources
from selfloop.storage.db.tables import SamplerRow
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id
from selfloop.types.resources import Run, Sampler, Session
from selfloop.types.status import SamplerStatus

log = logging.getLogger(__name__)

# So that a script that ended without a word does not keep its snapshots for good.
_SNAPSHOT_LIFE_S = 7 * 24 * 3600
_SAMPLER_DELAY_S = 3600
_LOOK_EVERY_S = 5.0

SILENT = "cancelled"
"""Why a session ended whose client was not heard of any more."""


class SessionDetails(msgspec.Struct, frozen=True):
    """What a client says of its session; shown again, and not acted upon."""

    tags: list[str] = []
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str | None = None


def details_of(row: Session) -> SessionDetails:
    """What its client said of a session; nothing for one that said nothing."""
    return SessionDetails() if row.details is None else msgspec.json.decode(row.details, type=SessionDetails)


class Sessions:
    """Sessions end when their client says so, or has not been heard of for ``timeout_s``."""

    def __init__(self, context: Context, jobs: Jobs, timeout_s: float) -> None:
        self._c = context
        self._jobs = jobs
        self._timeout_s = timeout_s
        self._heard: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Every session that was open when the server ended has its whole time again."""
        async with self._c.db.read() as session:
            now = time.monotonic()
            self._heard = {row.id: now for row in await queries_resources.open_sessions(session)}
        self._spawn(self._keep_ending(), "end-silent-sessions")

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def create(self, caller: Caller, details: SessionDetails) -> Session:
        row = new_session(caller, details=msgspec.json.encode(details).decode())
        async with self._c.db.write() as session:
            session.add(row)
        self._heard[row.id] = time.monotonic()
        return row.view()

    async def get(self, caller: Caller, id: str) -> Session:
        async with self._c.db.look_up() as session:
            row = await queries_resources.session_row(session, id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("session", id)
        return row

    async def open(self, caller: Caller, id: str) -> Session:
        """A session that something may be made in. Raises :class:`BadRequest` for one that has ended."""
        row = await self.get(caller, id)
        if row.ended_at is not None:
            expected = f"a session that goes on; {id} has ended ({row.end_reason})"
            raise BadRequest("session_id", expected)
        return row

    async def beat(self, caller: Caller, id: str) -> bool:
        """The session's client is alive; False when the session has ended. Raises :class:`NotFound`."""
        row = await self.get(caller, id)
        if row.ended_at is not None:
            return False
        if id in self._heard:
            self._heard[id] = time.monotonic()
        return True

    async def finish(self, caller: Caller, id: str, reason: str) -> None:
        """The client ends its session; see :meth:`end`."""
        row = await self.get(caller, id)
        if row.ended_at is None:
            await self.end(row, reason)

    async def end_silent(self) -> None:
        """End the sessions whose clients have not been heard of for too long."""
        too_long_ago = time.monotonic() - self._timeout_s
        for id in [id for id, at in self._heard.items() if at < too_long_ago]:
            async with self._c.db.look_up() as session:
                row = await queries_resources.session_row(session, id)
            assert row is not None
            log.warning("session %s ends: no heartbeat for %.0f s", id, self._timeout_s)
            await self.end(row, SILENT)

    async def end(self, row: Session, reason: str) -> None:
        """Mark the session's end and free what only it used.

        Its samples end; its snapshots and their samplers go; its runs leave the worker when they have done what
        was accepted. Runs, named checkpoints and the samplers of such stay.
        """
        self._heard.pop(row.id, None)
        async with self._c.db.write() as session:
            await queries_resources.update_session(session, row.id, ended_at=time.time(), end_reason=reason)
        async with self._c.db.read() as session:
            samplers = await queries_resources.samplers(session, team_id=row.team_id, session_id=row.id)
            snapshots = await queries_checkpoints.of_samplers(session, [sampler.id for sampler in samplers])
            runs = await queries_resources.runs(session, session_id=row.id)
        ids = {sampler.id for sampler in samplers}
        self._jobs.cancel_channels(lambda channel: channel.partition("/")[0] in ids)
        own = {snapshot.sampler_id for snapshot in snapshots} | {s.id for s in samplers if s.follows is not None}
        for sampler in samplers:
            if sampler.id in own:
                await self._c.lifecycle.end(sampler.id, f"session {row.id} ended: {reason}")
        for snapshot in snapshots:
            async with self._c.db.write() as session:
                await queries_checkpoints.remove(session, snapshot.id)
            await self._c.store.delete(snapshot.id)
        for run in runs:
            await self._rest(run)

    async def _rest(self, run: Run) -> None:
        """Suspend a run, unless its deployment also serves others'."""
        async with self._c.db.read() as session:
            sharing = await queries_resources.runs(session, deployment_id=run.deployment_id)
        if all(other.session_id == run.session_id for other in sharing):
            reason = f"session {run.session_id} ended"
            # What was accepted is still carried out, however long it takes.
            self._spawn(self._c.lifecycle.rest(run.deployment_id, reason), f"rest-{run.id}")

    async def _keep_ending(self) -> None:
        while True:
            await asyncio.sleep(min(_LOOK_EVERY_S, self._timeout_s / 4))
            with tried("end of silent sessions"):
                await self.end_silent()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def follower(self, caller: Caller, run: Run, sampler_id: str) -> Sampler:
        """The sampler ``sampler_id``, which goes over to all that ``run`` saves for its followers; made once.

        Raises:
            BadRequest: the id belongs to a sampler of something else.
        """
        return await self.snapshot_sampler(caller, run, sampler_id, follows=run.id)

    async def joined(self, caller: Caller, sampler: Sampler) -> int:
        """One more client shares the sampler; returns its number, from 1 on."""
        async with self._c.db.write() as session:
            return await queries_resources.count_clone(session, sampler.id)

    async def assign_project(self, caller: Caller, id: str, project_id: str) -> None:
        """Put a session, with its runs, into a project: a word to list by, nothing else."""
        row = await self.get(caller, id)
        details = details_of(row)
        changed = msgspec.structs.replace(details, project_id=project_id)
        async with self._c.db.write() as session:
            await queries_resources.update_session(session, id, details=msgspec.json.encode(changed).decode())
            queries_audit.record(
                session,
                "session.project_assigned",
                caller.team_id,
                caller.key_id,
                session_id=id,
                project_id=project_id,
                before=details.project_id or "",
            )

    async def snapshot_sampler(
        self, caller: Caller, run: Run, sampler_id: str, *, follows: str | None = None
    ) -> Sampler:
        """The sampler ``sampler_id``, bound to a snapshot of ``run`` that is yet to be taken; made on first asking.

        Raises:
            BadRequest: the id belongs to a sampler of something else, or the run's session has ended.
        """
        await self.open(caller, run.session_id)
        async with self._c.db.look_up() as session:
            known = await queries_resources.sampler(session, sampler_id)
        if known is not None:
            fits = known.checkpoint_id is not None and known.follows == follows
            if known.team_id != caller.team_id or known.model_name != run.model_name or not fits:
                raise BadRequest("sampling_session_seq_id", f"a number not used before: {sampler_id} exists")
            return known
        row = snapshot_sampler_row(caller, run, run.session_id, sampler_id, checkpoint_id=new_id(), follows=follows)
        async with self._c.db.write() as session:
            session.add(row)
            record_creation(session, "sampler", row.id, row.status, f"made for a snapshot of run {run.id}")
        self._c.lifecycle.add("sampler", row.id, row.id, row.model_name, row.scale_down_delay_s, row.status)
        return row.view()

    @property
    def snapshot_life_s(self) -> int:
        """How long a snapshot is kept when its session never ends."""
        return _SNAPSHOT_LIFE_S


def snapshot_sampler_row(
    caller: Caller, run: Run, session_id: str, id: str, *, checkpoint_id: str, follows: str | None = None
) -> SamplerRow:
    """A sampler of one snapshot of a run, asleep until it is asked."""
    return new_sampler(
        caller,
        session_id=session_id,
        id=id,
        base_model=run.base_model,
        model_name=run.model_name,
        max_seq_len=run.max_seq_len,
        delay_s=_SAMPLER_DELAY_S,
        status=SamplerStatus.SCALED_TO_ZERO,
        checkpoint_id=checkpoint_id,
        follows=follows,
    )
