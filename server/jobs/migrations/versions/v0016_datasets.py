"""Datasets, their clips, the files of those, and the tries that came to nothing."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

_BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "datasets",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("model_sha256", sa.String(64), nullable=False),
        sa.Column("format", sa.String(16), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("splits", sa.JSON(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("filters", sa.JSON(), nullable=False),
        sa.Column("about", sa.JSON(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Double()),
        sa.Column("planned", sa.Integer(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("missing", sa.Integer(), nullable=False),
        sa.Column("dropped", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("deleted_at", sa.Double()),
        sa.CheckConstraint(
            "status in ('in_progress', 'completed', 'cancelling', 'cancelled')", name="ck_datasets_status"
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_datasets_tenant_seq", "datasets", ["tenant", "seq"])
    op.create_index("ix_datasets_status", "datasets", ["status"])
    op.create_table(
        "dataset_clips",
        sa.Column("dataset_seq", sa.BigInteger(), sa.ForeignKey("datasets.seq"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("label", sa.Integer(), nullable=False),
        sa.Column("index_in_label", sa.Integer(), nullable=False),
        sa.Column("split", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.String(64), unique=True),
        sa.Column("attempt", sa.Integer()),
        sa.Column("done_number", sa.Integer()),
        sa.Column("reason", sa.Text()),
    )
    op.create_index("ix_dataset_clips_state", "dataset_clips", ["dataset_seq", "state", "number"])
    op.create_table(
        "dataset_payloads",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("dataset_seq", sa.BigInteger(), sa.ForeignKey("datasets.seq"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("parts", sa.JSON(), nullable=False),
        sa.Column("frames_sha256", sa.String(64), nullable=False),
        sa.Column("measures", sa.JSON(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("uq_dataset_payloads_job", "dataset_payloads", ["job_id", "attempt"], unique=True)
    op.create_index("ix_dataset_payloads_dataset", "dataset_payloads", ["dataset_seq", "seq"])
    op.create_table(
        "dataset_drops",
        sa.Column("seq", _BIG, primary_key=True, autoincrement=True),
        sa.Column("dataset_seq", sa.BigInteger(), sa.ForeignKey("datasets.seq"), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("try_number", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("job_id", sa.String(64)),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_dataset_drops_dataset", "dataset_drops", ["dataset_seq", "seq"])


def downgrade() -> None:
    """Drop the tables; the files stay where they are."""
    for table in ("dataset_drops", "dataset_payloads", "dataset_clips", "datasets"):
        op.drop_table(table)
