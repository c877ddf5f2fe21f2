"""roles and expiry of keys"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("role", sa.String(), nullable=False, server_default="member"))
    op.add_column("keys", sa.Column("expires_at", sa.Double(), nullable=True))
    # The keys that a server made or was given at its start.
    op.execute("UPDATE keys SET role = 'admin' WHERE name IN ('first', 'environment')")
