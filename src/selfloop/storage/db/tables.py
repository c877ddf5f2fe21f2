"""The tables. Times are UNIX seconds; ids are what ``types.ids`` hands out."""

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from selfloop.storage.db.column_types import JsonText, Text, Whole
from selfloop.types import resources

V = TypeVar("V")
V_co = TypeVar("V_co", covariant=True)


class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """Rows are keyword-only dataclasses, detached from their session as soon as they are read."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: Whole, str: Text}


@cache
def _fields(view: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(view))


def _view(row: Base, view: type[V]) -> V:
    return view(**{name: getattr(row, name) for name in _fields(view)})


def _partial(name: str, column: str, condition: str) -> Index:
    """An index of the few rows that are looked for."""
    where = text(condition)
    return Index(name, column, sqlite_where=where, postgresql_where=where)


class TeamRow(Base):
    __tablename__ = "teams"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    is_default: Mapped[bool]
    created_at: Mapped[float]

    def view(self) -> resources.Team:
        return _view(self, resources.Team)


class KeyRow(Base):
    """An API key; only its SHA-256 is kept (keys are 192 random bits, so no salt or stretching is needed)."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    prefix: Mapped[str]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None] = mapped_column(default=None)
    role: Mapped[str] = mapped_column(default="member", server_default="member")
    expires_at: Mapped[float | None] = mapped_column(default=None)

    def view(self) -> resources.Key:
        return _view(self, resources.Key)


class ModelRow(Base):
    """A base model in the catalogue. ``path`` is null until its files are prepared."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    created_at: Mapped[float]
    revision: Mapped[str | None] = mapped_column(default=None)
    path: Mapped[str | None] = mapped_column(default=None)

    def view(self) -> resources.CatalogueEntry:
        return _view(self, resources.CatalogueEntry)


class AliasRow(Base):
    __tablename__ = "model_aliases"

    alias: Mapped[str] = mapped_column(primary_key=True)
    model_name: Mapped[str] = mapped_column(ForeignKey("models.name"))

    def view(self) -> resources.Alias:
        return _view(self, resources.Alias)


class SessionRow(Base):
    """What one script made. ``details`` is JSON of what its client said of it: tags, metadata, a display name."""

    __tablename__ = "sessions"
    __table_args__ = (
        Index("ix_sessions_team_id_created_at_id", "team_id", "created_at", "id"),
        _partial("ix_sessions_open", "id", "details IS NOT NULL AND ended_at IS NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    created_at: Mapped[float]
    training_project_id: Mapped[str | None] = mapped_column(default=None)
    details: Mapped[str | None] = mapped_column(JsonText, default=None)
    ended_at: Mapped[float | None] = mapped_column(default=None)
    end_reason: Mapped[str | None] = mapped_column(default=None)

    def view(self) -> resources.Session:
        return _view(self, resources.Session)


class CustomLossRow(Base):
    """A loss that a session's script uploaded; ``definition`` is msgpack."""

    __tablename__ = "custom_losses"

    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    definition: Mapped[bytes] = mapped_column(LargeBinary)


