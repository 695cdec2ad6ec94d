"""When a job and its files go by themselves."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the reaper fills it, where lives are limited."""
    op.add_column("jobs", sa.Column("expires_at", sa.Double()))
    op.create_index("ix_jobs_expires_at", "jobs", ["expires_at"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index("ix_jobs_expires_at", "jobs")
    op.drop_column("jobs", "expires_at")
