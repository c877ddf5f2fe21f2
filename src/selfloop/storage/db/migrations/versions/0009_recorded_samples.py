"""sequences that are recorded for training"""

import sqlalchemy as sa
from alembic import op

from selfloop.storage.db.column_types import Whole

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "recorded_samples",
        sa.Column("sampler_id", sa.String(), nullable=False),
        sa.Column("request", sa.String(), nullable=False),
        sa.Column("team_id", sa.String(), nullable=False),
        sa.Column("policy_version", Whole, nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["team_id"], ["teams.id"], name=op.f("fk_recorded_samples_team_id")),
        sa.PrimaryKeyConstraint("sampler_id", "request", name=op.f("pk_recorded_samples")),
    )
    op.create_index("ix_recorded_samples_expires_at", "recorded_samples", ["expires_at"])
