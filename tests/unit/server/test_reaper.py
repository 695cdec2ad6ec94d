"""The reaper: what it publishes again, and which files and rows it removes."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import func, select, update
from waiting import wait_until

from server.events.log import EventLog
from server.files.store import FileStore
from server.jobs.database import Database, database_now
from server.jobs.model import Job, JobStatus, new_job_id
from server.jobs.queue import JobQueue, QueueError
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.workers import WorkerRegistry
from server.reaper import Reaper
from server.sealing import Sealer
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.storage import ArtifactStore, StoredFile, Variant
from server.webhooks.repository import WebhookRepository

AddJob = Callable[..., str]


class FakeQueue:
    """A broker's queue that can forget and be down."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, int]] = []
        self.is_down = False

    def publish(self, job_id: str, attempt: int) -> None:
        if self.is_down:
            raise QueueError("down")
        self.messages.append((job_id, attempt))

    def publish_hints(self, jobs: Sequence[tuple[str, int]]) -> None:
        for job_id, attempt in jobs:
            self.publish(job_id, attempt)

    def length(self) -> int:
        if self.is_down:
            raise QueueError("down")
        return len(self.messages)


@pytest.fixture
def queue() -> FakeQueue:
    return FakeQueue()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def reaper(
    tmp_path: Path, database: Database, repository: JobRepository, store: ArtifactStore, queue: FakeQueue
) -> Reaper:
    settings = Settings(
        data_dir=tmp_path, orphan_scan_s=0.001, reaper_interval_s=0.1, publish_grace_s=5.0, republish_after_s=10.0
    )
    workers = WorkerRegistry(database, heartbeat_s=1.0)
    return Reaper(
        settings,
        repository=repository,
        workers=workers,
        store=store,
        queue=cast(JobQueue, queue),
        sources=SourceRepository(database),
        source_store=FileStore(settings.sources_dir),
        events=EventLog(database),
        webhooks=WebhookRepository(database, Sealer(settings)),
    )


@pytest.fixture
def make_older(database: Database) -> Callable[[float], None]:
    """Move the times of all waiting jobs into the past."""

    def move(seconds: float) -> None:
        with database.write() as connection:
            connection.execute(
                update(Job).values(queued_at=Job.queued_at - seconds, published_at=Job.published_at - seconds)
            )

    return move


def put(
    store: ArtifactStore,
    job_id: str,
    attempt: int,
    *,
    age_s: float = 1000.0,
    partial: bool = False,
    variant: Variant = Variant.VIDEO,
) -> Path:
    info = store.write(
        job_id, attempt, lambda path: path.write_bytes(b"x") and None, lambda path: None, variant=variant
    )
    path = store.path(info.name)
    if partial:
        path = path.rename(path.with_suffix(f".part{path.suffix}"))
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


def test_publish_that_never_happened_is_made_up_for(
    reaper: Reaper, queue: FakeQueue, add_job: AddJob, make_older: Callable[[float], None]
) -> None:
    job_id = add_job()
    reaper.sweep()
    assert queue.messages == []
    make_older(6.0)
    reaper.sweep()
    reaper.sweep()
    assert queue.messages == [(job_id, 0)]


def test_broker_that_lost_its_memory_is_told_again_but_not_more_than_once_a_while(
    reaper: Reaper, queue: FakeQueue, add_job: AddJob, make_older: Callable[[float], None], repository: JobRepository
) -> None:
    ids = [add_job() for _ in range(3)]
    repository.mark_published(ids)
    make_older(20.0)
    reaper.sweep()
    assert queue.messages == [(job_id, 0) for job_id in ids]
    queue.messages.clear()
    reaper.sweep()
    assert queue.messages == []


