"""Whose job is next, and which others may be sampled together with it.

Fair queueing by start tags: what a job costs (pixels of all frames, times steps) moves its tenant forward in a virtual
time, and the waiting job of the tenant that is furthest behind comes first. Who comes after a pause stands where the
others are now: nobody saves up time, and nobody who was alone pays for it afterwards. Within a tenant the higher
priority comes first, then the older job, so no field of a request takes time from another tenant. All of it is in the
database and decided there, so any number of workers agree.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, case, func, insert, or_, select, text, update

from server.jobs.database import Database
from server.jobs.model import Job, TenantShare

__all__ = ["ALIKE", "charge", "cost_of", "lock_shares", "next_ids", "runs_alone"]

ALIKE = (
    Job.model, Job.num_frames, Job.height, Job.width, Job.num_inference_steps, Job.guidance_scale, Job.sampler,
)  # fmt: skip
"""What jobs must have in common to be sampled as one batch; ``GenerationRequest.shape_key`` and the model."""

_SHARES_LOCK_KEY = 0x6D656474  # any number of our own for pg_advisory_xact_lock
_COST: Any = 1e-6 * Job.num_frames * Job.width * Job.height * Job.num_inference_steps


def cost_of(job: Any) -> float:
    """What a job costs its tenant: megapixels of all frames, times steps."""
    return 1e-6 * float(job.num_frames * job.width * job.height * job.num_inference_steps)


def runs_alone() -> ColumnElement[bool]:
    """Jobs that share a batch with no other: that asked for it, are made from a source, or lost a worker before."""
    return or_(Job.deterministic.is_(True), Job.source_id.is_not(None), Job.attempt > Job.handed_back)


def lock_shares(connection: Connection, database: Database) -> None:
    """Let one worker choose at a time, else two would choose the same jobs. SQLite has one writer anyway."""
    if not database.is_sqlite:
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _SHARES_LOCK_KEY})


def next_ids(
    connection: Connection,
    takeable: Sequence[ColumnElement[bool]],
    *,
    limit: int,
    alike: Mapping[str, Any] | None = None,
) -> list[str]:
    """Ids of the jobs that come next, first the first.

    Args:
        takeable: Conditions of jobs that may be claimed at all.
        alike: Values of :data:`ALIKE`: only jobs that have them, and that do not run alone.
    """
    own_order = (Job.priority.desc(), Job.seq)
    before = func.sum(_COST).over(partition_by=Job.tenant, order_by=own_order, rows=(None, 0)) - _COST
    columns = [Job.id, Job.tenant, Job.priority, Job.seq, before.label("before"), runs_alone().label("alone"), *ALIKE]
    waiting = select(*columns).where(*takeable).subquery()
    now = select(func.coalesce(func.max(TenantShare.start_tag), 0.0)).scalar_subquery()
    finish = func.coalesce(TenantShare.finish_tag, 0.0)
    start = case((finish > now, finish), else_=now) + waiting.c.before
    query = select(waiting.c.id).join(TenantShare, TenantShare.tenant == waiting.c.tenant, isouter=True)
    if alike is not None:
        same = [waiting.c[name] == value for name, value in alike.items()]
        query = query.where(waiting.c.alone.is_(False), *same)
    query = query.order_by(start, waiting.c.priority.desc(), waiting.c.seq).limit(limit)
    return list(connection.scalars(query))


def charge(connection: Connection, jobs: Collection[Any]) -> None:
    """Move the tenants of jobs that have just been claimed together forward; the first of them was next."""
    rows = {
        row.tenant: row.finish_tag
        for row in connection.execute(select(TenantShare.tenant, TenantShare.finish_tag).with_for_update())
    }
    now = connection.scalar(select(func.coalesce(func.max(TenantShare.start_tag), 0.0))) or 0.0
    costs: dict[str, float] = {}
    for job in jobs:
        costs[job.tenant] = costs.get(job.tenant, 0.0) + cost_of(job)
    first = next(iter(costs), None)
    for tenant, cost in costs.items():
        start = max(now, rows.get(tenant, 0.0))
        values = {"start_tag": start if tenant == first else now, "finish_tag": start + cost}
        if tenant in rows:
            connection.execute(update(TenantShare).where(TenantShare.tenant == tenant).values(values))
        else:
            connection.execute(insert(TenantShare).values(tenant=tenant, **values))
