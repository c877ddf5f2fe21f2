"""Rows as the answers show them, and what management routes ask for: a renderer, a member of the team, a scope."""

from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from selfloop.control.capacity.hardware import INSTANCE_TYPE_ID, this_hardware
from selfloop.control.gateway import Control
from selfloop.control.resources import base_checkpoints
from selfloop.control.resources.access import Caller
from selfloop.control.resources.deployments import ModelView, Version
from selfloop.control.resources.runs import DeploymentView, RunView
from selfloop.server.management.schemas.checkpoints import CheckpointFileV1, LoopsCheckpointV1, LoraAdapterConfigV1
from selfloop.server.management.schemas.common import (
    CapacityV1,
    DeploymentStatusV1,
    InstanceTypeV1,
    LoopsLoRAConfigV1,
    UserV1,
    iso,
)
from selfloop.server.management.schemas.deployments import LoopsDeploymentStatusV1, LoopsDeploymentV1
from selfloop.server.management.schemas.models import AutoscalingSettingsV1, DeploymentV1, ModelV1
from selfloop.server.management.schemas.runs import (
    CreateLoopsRunRequestV1,
    LoopsRunStatusV1,
    LoopsRunV1,
    LoopsTrainerRunV1,
)
from selfloop.server.management.schemas.samplers import LoopsSamplerStatusV1, LoopsSamplerV1
from selfloop.server.shared.auth import CallerOf, control_of, public_base
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import RunId
from selfloop.types.lora import LoraTargets
from selfloop.types.resources import Checkpoint, Run, Sampler
from selfloop.types.status import CheckpointTarget, DeploymentStatus, RunStatus, SamplerStatus
from selfloop.types.uris import CheckpointUri

_LORA_CONFIG_VERSION = "v1"
_MACHINE_NAME = "this machine"
# What the engine samples at a time; the rest waits its turn.
_CONCURRENCY = 256
_MODULES = {
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "unembed": ("lm_head",),
}


class Renderer:
    """Renders for one request: it knows by which address the client reached us.

    Args:
        pinned: the base checkpoint that a model is, by the model's name.
    """

    def __init__(self, request: Request, pinned: Mapping[str, str]) -> None:
        self._base = public_base(request)
        self._control: Control = control_of(request)
        self._pinned = pinned

    def sampler(self, row: Sampler) -> LoopsSamplerV1:
        status = self._control.lifecycle.status(row.id) or row.status
        is_serverless = self._control.capacity.is_serverless(row.serverless)
        return LoopsSamplerV1(
            id=row.id,
            base_url=f"{self._base}/loops/samplers/{row.id}",
            base_model=row.base_model,
            created_at=iso(row.created_at),
            model_id=None if is_serverless else row.model_id,
            deployment_id=None if is_serverless else row.deployment_id,
            status=LoopsSamplerStatusV1(
                name=DeploymentStatusV1(status), reason=self._control.lifecycle.describe(row.id)
            ),
            run_id=row.run_id,
            user=self.user(row.key_id),
            instance_type=instance_type(),
            standing=row.standing,
            capacity=self.capacity(row),
            base_checkpoint=self._pinned.get(row.model_name),
        )

    def capacity(self, row: Run | Sampler) -> CapacityV1:
        return CapacityV1(
            kind="serverless" if self._control.capacity.is_serverless(row.serverless) else "dedicated",
            reused=row.reused_from is not None,
            reused_from=row.reused_from,
            reason=row.capacity_reason or "not recorded",
        )

    def user(self, key_id: str) -> UserV1:
        return UserV1(email=self._control.access.name_of(key_id))

    def model_deployment(self, version: Version) -> DeploymentV1:
        row, record = version.sampler, version.record
        status = self._control.lifecycle.status(row.id) or row.status
        return DeploymentV1(
            id=row.deployment_id,
            created_at=iso(row.created_at),
            name=version.model_name if record is None else f"{version.model_name}-{record.number}",
            model_id=row.model_id,
            is_production=version.is_newest,
            status=DeploymentStatusV1(status),
            reason=self._control.lifecycle.describe(row.id),
            active_replica_count=int(status == SamplerStatus.ACTIVE),
            autoscaling_settings=AutoscalingSettingsV1(
                min_replica=int(row.standing),
                scale_down_delay=None if row.standing else row.scale_down_delay_s,
                concurrency_target=_CONCURRENCY,
            ),
            instance_type_name=_MACHINE_NAME,
            environment="production" if version.is_newest else None,
            labels=None if record is None else {"hf_secret_name": record.hf_secret_name},
            sampler_id=row.id,
            base_url=f"{self._base}/loops/samplers/{row.id}",
            checkpoints=list(version.checkpoints),
        )

    def model(self, view: ModelView, team_name: str) -> ModelV1:
        return ModelV1(
            id=view.id,
            created_at=iso(view.created_at),
            name=view.name,
            deployments_count=view.num_deployments,
            production_deployment_id=view.live_deployment_id,
            instance_type_name=_MACHINE_NAME,
            team_name=team_name,
        )

    def run(self, view: RunView) -> LoopsRunV1:
        assert view.sampler is not None
        trainer = self.trainer(view)
        return LoopsRunV1.model_validate(trainer.model_dump())

    def trainer(self, view: RunView) -> LoopsTrainerRunV1:
        row = view.run
        return LoopsTrainerRunV1(
            id=row.id,
            session_id=row.session_id,
            base_model=row.base_model,
            base_url=f"{self._base}/loops/runs/{row.id}",
            created_at=iso(row.created_at),
            sampler=None if view.sampler is None else self.sampler(view.sampler),
            name=row.name,
            deployment_id=None if self._control.capacity.is_serverless(row.serverless) else row.deployment_id,
            lora_rank=row.lora_rank,
            max_seq_len=row.max_seq_len,
            seed=row.seed,
            status=LoopsRunStatusV1(name=RunStatus(row.status)),
            user=self.user(row.key_id),
            lora_config_version=_LORA_CONFIG_VERSION,
            lora_config=lora_config(row.targets),
            keep_last_checkpoints=row.keep_last_checkpoints,
            capacity=self.capacity(row),
            base_checkpoint=self._pinned.get(row.model_name),
        )

    def deployment(self, view: DeploymentView) -> LoopsDeploymentV1:
        row, active, sampler = view.deployment, view.active_run_id, view.sampler
        status = self._control.lifecycle.status(row.id) or row.status
        return LoopsDeploymentV1(
            id=row.id,
            active_run_id=active,
            latest_run_id=row.latest_run_id,
            base_model=row.base_model,
            base_url=f"{self._base}/loops/runs/{active or row.latest_run_id}",
            status=LoopsDeploymentStatusV1(
                name=DeploymentStatus(status), reason=self._control.lifecycle.describe(row.id)
            ),
            created_at=iso(row.created_at),
            scale_down_delay_seconds=row.scale_down_delay_s,
            instance_type=instance_type(),
            user=self.user(row.key_id),
            sampler=None if sampler is None else self.sampler(sampler),
        )

    def checkpoint(self, row: Checkpoint) -> LoopsCheckpointV1:
        target = CheckpointTarget(row.target)
        return LoopsCheckpointV1(
            id=row.id,
            checkpoint_id=row.name,
            run_id=row.run_id,
            base_model=row.base_model,
            created_at=iso(row.created_at),
            lora_adapter_config=LoraAdapterConfigV1(r=row.lora_rank, lora_alpha=row.lora_alpha),
            lora_config=lora_config(row.targets),
            size_bytes=row.size_bytes,
            target=_visible(target),
            path=str(CheckpointUri(RunId(row.run_id), target, row.name)),
            step=row.step,
            expires_at=None if row.expires_at is None else iso(row.expires_at),
        )

    def file(self, checkpoint_id: str, name: str, size_bytes: int, modified_at: float) -> CheckpointFileV1:
        url, _expires = self._control.checkpoints.link(checkpoint_id, name, self._base)
        return CheckpointFileV1(
            url=url,
            relative_file_name=name,
            size_bytes=size_bytes,
            last_modified=iso(modified_at),
        )


