"""Files, batches and their lines."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_STATES = "'validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled'"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "files",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("deleted_at", sa.Double()),
        sa.Column("removed_at", sa.Double()),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_files_tenant_seq", "files", ["tenant", "seq"])
    for name in ("expires_at", "deleted_at", "removed_at"):
        op.create_index(f"ix_files_{name}", "files", [name])
    op.create_table(
        "batches",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("completion_window", sa.String(8), nullable=False),
        sa.Column("output_expires_after_s", sa.Integer()),
        sa.Column("metadata", sa.JSON()),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Double()),
        sa.Column("checked_lines", sa.Integer(), nullable=False),
        sa.Column("checked_bytes", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("completed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("errors", sa.JSON()),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("in_progress_at", sa.Double()),
        sa.Column("finalizing_at", sa.Double()),
        sa.Column("completed_at", sa.Double()),
        sa.Column("failed_at", sa.Double()),
        sa.Column("expired_at", sa.Double()),
        sa.Column("cancelling_at", sa.Double()),
        sa.Column("cancelled_at", sa.Double()),
        sa.CheckConstraint(f"status in ({_STATES})", name="ck_batches_status"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_batches_tenant_seq", "batches", ["tenant", "seq"])
    op.create_index("ix_batches_status", "batches", ["status"])
    op.create_index("ix_batches_input_file_id", "batches", ["input_file_id"])
    op.create_table(
        "batch_lines",
        sa.Column("batch_seq", sa.BigInteger(), sa.ForeignKey("batches.seq"), primary_key=True),
        sa.Column("line", sa.Integer(), primary_key=True),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("begin", sa.BigInteger(), nullable=False),
        sa.Column("length", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("job_id", sa.String(64), unique=True),
        sa.Column("refusal", sa.JSON()),
    )
    op.create_index("uq_batch_lines_custom_id", "batch_lines", ["batch_seq", "custom_id"], unique=True)
    op.create_index("ix_batch_lines_state", "batch_lines", ["batch_seq", "state", "line"])


def downgrade() -> None:
    """Drop the tables; the bytes of the files stay where they are."""
    for name in ("batch_lines", "batches", "files"):
        op.drop_table(name)
