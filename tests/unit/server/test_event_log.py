"""The log of events: written with what happened, in order, and bounded."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, update

from server.events.log import EventLog, NewEvent, emit, emit_all
from server.events.model import Event
from server.jobs.database import Database, database_now
from server.jobs.repository import FinishedWork, JobRepository

AddJob = Callable[..., str]


def kinds(log: EventLog, subject: str) -> list[str]:
    return [event.kind for event in log.after(0, limit=100, subject=subject)]


@pytest.fixture
def log(database: Database) -> EventLog:
    return EventLog(database)


def test_life_of_a_job(
    log: EventLog, repository: JobRepository, add_job: AddJob, finished_work: Callable[[str, int], FinishedWork]
) -> None:
    job_id = add_job(prompt="secret words")
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    repository.renew(job_id, claim.token, steps_done=1, announce=True)
    repository.renew(job_id, claim.token, steps_done=2)  # a heartbeat
    repository.renew(job_id, claim.token, steps_done=3, announce=True)
    events = log.after(0, limit=10, subject=job_id)
    assert [event.kind for event in events] == ["video.queued", "video.started", "video.progress"]
    assert events[2].data == {
        "id": job_id, "status": "in_progress", "model": "tiny", "progress": 75, "attempt": 1, "steps_done": 3,
        "num_inference_steps": 4,
    }  # fmt: skip
    assert repository.succeed(job_id, claim.token, finished_work(job_id, claim.token))
    events = log.after(0, limit=10, subject=job_id)
    assert [event.kind for event in events] == ["video.queued", "video.started", "video.completed"]
    assert (events[2].data["status"], events[2].data["progress"]) == ("completed", 100)
    assert [event.seq for event in events] == sorted(event.seq for event in events)
    assert "secret" not in str(events)


def test_other_ends(log: EventLog, repository: JobRepository, add_job: AddJob, expire_lease: AddJob) -> None:
    waiting, failing, deleted, lost, handed = (add_job() for _ in range(5))
    repository.request_cancel(waiting)
    assert kinds(log, waiting) == ["video.queued", "video.cancelled"]
    assert log.after(0, limit=9, subject=waiting)[-1].data["error"]["code"] == "cancelled"

    repository.claim(failing, worker="w")
    repository.fail(failing, 1, code="storage_full", message="No room.")
    assert kinds(log, failing) == ["video.queued", "video.started", "video.failed"]
    assert log.after(0, limit=9, subject=failing)[-1].data["error"] == {"code": "storage_full", "message": "No room."}

    repository.request_removal(deleted)
    assert kinds(log, deleted) == ["video.queued", "video.cancelled", "video.deleted"]

    for _ in range(3):
        repository.claim(lost, worker="w")
        expire_lease(lost)
        repository.sweep_expired()
    assert kinds(log, lost) == [*["video.queued", "video.started"] * 3, "video.failed"]

    repository.claim(handed, worker="w")
    repository.hand_back(handed, 1)
    assert kinds(log, handed) == ["video.queued", "video.started", "video.queued"]


def test_what_is_refused_is_not_told(log: EventLog, repository: JobRepository, add_job: AddJob) -> None:
    job_id = add_job()
    repository.claim(job_id, worker="w")
    assert not repository.fail(job_id, 7, code="c", message="m")
    assert repository.renew(job_id, 7, steps_done=1, announce=True) is None
    repository.show_preview(job_id, 7, b"x", steps_done=1)
    assert kinds(log, job_id) == ["video.queued", "video.started"]


def test_previews_are_made_only_for_somebody(log: EventLog, repository: JobRepository, add_job: AddJob) -> None:
    mine, others = add_job(), add_job(tenant="other")
    for job_id in (mine, others):
        repository.claim(job_id, worker="w")
        assert not repository.previews_wanted([job_id])
    repository.want_previews([mine], [], for_s=10.0)
    assert (bool(repository.previews_wanted([mine])), bool(repository.previews_wanted([others]))) == (True, False)
    repository.want_previews([], ["other"], for_s=10.0)
    assert repository.previews_wanted([others])
    repository.want_previews([mine], [], for_s=-1.0)
    assert not repository.previews_wanted([mine])
    for step in (1, 2):
        repository.show_preview(others, 1, b"webp%d" % step, steps_done=step)
    (preview,) = [event for event in log.after(0, limit=9, subject=others) if event.kind == "video.preview"]
    assert preview.data["image"] == "data:image/webp;base64,d2VicDI="
    assert preview.data["steps_done"] == 2


def test_an_event_is_rolled_back_with_what_it_tells(log: EventLog, database: Database) -> None:
    def fail_later() -> None:
        with database.write() as connection:
            emit(connection, tenant="t", kind="batch.completed", subject="batch_1", data={"id": "batch_1"})
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        fail_later()
    assert log.end() == 0


def test_tenants_and_places(log: EventLog, database: Database) -> None:
    with database.write() as connection:
        emit_all(
            connection,
            [NewEvent(tenant=f"t{n % 2}", kind="x.y", subject=f"s{n}", data={"n": n}) for n in range(10)],
        )
    assert [event.data["n"] for event in log.after(0, limit=3, tenant="t1")] == [1, 3, 5]
    assert [event.data["n"] for event in log.after(log.end() - 2, limit=9)] == [8, 9]


def test_sweep(log: EventLog, database: Database) -> None:
    def add(count: int) -> None:
        with database.write() as connection:
            emit_all(connection, [NewEvent(tenant="t", kind="x.y", subject="s", data={}) for _ in range(count)])

    def count() -> Any:
        with database.read() as connection:
            return connection.scalar(select(func.count()).select_from(Event))

    add(3000)
    with database.write() as connection:
        connection.execute(update(Event).where(Event.seq <= 1500).values(created_at=database_now() - 100.0))
    while log.sweep(kept_s=60.0, max_rows=10_000):
        pass
    assert count() == 1500
    while log.sweep(kept_s=60.0, max_rows=1000):
        pass
    assert count() == 1000
    end = log.end()
    while log.sweep(kept_s=-10.0, max_rows=1000):
        pass
    assert count() == 0
    add(1)
    assert log.end() == end + 1  # a place is never used again


def test_states_of_a_batch_are_told(log: EventLog, database: Database) -> None:
    from server.batches.repository import BatchRepository

    batches = BatchRepository(database, lease_s=60.0)
    batch = batches.add(
        tenant="t", endpoint="/v1/videos", input_file_id="file-1", completion_window="24h",
        output_expires_after_s=None, metadata=None, max_active=9,
    )  # fmt: skip
    claim = batches.claim(batch.seq)
    assert claim is not None
    batches.end_validation(claim, [{"code": "invalid_line", "message": "m", "param": None, "line": 1}])
    last = log.after(0, limit=9, subject=batch.id)[-1]
    assert (last.kind, last.tenant, last.data["status"]) == ("batch.failed", "t", "failed")
