"""Sessions, runs and the trainer deployments under them."""

import asyncio
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.capacity.placement import Chosen, Scope
from selfloop.control.context import Context
from selfloop.control.queue.journal import END_OF_TIME, cancelled
from selfloop.control.queue.recovery import identity
from selfloop.control.resources import base_checkpoints
from selfloop.control.resources.access import Caller
from selfloop.control.resources.catalogue import Model
from selfloop.control.resources.new_rows import new_deployment, new_paired_sampler, new_run, new_session
from selfloop.control.resources.run_names import run_name
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_checkpoints, queries_resources
from selfloop.storage.db.keyset import Cut, Part
from selfloop.storage.db.tables import RunRow
from selfloop.types.errors import BadRequest, Conflict, NotFound
from selfloop.types.ids import new_id
from selfloop.types.lora import MAX_LORA_RANK, LoraTargets
from selfloop.types.lora_size import with_experts
from selfloop.types.resources import Checkpoint, Deployment, Run, Sampler, Session
from selfloop.types.status import CheckpointTarget, DeploymentStatus, RunStatus, SamplerStatus
from selfloop.types.uris import parse_checkpoint_uri

OPTIMIZER_FILE = "optimizer.safetensors"
_MAX_SEED = 2**63 - 1
_MAX_DELAY_S = 2**31 - 1
_MAX_KEPT = 10_000
_UNUSABLE = {DeploymentStatus.STOPPED, DeploymentStatus.FAILED, DeploymentStatus.PREEMPTED}
_UNHEALTHY = {SamplerStatus.DEPLOY_FAILED, SamplerStatus.UNHEALTHY, SamplerStatus.FAILED, SamplerStatus.INACTIVE}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What a caller asks of a new run; see the specification for the meaning of each field.

    Args:
        id: of the run, when the caller must know it beforehand; a run that has it already is taken as it is.
        with_optimizer: begin with the moments and the step of the checkpoint at ``path``, too.
        targets: what a fresh adapter changes; a checkpoint's own win.
        reader_team_id: another team, whose checkpoints the caller has shown to have access to.
        base_checkpoint: the pinned revision to take in place of ``base_model``, which is of the same architecture.
        keep_last_checkpoints: of each target; older ones that nobody needs are deleted after a save. None keeps all.
    """

    session_id: str
    base_model: str
    lora_rank: int | None = None
    max_seq_len: int | None = None
    seed: int | None = None
    scale_down_delay_s: int = 3600
    path: str | None = None
    reuse_from_session_id: str | None = None
    reuse_from_run_id: str | None = None
    name: str | None = None
    default_lora_rank: int = 64
    id: str | None = None
    with_optimizer: bool = False
    targets: LoraTargets = LoraTargets()  # noqa: RUF009 - frozen
    user_metadata: dict[str, str] | None = None
    keep_last_checkpoints: int | None = None
    reader_team_id: str | None = None
    scope: Scope = "default"
    base_checkpoint: str | None = None

    @property
    def reuses(self) -> str | None:
        """Whose capacity it asks for, in words."""
        if self.reuse_from_run_id is not None:
            return f"run {self.reuse_from_run_id}"
        return None if self.reuse_from_session_id is None else f"session {self.reuse_from_session_id}"


@dataclass(frozen=True, slots=True)
class RunView:
    """A run with what an answer about it needs."""

    run: Run
    sampler: Sampler | None


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A trainer deployment with its newest active run, and the sampler of the newest run that has one."""

    deployment: Deployment
    active_run_id: str | None
    sampler: Sampler | None


