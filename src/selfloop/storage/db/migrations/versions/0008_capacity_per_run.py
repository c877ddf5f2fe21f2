"""whether a run's or sampler's capacity is serverless, null for those from before it was theirs"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("runs", "samplers"):
        op.add_column(table, sa.Column("serverless", sa.Boolean(), nullable=True))
