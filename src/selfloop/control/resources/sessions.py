"""Sessions that tell of themselves and end: what a script made for itself alone goes with it."""

import asyncio
import time

import msgspec

from selfloop.control.context import Context
from selfloop.control.lifecycle import record_change
from selfloop.control.resources.access import Caller
from selfloop.control.settle import checkpoint_key
from selfloop.storage.db import queries_checkpoints, queries_resources
from selfloop.storage.db.tables import RunRow, SamplerRow, SessionRow
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id
from selfloop.types.status import SamplerStatus

Session = SessionRow
"""What the dialects may know of a session."""

# So that a script that ended without a word does not keep its snapshots for good.
_SNAPSHOT_LIFE_S = 7 * 24 * 3600
_SAMPLER_DELAY_S = 3600


class SessionDetails(msgspec.Struct, frozen=True):
    """What a client tells of its session; shown again, and not acted upon."""

    tags: list[str] = []
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str | None = None


class Sessions:
    def __init__(self, context: Context) -> None:
        self._c = context

    async def create(self, caller: Caller, details: SessionDetails) -> SessionRow:
        row = SessionRow(
            id=new_id(),
            team_id=caller.team_id,
            key_id=caller.key_id,
            created_at=time.time(),
            details=msgspec.json.encode(details).decode(),
        )
        async with self._c.db.write() as session:
            session.add(row)
        return row

    async def get(self, caller: Caller, id: str) -> SessionRow:
        async with self._c.db.read() as session:
            row = await queries_resources.session_row(session, id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("session", id)
        return row

    async def finish(self, caller: Caller, id: str, reason: str) -> None:
        """Mark the session's end; its snapshots and their samplers go. Runs and named checkpoints stay."""
        row = await self.get(caller, id)
        if row.ended_at is not None:
            return
        async with self._c.db.write() as session:
            await queries_resources.update_session(session, id, ended_at=time.time(), end_reason=reason)
        async with self._c.db.read() as session:
            samplers = await queries_resources.samplers(session, team_id=caller.team_id, session_id=id)
            snapshots = await queries_checkpoints.of_samplers(session, [sampler.id for sampler in samplers])
        for snapshot in snapshots:
            assert snapshot.sampler_id is not None
            await self._c.lifecycle.end(snapshot.sampler_id, f"session {id} ended: {reason}")
            async with self._c.db.write() as session:
                await queries_checkpoints.remove(session, snapshot.id)
            await asyncio.to_thread(self._c.blobs.delete, checkpoint_key(snapshot.id))

    async def snapshot_sampler(self, caller: Caller, run: RunRow, sampler_id: str) -> SamplerRow:
        """The sampler ``sampler_id``, bound to a snapshot of ``run`` that is yet to be taken; made on first asking.

        Raises:
            BadRequest: the id belongs to a sampler of something else.
        """
        async with self._c.db.read() as session:
            known = await queries_resources.sampler(session, sampler_id)
        if known is not None:
            if known.team_id != caller.team_id or known.checkpoint_id is None or known.model_name != run.model_name:
                raise BadRequest("sampling_session_seq_id", f"a number not used before: {sampler_id} exists")
            return known
        row = SamplerRow(
            id=sampler_id,
            session_id=run.session_id,
            team_id=caller.team_id,
            key_id=caller.key_id,
            base_model=run.base_model,
            model_name=run.model_name,
            model_id=new_id(),
            deployment_id=new_id(),
            max_seq_len=run.max_seq_len,
            scale_down_delay_s=_SAMPLER_DELAY_S,
            status=SamplerStatus.SCALED_TO_ZERO,
            created_at=time.time(),
            checkpoint_id=new_id(),
        )
        async with self._c.db.write() as session:
            session.add(row)
            record_change(session, "sampler", row.id, row.status, f"made for a snapshot of run {run.id}")
        self._c.lifecycle.add("sampler", row.id, row.id, row.model_name, row.scale_down_delay_s, row.status)
        return row

    @property
    def snapshot_life_s(self) -> int:
        """How long a snapshot is kept when its session never ends."""
        return _SNAPSHOT_LIFE_S
