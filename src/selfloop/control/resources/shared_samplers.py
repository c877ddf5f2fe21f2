"""Samplers that a team's requests to the whole server share: one for each base model, made on first use."""

import asyncio

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.catalogue import Model
from selfloop.control.resources.new_rows import new_sampler, new_session
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_resources
from selfloop.types.resources import Sampler
from selfloop.types.status import SamplerStatus

_SCALE_DOWN_DELAY_S = 3600
_ENDED = (SamplerStatus.INACTIVE, SamplerStatus.DEACTIVATING)


class SharedSamplers:
    """Standalone samplers in a session that each team has for them alone; they sleep and wake like any other."""

    def __init__(self, context: Context, user_configs: UserConfigs) -> None:
        self._c = context
        self._user_configs = user_configs
        self._making = asyncio.Lock()

    async def of(self, caller: Caller, base_model: str, field: str) -> Sampler:
        """The team's sampler of a base model; a new one where there is none, or it was deactivated.

        Raises:
            NotFound: no such base model, as ``field``.
            Conflict: the caller's own config excludes this machine.
        """
        model = await self._c.catalogue.resolve(base_model, field)
        found = await self._live(caller.team_id, model.name)
        if found is not None and self._c.lifecycle.status(found.id) is not None:
            return found
        async with self._making:
            found = await self._live(caller.team_id, model.name)
            return found or await self._make(caller, model)

    async def _live(self, team_id: str, model_name: str) -> Sampler | None:
        async with self._c.db.read() as session:
            rows = await queries_resources.samplers(session, team_id=team_id, session_id=_session_id(team_id))
        live = (row for row in rows if row.model_name == model_name and row.status not in _ENDED)
        # Anybody of the team may have put a sampler of something else there.
        return next((row for row in live if row.checkpoint_id is None and row.run_id is None), None)

    async def _make(self, caller: Caller, model: Model) -> Sampler:
        await self._user_configs.check(caller, trainer=False, sampler=True)
        session_id = _session_id(caller.team_id)
        async with self._c.db.write() as session:
            if await queries_resources.session_row(session, session_id) is None:
                session.add(new_session(caller, id=session_id))
                await session.flush()
            row = new_sampler(
                caller,
                session_id=session_id,
                base_model=model.name,
                model_name=model.name,
                max_seq_len=model.max_position_embeddings,
                delay_s=_SCALE_DOWN_DELAY_S,
                capacity_reason="fresh: shared by the team's requests to the whole server",
            )
            session.add(row)
            record_creation(
                session, "sampler", row.id, row.status, "created for the team's requests to the whole server"
            )
        lifecycle = self._c.lifecycle
        lifecycle.add("sampler", row.id, row.id, row.model_name, row.scale_down_delay_s, row.status)
        lifecycle.wake_soon(row.id)
        return row.view()


def _session_id(team_id: str) -> str:
    return f"shared{team_id}"
