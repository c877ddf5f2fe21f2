"""Rows as the answers show them."""

import functools
import os
import re
from pathlib import Path

import psutil
from fastapi import Request

from selfloop.control.control import Control
from selfloop.control.resources.checkpoints import Checkpoint
from selfloop.control.resources.runs import Deployment, RunView
from selfloop.control.resources.samplers import Sampler
from selfloop.server.auth import control_of, public_base
from selfloop.server.management import schemas as s
from selfloop.types.errors import BadRequest
from selfloop.types.ids import RunId
from selfloop.types.status import CheckpointTarget, DeploymentStatus, RunStatus
from selfloop.types.uris import CheckpointUri


class Renderer:
    """Renders for one request: it knows by which address the client reached us."""

    def __init__(self, request: Request) -> None:
        self._base = public_base(request)
        self._control: Control = control_of(request)

    def sampler(self, row: Sampler) -> s.LoopsSamplerV1:
        status = self._control.lifecycle.status(row.id) or row.status
        return s.LoopsSamplerV1(
            id=row.id,
            base_url=f"{self._base}/loops/samplers/{row.id}",
            base_model=row.base_model,
            created_at=s.iso(row.created_at),
            model_id=row.model_id,
            deployment_id=row.deployment_id,
            status=s.LoopsSamplerStatusV1(
                name=s.DeploymentStatusV1(status), reason=self._control.lifecycle.describe(row.id)
            ),
            run_id=row.run_id,
        )

    def run(self, view: RunView) -> s.LoopsRunV1:
        assert view.sampler is not None
        trainer = self.trainer(view)
        return s.LoopsRunV1.model_validate(trainer.model_dump())

    def trainer(self, view: RunView) -> s.LoopsTrainerRunV1:
        row = view.run
        return s.LoopsTrainerRunV1(
            id=row.id,
            session_id=row.session_id,
            base_model=row.base_model,
            base_url=f"{self._base}/loops/runs/{row.id}",
            created_at=s.iso(row.created_at),
            sampler=None if view.sampler is None else self.sampler(view.sampler),
            name=row.name,
            deployment_id=row.deployment_id,
            lora_rank=row.lora_rank,
            max_seq_len=row.max_seq_len,
            seed=row.seed,
            status=s.LoopsRunStatusV1(name=RunStatus(row.status)),
        )

    def deployment(self, row: Deployment, runs: list[RunView]) -> s.LoopsDeploymentV1:
        """``runs`` are the deployment's, newest first."""
        active = next((view.run.id for view in runs if view.run.status == RunStatus.ACTIVE), None)
        status = self._control.lifecycle.status(row.id) or row.status
        sampler = next((view.sampler for view in runs if view.sampler is not None), None)
        return s.LoopsDeploymentV1(
            id=row.id,
            active_run_id=active,
            latest_run_id=row.latest_run_id,
            base_model=row.base_model,
            base_url=f"{self._base}/loops/runs/{active or row.latest_run_id}",
            status=s.LoopsDeploymentStatusV1(
                name=DeploymentStatus(status), reason=self._control.lifecycle.describe(row.id)
            ),
            created_at=s.iso(row.created_at),
            scale_down_delay_seconds=row.scale_down_delay_s,
            instance_type=_instance_type(),
            sampler=None if sampler is None else self.sampler(sampler),
        )

    def checkpoint(self, row: Checkpoint) -> s.LoopsCheckpointV1:
        target = CheckpointTarget(row.target)
        return s.LoopsCheckpointV1(
            id=row.id,
            checkpoint_id=row.name,
            run_id=row.run_id,
            base_model=row.base_model,
            created_at=s.iso(row.created_at),
            lora_adapter_config=s.LoraAdapterConfigV1(r=row.lora_rank, lora_alpha=row.lora_alpha),
            size_bytes=row.size_bytes,
            target=target.value,
            path=str(CheckpointUri(RunId(row.run_id), target, row.name)),
            step=row.step,
            expires_at=None if row.expires_at is None else s.iso(row.expires_at),
        )

    def file(self, checkpoint_id: str, name: str, size_bytes: int, modified_at: float) -> s.CheckpointFileV1:
        expires, signature = self._control.checkpoints.sign(checkpoint_id, name)
        return s.CheckpointFileV1(
            url=f"{self._base}/files/{checkpoint_id}/{name}?expires={expires}&signature={signature}",
            relative_file_name=name,
            size_bytes=size_bytes,
            last_modified=s.iso(modified_at),
        )


@functools.cache
def _instance_type() -> s.InstanceTypeV1:
    mib = psutil.virtual_memory().total // (1024 * 1024)
    gpus = [text for path in Path("/proc/driver/nvidia/gpus").glob("*/information") if (text := path.read_text())]
    model = re.search(r"^Model:\s*(.+)$", gpus[0], re.MULTILINE) if gpus else None
    return s.InstanceTypeV1(
        id="local",
        name="this machine",
        memory_limit_mib=mib,
        millicpu_limit=1000 * (os.cpu_count() or 1),
        gpu_count=len(gpus),
        gpu_type=model[1] if model else None,
        gpu_memory_limit_mib=None,
    )


def refuse_unserved(body: s.CreateLoopsRunRequestV1) -> None:
    """Fields that newer clients send and one machine cannot honour are refused, never ignored."""
    if body.availability_model != "dedicated":
        raise BadRequest("availability_model", "dedicated: this server has no spot capacity")
    if body.replicas != 1:
        raise BadRequest("replicas", f"1, got {body.replicas}")
    if body.sampler_num_replicas not in (None, 1):
        raise BadRequest("sampler_num_replicas", f"1, got {body.sampler_num_replicas}")
    if body.base_checkpoint is not None:
        raise BadRequest(
            "base_checkpoint", "null: put the model in the catalogue with `selfloop models add` and name it"
        )
