"""queued samples, accounts, observations"""

import sqlalchemy as sa
from alembic import op

from selfloop.storage.db.column_types import Whole

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _queued_samples()
    _accounts()
    _observations()


def _queued_samples() -> None:
    op.create_table(
        "queued_samples",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("payload_key", sa.String(), nullable=True),
        sa.Column("result", sa.LargeBinary(), nullable=True),
        sa.Column("result_key", sa.String(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("error_class", sa.String(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["sampler_id"], ["samplers.id"], name=op.f("fk_queued_samples_sampler_id")),
        sa.PrimaryKeyConstraint("sampler_id", "id", name=op.f("pk_queued_samples")),
    )
    op.create_index("ix_queued_samples_state", "queued_samples", ["state"])
    op.create_index("ix_queued_samples_finished_at", "queued_samples", ["finished_at"])


def _accounts() -> None:
    op.add_column("runs", sa.Column("keep_last_checkpoints", Whole, nullable=True))
    op.add_column("runs", sa.Column("reused_from", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("capacity_reason", sa.String(), nullable=False, server_default=""))
    op.add_column("samplers", sa.Column("standing", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("samplers", sa.Column("reused_from", sa.String(), nullable=True))
    op.add_column("samplers", sa.Column("capacity_reason", sa.String(), nullable=False, server_default=""))
    op.create_table(
        "held_checkpoints",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("checkpoint_id", sa.String(), nullable=False),
        sa.Column("position", Whole, nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("step", Whole, nullable=False),
        sa.ForeignKeyConstraint(["sampler_id"], ["samplers.id"], name=op.f("fk_held_checkpoints_sampler_id")),
        sa.PrimaryKeyConstraint("sampler_id", "checkpoint_id", name=op.f("pk_held_checkpoints")),
    )
    op.create_table(
        "deployed_models",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("team_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_deployed_models_team_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployed_models")),
        sa.UniqueConstraint("team_id", "name", name=op.f("uq_deployed_models_team_id_name")),
    )
    op.create_table(
        "model_versions",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("number", Whole, nullable=False),
        sa.Column("hf_secret_name", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["sampler_id"], ["samplers.id"], name=op.f("fk_model_versions_sampler_id")),
        sa.ForeignKeyConstraint(["model_id"], ["deployed_models.id"], name=op.f("fk_model_versions_model_id")),
        sa.PrimaryKeyConstraint("sampler_id", name=op.f("pk_model_versions")),
        sa.UniqueConstraint("model_id", "number", name=op.f("uq_model_versions_model_id_number")),
    )
    op.create_table(
        "user_configs",
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("trainer_accelerators", sa.JSON(), nullable=True),
        sa.Column("sampler_accelerators", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["key_id"], ["keys.id"], name=op.f("fk_user_configs_key_id")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_user_configs")),
    )


def _observations() -> None:
    op.add_column("operations", sa.Column("key_id", sa.String(), nullable=True))
    op.create_table(
        "usage",
        sa.Column("team_id", sa.String(), nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("operations", sa.BigInteger(), nullable=False),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("tokens_trained", sa.BigInteger(), nullable=False),
        sa.Column("tokens_forwarded", sa.BigInteger(), nullable=False),
        sa.Column("tokens_prefilled", sa.BigInteger(), nullable=False),
        sa.Column("tokens_sampled", sa.BigInteger(), nullable=False),
        sa.Column("compute_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("team_id", "hour", "key_id", "run_id", "sampler_id", name=op.f("pk_usage")),
    )
    op.create_table(
        "deployment_minutes",
        sa.Column("deployment_id", sa.String(), nullable=False),
        sa.Column("minute", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", "minute", name=op.f("pk_deployment_minutes")),
    )
    op.create_index("ix_deployment_minutes_minute", "deployment_minutes", ["minute"])