class Runs:
    def __init__(self, context: Context, user_configs: UserConfigs) -> None:
        self._c = context
        self._user_configs = user_configs

    # -- sessions -------------------------------------------------------------------------------------

    async def create_session(self, caller: Caller, training_project_id: str | None) -> Session:
        row = new_session(caller, training_project_id=training_project_id)
        async with self._c.db.write() as session:
            session.add(row)
        return row.view()

    async def session(self, caller: Caller, id: str) -> Session:
        async with self._c.db.look_up() as session:
            row = await queries_resources.session_row(session, id)
        if row is None or row.team_id != caller.team_id:
            raise NotFound("session", id)
        return row

    # -- runs -----------------------------------------------------------------------------------------

    async def create(self, caller: Caller, request: RunRequest, *, with_sampler: bool) -> RunView:
        """Make a run on reused or fresh capacity, which begins to load at once; or find the one with the id given.

        Raises:
            NotFound: unknown session, base model, checkpoint or run to reuse.
            BadRequest: a value that this installation cannot serve, by field.
            Conflict: the caller's own config excludes this machine.
        """
        in_session = await self.session(caller, request.session_id)
        if request.id is not None and (known := await self._known(caller, request.id)) is not None:
            return known
        request, model = await self._pinned(request)
        checkpoint = await self._initial_checkpoint(caller, request)
        lora_rank, targets = await self._adapter(request, model, checkpoint)
        capacity, max_seq_len = self._chosen(request, model, lora_rank)
        _check_ranges(request)
        await self._user_configs.check(caller, trainer=True, sampler=with_sampler)
        reused, capacity_reason = await self._reusable(caller, request, model)
        run_id = request.id or new_id()
        initial_key = await self._keep_initial(run_id, checkpoint)
        async with self._c.db.write() as session:
            deployment = reused.deployment if reused else self._new_deployment(caller, request, model, session)
            await session.flush()
            row = new_run(
                caller,
                session_id=request.session_id,
                deployment=deployment,
                id=run_id,
                name=run_name(request.name, request.user_metadata, in_session, request.base_model),
                base_model=request.base_model,
                lora_rank=lora_rank,
                max_seq_len=max_seq_len,
                seed=secrets.randbits(63) if request.seed is None else request.seed,
                path=request.path,
                initial_key=initial_key,
                step=checkpoint.step if checkpoint is not None and request.with_optimizer else 0,
                with_optimizer=request.with_optimizer,
                keep_last_checkpoints=request.keep_last_checkpoints,
                reused_from=reused.run_id if reused else None,
                capacity_reason=capacity.words(capacity_reason),
                serverless=capacity.serverless,
                targets=targets.stored(),
                user_metadata=request.user_metadata,
                num_changes=0,
            )
            run = await _add(session, row, request)
            sampler = _add_paired(session, run, request, reused) if with_sampler else None
        self._register(deployment, run, sampler, request.scale_down_delay_s)
        return RunView(run, sampler)

    async def _pinned(self, request: RunRequest) -> tuple[RunRequest, Model]:
        """The request by the name of its base model at the revision that it asks for, and that model."""
        model = await self._c.catalogue.resolve(request.base_model)
        if request.base_checkpoint is None:
            return request, model
        served_as = await base_checkpoints.served_as(self._c.catalogue, request.base_checkpoint, request.base_model)
        return replace(request, base_model=served_as), await self._c.catalogue.resolve(served_as)

    async def _adapter(
        self, request: RunRequest, model: Model, checkpoint: Checkpoint | None
    ) -> tuple[int, LoraTargets]:
        """Rank and targets, which fit the memory for runs."""
        rank = _checked_rank(request, checkpoint)
        targets = await _new_targets(request, model) if checkpoint is None else LoraTargets.parse(checkpoint.targets)
        await self._c.memories.check_rank(model.name, rank, targets)
        return rank, targets

    def _chosen(self, request: RunRequest, model: Model, lora_rank: int) -> tuple[Chosen, int]:
        """Which capacity, and the longest sequences there."""
        max_seq_len = checked_seq_len(request.max_seq_len, model, "max_seq_len")
        capacity = self._c.capacity.choose(
            request.scope, request.base_model, rank=lora_rank, seq_len=request.max_seq_len, reuses=request.reuses
        )
        return capacity, self._c.capacity.shortened(max_seq_len) if capacity.serverless else max_seq_len

    def _register(self, deployment: Deployment, run: Run, sampler: Sampler | None, delay_s: float) -> None:
        lifecycle = self._c.lifecycle
        status = lifecycle.status(deployment.id) or deployment.status
        lifecycle.add("deployment", deployment.id, deployment.id, run.model_name, delay_s, status)
        if sampler is not None:
            lifecycle.add("sampler", sampler.id, deployment.id, run.model_name, delay_s, sampler.status)
        lifecycle.wake_soon(deployment.id)

    async def get(self, caller: Caller, id: str) -> RunView:
        async with self._c.db.look_up() as session:
            run = await queries_resources.run(session, id)
            if run is None or run.team_id != caller.team_id:
                raise NotFound("run", id)
            samplers = await queries_resources.samplers(session, run_id=id)
        return RunView(run, samplers[0] if samplers else None)

    async def live(self, caller: Caller, id: str) -> Run:
        """The run as it is this moment; what its operations ask for, without a look into the database."""
        actor = self._c.scheduler.known(id)
        if actor is None:
            return (await self.get(caller, id)).run
        if actor.run.team_id != caller.team_id:
            raise NotFound("run", id)
        return actor.run.view()

    async def list(
        self, caller: Caller, cut: Cut, *, run_id: str | None, base_model: str | None, whole_team: bool
    ) -> Part[RunView]:
        """Runs that match, newest first."""
        async with self._c.db.read() as session:
            part = await queries_resources.runs_part(
                session,
                cut,
                team_id=caller.team_id,
                key_id=None if whole_team else caller.key_id,
                run_id=run_id,
                base_model=base_model,
            )
            samplers = await queries_resources.samplers_of_runs(session, [run.id for run in part.rows])
        return part.map(lambda run: RunView(run, samplers.get(run.id)))

    async def deactivate(self, caller: Caller, id: str, reason: str = "deactivated by request") -> RunView:
        """End a run and its paired sampler; its checkpoints stay. Doing it twice is fine."""
        view = await self.get(caller, id)
        if view.run.status == RunStatus.INACTIVE:
            return view
        await self._c.lifecycle.end_run(id, reason)
        await self._c.outcomes.fail(
            *(cancelled(row, f"run {id} was deactivated") for row in await self._c.scheduler.end(id))
        )
        for key in (f"snapshots/{id}", f"initial/{id}"):
            await asyncio.to_thread(self._c.blobs.delete, key)
        await self._c.journal.forget_payloads(id, END_OF_TIME)
        self._c.outcomes.measured.announce(id)
        if view.sampler is not None:
            await self._c.lifecycle.end(view.sampler.id, reason)
        async with self._c.db.look_up() as session:
            others = await queries_resources.runs(
                session, deployment_id=view.run.deployment_id, status=RunStatus.ACTIVE
            )
        if not others:
            await self._c.lifecycle.end(view.run.deployment_id, reason)
        return await self.get(caller, id)

    # -- deployments ----------------------------------------------------------------------------------

    async def deployment(self, caller: Caller, id: str) -> DeploymentView:
        async with self._c.db.read() as session:
            row = await queries_resources.deployment(session, id)
            if row is None or row.team_id != caller.team_id:
                raise NotFound("deployment", id)
            return (await _deployment_views(session, [row]))[0]

    async def runs_on(self, caller: Caller, deployment_id: str) -> tuple[Deployment, Sequence[str]]:
        """A deployment, and the ids of every run that it has had, newest first."""
        view = await self.deployment(caller, deployment_id)
        async with self._c.db.read() as session:
            return view.deployment, await queries_resources.run_ids_on(session, deployment_id)

    async def deployments(self, caller: Caller, cut: Cut, *, whole_team: bool) -> Part[DeploymentView]:
        """Newest first."""
        async with self._c.db.read() as session:
            part = await queries_resources.deployments_part(
                session, cut, team_id=caller.team_id, key_id=None if whole_team else caller.key_id
            )
            return Part(await _deployment_views(session, part.rows), part.next)

    async def deactivate_deployment(self, caller: Caller, id: str) -> None:
        """End every run on the deployment, and the deployment."""
        await self.deployment(caller, id)
        async with self._c.db.read() as session:
            active = await queries_resources.runs(session, deployment_id=id, status=RunStatus.ACTIVE)
        for run in active:
            await self.deactivate(caller, run.id, f"deployment {id} was deactivated")
        await self._c.lifecycle.end(id, "deactivated by request")

    # -- parts ----------------------------------------------------------------------------------------

    def _new_deployment(self, caller: Caller, request: RunRequest, model: Model, session: AsyncSession) -> Deployment:
        row = new_deployment(caller, request.base_model, model.name, delay_s=request.scale_down_delay_s)
        session.add(row)
        record_creation(session, "deployment", row.id, row.status, "created for a run")
        return row.view()

    async def _known(self, caller: Caller, id: str) -> RunView | None:
        try:
            return await self.get(caller, id)
        except NotFound:
            return None

    async def _initial_checkpoint(self, caller: Caller, request: RunRequest) -> Checkpoint | None:
        if request.path is None:
            return None
        uri = parse_checkpoint_uri(request.path, "path")
        if uri.target is not CheckpointTarget.TRAINER:
            raise BadRequest("path", "a trainer checkpoint: bt://loops:<run_id>/weights/<checkpoint_name>")
        async with self._c.db.look_up() as session:
            row = await queries_checkpoints.named(session, uri.run_id, uri.target, uri.name)
        if row is None or not row.may_be_read_by(caller.team_id, request.reader_team_id):
            raise NotFound("checkpoint", request.path)
        await self._c.catalogue.same_model(row.base_model, request.base_model, "path")
        if request.with_optimizer and not (await self._c.store.folder(row.id) / OPTIMIZER_FILE).is_file():
            raise BadRequest("path", "a checkpoint with an optimizer: this one was imported, load its weights alone")
        return row

    async def _keep_initial(self, run_id: str, checkpoint: Checkpoint | None) -> str | None:
        if checkpoint is None:
            return None
        key = f"initial/{run_id}"
        await self._c.store.check(checkpoint.id)
        source, target = await self._c.store.folder(checkpoint.id), self._c.blobs.path(key)
        await asyncio.to_thread(_copy_folder, source, target)
        return key

    async def _reusable(self, caller: Caller, request: RunRequest, model: Model) -> tuple["_Reusable | None", str]:
        """Warm capacity of the named session or run, if it can take this run, and the reason for either."""
        if request.reuse_from_run_id is not None:
            named = f"run {request.reuse_from_run_id}"
            candidates = [(await self.get(caller, request.reuse_from_run_id)).run]
        elif request.reuse_from_session_id is not None:
            named = f"session {request.reuse_from_session_id}"
            await self.session(caller, request.reuse_from_session_id)
            async with self._c.db.read() as session:
                candidates = await queries_resources.runs(
                    session, team_id=caller.team_id, session_id=request.reuse_from_session_id
                )
        else:
            return None, "fresh: nothing to reuse was named"
        why = f"{named} has no runs"
        for run in candidates:
            if run.model_name != model.name or run.base_model != request.base_model:
                why = f"run {run.id} is of base model {run.base_model}"
                continue
            async with self._c.db.look_up() as session:
                deployment = await queries_resources.deployment(session, run.deployment_id)
                samplers = await queries_resources.samplers(session, run_id=run.id)
            assert deployment is not None
            sampler = samplers[0] if samplers else None
            if self._c.capacity.is_serverless(run.serverless):
                why = f"run {run.id} has serverless capacity, and only dedicated capacity is reused"
                continue
            if deployment.status in _UNUSABLE:
                why = f"deployment {deployment.id} of run {run.id} is {deployment.status}"
                continue
            if sampler is not None and sampler.status in _UNHEALTHY:
                why = f"sampler {sampler.id} of run {run.id} is {sampler.status}"
                continue
            return _Reusable(run.id, deployment, sampler), f"reused: deployment {deployment.id} of run {run.id}"
        return None, f"fresh: {why}"