def instance_type() -> InstanceTypeV1:
    machine = this_hardware()
    return InstanceTypeV1(
        id=INSTANCE_TYPE_ID,
        name=_MACHINE_NAME,
        memory_limit_mib=machine.memory_bytes // 2**20,
        millicpu_limit=1000 * machine.cpus,
        gpu_count=machine.gpu_count,
        gpu_type=machine.accelerator if machine.gpu_count else None,
        gpu_memory_limit_mib=machine.gpu_memory_mib,
    )


def lora_config(targets: str | None) -> LoopsLoRAConfigV1:
    """The projections behind a row's ``targets``."""
    parts = LoraTargets.parse(targets)
    named = [module for part, modules in _MODULES.items() if getattr(parts, part) for module in modules]
    return LoopsLoRAConfigV1(config_version=_LORA_CONFIG_VERSION, targets=named)


def refuse_unserved(body: CreateLoopsRunRequestV1) -> None:
    """Fields that newer clients send and one machine cannot honour are refused, never ignored."""
    if body.scope == "serverless":
        replicas = {"replicas": body.replicas, "sampler_num_replicas": body.sampler_num_replicas}
        refuse_with_serverless(body.availability_model, replicas)
    refuse_spot(body.availability_model)
    refuse_replicas("replicas", body.replicas)
    refuse_replicas("sampler_num_replicas", body.sampler_num_replicas)


def refuse_with_serverless(availability_model: str | None, replicas: Mapping[str, int | None]) -> None:
    """What only dedicated capacity has. The values that the official client always sends say nothing, and pass."""
    if availability_model not in (None, "dedicated"):
        raise BadRequest("availability_model", "none with scope=serverless: it is of dedicated capacity")
    for field, number in replicas.items():
        if number not in (None, 1):
            raise BadRequest(field, "none with scope=serverless: it is of dedicated capacity")


def refuse_spot(availability_model: str | None) -> None:
    if availability_model == "spot":
        raise BadRequest(
            "availability_model",
            "dedicated: this machine has no spot capacity, and what runs here is never preempted",
            reason="SPOT_UNAVAILABLE",
        )


def refuse_replicas(field: str, asked: int | None) -> None:
    if asked not in (None, 1):
        raise BadRequest(
            field,
            f"1, got {asked}: one worker a base model serves every run and sampler of it",
            reason="REPLICAS_UNAVAILABLE",
        )


def _visible(target: CheckpointTarget) -> Literal["trainer", "sampler"]:
    """The clients of this API know two kinds; checkpoints made for download are not listed to them."""
    assert target != CheckpointTarget.EXTERNAL
    return "trainer" if target == CheckpointTarget.TRAINER else "sampler"


async def _renderer(request: Request) -> Renderer:
    return Renderer(request, await base_checkpoints.by_model(control_of(request).catalogue))


RenderOf = Annotated[Renderer, Depends(_renderer)]
Scope = Annotated[Literal["org"] | None, Query(description="`org` lists the whole team's, not only your own.")]


async def _member(request: Request, caller: CallerOf) -> Caller:
    """The caller, checked to belong to the team that the path names (if it names one)."""
    team_id = request.path_params.get("team_id")
    if team_id is not None and team_id != caller.team_id:
        raise NotFound("team", team_id)
    return caller


MemberOf = Annotated[Caller, Depends(_member)]
