"""Whose job is next, and which others may be sampled together with it.

Fair queueing by start tags: what a job costs (pixels of all frames, times steps) moves its tenant forward in a virtual
time, and the waiting job of the tenant that is furthest behind comes first. Who comes after a pause stands where the
others are now: nobody saves up time, and nobody who was alone pays for it afterwards. Within a tenant the higher
priority comes first, then the older job, so no field of a request takes time from another tenant. All of it is in the
database and decided there, so any number of workers agree.

Workers that choose at the same moment do not wait for each other: each passes over the rows that another has locked
(SKIP LOCKED) and takes the next ones of the same order. They see the shares as they were before the others' claims, so
for that moment a tenant may get a batch for each of them; all of it is charged, and evened out by the claims that
follow. What a claim reads does not grow with the queue: of each tenant the first job, by an index.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Double, Select, bindparam, case, func, or_, select, update

from server.jobs.database import insert_if_absent
from server.jobs.model import ALIKE, IS_QUEUED, Job, TenantShare

__all__ = ["CLAIMABLE", "LOCKABLE", "Candidate", "charge", "cost_of", "heads", "lock_alike", "lock_first", "places"]

_TABLE: Any = Job.__table__
_SHARE: Any = TenantShare.__table__
_COST: Any = 1e-6 * Job.num_frames * Job.width * Job.height * Job.num_inference_steps
_OWN_ORDER = (Job.priority.desc(), Job.seq)
_NOW = func.coalesce(func.max(TenantShare.start_tag), 0.0)


@dataclass(frozen=True)
class Candidate:
    """A tenant with jobs that wait, and where it stands."""

    tenant: str
    start: float
    """Virtual time at which its next job begins: who has the least is next."""
    priority: int
    """Of its first job."""
    seq: int
    """Of its first job."""


CLAIMABLE = (Job.cancel_requested.is_(False), Job.attempt - Job.handed_back < bindparam("max_attempts"))
"""What jobs that nobody works on must be, so that they can be claimed; the parameter is for each execution to give."""
_RUNS_ALONE = or_(Job.deterministic.is_(True), Job.source_id.is_not(None), Job.attempt > Job.handed_back)
"""Jobs that share a batch with no other: that asked for it, are made from a source, or lost a worker before."""
LOCKABLE = select(*_TABLE.c, _RUNS_ALONE.label("runs_alone")).with_for_update(skip_locked=True)
"""Rows that nobody else is at, locked, with ``runs_alone``."""
_IS_NEXT = (IS_QUEUED, *CLAIMABLE)
_IS_ALIKE = (*_IS_NEXT, ~_RUNS_ALONE, *(_TABLE.c[column.key] == bindparam(f"like_{column.key}") for column in ALIKE))


def cost_of(job: Any) -> float:
    """What a job costs its tenant: megapixels of all frames, times steps."""
    return 1e-6 * float(job.num_frames * job.width * job.height * job.num_inference_steps)


def _heads(wanted: Sequence[ColumnElement[bool]]) -> Select[Any]:
    """Of each tenant the job that comes first among the wanted ones."""
    # Tenants one after the other, each found by the index behind the one before.
    first = select(Job.tenant).where(IS_QUEUED).order_by(Job.tenant).limit(1).scalar_subquery()
    tenants = select(first.label("tenant")).cte("tenants", recursive=True)
    behind = select(Job.tenant).where(IS_QUEUED, Job.tenant > tenants.c.tenant).order_by(Job.tenant).limit(1)
    tenants = tenants.union_all(
        select(behind.correlate(tenants).scalar_subquery()).where(tenants.c.tenant.is_not(None))
    )
    head = select(Job.seq).where(*wanted, Job.tenant == tenants.c.tenant).order_by(*_OWN_ORDER).limit(1)
    seqs = select(tenants.c.tenant, head.correlate(tenants).scalar_subquery().label("seq")).subquery()
    return (
        select(seqs.c.tenant, Job.priority, Job.seq, func.coalesce(TenantShare.finish_tag, 0.0).label("finish"))
        .join(Job, Job.seq == seqs.c.seq)
        .join(TenantShare, TenantShare.tenant == seqs.c.tenant, isouter=True)
    )


def _locked_in_order(wanted: Sequence[ColumnElement[bool]]) -> Select[Any]:
    return LOCKABLE.where(*wanted, Job.tenant == bindparam("of")).order_by(*_OWN_ORDER).limit(bindparam("most"))


# Put together once: with few jobs in the queue that costs more than running them.
_VIRTUAL_TIME = select(_NOW)
_HEADS, _HEADS_ALIKE = _heads(_IS_NEXT), _heads(_IS_ALIKE)
_LOCK_NEXT = _locked_in_order(_IS_NEXT)
_LOCK_ALIKE = _locked_in_order((*_IS_ALIKE, Job.seq.not_in(bindparam("taken", expanding=True))))


def heads(connection: Connection, *, max_attempts: int, alike: Mapping[str, Any] | None = None) -> list[Candidate]:
    """The tenants that have waiting jobs, whose turn it is first.

    Args:
        max_attempts: Of a job; one that has had so many is not claimed.
        alike: Values of :data:`server.jobs.model.ALIKE`: only jobs that have them, and that do not run alone.
    """
    query, values = (_HEADS, {}) if alike is None else (_HEADS_ALIKE, _like(alike))
    now = float(connection.scalar(_VIRTUAL_TIME) or 0.0)
    rows = connection.execute(query, {**values, "max_attempts": max_attempts})
    found = [Candidate(row.tenant, max(now, row.finish), row.priority, row.seq) for row in rows]
    return sorted(found, key=lambda one: (one.start, -one.priority, one.seq))


def lock_first(connection: Connection, *, max_attempts: int) -> Any | None:
    """The row of the job that is next, locked; None: there is none, or others are at all of them."""
    for candidate in heads(connection, max_attempts=max_attempts):
        values = {"of": candidate.tenant, "most": 1, "max_attempts": max_attempts}
        row = connection.execute(_LOCK_NEXT, values).one_or_none()
        if row is not None:
            return row
    return None


def lock_alike(
    connection: Connection, alike: Mapping[str, Any], *, max_attempts: int, limit: int, first: Any | None = None
) -> list[Any]:
    """Rows of the jobs that come next among those that are alike, locked, in their order.

    Args:
        alike: As of :func:`heads`.
        max_attempts: As of :func:`heads`.
        first: A row that is locked already and counts as its tenant's next one.
    """
    found: list[tuple[float, Any]] = []
    start = {one.tenant: one.start for one in heads(connection, max_attempts=max_attempts, alike=alike)}
    cost = 1e-6 * float(alike["num_frames"] * alike["width"] * alike["height"] * alike["num_inference_steps"])
    taken: dict[str, list[int]] = {tenant: [] for tenant in start}
    if first is not None and first.tenant in start:
        start[first.tenant] += cost
        taken[first.tenant].append(first.seq)
    values = {**_like(alike), "max_attempts": max_attempts}
    # All of them cost the same, so each round shares the places out, and those who had less than that leave the rest.
    while start and len(found) < limit:
        for tenant, quota in _shares(start, cost, limit - len(found)).items():
            about = {**values, "of": tenant, "most": quota, "taken": taken[tenant]}
            rows = connection.execute(_LOCK_ALIKE, about).all()
            for row in rows:
                found.append((start[tenant], row))
                taken[tenant].append(row.seq)
                start[tenant] += cost
            if len(rows) < quota:
                del start[tenant]
    return [row for _, row in sorted(found, key=lambda one: (one[0], -one[1].priority, one[1].seq))]


def _shares(start: Mapping[str, float], cost: float, places: int) -> dict[str, int]:
    """How many of the next places each tenant gets, where all have jobs enough."""
    at, quotas = dict(start), dict.fromkeys(start, 0)
    for _ in range(places):
        tenant = min(at, key=lambda name: at[name])
        at[tenant] += cost
        quotas[tenant] += 1
    return {tenant: quota for tenant, quota in quotas.items() if quota}


def _like(alike: Mapping[str, Any]) -> dict[str, Any]:
    return {f"like_{name}": value for name, value in alike.items()}


def places(connection: Connection, waits: Sequence[ColumnElement[bool]], *, limit: int) -> list[str]:
    """Ids of the jobs that wait, in the order in which they would be claimed one by one."""
    before = func.sum(_COST).over(partition_by=Job.tenant, order_by=_OWN_ORDER, rows=(None, 0)) - _COST
    waiting = (
        select(Job.id, Job.tenant, Job.priority, Job.seq, before.label("before")).where(IS_QUEUED, *waits).subquery()
    )
    now = select(_NOW).scalar_subquery()
    finish = func.coalesce(TenantShare.finish_tag, 0.0)
    start = case((finish > now, finish), else_=now) + waiting.c.before
    query = select(waiting.c.id).join(TenantShare, TenantShare.tenant == waiting.c.tenant, isouter=True)
    return list(connection.scalars(query.order_by(start, waiting.c.priority.desc(), waiting.c.seq).limit(limit)))


def charge(connection: Connection, jobs: Collection[Any]) -> None:
    """Move the tenants of jobs that have just been claimed together forward; the first of them was next.

    Call it late: nobody else charges these tenants until the transaction is over.
    """
    costs: dict[str, float] = {}
    for job in jobs:
        costs[job.tenant] = costs.get(job.tenant, 0.0) + cost_of(job)
    first = next(iter(costs), None)
    for tenant in sorted(costs):  # in one order: see lock_rows
        insert_if_absent(connection, _SHARE, {"tenant": tenant, "start_tag": 0.0, "finish_tag": 0.0})
    now = float(connection.scalar(_VIRTUAL_TIME) or 0.0)
    for tenant, cost in sorted(costs.items()):
        connection.execute(_CHARGE_FIRST if tenant == first else _CHARGE, {"of": tenant, "now": now, "cost": cost})


def _charging(*, is_first: bool) -> Any:
    now: Any = bindparam("now", type_=Double)
    start = case((TenantShare.finish_tag > now, TenantShare.finish_tag), else_=now)
    begun = start if is_first else now
    # What another worker has charged meanwhile stands: virtual time never goes back.
    later = case((TenantShare.start_tag > begun, TenantShare.start_tag), else_=begun)
    statement = update(TenantShare).where(TenantShare.tenant == bindparam("of"))
    return statement.values(start_tag=later, finish_tag=start + bindparam("cost", type_=Double))


_CHARGE, _CHARGE_FIRST = _charging(is_first=False), _charging(is_first=True)
