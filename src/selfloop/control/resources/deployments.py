"""Deployed models: sampler checkpoints under a name, served by a sampler that stays up until it is deactivated."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from selfloop.control.capacity.hardware import INSTANCE_TYPE_ID
from selfloop.control.capacity.lifecycle import record_creation
from selfloop.control.context import Context
from selfloop.control.resources.access import Caller
from selfloop.control.resources.checkpoints import pinned
from selfloop.control.resources.checkpoints.zero_adapters import warn_of_zero
from selfloop.control.resources.new_rows import new_sampler, new_session
from selfloop.control.resources.user_config import UserConfigs
from selfloop.storage.db import queries_checkpoints, queries_models_deployed, queries_resources
from selfloop.storage.db.keyset import Cut, Part
from selfloop.storage.db.tables import DeployedModelRow, ModelVersionRow
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id
from selfloop.types.resources import Checkpoint, ModelVersion, Sampler
from selfloop.types.status import CheckpointTarget

MAX_NAME = 255
MAX_CHECKPOINTS = 64
_DELAY_S = 3600


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What to serve under which name. ``hf_secret_name`` is a label: nothing is fetched from a hub here."""

    checkpoint_ids: Sequence[str]
    model_name: str
    instance_type_id: str
    hf_secret_name: str


@dataclass(frozen=True, slots=True)
class Version:
    """One deployment of a model.

    Args:
        record: what was said with the deploy; None for what was not made by one.
        checkpoints: URIs of what it serves, the default first.
    """

    model_name: str
    sampler: Sampler
    record: ModelVersion | None
    is_newest: bool
    checkpoints: Sequence[str]


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model; the one under a plain sampler is named after it.

    Args:
        num_deployments: those that have ended, too.
        live_deployment_id: the newest that has not ended.
    """

    id: str
    name: str
    created_at: float
    num_deployments: int
    live_deployment_id: str | None


class Deploys:
    def __init__(self, context: Context, user_configs: UserConfigs) -> None:
        self._c = context
        self._user_configs = user_configs

    async def check(self, caller: Caller, request: DeployRequest) -> Sequence[Checkpoint]:
        """The checkpoints, when all that is asked can be done.

        Raises:
            BadRequest: a field that cannot be served.
            NotFound: a checkpoint that is not the team's.
            Conflict: the caller's own config excludes this machine.
        """
        if request.instance_type_id != INSTANCE_TYPE_ID:
            raise BadRequest(
                "instance_type_id",
                f"{INSTANCE_TYPE_ID!r}, this machine (GET /v1/instance_types); got {request.instance_type_id!r}",
            )
        _check_text("model_name", request.model_name)
        _check_text("hf_secret_name", request.hf_secret_name)
        ids = request.checkpoint_ids
        if not 1 <= len(ids) <= MAX_CHECKPOINTS or len(set(ids)) < len(ids):
            raise BadRequest("checkpoint_ids", f"1 to {MAX_CHECKPOINTS} different checkpoint ids")
        await self._user_configs.check(caller, trainer=False, sampler=True)
        async with self._c.db.read() as session:
            rows = [await _checkpoint(session, caller, id) for id in ids]
        for row in rows:
            await self._c.catalogue.same_model(row.base_model, rows[0].base_model, "checkpoint_ids")
        return rows

    async def deploy(self, caller: Caller, request: DeployRequest) -> Sampler:
        """Bring up a standing sampler with its own files of the checkpoints; another version if the name is known.

        Raises:
            BadRequest: see :meth:`check`.
            NotFound: see :meth:`check`.
            Conflict: see :meth:`check`.
            CheckpointDamaged: a file of a checkpoint is not what was written.
        """
        rows = await self.check(caller, request)
        model = await self._c.catalogue.resolve(rows[0].base_model)
        now = time.time()
        for row in rows:
            # Before the transaction, in which nobody else can write: they may come from far.
            await self._c.store.check(row.id)
        async with self._c.db.write() as session:
            rows = [await _checkpoint(session, caller, row.id) for row in rows]
            named = await queries_models_deployed.models(session, caller.team_id, request.model_name)
            deployed = named[0] if named else _new_model(session, caller, request.model_name, now)
            made_for = new_session(caller)
            session.add(made_for)
            await session.flush()
            sampler = new_sampler(
                caller,
                session_id=made_for.id,
                base_model=rows[0].base_model,
                model_name=model.name,
                model_id=deployed.id,
                max_seq_len=model.max_position_embeddings,
                delay_s=_DELAY_S,
                checkpoint_id=rows[0].id,
                standing=True,
                serverless=False,
                capacity_reason="fresh: a deployment stands on its own",
            )
            session.add(sampler)
            await session.flush()
            number = await queries_models_deployed.next_number(session, deployed.id)
            session.add(
                ModelVersionRow(
                    sampler_id=sampler.id, model_id=deployed.id, number=number, hf_secret_name=request.hf_secret_name
                )
            )
            record_creation(session, "sampler", sampler.id, sampler.status, f"version {number} of {request.model_name}")
            await pinned.hold(session, self._c.store, self._c.blobs, sampler.id, rows)
        made = sampler.view()
        await warn_of_zero(self._c.store, made, rows)
        self._c.lifecycle.add("sampler", sampler.id, sampler.id, sampler.model_name, math.inf, sampler.status)
        self._c.lifecycle.wake_soon(sampler.id)
        return made

    async def models(self, caller: Caller, cut: Cut, name: str | None) -> Part[ModelView]:
        """The team's deployed models, newest first."""
        async with self._c.db.read() as session:
            part = await queries_models_deployed.models_part(session, cut, caller.team_id, name)
            views = await _model_views(session, {row.id: (row.name, row.created_at) for row in part.rows})
        return Part(views, part.next)

    async def model(self, caller: Caller, id: str) -> ModelView:
        """A deployed model, or the one under a sampler. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            named = await _named(session, caller.team_id, id)
            return (await _model_views(session, {id: named}))[0]

    async def versions(self, caller: Caller, model_id: str, cut: Cut) -> Part[Version]:
        """A model's deployments, newest first. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            name, _created_at = await _named(session, caller.team_id, model_id)
            part = await queries_resources.samplers_part(session, cut, team_id=caller.team_id, model_id=model_id)
            return Part(await _versions(session, name, part.rows), part.next)

    async def version(self, caller: Caller, model_id: str, deployment_id: str) -> Version:
        """The newest live sampler behind a deployment, or its last. Raises :class:`NotFound`."""
        async with self._c.db.read() as session:
            asked = (session, caller.team_id, model_id, deployment_id)
            sampler = await queries_resources.newest_of_model(*asked, live=True)
            sampler = sampler or await queries_resources.newest_of_model(*asked)
            if sampler is None:
                raise NotFound("deployment", f"{model_id}/{deployment_id}")
            name, _created_at = await _named(session, caller.team_id, model_id)
            return (await _versions(session, name, [sampler]))[0]


