"""The tables. Times are UNIX seconds; ids are what ``types.ids`` hands out."""

from sqlalchemy import ForeignKey, Index, LargeBinary, MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column


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


class TeamRow(Base):
    __tablename__ = "teams"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    is_default: Mapped[bool]
    created_at: Mapped[float]


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


class ModelRow(Base):
    """A base model in the catalogue. ``path`` is null until its files are prepared."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    created_at: Mapped[float]
    revision: Mapped[str | None] = mapped_column(default=None)
    path: Mapped[str | None] = mapped_column(default=None)


class AliasRow(Base):
    __tablename__ = "model_aliases"

    alias: Mapped[str] = mapped_column(primary_key=True)
    model_name: Mapped[str] = mapped_column(ForeignKey("models.name"))


class SessionRow(Base):
    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    created_at: Mapped[float]
    training_project_id: Mapped[str | None] = mapped_column(default=None)


class DeploymentRow(Base):
    """Trainer capacity for a base model; holds one or many runs."""

    __tablename__ = "deployments"

    id: Mapped[str] = mapped_column(primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("teams.id"))
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    base_model: Mapped[str]
    model_name: Mapped[str]
    status: Mapped[str]
    scale_down_delay_s: Mapped[int]
    created_at: Mapped[float]
    latest_run_id: Mapped[str | None] = mapped_column(default=None)


class RunRow(Base):
    """A LoRA adapter with its optimizer state, step count and operation queue.

    ``epoch`` counts clients that attached (each starts its ``seq_id`` at 1); ``next_seq`` is the lowest
    sequence id of the epoch that has not arrived. ``snapshot_key`` is the last stored state; it covers the
    operations up to ``(snapshot_epoch, snapshot_seq)``. ``initial_key`` is the folder with our own copy of the
    checkpoint at ``path``, which may be deleted or replaced while the run lives.
    """

    __tablename__ = "runs"
    __table_args__ = (Index("ix_runs_team_id_created_at", "team_id", "created_at"),)

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


class SamplerRow(Base):
    """Sampling capacity bound to a run, a checkpoint or a base model."""

    __tablename__ = "samplers"
    __table_args__ = (Index("ix_samplers_model_id_deployment_id", "model_id", "deployment_id"),)

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


class CheckpointRow(Base):
    """An immutable folder of files; a row exists only once the folder is whole."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("run_id", "target", "name"),)

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


class OperationRow(Base):
    """One accepted operation. Payload and result lie in the row when small, else in a blob of that key."""

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