def test_long_queue_does_not_grow_copies(
    reaper: Reaper, queue: FakeQueue, add_job: AddJob, make_older: Callable[[float], None], repository: JobRepository
) -> None:
    ids = [add_job() for _ in range(3)]
    for job_id in ids:
        queue.publish(job_id, 0)
    repository.mark_published(ids)
    for _ in range(5):
        make_older(3600.0)
        reaper.sweep()
    assert len(queue.messages) == 3
    queue.messages.pop()  # one is lost with a worker that had just taken it; the others lead to its job, too
    make_older(3600.0)
    reaper.sweep()
    assert len(queue.messages) == 2
    queue.messages.clear()
    reaper.sweep()
    assert queue.messages == [(job_id, 0) for job_id in ids]


def test_lost_job_is_queued_and_published_in_one_sweep(
    reaper: Reaper, queue: FakeQueue, add_job: AddJob, repository: JobRepository, expire_lease: Callable[[str], None]
) -> None:
    job_id = add_job()
    repository.claim(job_id, worker="w")
    expire_lease(job_id)
    reaper.sweep()
    assert queue.messages == [(job_id, 1)]
    job = repository.get(job_id)
    assert job is not None
    assert job.published_at is not None


def test_broker_outage_does_not_stop_the_rest(
    reaper: Reaper,
    queue: FakeQueue,
    add_job: AddJob,
    repository: JobRepository,
    expire_lease: Callable[[str], None],
    store: ArtifactStore,
) -> None:
    queue.is_down = True
    job_id = add_job()
    repository.claim(job_id, worker="w")
    expire_lease(job_id)
    orphan = put(store, new_job_id(), 1)
    reaper.sweep()
    job = repository.get(job_id)
    assert job is not None
    assert job.status is JobStatus.QUEUED
    assert not orphan.exists()
    queue.is_down = False
    reaper.sweep()
    assert queue.messages == [(job_id, 1)]


def test_deleted_running_job_goes_with_its_files_once_its_worker_has_stopped(
    reaper: Reaper, add_job: AddJob, repository: JobRepository, store: ArtifactStore
) -> None:
    job_id = add_job()
    claim = repository.claim(job_id, worker="w")
    assert claim is not None
    repository.request_removal(job_id)
    path = put(store, job_id, 1)
    reaper.sweep()
    assert path.exists(), "the file of a running attempt was removed"
    repository.finish_cancel(job_id, claim.token)
    reaper.sweep()
    assert not path.exists()
    assert repository.referenced([job_id]) == {}


def test_only_files_that_belong_to_no_job_are_removed(
    reaper: Reaper,
    add_job: AddJob,
    repository: JobRepository,
    store: ArtifactStore,
    finished_work: Callable[[str, int], FinishedWork],
) -> None:
    done, running = add_job(), add_job()
    repository.claim(done, worker="w")
    repository.succeed(done, 1, finished_work(done, 1))
    repository.claim(running, worker="w")
    kept = [
        put(store, done, 1),
        put(store, done, 1, variant=Variant.THUMBNAIL),
        put(store, done, 1, variant=Variant.SPRITESHEET),
        put(store, running, 1, partial=True),
        put(store, new_job_id(), 1, age_s=0.0),  # too young to judge
        put(store, new_job_id(), 1, age_s=0.0, partial=True),
    ]
    gone = [
        put(store, done, 2),
        put(store, done, 2, variant=Variant.THUMBNAIL),
        put(store, new_job_id(), 1),
        put(store, new_job_id(), 1, variant=Variant.SPRITESHEET),
        put(store, new_job_id(), 1, partial=True),
    ]
    reaper.sweep()
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in gone if path.exists()] == []


def test_what_was_followed_goes_some_time_after_the_video_is_finished(
    reaper: Reaper,
    repository: JobRepository,
    store: ArtifactStore,
    add_job: AddJob,
    finished_work: Callable[[str, int], FinishedWork],
) -> None:
    finished, running = add_job(), add_job()
    for job_id in (finished, running):
        claim = repository.claim(job_id, worker="w")
        assert claim is not None
        put(store, job_id, 1)
        store.live_path(job_id, 1).write_bytes(b"fragments")
    assert repository.succeed(finished, 1, finished_work(finished, 1))
    for age_s, left in ((300.0, True), (700.0, False)):
        for job_id in (finished, running):
            past = time.time() - age_s
            os.utime(store.live_path(job_id, 1), (past, past))
        time.sleep(0.002)
        reaper.sweep()
        assert store.live_path(finished, 1).exists() is left
        assert store.live_path(running, 1).exists()
    assert store.path(finished_work(finished, 1).artifact).exists()


