"""Signs of life of the sampling processes, for readiness and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select, update

from server.jobs.database import Database, database_now
from server.jobs.model import WorkerProcess

__all__ = ["WorkerRecord", "WorkerRegistry"]


@dataclass(frozen=True, kw_only=True)
class WorkerRecord:
    """A sampling process that was seen lately."""

    id: str
    age_s: float
    """Seconds since its last sign of life."""
    models: tuple[str, ...]
    device: str
    rss_bytes: int
    problem: str | None
    warm_up_s: Mapping[str, Mapping[str, float]]
    """By model and batch size."""
    gpu_peak_bytes: int | None
    """None: it samples on the CPU."""


class WorkerRegistry:
    """Table of sampling processes.

    Args:
        heartbeat_s: Seconds between signs of life; a process counts as alive for four of them.
    """

    def __init__(self, database: Database, *, heartbeat_s: float) -> None:
        self._database = database
        # Four, and never under ten seconds: a loaded machine may be late with a thread.
        self._alive_s = max(4 * heartbeat_s, 10.0)

    def report(
        self,
        worker_id: str,
        *,
        models: tuple[str, ...],
        device: str,
        rss_bytes: int,
        problem: str | None,
        warm_up_s: Mapping[str, Mapping[str, float]] | None = None,
        gpu_peak_bytes: int | None = None,
    ) -> None:
        """Write a sign of life."""
        values: dict[str, Any] = {
            "seen_at": database_now(),
            "models": "\n".join(models),
            "device": device,
            "rss_bytes": rss_bytes,
            "problem": problem,
            "warm_up_s": warm_up_s or {},
            "gpu_peak_bytes": gpu_peak_bytes,
        }
        statement = update(WorkerProcess).where(WorkerProcess.id == worker_id).values(**values)
        with self._database.write(is_durable=False) as connection:
            if connection.execute(statement).rowcount == 0:
                connection.execute(insert(WorkerProcess).values(id=worker_id, started_at=database_now(), **values))

    def sign_off(self, worker_id: str) -> None:
        """Remove a process that stops."""
        with self._database.write() as connection:
            connection.execute(delete(WorkerProcess).where(WorkerProcess.id == worker_id))

    def alive(self) -> list[WorkerRecord]:
        """Processes seen lately."""
        age = (database_now() - WorkerProcess.seen_at).label("age_s")
        query = select(WorkerProcess.__table__, age).where(WorkerProcess.seen_at > database_now() - self._alive_s)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            WorkerRecord(
                id=row.id,
                age_s=row.age_s,
                models=tuple(row.models.split("\n")) if row.models else (),
                device=row.device,
                rss_bytes=row.rss_bytes,
                problem=row.problem,
                warm_up_s=row.warm_up_s,
                gpu_peak_bytes=row.gpu_peak_bytes,
            )
            for row in rows
        ]

    def drop_dead(self) -> int:
        """Remove processes that have not been seen for ten times as long as counts as alive."""
        limit = database_now() - 10 * self._alive_s
        with self._database.write() as connection:
            return connection.execute(delete(WorkerProcess).where(WorkerProcess.seen_at < limit)).rowcount