class DeploymentRow(Base):
    """Trainer capacity for a base model; holds one or many runs."""

    __tablename__ = "deployments"
    __table_args__ = (
        Index("ix_deployments_team_id_created_at_id", "team_id", "created_at", "id"),
        Index("ix_deployments_key_id_created_at_id", "key_id", "created_at", "id"),
        Index("ix_deployments_status", "status"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    base_model: Mapped[str]
    model_name: Mapped[str]
    status: Mapped[str]
    scale_down_delay_s: Mapped[int]
    created_at: Mapped[float]
    latest_run_id: Mapped[str | None] = mapped_column(default=None)

    def view(self) -> resources.Deployment:
        return _view(self, resources.Deployment)


class RunRow(Base):
    """A LoRA adapter with its optimizer state, step count and operation queue.

    ``epoch`` counts clients that attached (each starts its ``seq_id`` at 1); ``next_seq`` is the lowest
    sequence id of the epoch that has not arrived. ``snapshot_key`` is the last stored state; it covers the
    operations up to ``(snapshot_epoch, snapshot_seq)``. ``initial_key`` is the folder with our own copy of the
    checkpoint at ``path``, which may be deleted or replaced while the run lives; ``with_optimizer`` says that
    the run starts with that checkpoint's moments and step, too. ``targets`` names the adapted parts of the model,
    null for the usual ones; ``user_metadata`` is a JSON object of strings. ``copy_key`` names the request that
    a run was made by to hold a copy of a checkpoint, so that the request sent again finds it.

    ``older_key`` is the stored state before the last one, up to ``(older_epoch, older_seq)``: null with a place is the
    run's start, null without one is nothing. ``num_changes`` counts the finished operations that changed the run's
    state, ``snapshot_changes`` and ``older_changes`` those of them that a stored state covers; null in runs of before
    these were counted. ``digest`` is that of what never changes and decides what is computed.
    ``serverless`` is null for runs from before capacity was theirs.
    """

    __tablename__ = "runs"
    __table_args__ = (
        Index("ix_runs_team_id_created_at_id", "team_id", "created_at", "id"),
        Index("ix_runs_key_id_created_at_id", "key_id", "created_at", "id"),
        Index("ix_runs_deployment_id_created_at", "deployment_id", "created_at"),
        Index("ix_runs_session_id", "session_id"),
        Index("ix_runs_team_id_copy_key", "team_id", "copy_key", unique=True),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"))
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    deployment_id: Mapped[str] = mapped_column(ForeignKey("deployments.id"))
    name: Mapped[str]
    base_model: Mapped[str]
    model_name: Mapped[str]
    lora_rank: Mapped[int]
    max_seq_len: Mapped[int]
    initial_rank: Mapped[int]
    seed: Mapped[int]
    status: Mapped[str]
    created_at: Mapped[float]
    path: Mapped[str | None] = mapped_column(default=None)
    initial_key: Mapped[str | None] = mapped_column(default=None)
    step: Mapped[int] = mapped_column(default=0)
    epoch: Mapped[int] = mapped_column(default=0)
    next_seq: Mapped[int] = mapped_column(default=1)
    snapshot_key: Mapped[str | None] = mapped_column(default=None)
    snapshot_epoch: Mapped[int] = mapped_column(default=0)
    snapshot_seq: Mapped[int] = mapped_column(default=0)
    with_optimizer: Mapped[bool] = mapped_column(default=False)
    targets: Mapped[str | None] = mapped_column(default=None)
    user_metadata: Mapped[str | None] = mapped_column(default=None)
    keep_last_checkpoints: Mapped[int | None] = mapped_column(default=None)
    reused_from: Mapped[str | None] = mapped_column(default=None)
    capacity_reason: Mapped[str] = mapped_column(default="", server_default="")
    copy_key: Mapped[str | None] = mapped_column(default=None)
    older_key: Mapped[str | None] = mapped_column(default=None)
    older_epoch: Mapped[int | None] = mapped_column(default=None)
    older_seq: Mapped[int | None] = mapped_column(default=None)
    num_changes: Mapped[int | None] = mapped_column(default=None)
    snapshot_changes: Mapped[int | None] = mapped_column(default=None)
    older_changes: Mapped[int | None] = mapped_column(default=None)
    digest: Mapped[str | None] = mapped_column(default=None)
    serverless: Mapped[bool | None] = mapped_column(default=None)

    def view(self) -> resources.Run:
        return _view(self, resources.Run)


class SamplerRow(Base):
    """Sampling capacity bound to a run, a checkpoint or a base model; ``standing`` never scales to zero.

    One that ``follows`` a run has as its checkpoint the newest that the run saved for its followers. ``num_clones``
    counts the clients that joined it.
    """

    __tablename__ = "samplers"
    __table_args__ = (
        Index("ix_samplers_model_id_deployment_id", "model_id", "deployment_id"),
        Index("ix_samplers_team_id_created_at_id", "team_id", "created_at", "id"),
        Index("ix_samplers_key_id_created_at_id", "key_id", "created_at", "id"),
        Index("ix_samplers_session_id", "session_id"),
        Index("ix_samplers_status", "status"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    session_id: Mapped[str] = mapped_column(ForeignKey("sessions.id"))
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    base_model: Mapped[str]
    model_name: Mapped[str]
    model_id: Mapped[str]
    deployment_id: Mapped[str]
    max_seq_len: Mapped[int]
    scale_down_delay_s: Mapped[int]
    status: Mapped[str]
    created_at: Mapped[float]
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id"), default=None, index=True)
    checkpoint_id: Mapped[str | None] = mapped_column(default=None)
    live_checkpoint_id: Mapped[str | None] = mapped_column(default=None)
    live_version: Mapped[int] = mapped_column(default=0)
    standing: Mapped[bool] = mapped_column(default=False, server_default=false())
    reused_from: Mapped[str | None] = mapped_column(default=None)
    capacity_reason: Mapped[str] = mapped_column(default="", server_default="")
    follows: Mapped[str | None] = mapped_column(default=None, index=True)
    num_clones: Mapped[int] = mapped_column(default=0, server_default="0")
    serverless: Mapped[bool | None] = mapped_column(default=None)

    def view(self) -> resources.Sampler:
        return _view(self, resources.Sampler)


class PinnedCheckpointRow(Base):
    """A checkpoint that a sampler holds files of its own of, whatever becomes of the original; 0 is its default."""

    __tablename__ = "held_checkpoints"

    sampler_id: Mapped[str] = mapped_column(ForeignKey("samplers.id"), primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    run_id: Mapped[str]
    target: Mapped[str]
    name: Mapped[str]
    step: Mapped[int]

    def view(self) -> resources.PinnedCheckpoint:
        return _view(self, resources.PinnedCheckpoint)


class DeployedModelRow(Base):
    """A name under which checkpoints were deployed; each deploy is a version with a standing sampler of its own."""

    __tablename__ = "deployed_models"
    __table_args__ = (UniqueConstraint("team_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str]
    created_at: Mapped[float]


class ModelVersionRow(Base):
    """One deploy: the sampler that serves it, and what was said with it."""

    __tablename__ = "model_versions"
    __table_args__ = (UniqueConstraint("model_id", "number"),)

    sampler_id: Mapped[str] = mapped_column(ForeignKey("samplers.id"), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("deployed_models.id"))
    number: Mapped[int]
    hf_secret_name: Mapped[str]

    def view(self) -> resources.ModelVersion:
        return _view(self, resources.ModelVersion)


class UserConfigRow(Base):
    """Accelerators that the holder of a key allows, the preferred first; null allows every one."""

    __tablename__ = "user_configs"

    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"), primary_key=True)
    trainer_accelerators: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True), default=None)
    sampler_accelerators: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True), default=None)


class CheckpointRow(Base):
    """An immutable folder of files; a row exists only once the folder is whole.

    With ``sampler_id`` it is a snapshot for that sampler alone: it has no address, and goes with its session.
    A ``public`` one is read by every team.
    """

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("run_id", "target", "name"),
        Index("ix_checkpoints_team_id_created_at_id", "team_id", "created_at", "id"),
        Index("ix_checkpoints_run_id_created_at_id", "run_id", "created_at", "id"),
        _partial("ix_checkpoints_expires_at", "expires_at", "expires_at IS NOT NULL"),
        _partial("ix_checkpoints_sampler_id", "sampler_id", "sampler_id IS NOT NULL"),
        _partial("ix_checkpoints_public", "run_id", "public"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    name: Mapped[str]
    target: Mapped[str]
    base_model: Mapped[str]
    step: Mapped[int]
    lora_rank: Mapped[int]
    lora_alpha: Mapped[float]
    size_bytes: Mapped[int]
    created_at: Mapped[float]
    expires_at: Mapped[float | None] = mapped_column(default=None)
    sampler_id: Mapped[str | None] = mapped_column(default=None)
    targets: Mapped[str | None] = mapped_column(default=None)
    user_metadata: Mapped[str | None] = mapped_column(default=None)
    public: Mapped[bool] = mapped_column(default=False, server_default=false())

    def view(self) -> resources.Checkpoint:
        return _view(self, resources.Checkpoint)


class OperationRow(Base):
    """One accepted operation. Payload and result lie in the row when small, else in a blob of that key.

    ``key_id`` is the key that sent it; ``num_attempts`` counts the workers that died at it. ``payload_digest`` covers
    the payload, its kind and its place; it and ``result_digest`` are null in rows of before there were digests.
    """

    __tablename__ = "operations"
    __table_args__ = (
        UniqueConstraint("run_id", "epoch", "seq"),
        Index("ix_operations_state", "state"),
        Index("ix_operations_finished_at", "finished_at"),
    )

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    seq: Mapped[int]
    kind: Mapped[str]
    fingerprint: Mapped[str]
    state: Mapped[str]
    created_at: Mapped[float]
    payload: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    payload_key: Mapped[str | None] = mapped_column(default=None)
    result: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    result_key: Mapped[str | None] = mapped_column(default=None)
    error: Mapped[str | None] = mapped_column(default=None)
    error_class: Mapped[str | None] = mapped_column(default=None)
    finished_at: Mapped[float | None] = mapped_column(default=None)
    key_id: Mapped[str | None] = mapped_column(default=None)
    num_attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    payload_digest: Mapped[str | None] = mapped_column(default=None)
    result_digest: Mapped[str | None] = mapped_column(default=None)


class RunMetricRow(Base):
    """What one finished operation of a run measured; ``number`` counts them from 1, in the order they finished.

    ``step`` is the optimizer step that it belongs to, ``data`` msgpack of a map from names to numbers.
    """

    __tablename__ = "run_metrics"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    step: Mapped[int]
    at: Mapped[float]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class SkippedRow(Base):
    """A place in a run's order that nothing is to be expected at: the call that had it was refused."""

    __tablename__ = "left_out"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class RecordedSampleRow(Base):
    """What a request sampled, for training that names it; gone once nobody has used it for a day.

    ``request`` names it among the sampler's requests. ``payload`` has the prompt, and tokens and logprobs of each
    sequence. Their routes lie in the row when small, else in a blob of that key. There is no foreign key to the
    sampler: a recording may outlive its row.
    """

    __tablename__ = "recorded_samples"
    __table_args__ = (Index("ix_recorded_samples_expires_at", "expires_at"),)

    sampler_id: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    policy_version: Mapped[int]
    expires_at: Mapped[float]
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    routes: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    routes_key: Mapped[str | None] = mapped_column(default=None)
    routes_digest: Mapped[str | None] = mapped_column(default=None)


class QueuedSampleRow(Base):
    """An accepted sampling request. Payload and result lie in the row when small, else in a blob of that key."""

    __tablename__ = "queued_samples"
    __table_args__ = (
        Index("ix_queued_samples_state", "state"),
        Index("ix_queued_samples_finished_at", "finished_at"),
    )

    sampler_id: Mapped[str] = mapped_column(ForeignKey("samplers.id"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    state: Mapped[str]
    created_at: Mapped[float]
    payload: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    payload_key: Mapped[str | None] = mapped_column(default=None)
    result: Mapped[bytes | None] = mapped_column(LargeBinary, default=None)
    result_key: Mapped[str | None] = mapped_column(default=None)
    error: Mapped[str | None] = mapped_column(default=None)
    error_class: Mapped[str | None] = mapped_column(default=None)
    finished_at: Mapped[float | None] = mapped_column(default=None)
    payload_digest: Mapped[str | None] = mapped_column(default=None)
    result_digest: Mapped[str | None] = mapped_column(default=None)


class StatusChangeRow(Base):
    """Every transition of a run, deployment or sampler, with its time and cause."""

    __tablename__ = "status_changes"
    __table_args__ = (Index("ix_status_changes_resource_id_at", "resource_id", "at"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True, init=False)
    resource: Mapped[str]
    resource_id: Mapped[str]
    status: Mapped[str]
    reason: Mapped[str]
    at: Mapped[float]


class AuditRow(Base):
    """What somebody did: with a checkpoint (of a run, for a target, by name), a key or a session.

    ``key_id`` is null for what the command line did; ``details`` is a JSON object of strings.
    """

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_team_id_at", "team_id", "at"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True, init=False)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str | None]
    event: Mapped[str]
    at: Mapped[float]
    details: Mapped[str]
    run_id: Mapped[str | None] = mapped_column(default=None)
    target: Mapped[str | None] = mapped_column(default=None)
    name: Mapped[str | None] = mapped_column(default=None)

    def view(self) -> resources.AuditEvent:
        return _view(self, resources.AuditEvent)


class UsageRow(Base):
    """What a key took in one hour (its start in UNIX seconds) for a run or sampler; empty ids where there is none."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_run_id", "run_id"),)

    team_id: Mapped[str] = mapped_column(primary_key=True)
    hour: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    key_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(primary_key=True)
    sampler_id: Mapped[str] = mapped_column(primary_key=True)
    operations: Mapped[int] = mapped_column(BigInteger)
    samples: Mapped[int] = mapped_column(BigInteger)
    tokens_trained: Mapped[int] = mapped_column(BigInteger)
    tokens_forwarded: Mapped[int] = mapped_column(BigInteger)
    tokens_prefilled: Mapped[int] = mapped_column(BigInteger)
    tokens_sampled: Mapped[int] = mapped_column(BigInteger)
    compute_s: Mapped[float]


class DeploymentMinuteRow(Base):
    """A minute (its start in UNIX seconds) of a trainer deployment's metrics, as msgpack."""

    __tablename__ = "deployment_minutes"
    __table_args__ = (Index("ix_deployment_minutes_minute", "minute"),)

    deployment_id: Mapped[str] = mapped_column(primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Viewed(Protocol[V_co]):
    """A row that has a view."""

    def view(self) -> V_co: ...


def view(row: Viewed[V] | None) -> V | None:
    return None if row is None else row.view()


def views(rows: Iterable[Viewed[V]]) -> list[V]:
    return [row.view() for row in rows]
