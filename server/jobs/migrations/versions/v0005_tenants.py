"""Whose a job is."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. What was there before belongs to the tenant ``default``."""
    for table in ("jobs", "deleted_jobs"):
        op.add_column(table, sa.Column("tenant", sa.String(64), nullable=False, server_default="default"))
    op.create_index("ix_jobs_tenant_seq", "jobs", ["tenant", "seq"])
    op.create_index("ix_jobs_tenant_status", "jobs", ["tenant", "status"])


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_jobs_tenant_status", "jobs")
    op.drop_index("ix_jobs_tenant_seq", "jobs")
    for table in ("deleted_jobs", "jobs"):
        op.drop_column(table, "tenant")