@dataclass(frozen=True, slots=True)
class _Reusable:
    run_id: str
    deployment: Deployment
    sampler: Sampler | None


async def _deployment_views(session: AsyncSession, rows: Sequence[Deployment]) -> list[DeploymentView]:
    ids = [row.id for row in rows]
    active = await queries_resources.active_runs_on(session, ids)
    samplers = await queries_resources.newest_samplers_on(session, ids)
    return [DeploymentView(row, active.get(row.id), samplers.get(row.id)) for row in rows]


def checked_seq_len(asked: int | None, model: Model, field: str) -> int:
    """The sequence length to serve: what was asked for, else the model's own maximum."""
    if asked is None:
        return model.max_position_embeddings
    if not 1 <= asked <= model.max_position_embeddings:
        raise BadRequest(field, f"1 to {model.max_position_embeddings} tokens for {model.name}, got {asked}")
    return asked


async def _add(session: AsyncSession, row: RunRow, request: RunRequest) -> Run:
    row.digest = identity(row)
    session.add(row)
    run = row.view()
    record_creation(session, "run", run.id, RunStatus.ACTIVE, "created")
    await session.flush()
    await queries_resources.update_deployment(
        session, run.deployment_id, latest_run_id=run.id, scale_down_delay_s=request.scale_down_delay_s
    )
    return run


