"""Tables, states and the plan of datasets: which clip is of which label and split, and made of which seed."""

import enum
import hashlib
import re
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Double, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = [
    "ACTIVE",
    "FORMATS",
    "MAX_CLIPS",
    "ClipState",
    "Dataset",
    "DatasetClip",
    "DatasetDrop",
    "DatasetPayload",
    "DatasetStatus",
    "clip_seed",
    "is_dataset_id",
    "new_dataset_id",
    "planned_clips",
    "split_counts",
    "spread",
]

_BIG = BigInteger().with_variant(Integer(), "sqlite")
_DATASET_ID = re.compile(r"dataset_[0-9a-f]{32}")

MAX_CLIPS = 100_000
FORMATS = {"videofolder": "mp4", "webdataset": "mp4", "ffv1": "ffv1", "png": "png", "dicom": "dicom"}
"""Format of a dataset -> format of its clips, of :data:`medsora.clip_files.CLIP_FORMATS`."""


class DatasetStatus(enum.StrEnum):
    """State of a dataset."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    """Nothing more will be made; some clips may be missing, and then the shortfall says how many."""
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ACTIVE = (DatasetStatus.IN_PROGRESS, DatasetStatus.CANCELLING)
"""States in which there is something to do."""


class ClipState(enum.StrEnum):
    """How far a clip is."""

    PENDING = "pending"
    """It is to get another job."""
    SUBMITTED = "submitted"
    """It has a job, whose end has not been seen yet."""
    DONE = "done"
    MISSING = "missing"
    """No try came to a good end, or it was cancelled."""


def new_dataset_id() -> str:
    """An id that cannot be guessed and is safe in paths and URLs: ``dataset_`` and 32 hex digits."""
    return f"dataset_{secrets.token_hex(16)}"


def is_dataset_id(text: str) -> bool:
    """Whether ``text`` could have come from :func:`new_dataset_id`."""
    return _DATASET_ID.fullmatch(text) is not None


class Dataset(Base):
    """What was asked, and how far it is. Times are Unix seconds of the database's clock."""

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint(f"status in ({', '.join(repr(str(one)) for one in DatasetStatus)})", name="ck_datasets_status"),
        Index("ix_datasets_tenant_seq", "tenant", "seq"),
        Index("ix_datasets_status", "status"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    """Order of acceptance; the cursor of lists."""
    id: Mapped[str] = mapped_column(String(64), unique=True)
    tenant: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(200))
    model: Mapped[str] = mapped_column(String(200))
    model_sha256: Mapped[str] = mapped_column(String(64))
    format: Mapped[str] = mapped_column(String(16))
    """Of :data:`FORMATS`."""
    seed: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int] = mapped_column(Integer)
    labels: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Of each its name, count, and folder in archives."""
    splits: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Of each its name and ratio."""
    settings: Mapped[dict[str, Any]] = mapped_column(JSON)
    """The columns that all its jobs have in common."""
    filters: Mapped[dict[str, Any]] = mapped_column(JSON)
    about: Mapped[dict[str, Any]] = mapped_column(JSON)
    """What the checkpoint said of itself when the dataset was accepted: licence, training data and the like."""

    # who works on it
    token: Mapped[int] = mapped_column(Integer, default=0)
    """Number of claims so far, and the fencing token of the newest one."""
    lease_until: Mapped[float | None] = mapped_column(Double)
    planned: Mapped[int] = mapped_column(Integer, default=0)
    """Clips that have a row."""
    done: Mapped[int] = mapped_column(Integer, default=0)
    missing: Mapped[int] = mapped_column(Integer, default=0)
    dropped: Mapped[int] = mapped_column(Integer, default=0)
    """Tries that came to nothing."""

    # when
    created_at: Mapped[float] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    """When the client deleted it. Nobody sees such a row; it goes once all that belongs to it has gone."""


