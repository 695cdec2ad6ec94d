"""Tables and states of jobs. What may become of a job is written in :data:`TRANSITIONS` and nowhere else."""

import enum
import re
import secrets

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    ColumnElement,
    Double,
    Index,
    Integer,
    String,
    Text,
    false,
    literal_column,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "ALIKE",
    "DEFAULT_TENANT",
    "IS_QUEUED",
    "MOST_PRIORITY",
    "TERMINAL",
    "TRANSITIONS",
    "Base",
    "DeletedJob",
    "Job",
    "JobStatus",
    "TenantShare",
    "WorkerProcess",
    "is_job_id",
    "new_job_id",
]

DEFAULT_TENANT = "default"
"""Whose everything is where no keys are used."""

MOST_PRIORITY = 10
"""Priorities go from minus this to this; 0 is the usual."""

_BIG = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by itself only for INTEGER


_QUEUED = text("status = 'queued'")
_UNPUBLISHED = text("status = 'queued' and published_at is null")
_DELETED = text("deleted_at is not null")


class JobStatus(enum.StrEnum):
    """State of a job. The last three are for ever."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED})

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELED}),
    # RUNNING again: a worker whose lease ran out is replaced by another without a stop in the queue.
    JobStatus.RUNNING: frozenset(JobStatus),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELED: frozenset(),
}
"""State -> states that may follow."""

_JOB_ID = re.compile(r"video_[0-9a-f]{32}")


def new_job_id() -> str:
    """An id that cannot be guessed and is safe in paths and URLs: ``video_`` and 32 hex digits."""
    return f"video_{secrets.token_hex(16)}"


def is_job_id(text: str) -> bool:
    """Whether ``text`` could have come from :func:`new_job_id`."""
    return _JOB_ID.fullmatch(text) is not None


class Base(DeclarativeBase):
    """Base of all tables. Times are Unix seconds of the database's clock, as floats."""


class Job(Base):
    """One asked-for clip: what was asked, how far it is, what came of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status in ('queued', 'running', 'succeeded', 'failed', 'canceled')", name="ck_jobs_status"),
        # Nothing that changes while a job runs is in an index: PostgreSQL then renews leases without touching any.
        Index("ix_jobs_status_seq", "status", "seq"),
        Index("ix_jobs_status_model", "status", "model"),  # what /metrics counts
        Index("ix_jobs_tenant_seq", "tenant", "seq"),
        Index("ix_jobs_unpublished", "seq", sqlite_where=_UNPUBLISHED, postgresql_where=_UNPUBLISHED),
        Index("ix_jobs_deleted", "seq", sqlite_where=_DELETED, postgresql_where=_DELETED),
        {"sqlite_autoincrement": True},  # a cursor into the list must never come to mean another job
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    """Order of acceptance; the cursor of lists."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64), default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    """Whose it is: nobody else sees it."""
    status: Mapped[str] = mapped_column(String(16), default=JobStatus.QUEUED.value)

    # what was asked, resolved against the checkpoint when it was accepted
    model: Mapped[str] = mapped_column(String(200))
    prompt: Mapped[str] = mapped_column(Text)
    label: Mapped[str] = mapped_column(String(200))
    seed: Mapped[int] = mapped_column(BigInteger)
    num_frames: Mapped[int] = mapped_column(Integer)
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    fps: Mapped[float] = mapped_column(Double)
    seconds: Mapped[str] = mapped_column(String(16))
    num_inference_steps: Mapped[int] = mapped_column(Integer)
    guidance_scale: Mapped[float] = mapped_column(Double)
    sampler: Mapped[str] = mapped_column(String(64))
    remixed_from: Mapped[str | None] = mapped_column(String(64))
    """Id of the job whose seed and settings it took; that job may be gone."""
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Higher comes sooner among the jobs of its tenant."""
    deterministic: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """Whether it is sampled alone, so that nothing else can change how its numbers are rounded."""

    # what it is made from, beside the label
    source_kind: Mapped[str | None] = mapped_column(String(16))
    """Of :class:`server.sources.model.SourceKind`; None: from a label alone."""
    source_id: Mapped[str | None] = mapped_column(String(64), index=True)
    """Of :class:`server.sources.model.Source`."""
    source_video: Mapped[str | None] = mapped_column(String(64))
    """Id of the job whose video that is; that job may be gone. None: it was uploaded."""
    prefix_frames: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Frames that the sampler goes on from: of a reference all, of an extension the last ones of the source."""
    strength: Mapped[float] = mapped_column(Double, default=1.0, server_default="1")
    """Of an edit: time that the source is put back to."""

    # who works on it
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Number of claims so far, and the fencing token of the newest one."""
    handed_back: Mapped[int] = mapped_column(Integer, default=0)
    """Claims that a stopping worker gave back; they do not count against the cap of attempts."""
    lease_until: Mapped[float | None] = mapped_column(Double)
    worker: Mapped[str | None] = mapped_column(String(200))
    steps_done: Mapped[int] = mapped_column(Integer, default=0)
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    """When the client deleted it. Nobody sees such a row; it goes once no worker holds it."""

    webhook_url: Mapped[str | None] = mapped_column(Text)
    """Where to tell of its end, besides the tenant's webhooks."""
    webhook_secret: Mapped[str | None] = mapped_column(String(200))
    """That this is signed with, sealed (``server/sealing.py``)."""
    previews_until: Mapped[float | None] = mapped_column(Double)
    """Until when somebody looks at pictures of the running estimate; a worker makes none that nobody looks at."""

    # what came of it
    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None] = mapped_column(Text)
    artifact: Mapped[str | None] = mapped_column(String(255))
    """Name of the finished file in the artifact store."""
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    thumbnail_sha256: Mapped[str | None] = mapped_column(String(64))
    """None: not finished, or by a version that made no stills. They lie beside the artifact."""
    spritesheet_sha256: Mapped[str | None] = mapped_column(String(64))

    # where it comes from
    request_id: Mapped[str | None] = mapped_column(String(64))
    """``x-request-id`` of the request that asked for it; None: a line of a batch."""
    traceparent: Mapped[str | None] = mapped_column(String(64))
    """Trace that the request belongs to, as W3C Trace Context writes it."""

    # when
    created_at: Mapped[float] = mapped_column(Double)
    published_at: Mapped[float | None] = mapped_column(Double)
    """When its id was last handed to the broker; None: not since it was (again) queued."""
    queued_at: Mapped[float] = mapped_column(Double)
    """When it last began to wait."""
    started_at: Mapped[float | None] = mapped_column(Double)
    """When its newest attempt was claimed."""
    completed_at: Mapped[float | None] = mapped_column(Double)

    expires_at: Mapped[float | None] = mapped_column(Double, index=True)
    """When it and its files go by themselves; None: they are kept, or it is not finished."""

    # how long the parts of the attempt that succeeded took, seconds of the worker's steady clock
    sampling_s: Mapped[float | None] = mapped_column(Double)
    """Sampler and decoder: what the model itself took, for the whole batch."""
    batch_size: Mapped[int | None] = mapped_column(Integer)
    """Clips that were sampled together with it, itself included."""
    encode_s: Mapped[float | None] = mapped_column(Double)
    store_s: Mapped[float | None] = mapped_column(Double)