def test_dead_workers_are_forgotten(reaper: Reaper, database: Database) -> None:
    from server.jobs.model import WorkerProcess

    registry = WorkerRegistry(database, heartbeat_s=1.0)
    for name in ("alive", "dead"):
        registry.report(name, models=("m",), device="cpu", rss_bytes=1, problem=None)
    with database.write() as connection:
        connection.execute(
            update(WorkerProcess).where(WorkerProcess.id == "dead").values(seen_at=database_now() - 1000.0)
        )
    assert [worker.id for worker in registry.alive()] == ["alive"]
    reaper.sweep()
    with database.read() as connection:
        from sqlalchemy import select

        assert connection.scalars(select(WorkerProcess.id)).all() == ["alive"]


def test_videos_go_when_their_time_is_over(
    reaper: Reaper, repository: JobRepository, store: ArtifactStore, database: Database, add_job: Callable[..., str],
    finished_work: Callable[[str, int], FinishedWork],
) -> None:  # fmt: skip
    old, young, waiting = add_job(), add_job(), add_job()
    for job_id in (old, young):
        claim = repository.claim(job_id, worker="w")
        assert claim is not None
        put(store, job_id, claim.token, age_s=0.0)
        assert repository.succeed(job_id, claim.token, finished_work(job_id, claim.token))
    reaper.sweep()
    assert all(job is not None and job.expires_at is None for job in map(repository.get, (old, young)))  # kept for ever
    reaper._settings = reaper._settings.model_copy(update={"video_kept_s": 3600.0})
    reaper.sweep()
    job = repository.get(old)
    assert job is not None
    assert job.completed_at is not None
    assert job.expires_at == pytest.approx(job.completed_at + 3600.0)
    with database.write() as connection:
        connection.execute(update(Job).where(Job.id == old).values(expires_at=database_now() - 1.0))
    reaper.sweep()
    assert repository.get(old) is None
    assert repository.get(young) is not None
    waits = repository.get(waiting)
    assert waits is not None
    assert waits.expires_at is None
    assert {file.job_id for file in store.files()} == {young}
    with database.read() as connection:
        assert connection.scalar(select(func.count()).where(Job.id == old)) == 0
    kinds = [event.kind for event in EventLog(database).after(0, limit=99, subject=old)]
    assert kinds[-1] == "video.deleted"


def test_lost_jobs_do_not_wait_while_all_that_is_kept_is_listed(
    reaper: Reaper, repository: JobRepository, store: ArtifactStore, add_job: AddJob,
    expire_lease: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    put(store, new_job_id(), 1, age_s=0.0)
    (file,) = store.files()
    listed = threading.Semaphore(0)

    def endless() -> Iterator[StoredFile]:
        while True:
            listed.release()
            time.sleep(0.001)
            yield file

    monkeypatch.setattr(store, "files", endless)
    stop = threading.Event()
    running = threading.Thread(target=reaper.run, args=(stop,))
    running.start()
    try:
        assert listed.acquire(timeout=10)
        job_id = add_job()
        assert repository.claim(job_id, worker="lost") is not None
        expire_lease(job_id)
        job = wait_until(
            lambda: (found := repository.get(job_id)) and found.status is JobStatus.QUEUED and found,
            timeout_s=20,
            what="the job of a lost worker waits again",
        )
        assert job.attempt == 1
    finally:
        stop.set()
        running.join(20)
    assert not running.is_alive(), "a list without end does not keep it from stopping"


def test_an_error_that_nobody_expected_ends_the_reaper(reaper: Reaper, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("tidying")

    monkeypatch.setattr(reaper, "_tidy", broken)
    stop = threading.Event()
    with pytest.raises(ZeroDivisionError, match="tidying"):
        reaper.run(stop)
    assert stop.is_set()
