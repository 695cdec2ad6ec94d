"""What was observed, and what a worker has of its GPU, for /metrics."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, add the column. Histograms begin with it; they know nothing of jobs that ended before."""
    op.create_table(
        "measure_sums",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("labels", sa.String(600), primary_key=True),
        sa.Column("le", sa.String(32), primary_key=True),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
    )
    op.add_column("worker_processes", sa.Column("gpu_peak_bytes", sa.BigInteger()))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("worker_processes", "gpu_peak_bytes")
    op.drop_table("measure_sums")