ALIKE = (
    Job.model, Job.num_frames, Job.height, Job.width, Job.num_inference_steps, Job.guidance_scale, Job.sampler,
)  # fmt: skip
"""What jobs must have in common to be sampled as one batch; ``GenerationRequest.shape_key`` and the model."""

# Of what waits alone, so that they stay small however many jobs there have been; see sharing.py
_OWN_ORDER = (Job.priority.desc(), Job.seq)
Index("ix_jobs_queue", Job.tenant, *_OWN_ORDER, sqlite_where=_QUEUED, postgresql_where=_QUEUED)
Index("ix_jobs_alike", Job.tenant, *ALIKE, *_OWN_ORDER, sqlite_where=_QUEUED, postgresql_where=_QUEUED)

IS_QUEUED: ColumnElement[bool] = Job.status == literal_column("'queued'")
"""Jobs that wait, said so that the indices which hold nothing else can serve: no parameter could promise that."""


class WorkerProcess(Base):
    """A sampling process and its last sign of life."""

    __tablename__ = "worker_processes"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    """``host:pid:`` and a random part."""
    started_at: Mapped[float] = mapped_column(Double)
    seen_at: Mapped[float] = mapped_column(Double)
    models: Mapped[str] = mapped_column(Text)
    """Names of the models it can run, separated by newlines."""
    device: Mapped[str] = mapped_column(String(64))
    rss_bytes: Mapped[int] = mapped_column(BigInteger)
    problem: Mapped[str | None] = mapped_column(Text)
    """Why it cannot generate, e.g. that it is still starting, or a damaged checkpoint; None when it can."""
    warm_up_s: Mapped[dict[str, dict[str, float]]] = mapped_column(JSON, server_default="{}")
    """Seconds that warming up took, by model and by batch size (a text, as JSON has no other keys)."""
    gpu_peak_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Most memory of its GPU that its tensors have had at once; None: it samples on the CPU."""


class DeletedJob(Base):
    """Place in the list of a job that is gone, for a while: whoever deletes while paging still finds the next page."""

    __tablename__ = "deleted_jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), default=DEFAULT_TENANT, server_default=DEFAULT_TENANT)
    seq: Mapped[int] = mapped_column(BigInteger)
    deleted_at: Mapped[float] = mapped_column(Double, index=True)


class TenantShare(Base):
    """Where a tenant stands in the virtual time of fair queueing; see ``sharing.py``."""

    __tablename__ = "tenant_shares"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    start_tag: Mapped[float] = mapped_column(Double)
    """Virtual time at its newest claim; the largest of all is the virtual time now."""
    finish_tag: Mapped[float] = mapped_column(Double)
    """Where its claims so far have moved it."""
