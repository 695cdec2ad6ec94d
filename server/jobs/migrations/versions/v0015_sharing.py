"""Priorities, shares of tenants, jobs that run alone."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and add the columns. What waits has the usual priority."""
    op.create_table(
        "tenant_shares",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("start_tag", sa.Double(), nullable=False),
        sa.Column("finish_tag", sa.Double(), nullable=False),
    )
    op.add_column("jobs", sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("deterministic", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("batch_size", sa.Integer()))


def downgrade() -> None:
    """Drop them."""
    for column in ("batch_size", "deterministic", "priority"):
        op.drop_column("jobs", column)
    op.drop_table("tenant_shares")
