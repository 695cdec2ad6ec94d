"""Requests with an Idempotency-Key."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "idempotent_requests",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("token", sa.String(32), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("object_id", sa.String(64)),
        sa.Column("status_code", sa.Integer()),
        sa.Column("content_type", sa.String(200)),
        sa.Column("body", sa.LargeBinary()),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.create_index("ix_idempotent_requests_created_at", "idempotent_requests", ["created_at"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("idempotent_requests")
