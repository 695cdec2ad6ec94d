"""Request and trace that a job comes from."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. Of jobs from before nothing is known."""
    op.add_column("jobs", sa.Column("request_id", sa.String(64)))
    op.add_column("jobs", sa.Column("traceparent", sa.String(64)))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("jobs", "traceparent")
    op.drop_column("jobs", "request_id")
