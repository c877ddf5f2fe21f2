"""adapted parts of the model, what users say of sessions, runs and checkpoints"""

import sqlalchemy as sa
from alembic import op

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
