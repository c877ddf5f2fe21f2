"""Rows of sessions, deployments, runs, samplers and checkpoints as they are made: each in this one place."""

import time
from collections.abc import Mapping
from typing import Protocol

import msgspec

from selfloop.storage.db.tables import CheckpointRow, DeploymentRow, RunRow, SamplerRow, SessionRow
from selfloop.types.ids import new_id
from selfloop.types.resources import Deployment, Run, Sampler
from selfloop.types.status import DeploymentStatus, RunStatus, SamplerStatus


class Owner(Protocol):
    """Whose it is: a caller, or a resource that another is made for."""

    @property
    def team_id(self) -> str: ...

    @property
    def key_id(self) -> str: ...


def new_session(
    owner: Owner,
    *,
    id: str | None = None,
    training_project_id: str | None = None,
    details: str | None = None,
    end_reason: str | None = None,
) -> SessionRow:
    """A session; with ``end_reason`` one that ends as it begins. ``details`` is JSON."""
    now = time.time()
    return SessionRow(
        id=id or new_id(),
        team_id=owner.team_id,
        key_id=owner.key_id,
        created_at=now,
        training_project_id=training_project_id,
        details=details,
        ended_at=None if end_reason is None else now,
        end_reason=end_reason,
    )


def new_deployment(
    owner: Owner, base_model: str, model_name: str, *, delay_s: int = 0, holds_run_id: str | None = None
) -> DeploymentRow:
    """Trainer capacity; with ``holds_run_id`` none, but what a run that is not trained belongs to."""
    return DeploymentRow(
        id=new_id(),
        team_id=owner.team_id,
        key_id=owner.key_id,
        base_model=base_model,
        model_name=model_name,
        status=DeploymentStatus.CREATED if holds_run_id is None else DeploymentStatus.STOPPED,
        scale_down_delay_s=delay_s,
        created_at=time.time(),
        latest_run_id=holds_run_id,
    )


def new_run(
    owner: Owner,
    *,
    session_id: str,
    deployment: Deployment | DeploymentRow,
    id: str,
    name: str,
    base_model: str,
    lora_rank: int,
    max_seq_len: int,
    seed: int = 0,
    status: RunStatus = RunStatus.ACTIVE,
    path: str | None = None,
    initial_key: str | None = None,
    step: int = 0,
    with_optimizer: bool = False,
    keep_last_checkpoints: int | None = None,
    reused_from: str | None = None,
    capacity_reason: str = "",
    serverless: bool | None = None,
    targets: str | None = None,
    user_metadata: Mapping[str, str] | None = None,
    copy_key: str | None = None,
    num_changes: int | None = None,
) -> RunRow:
    """A run on ``deployment``, of its base model; the columns' meaning is with the table."""
    return RunRow(
        id=id,
        session_id=session_id,
        team_id=owner.team_id,
        key_id=owner.key_id,
        deployment_id=deployment.id,
        name=name,
        base_model=base_model,
        model_name=deployment.model_name,
        lora_rank=lora_rank,
        initial_rank=lora_rank,
        max_seq_len=max_seq_len,
        seed=seed,
        status=status,
        created_at=time.time(),
        path=path,
        initial_key=initial_key,
        step=step,
        with_optimizer=with_optimizer,
        keep_last_checkpoints=keep_last_checkpoints,
        reused_from=reused_from,
        capacity_reason=capacity_reason,
        serverless=serverless,
        targets=targets,
        user_metadata=_json(user_metadata),
        copy_key=copy_key,
        num_changes=num_changes,
    )


def new_sampler(
    owner: Owner,
    *,
    session_id: str,
    base_model: str,
    model_name: str,
    max_seq_len: int,
    delay_s: int,
    id: str | None = None,
    model_id: str | None = None,
    reused: Sampler | None = None,
    status: SamplerStatus = SamplerStatus.BUILDING,
    run_id: str | None = None,
    checkpoint_id: str | None = None,
    standing: bool = False,
    follows: str | None = None,
    capacity_reason: str = "",
    serverless: bool | None = None,
) -> SamplerRow:
    """A sampler; on ``reused`` capacity it keeps that capacity's ids."""
    return SamplerRow(
        id=id or new_id(),
        session_id=session_id,
        team_id=owner.team_id,
        key_id=owner.key_id,
        base_model=base_model,
        model_name=model_name,
        model_id=model_id or (reused.model_id if reused else new_id()),
        deployment_id=reused.deployment_id if reused else new_id(),
        max_seq_len=max_seq_len,
        scale_down_delay_s=delay_s,
        status=status,
        created_at=time.time(),
        run_id=run_id,
        checkpoint_id=checkpoint_id,
        standing=standing,
        reused_from=reused.id if reused else None,
        follows=follows,
        capacity_reason=capacity_reason,
        serverless=serverless,
    )


def new_paired_sampler(run: Run, delay_s: int, reused: Sampler | None) -> SamplerRow:
    """A sampler bound to ``run``."""
    return new_sampler(
        run,
        session_id=run.session_id,
        base_model=run.base_model,
        model_name=run.model_name,
        max_seq_len=run.max_seq_len,
        delay_s=delay_s,
        reused=reused,
        run_id=run.id,
        serverless=run.serverless,
        capacity_reason=f"reused: sampler {reused.id}" if reused else f"fresh: it shares the worker of run {run.id}",
    )


def new_checkpoint(
    run: Run | RunRow,
    *,
    id: str,
    name: str,
    target: str,
    step: int,
    lora_rank: int,
    lora_alpha: float,
    size_bytes: int,
    ttl_seconds: float | None = None,
    sampler_id: str | None = None,
    targets: str | None = None,
    user_metadata: str | None = None,
) -> CheckpointRow:
    """A checkpoint of ``run``, whose files are whole; ``user_metadata`` is JSON."""
    now = time.time()
    return CheckpointRow(
        id=id,
        run_id=run.id,
        team_id=run.team_id,
        name=name,
        target=target,
        base_model=run.base_model,
        step=step,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        size_bytes=size_bytes,
        created_at=now,
        expires_at=None if ttl_seconds is None else now + ttl_seconds,
        sampler_id=sampler_id,
        targets=targets,
        user_metadata=user_metadata,
    )


def _json(metadata: Mapping[str, str] | None) -> str | None:
    return None if metadata is None else msgspec.json.encode(metadata).decode()
