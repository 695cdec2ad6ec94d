"""What tenants may have, and have used."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "tenant_limits",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("clips_per_day", sa.BigInteger()),
        sa.Column("megapixel_frames_per_day", sa.Double()),
        sa.Column("queued_jobs", sa.Integer()),
        sa.Column("requests_per_minute", sa.Integer()),
    )
    op.create_table(
        "usage_of_days",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("day", sa.Integer(), primary_key=True),
        sa.Column("clips", sa.BigInteger(), nullable=False),
        sa.Column("pixel_frames", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "request_allowances",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("remaining", sa.Double(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for name in ("request_allowances", "usage_of_days", "tenant_limits"):
        op.drop_table(name)
