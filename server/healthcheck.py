"""Whether one part does its work, for health checks of containers: asked beside the part, with the same settings."""

import http.client
import socket

from sqlalchemy.exc import SQLAlchemyError

from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.jobs.workers import WorkerRegistry
from server.settings import Settings

__all__ = ["api_problem", "reaper_problem", "worker_problem"]

_API_TIMEOUT_S = 5.0
_REAPER_LATE_S = 60.0


def api_problem(settings: Settings) -> str | None:
    """What is wrong with the HTTP process that listens on this machine; None: it answers."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    connection = http.client.HTTPConnection(host, settings.port, timeout=_API_TIMEOUT_S)
    try:
        connection.request("GET", "/health/live")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{host}:{settings.port} does not answer: {str(error) or type(error).__name__}"
    finally:
        connection.close()
    return None if status == 200 else f"{host}:{settings.port} answers with status {status}"


def worker_problem(settings: Settings) -> str | None:
    """What is wrong with the sampling processes of this host, by the table that they write to; None: one can sample."""
    database = Database(settings.database_address)
    try:
        alive = WorkerRegistry(database, heartbeat_s=settings.worker_heartbeat_s).alive()
    except SQLAlchemyError as error:
        return f"the job database does not answer: {type(error).__name__}"
    finally:
        database.close()
    own = [worker for worker in alive if worker.id.startswith(f"{socket.gethostname()}:")]
    if not own:
        return f"no sampling process of {socket.gethostname()} shows signs of life"
    if any(worker.problem is None for worker in own):
        return None
    return "; ".join(sorted({str(worker.problem) for worker in own}))


def reaper_problem(settings: Settings) -> str | None:
    """What the reapers have left undone for a minute; None: nothing. Of several, it tells none apart."""
    database = Database(settings.database_address)
    repository = JobRepository(database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
    try:
        late = repository.unpublished(grace_s=settings.publish_grace_s + _REAPER_LATE_S, limit=1)
    except SQLAlchemyError as error:
        return f"the job database does not answer: {type(error).__name__}"
    finally:
        database.close()
    return f"job {late[0][0]} was not published for a minute" if late else None
