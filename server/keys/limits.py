"""What a tenant may have: clips and megapixel-frames a day, jobs that wait, requests a minute.

All of it is counted in the database, with its clock: so it is right however many API processes there are, and whatever
becomes of the broker. A day is one of UTC. What was accepted counts, also if it is cancelled or fails afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sqlalchemy import BigInteger, Connection, Double, Integer, String, bindparam, delete, func, select, update
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.database import Database, database_now, insert_if_absent
from server.jobs.model import IS_QUEUED, Base, Job
from server.settings import Settings

__all__ = [
    "NO_LIMITS",
    "Fit",
    "Limits",
    "Quota",
    "RequestLimiter",
    "RequestRate",
    "TenantLimit",
    "TenantLimits",
    "Usage",
    "UsageOfDay",
    "count_usage",
    "fitting",
]

DAY_S = 86_400
_MINUTE_S = 60.0


class TenantLimit(Base):
    """What a tenant may have in place of what all may; None: as all."""

    __tablename__ = "tenant_limits"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    clips_per_day: Mapped[int | None] = mapped_column(BigInteger)
    megapixel_frames_per_day: Mapped[float | None] = mapped_column(Double)
    queued_jobs: Mapped[int | None] = mapped_column(Integer)
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)


class UsageOfDay(Base):
    """What was accepted of a tenant on a day."""

    __tablename__ = "usage_of_days"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    day: Mapped[int] = mapped_column(Integer, primary_key=True)
    """Days since 1970-01-01, UTC."""
    clips: Mapped[int] = mapped_column(BigInteger)
    pixel_frames: Mapped[int] = mapped_column(BigInteger)
    """Sum of width x height x frames."""


class RequestAllowance(Base):
    """Requests that a tenant may still make, at a point in time; they come back steadily."""

    __tablename__ = "request_allowances"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    remaining: Mapped[float] = mapped_column(Double)
    at: Mapped[float] = mapped_column(Double)


_LIMIT: Any = TenantLimit.__table__
_USAGE: Any = UsageOfDay.__table__
_ALLOWANCE: Any = RequestAllowance.__table__

# Put together once: every request runs them, and that costs less than putting them together.
_NOW = select(database_now())
_OWN_LIMITS = select(_LIMIT).where(TenantLimit.tenant == bindparam("of"))
_IS_USAGE = (UsageOfDay.tenant == bindparam("of"), UsageOfDay.day == bindparam("on"))
_USAGE_OF = select(_USAGE).where(*_IS_USAGE)
_LOCKED_USAGE = _USAGE_OF.with_for_update()
_COUNT_USAGE = (
    update(_USAGE)
    .where(*_IS_USAGE)
    .values(
        clips=UsageOfDay.clips + bindparam("more_clips"),
        pixel_frames=UsageOfDay.pixel_frames + bindparam("more_pixel_frames"),
    )
)
_IS_ALLOWANCE = RequestAllowance.tenant == bindparam("of")
_LOCKED_ALLOWANCE = select(_ALLOWANCE).where(_IS_ALLOWANCE).with_for_update()
_SPEND_ALLOWANCE = update(_ALLOWANCE).where(_IS_ALLOWANCE).values(remaining=bindparam("left"), at=bindparam("now"))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a tenant may have; None: any amount."""

    clips_per_day: int | None = None
    megapixel_frames_per_day: float | None = None
    queued_jobs: int | None = None
    requests_per_minute: int | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """What every tenant may have that has no limits of its own."""
        return cls(**{field.name: getattr(settings, f"tenant_{field.name}") for field in fields(cls)})


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Quota:
    """A limit that is reached."""

    message: str
    """Which, how much of it is used, and when there is more."""
    retry_after_s: float
    is_soon: bool
    """Whether it is worth waiting for within one request of a client."""


