"""The newest weights of a run, for somebody who is not its client: a sampler of them, whatever was published."""

import logging
from dataclasses import dataclass

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints.pinned import uri_of
from selfloop.control.resources.runs import Runs
from selfloop.control.resources.samplers import Samplers
from selfloop.control.resources.sessions import snapshot_sampler_row
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_checkpoints
from selfloop.types.errors import Conflict, WorkerLost
from selfloop.types.ids import new_id
from selfloop.types.operation import SaveWeightsForSampler
from selfloop.types.resources import Checkpoint, Run, Sampler
from selfloop.types.status import RunStatus
from selfloop.types.uris import snapshot_name

log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
# Longer than anybody talks; the sampler that serves it keeps it beyond that.
_LIFE_S = 3600


@dataclass(frozen=True, slots=True)
class NewestSampler:
    """A sampler of a run's newest weights. ``path`` is the checkpoint's, None for weights taken from the live run."""

    sampler: Sampler
    step: int
    path: str | None


class NewestWeights:
    def __init__(self, context: Context, user_configs: UserConfigs, runs: Runs, samplers: Samplers) -> None:
        self._c = context
        self._user_configs = user_configs
        self._runs = runs
        self._samplers = samplers

    async def sampler(self, caller: Caller, run_id: str) -> NewestSampler:
        """A new sampler: of the weights that a live run has by now, or of the last ones that an ended run saved.

        The run's own operations, their order and what it has published are left as they are.

        Raises:
            NotFound: no such run in the caller's team.
            Conflict: the run has ended and left no checkpoint, or the caller's own config excludes this machine.
            OperationFailed: the weights cannot be had; the cause is named.
        """
        run = (await self._runs.get(caller, run_id)).run
        await self._user_configs.check(caller, trainer=False, sampler=True)
        session_id = (await self._runs.create_session(caller, None)).id
        if run.status == RunStatus.ACTIVE:
            return await self._of_live(caller, run, session_id)
        async with self._c.db.read() as session:
            saved = await queries_checkpoints.matching(session, caller.team_id, run_id=run.id)
        if not saved:
            raise Conflict(f"run {run.id} is {run.status} and has no checkpoint to sample from")
        path = uri_of(saved[0])
        sampler = await self._samplers.create_standalone(
            caller, session_id, base_model=None, model_path=path, max_seq_len=None, reuse_from_session_id=None
        )
        return NewestSampler(sampler, saved[0].step, path)

    async def _of_live(self, caller: Caller, run: Run, session_id: str) -> NewestSampler:
        checkpoint = await self._save(run, new_id())
        assert checkpoint.sampler_id is not None
        row = snapshot_sampler_row(caller, run, session_id, checkpoint.sampler_id, checkpoint_id=checkpoint.id)
        async with self._c.db.write() as session:
            session.add(row)
            record_creation(session, "sampler", row.id, row.status, f"made for the newest weights of run {run.id}")
        self._c.lifecycle.add("sampler", row.id, row.id, row.model_name, row.scale_down_delay_s, row.status)
        self._c.lifecycle.wake_soon(row.id)
        return NewestSampler(row.view(), checkpoint.step, None)

    async def _save(self, run: Run, sampler_id: str) -> Checkpoint:
        operation = SaveWeightsForSampler(
            new_id(), snapshot_name(sampler_id), publish=False, ttl_seconds=_LIFE_S, sampler_id=sampler_id
        )
        outcomes = self._c.outcomes
        for _attempt in range(_MAX_ATTEMPTS):
            try:
                actor = await self._c.scheduler.actor(run.id)
                body = await actor.saves_beside.ask(operation)
            except WorkerLost as lost:
                log.warning("run %s lost its worker while its newest weights were saved: %s", run.id, lost)
            else:
                return await outcomes.saved_beside(actor.run, operation, body)
        raise WorkerLost(f"the worker died {_MAX_ATTEMPTS} times while it saved the weights of run {run.id}")