def _add_paired(session: AsyncSession, run: Run, request: RunRequest, reused: _Reusable | None) -> Sampler:
    made = new_paired_sampler(run, request.scale_down_delay_s, reused.sampler if reused else None)
    session.add(made)
    return made.view()


def _check_ranges(request: RunRequest) -> None:
    if request.seed is not None and not 0 <= request.seed <= _MAX_SEED:
        raise BadRequest("seed", f"an integer from 0 to {_MAX_SEED}")
    if not 0 < request.scale_down_delay_s <= _MAX_DELAY_S:
        raise BadRequest("scale_down_delay_seconds", f"1 to {_MAX_DELAY_S}, got {request.scale_down_delay_s}")
    keep_last = request.keep_last_checkpoints
    if keep_last is not None and not 1 <= keep_last <= _MAX_KEPT:
        raise BadRequest("keep_last_checkpoints", f"1 to {_MAX_KEPT}, or null to keep all; got {keep_last}")


def _checked_rank(request: RunRequest, checkpoint: Checkpoint | None) -> int:
    rank = request.lora_rank
    if checkpoint is not None:
        if rank is not None and rank != checkpoint.lora_rank:
            raise BadRequest("lora_rank", f"the checkpoint at path has rank {checkpoint.lora_rank}, got {rank}")
        return checkpoint.lora_rank
    rank = request.default_lora_rank if rank is None else rank
    if not 1 <= rank <= MAX_LORA_RANK:
        raise BadRequest("lora_rank", f"1 to {MAX_LORA_RANK}, got {rank}")
    return rank


async def _new_targets(request: RunRequest, model: Model) -> LoraTargets:
    """Of a fresh adapter. The embedded model, whose files may not be here yet, has no experts."""
    if model.path is None:
        return request.targets
    try:
        return await asyncio.to_thread(with_experts, model.path, request.targets)
    except (OSError, msgspec.MsgspecError) as error:
        raise Conflict(f"config.json of {model.name} cannot be read: {error}") from error


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
