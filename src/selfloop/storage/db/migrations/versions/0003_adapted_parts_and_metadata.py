"""adapted parts of the model, what users say of sessions, runs and checkpoints"""

import sqlalchemy as sa
from alembic import op

from selfloop.storage.db.column_types import Whole

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("sessions", sa.Column("details", sa.String(), nullable=True))
    op.add_column("sessions", sa.Column("ended_at", sa.Double(), nullable=True))
    op.add_column("sessions", sa.Column("end_reason", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("with_optimizer", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("targets", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("user_metadata", sa.String(), nullable=True))
    op.add_column("checkpoints", sa.Column("sampler_id", sa.String(), nullable=True))
    op.add_column("checkpoints", sa.Column("targets", sa.String(), nullable=True))
    op.add_column("checkpoints", sa.Column("user_metadata", sa.String(), nullable=True))
    _publishing_and_audit()
    _custom_losses()
    _shared_sampling()


def _publishing_and_audit() -> None:
    op.add_column("checkpoints", sa.Column("public", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("copy_key", sa.String(), nullable=True))
    op.create_index("ix_runs_team_id_copy_key", "runs", ["team_id", "copy_key"], unique=True)
    op.create_table(
        "audit_events",
        sa.Column("id", Whole, autoincrement=True, nullable=False),
        sa.Column("team_id", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=True),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("target", sa.String(), nullable=True),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("details", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_events")),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_audit_events_team_id")),
    )
    op.create_index("ix_audit_events_team_id_at", "audit_events", ["team_id", "at"])


def _custom_losses() -> None:
    op.create_table(
        "custom_losses",
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("number", Whole, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("definition", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("session_id", "number", name=op.f("pk_custom_losses")),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name=op.f("fk_custom_losses_session_id")),
    )


def _shared_sampling() -> None:
    op.add_column("samplers", sa.Column("follows", sa.String(), nullable=True))
    op.add_column("samplers", sa.Column("num_clones", Whole, nullable=False, server_default="0"))
    op.create_index(op.f("ix_samplers_follows"), "samplers", ["follows"])
