"""indices by which long lists are read in parts, and what is live is found among what has ended"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_LISTED = {
    "sessions": ["team_id"],
    "deployments": ["team_id", "key_id"],
    "runs": ["team_id", "key_id"],
    "samplers": ["team_id", "key_id"],
    "checkpoints": ["team_id", "run_id"],
}
_PARTIAL = [
    ("ix_sessions_open", "sessions", "id", "details IS NOT NULL AND ended_at IS NULL"),
    ("ix_checkpoints_expires_at", "checkpoints", "expires_at", "expires_at IS NOT NULL"),
    ("ix_checkpoints_sampler_id", "checkpoints", "sampler_id", "sampler_id IS NOT NULL"),
    ("ix_checkpoints_public", "checkpoints", "run_id", "public"),
]


def upgrade() -> None:
    for table, owners in _LISTED.items():
        for owner in owners:
            op.create_index(f"ix_{table}_{owner}_created_at_id", table, [owner, "created_at", "id"])
    op.drop_index("ix_runs_team_id_created_at", "runs")
    op.create_index("ix_runs_deployment_id_created_at", "runs", ["deployment_id", "created_at"])
    for table, column in (
        ("runs", "session_id"),
        ("samplers", "session_id"),
        ("samplers", "status"),
        ("deployments", "status"),
        ("usage", "run_id"),
    ):
        op.create_index(f"ix_{table}_{column}", table, [column])
    for name, table, column, condition in _PARTIAL:
        where = sa.text(condition)
        op.create_index(name, table, [column], sqlite_where=where, postgresql_where=where)