@dataclass(frozen=True)
class Fit:
    """How many of the first jobs of a list are within the limits of their tenant, and what keeps off the next."""

    num_jobs: int
    quota: Quota | None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a tenant has used, and may use."""

    limits: Limits
    clips: int
    """Accepted today."""
    megapixel_frames: float
    """Accepted today."""
    queued_jobs: int
    resets_at: float
    """Unix seconds at which the day is over."""


@dataclass(frozen=True)
class RequestRate:
    """What is left of the requests a minute."""

    limit: int
    remaining: int
    reset_s: float
    """Seconds until all of the limit is there again."""
    retry_after_s: float
    """Seconds until a request is possible again; 0: the one that was asked for is."""


# -- in the transaction that makes jobs ------------------------------------------------------------------------


class Allowance:
    """What a tenant may have made now; nobody else makes any of its jobs until the caller's transaction, which must be
    one that writes, is over.

    Args:
        defaults: Limits of tenants that have none of their own.
        queue_share: Share of the tenant's places in the queue that may be taken, so that some are left to others.
    """

    def __init__(self, connection: Connection, tenant: str, defaults: Limits, *, queue_share: float = 1.0) -> None:
        self._limits = _limits(connection, tenant, defaults)
        now = _now(connection)
        usage = _lock_usage(connection, tenant, now)
        self._clips, self._pixel_frames = usage.clips, usage.pixel_frames
        self._day_left_s = DAY_S - now % DAY_S
        self._places: float = math.inf
        if self._limits.queued_jobs is not None:
            self._places = math.ceil(self._limits.queued_jobs * queue_share) - _count_queued(connection, tenant)

    def exceeded_by(self, job: Mapping[str, Any]) -> Quota | None:
        """The limit that keeps a job off; None: it may be made.

        Args:
            job: Columns of a job that is to be inserted.
        """
        limits = self._limits
        if self._places <= 0:
            return Quota(f"{limits.queued_jobs} jobs of this tenant may wait at once, and do.", 2.0, is_soon=True)
        if limits.clips_per_day is not None and self._clips >= limits.clips_per_day:
            message = f"This tenant may ask for {limits.clips_per_day} clips a day (UTC), and has."
            return Quota(message, self._day_left_s, is_soon=False)
        used, more = self._pixel_frames, _pixel_frames(job)
        if limits.megapixel_frames_per_day is not None and used + more > limits.megapixel_frames_per_day * 1e6:
            message = (
                f"This tenant may ask for {limits.megapixel_frames_per_day:g} megapixel-frames (width x height x "
                f"frames / 1e6) a day (UTC): {used / 1e6:g} are used, and this needs {more / 1e6:g}."
            )
            return Quota(message, self._day_left_s, is_soon=False)
        return None

    def take(self, job: Mapping[str, Any]) -> None:
        """Note that a job is made. What is taken is not written down: see :func:`count_usage`."""
        self._places -= 1
        self._clips += 1
        self._pixel_frames += _pixel_frames(job)


def fitting(
    connection: Connection,
    tenant: str,
    jobs: Sequence[Mapping[str, Any]],
    defaults: Limits,
    *,
    queue_share: float = 1.0,
) -> Fit:
    """How many of these jobs, in their order, the tenant may have made now; see :class:`Allowance`.

    Args:
        jobs: Columns of jobs that are to be inserted.
    """
    allowance = Allowance(connection, tenant, defaults, queue_share=queue_share)
    for number, job in enumerate(jobs):
        quota = allowance.exceeded_by(job)
        if quota is not None:
            return Fit(number, quota)
        allowance.take(job)
    return Fit(len(jobs), None)


def count_usage(connection: Connection, jobs: Sequence[Mapping[str, Any]]) -> None:
    """Count jobs that are being inserted, each for its tenant."""
    now = _now(connection)
    for tenant in sorted({str(job["tenant"]) for job in jobs}):
        theirs = [job for job in jobs if job["tenant"] == tenant]
        pixel_frames = sum(_pixel_frames(job) for job in theirs)
        added = {"of": tenant, "on": _day(now), "more_clips": len(theirs), "more_pixel_frames": pixel_frames}
        if connection.execute(_COUNT_USAGE, added).rowcount == 0:  # the first of this day
            _lock_usage(connection, tenant, now)
            connection.execute(_COUNT_USAGE, added)


# -- for whoever asks or sets --------------------------------------------------------------------------------------


class TenantLimits:
    """Limits of tenants and what they have used."""

    def __init__(self, database: Database, defaults: Limits) -> None:
        self._database = database
        self._defaults = defaults

    def usage(self, tenant: str) -> Usage:
        """What a tenant has used today, and may use."""
        with self._database.read() as connection:
            now = _now(connection)
            row = connection.execute(_USAGE_OF, {"of": tenant, "on": _day(now)}).one_or_none()
            return Usage(
                limits=_limits(connection, tenant, self._defaults),
                clips=0 if row is None else row.clips,
                megapixel_frames=0.0 if row is None else row.pixel_frames / 1e6,
                queued_jobs=_count_queued(connection, tenant),
                resets_at=(_day(now) + 1) * DAY_S,
            )

    def change(self, tenant: str, changes: Mapping[str, float | None]) -> None:
        """Give a tenant limits of its own; None: as all have. What is not named stays as it is."""
        with self._database.write() as connection:
            insert_if_absent(connection, _LIMIT, {"tenant": tenant})
            connection.execute(update(_LIMIT).where(TenantLimit.tenant == tenant).values(dict(changes)))


class RequestLimiter:
    """Counts the requests of tenants.

    Args:
        database: A power cut may undo what was counted last.
    """

    def __init__(self, database: Database, defaults: Limits) -> None:
        self._database = database
        self._defaults = defaults

    def take(self, tenant: str) -> RequestRate | None:
        """Count a request if the tenant may make it; None: there is no limit."""
        with self._database.read() as connection:
            limit = _limits(connection, tenant, self._defaults).requests_per_minute
        if limit is None:
            return None
        if limit == 0:
            return RequestRate(0, 0, _MINUTE_S, _MINUTE_S)
        pace = limit / _MINUTE_S
        with self._database.write(is_durable=False) as connection:
            now = _now(connection)
            insert_if_absent(connection, _ALLOWANCE, {"tenant": tenant, "remaining": float(limit), "at": now})
            row = connection.execute(_LOCKED_ALLOWANCE, {"of": tenant}).one()
            left = min(float(limit), row.remaining + max(0.0, now - row.at) * pace)
            if left < 1.0:
                return RequestRate(limit, 0, (limit - left) / pace, (1.0 - left) / pace)
            connection.execute(_SPEND_ALLOWANCE, {"of": tenant, "left": left - 1.0, "now": now})
        return RequestRate(limit, math.floor(left - 1.0), (limit - left + 1.0) / pace, 0.0)


def _limits(connection: Connection, tenant: str, defaults: Limits) -> Limits:
    row = connection.execute(_OWN_LIMITS, {"of": tenant}).one_or_none()
    if row is None:
        return defaults
    own = {name: value for name, value in row._mapping.items() if name != "tenant" and value is not None}
    return Limits(**{**asdict(defaults), **own})


def _lock_usage(connection: Connection, tenant: str, now: float) -> Any:
    """The row of today; whoever else wants it waits until the transaction is over."""
    values = {"tenant": tenant, "day": _day(now), "clips": 0, "pixel_frames": 0}
    if insert_if_absent(connection, _USAGE, values):
        connection.execute(delete(_USAGE).where(UsageOfDay.tenant == tenant, UsageOfDay.day < _day(now) - 366))
    return connection.execute(_LOCKED_USAGE, {"of": tenant, "on": _day(now)}).one()


def _count_queued(connection: Connection, tenant: str) -> int:
    query = select(func.count()).where(Job.tenant == tenant, IS_QUEUED)
    return connection.scalar(query) or 0


def _pixel_frames(job: Mapping[str, Any]) -> int:
    return int(job["width"]) * int(job["height"]) * int(job["num_frames"])


def _now(connection: Connection) -> float:
    return float(connection.execute(_NOW).scalar_one())


def _day(now: float) -> int:
    return int(now // DAY_S)
