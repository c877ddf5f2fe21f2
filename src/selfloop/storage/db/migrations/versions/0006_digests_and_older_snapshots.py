"""digests of payloads, results and runs; the snapshot before the newest; how many operations changed a run"""

import sqlalchemy as sa
from alembic import op

from selfloop.storage.db.column_types import Whole

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("operations", "queued_samples"):
        for name in ("payload_digest", "result_digest"):
            op.add_column(table, sa.Column(name, sa.String(), nullable=True))
    for name in ("digest", "older_key"):
        op.add_column("runs", sa.Column(name, sa.String(), nullable=True))
    for name in ("older_epoch", "older_seq", "num_changes", "snapshot_changes", "older_changes"):
        op.add_column("runs", sa.Column(name, Whole, nullable=True))
