"""which experts a recorded sequence's tokens went to"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("recorded_samples", sa.Column("routes", sa.LargeBinary(), nullable=True))
    for name in ("routes_key", "routes_digest"):
        op.add_column("recorded_samples", sa.Column(name, sa.String(), nullable=True))