async def _named(session: AsyncSession, team_id: str, model_id: str) -> tuple[str, float]:
    """Name and making of a model that has samplers. Raises :class:`NotFound`."""
    oldest = await queries_resources.oldest_of_model(session, team_id, model_id)
    if oldest is None:
        raise NotFound("model", model_id)
    row = await queries_models_deployed.model(session, model_id)
    return (f"loops-sampler-{oldest.id}", oldest.created_at) if row is None else (row.name, row.created_at)


async def _model_views(session: AsyncSession, models: Mapping[str, tuple[str, float]]) -> list[ModelView]:
    counts = await queries_resources.count_deployments(session, models)
    live = await queries_resources.live_deployment_of(session, models)
    return [
        ModelView(id, name, created_at, counts.get(id, 0), live.get(id)) for id, (name, created_at) in models.items()
    ]


async def _versions(session: AsyncSession, model_name: str, samplers: Sequence[Sampler]) -> list[Version]:
    """Of samplers of one model."""
    if not samplers:
        return []
    ids = [row.id for row in samplers]
    records = await queries_models_deployed.versions(session, ids)
    pinned_rows = await queries_models_deployed.held_by(session, ids)
    wanted = {row.checkpoint_id or row.live_checkpoint_id for row in samplers if row.id not in pinned_rows} - {None}
    served = await queries_checkpoints.named_by_id(session, [id for id in wanted if id is not None])
    newest = await queries_resources.newest_of_model(session, samplers[0].team_id, samplers[0].model_id)
    assert newest is not None

    def paths(sampler: Sampler) -> list[str]:
        if sampler.id in pinned_rows:
            return [pinned.uri_of(row) for row in pinned_rows[sampler.id]]
        live = served.get(sampler.checkpoint_id or sampler.live_checkpoint_id or "")
        return [] if live is None else [pinned.uri_of(live)]

    return [
        Version(model_name, row, records.get(row.id), row.deployment_id == newest.deployment_id, paths(row))
        for row in samplers
    ]


def _check_text(field: str, text: str) -> None:
    if not text.strip() or len(text) > MAX_NAME:
        raise BadRequest(field, f"1 to {MAX_NAME} characters")


async def _checkpoint(session: AsyncSession, caller: Caller, id: str) -> Checkpoint:
    row = await queries_checkpoints.get(session, id)
    if row is None or row.team_id != caller.team_id:
        raise NotFound("checkpoint", id)
    if row.target != CheckpointTarget.SAMPLER:
        raise BadRequest("checkpoint_ids", f"sampler checkpoints; {id} is a trainer's (save_weights_for_sampler)")
    return row


def _new_model(session: AsyncSession, caller: Caller, name: str, now: float) -> DeployedModelRow:
    row = DeployedModelRow(id=new_id(), team_id=caller.team_id, name=name, created_at=now)
    session.add(row)
    return row
