"""queued samples, accounts, observations"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _queued_samples()
    _accounts()
    _observations()


def _queued_samples() -> None: ...


def _accounts() -> None: ...


def _observations() -> None: ...
