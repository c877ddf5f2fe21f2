"""attempts of operations, places left out of a run's order, and NULs in the JSON of sessions"""

import sqlalchemy as sa
from alembic import op

from selfloop.storage.db.column_types import Whole, nul_marked

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("operations", sa.Column("num_attempts", Whole, nullable=False, server_default="0"))
    op.create_table(
        "left_out",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("epoch", Whole, autoincrement=False, nullable=False),
        sa.Column("seq", Whole, autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_left_out_run_id")),
        sa.PrimaryKeyConstraint("run_id", "epoch", "seq", name=op.f("pk_left_out")),
    )
    if op.get_bind().dialect.name == "postgresql":
        sessions = sa.table("sessions", sa.column("id", sa.String), sa.column("details", sa.String))
        with_nul = sa.func.strpos(sessions.c.details, "\\u0000") > 0
        for id, details in op.get_bind().execute(sa.select(sessions).where(with_nul)).all():
            op.execute(sessions.update().where(sessions.c.id == id).values(details=nul_marked(details)))
