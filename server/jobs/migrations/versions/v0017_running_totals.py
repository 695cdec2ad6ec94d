"""Counters of jobs are running totals, as all other figures are; sums over deleted jobs are not needed any more."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_SUMS = sa.table("measure_sums", *(sa.column(name) for name in ("name", "labels", "le", "count", "total")))
_DELETED = sa.table(
    "deleted_totals", *(sa.column(name) for name in ("model", "status", "jobs", "frames", "video_s", "redelivered"))
)
_JOBS = sa.table("jobs", *(sa.column(name) for name in ("model", "status", "num_frames", "fps", "attempt")))
_NAMES = (
    "medsora_requests", "medsora_frames_generated", "medsora_video_seconds_generated", "medsora_jobs_redelivered",
)  # fmt: skip


def upgrade() -> None:
    """Begin each counter with what it told so far."""
    connection = op.get_bind()
    is_done = _JOBS.c.status == "succeeded"
    over_jobs = sa.select(
        _JOBS.c.model,
        _JOBS.c.status,
        sa.func.count().label("jobs"),
        sa.func.sum(sa.case((is_done, _JOBS.c.num_frames), else_=0)).label("frames"),
        sa.func.sum(sa.case((is_done, _JOBS.c.num_frames / _JOBS.c.fps), else_=0.0)).label("video_s"),
        sa.func.sum(sa.case((_JOBS.c.attempt > 1, _JOBS.c.attempt - 1), else_=0)).label("redelivered"),
    ).group_by(_JOBS.c.model, _JOBS.c.status)
    sums: dict[tuple[str, str], list[float]] = {}

    def add(name: str, labels: list[str], count: int, total: float) -> None:
        so_far = sums.setdefault((name, json.dumps(labels)), [0, 0.0])
        so_far[0] += count
        so_far[1] += total

    for row in [*connection.execute(over_jobs), *connection.execute(sa.select(_DELETED))]:
        if row.status not in ("queued", "running"):
            add("medsora_requests", [row.model, row.status], row.jobs, row.jobs)
        if row.status == "succeeded":
            add("medsora_frames_generated", [row.model], row.jobs, row.frames)
            add("medsora_video_seconds_generated", [row.model], row.jobs, row.video_s)
        add("medsora_jobs_redelivered", [row.model], row.redelivered, row.redelivered)
    rows = [
        {"name": name, "labels": labels, "le": "+Inf", "count": int(count), "total": float(total)}
        for (name, labels), (count, total) in sums.items()
    ]
    if rows:
        connection.execute(sa.insert(_SUMS), rows)
    op.drop_table("deleted_totals")
    op.create_index("ix_jobs_status_model", "jobs", ["status", "model"])


def downgrade() -> None:
    """Bring the table back, empty: counters fall by what concerned jobs that are gone."""
    op.drop_index("ix_jobs_status_model", "jobs")
    op.create_table(
        "deleted_totals",
        sa.Column("model", sa.String(200), primary_key=True),
        sa.Column("status", sa.String(16), primary_key=True),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("jobs", "frames")),
        sa.Column("video_s", sa.Double(), nullable=False),
        sa.Column("redelivered", sa.BigInteger(), nullable=False),
        *(
            sa.Column(name, sa.Double(), nullable=False)
            for name in ("latency_s", "queue_s", "sampling_s", "encode_s", "store_s")
        ),
    )
    op.get_bind().execute(sa.delete(_SUMS).where(_SUMS.c.name.in_(_NAMES)))
