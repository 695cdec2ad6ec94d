"""What the warm-up of a sampling process took."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    # The default is for processes of the older version that still run.
    op.add_column("worker_processes", sa.Column("warm_up_s", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("worker_processes", "warm_up_s")
