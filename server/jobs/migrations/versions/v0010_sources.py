"""What clips are made from."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and the columns. Jobs from before are made from their label alone."""
    op.create_table(
        "sources",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("media", sa.String(16), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("num_frames", sa.Integer(), nullable=False),
        sa.Column("fps", sa.Double()),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
    )
    op.add_column("jobs", sa.Column("source_kind", sa.String(16)))
    op.add_column("jobs", sa.Column("source_id", sa.String(64)))
    op.add_column("jobs", sa.Column("source_video", sa.String(64)))
    op.add_column("jobs", sa.Column("prefix_frames", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("strength", sa.Double(), nullable=False, server_default="1"))
    op.create_index("ix_jobs_source_id", "jobs", ["source_id"])


def downgrade() -> None:
    """Drop them; the bytes of the sources stay where they are."""
    op.drop_index("ix_jobs_source_id", "jobs")
    for name in ("strength", "prefix_frames", "source_video", "source_id", "source_kind"):
        op.drop_column("jobs", name)
    op.drop_table("sources")
