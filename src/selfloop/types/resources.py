"""Resources as everybody outside the database sees them: frozen views of their rows.

Times are UNIX seconds; the meaning of each field is with its table (``storage.db.tables``).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """A team."""

    id: str
    name: str
    is_default: bool
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key; what it is checked by stays in its row."""

    id: str
    team_id: str
    name: str
    prefix: str
    created_at: float
    revoked_at: float | None = None
    role: str = "member"
    expires_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A base model in the catalogue, and its folder once there is one."""

    name: str
    source: str
    created_at: float
    revision: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """Another name of a base model."""

    alias: str
    model_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What one script made. ``details`` is JSON of what its client said of it."""

    id: str
    team_id: str
    key_id: str
    created_at: float
    training_project_id: str | None = None
    details: str | None = None
    ended_at: float | None = None
    end_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Trainer capacity for a base model."""

    id: str
    team_id: str
    key_id: str
    base_model: str
    model_name: str
    status: str
    scale_down_delay_s: int
    created_at: float
    latest_run_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A LoRA adapter with its optimizer state, step count and operation queue."""

    id: str
    session_id: str
    team_id: str
    key_id: str
    deployment_id: str
    name: str
    base_model: str
    model_name: str
    lora_rank: int
    max_seq_len: int
    initial_rank: int
    seed: int
    status: str
    created_at: float
    path: str | None = None
    initial_key: str | None = None
    step: int = 0
    epoch: int = 0
    next_seq: int = 1
    snapshot_key: str | None = None
    snapshot_epoch: int = 0
    snapshot_seq: int = 0
    with_optimizer: bool = False
    targets: str | None = None
    user_metadata: str | None = None
    keep_last_checkpoints: int | None = None
    reused_from: str | None = None
    capacity_reason: str = ""
    copy_key: str | None = None
    older_key: str | None = None
    older_epoch: int | None = None
    older_seq: int | None = None
    num_changes: int | None = None
    snapshot_changes: int | None = None
    older_changes: int | None = None
    digest: str | None = None
    serverless: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """Sampling capacity bound to a run, a checkpoint or a base model."""

    id: str
    session_id: str
    team_id: str
    key_id: str
    base_model: str
    model_name: str
    model_id: str
    deployment_id: str
    max_seq_len: int
    scale_down_delay_s: int
    status: str
    created_at: float
    run_id: str | None = None
    checkpoint_id: str | None = None
    live_checkpoint_id: str | None = None
    live_version: int = 0
    standing: bool = False
    reused_from: str | None = None
    capacity_reason: str = ""
    follows: str | None = None
    num_clones: int = 0
    serverless: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedCheckpoint:
    """A checkpoint that a sampler holds files of its own of."""

    sampler_id: str
    checkpoint_id: str
    position: int
    run_id: str
    target: str
    name: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One deploy of a model: the sampler that serves it, and what was said with it."""

    sampler_id: str
    model_id: str
    number: int
    hf_secret_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An immutable folder of files, whole since it has its row."""

    id: str
    run_id: str
    team_id: str
    name: str
    target: str
    base_model: str
    step: int
    lora_rank: int
    lora_alpha: float
    size_bytes: int
    created_at: float
    expires_at: float | None = None
    sampler_id: str | None = None
    targets: str | None = None
    user_metadata: str | None = None
    public: bool = False

    def may_be_read_by(self, team_id: str, granted_team_id: str | None = None) -> bool:
        """By its team, by everybody once it is published, and by who shows a key of its team (``granted_team_id``)."""
        return self.public or self.team_id in (team_id, granted_team_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """What somebody did; ``details`` is a JSON object of strings."""

    id: int
    team_id: str
    key_id: str | None
    event: str
    at: float
    details: str
    run_id: str | None = None
    target: str | None = None
    name: str | None = None