class DatasetClip(Base):
    """A clip that a dataset is to have. The row is what keeps it from being made twice, or not at all."""

    __tablename__ = "dataset_clips"
    __table_args__ = (Index("ix_dataset_clips_state", "dataset_seq", "state", "number"),)

    dataset_seq: Mapped[int] = mapped_column(BigInteger, ForeignKey("datasets.seq"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    """From 0."""
    label: Mapped[int] = mapped_column(Integer)
    """Number of its label in the dataset's list."""
    index_in_label: Mapped[int] = mapped_column(Integer)
    split: Mapped[int] = mapped_column(Integer)
    """Number of its split in the dataset's list."""
    state: Mapped[str] = mapped_column(String(16))
    tries: Mapped[int] = mapped_column(Integer)
    """Tries so far, the one at work included."""
    seed: Mapped[int] = mapped_column(BigInteger)
    """Of the newest try."""
    job_id: Mapped[str | None] = mapped_column(String(64), unique=True)
    """Of the newest try."""
    attempt: Mapped[int | None] = mapped_column(Integer)
    """Of the job: whose file it is."""
    done_number: Mapped[int | None] = mapped_column(Integer)
    """How many were done with it: what was done at one moment are the clips up to a number."""
    reason: Mapped[str | None] = mapped_column(Text)
    """Why it is missing."""


class DatasetPayload(Base):
    """The file that a worker made of a clip for an archive; of no account until its job has succeeded."""

    __tablename__ = "dataset_payloads"
    __table_args__ = (
        Index("uq_dataset_payloads_job", "job_id", "attempt", unique=True),
        Index("ix_dataset_payloads_dataset", "dataset_seq", "seq"),
        {"sqlite_autoincrement": True},
    )

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    dataset_seq: Mapped[int] = mapped_column(BigInteger, ForeignKey("datasets.seq"))
    number: Mapped[int] = mapped_column(Integer)
    job_id: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int] = mapped_column(Integer)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    parts: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """Of :class:`medsora.clip_files.ClipPart`."""
    frames_sha256: Mapped[str] = mapped_column(String(64))
    measures: Mapped[dict[str, float]] = mapped_column(JSON)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)


class DatasetDrop(Base):
    """A try that came to nothing, and why."""

    __tablename__ = "dataset_drops"
    __table_args__ = (Index("ix_dataset_drops_dataset", "dataset_seq", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    dataset_seq: Mapped[int] = mapped_column(BigInteger, ForeignKey("datasets.seq"))
    number: Mapped[int] = mapped_column(Integer)
    try_number: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(String(64))
    code: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(Text)


def clip_seed(base: int, label: str, index: int, try_number: int) -> int:
    """Seed of a try, 0 to 2**63-1: the same for the same dataset seed, label, place within the label, and try.

    Args:
        index: From 0.
        try_number: From 1.
    """
    digest = hashlib.sha256(f"medsora dataset\n{base}\n{label}\n{index}\n{try_number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def spread(counts: Sequence[int]) -> list[int]:
    """Which of several kinds comes when, if there are so many of each and each is spread evenly over all.

    >>> spread([4, 2])
    [0, 1, 0, 0, 1, 0]
    """
    places = [((2 * index + 1) / (2 * count), kind) for kind, count in enumerate(counts) for index in range(count)]
    return [kind for _, kind in sorted(places)]


def split_counts(count: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``count``, as near to the ratios as can be (largest remainders).

    >>> split_counts(10, [0.75, 0.25])
    [8, 2]
    """
    total = sum(ratios)
    exact = [count * ratio / total for ratio in ratios]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(ratios)), key=lambda place: (counts[place] - exact[place], place))
    for place in by_remainder[: count - sum(counts)]:
        counts[place] += 1
    return counts


def planned_clips(counts: Sequence[int], ratios: Sequence[float]) -> list[tuple[int, int, int]]:
    """(label, index within the label, split) of every clip, in the order in which they are made.

    Labels take turns, so that a dataset that is not finished has some of each; each label is divided into the splits by
    itself.
    """
    splits = [spread(split_counts(count, ratios)) for count in counts]
    made = [0] * len(counts)
    clips = []
    for label in spread(counts):
        clips.append((label, made[label], splits[label][made[label]]))
        made[label] += 1
    return clips
