"""Stills of videos, what a video is a remix of, and the places in the list of deleted jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table. Jobs from before have no stills and are no remixes."""
    op.add_column("jobs", sa.Column("remixed_from", sa.String(64)))
    op.add_column("jobs", sa.Column("thumbnail_sha256", sa.String(64)))
    op.add_column("jobs", sa.Column("spritesheet_sha256", sa.String(64)))
    op.create_table(
        "deleted_jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("deleted_at", sa.Double(), nullable=False),
    )
    op.create_index("ix_deleted_jobs_deleted_at", "deleted_jobs", ["deleted_at"])


def downgrade() -> None:
    """Drop them."""
    op.drop_table("deleted_jobs")
    for name in ("spritesheet_sha256", "thumbnail_sha256", "remixed_from"):
        op.drop_column("jobs", name)
