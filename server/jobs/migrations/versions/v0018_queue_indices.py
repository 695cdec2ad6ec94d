"""Indices of what waits, is not published or is deleted, in place of two that every renewal of a lease had to write."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_ALIKE = ("model", "num_frames", "height", "width", "num_inference_steps", "guidance_scale", "sampler")
_NEW = (
    ("ix_jobs_queue", ("tenant", sa.text("priority DESC"), "seq"), "status = 'queued'"),
    ("ix_jobs_alike", ("tenant", *_ALIKE, sa.text("priority DESC"), "seq"), "status = 'queued'"),
    ("ix_jobs_unpublished", ("seq",), "status = 'queued' and published_at is null"),
    ("ix_jobs_deleted", ("seq",), "deleted_at is not null"),
)
_OLD = (("ix_jobs_status_lease", ("status", "lease_until")), ("ix_jobs_tenant_status", ("tenant", "status")))


def upgrade() -> None:
    """Exchange them. PostgreSQL leaves room in each page, where rows are written anew as their jobs get on."""
    for name, columns, where in _NEW:
        op.create_index(name, "jobs", columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
    for name, _ in _OLD:
        op.drop_index(name, "jobs")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("alter table jobs set (fillfactor = 70)")


def downgrade() -> None:
    """Exchange them back."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("alter table jobs reset (fillfactor)")
    for name, columns in _OLD:
        op.create_index(name, "jobs", columns)
    for name, _, _ in _NEW:
        op.drop_index(name, "jobs")
