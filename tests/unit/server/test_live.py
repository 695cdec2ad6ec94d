"""Following a video while it is made: in order, across attempts, never mixed, never taken for whole when it is not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from server.api.live import LiveStream, StreamBrokenError
from server.jobs.repository import FinishedWork, JobRepository
from server.jobs.service import JobService
from server.storage import ArtifactStore

AddJob = Callable[..., str]


class Jobs:
    """Of the service, what is used here."""

    def __init__(self, repository: JobRepository) -> None:
        self._repository = repository

    def get(self, tenant: str, job_id: str) -> Any:
        job = self._repository.get(job_id, tenant=tenant)
        assert job is not None
        return job


class Scene:
    """A job, its attempts, and a stream that follows it."""

    def __init__(self, repository: JobRepository, job_id: str, store: ArtifactStore) -> None:
        self.repository, self.job_id, self.store = repository, job_id, store
        jobs = cast(JobService, Jobs(repository))
        self.stream = LiveStream(jobs, store, "default", job_id, interval_s=0.001)
        self.token = 0

    def claim(self) -> None:
        claim = self.repository.claim(self.job_id, worker="w")
        assert claim is not None
        self.token = claim.token

    def grow(self, content: bytes) -> None:
        path = self.store.live_path(self.job_id, self.token)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)

    def finish(self) -> None:
        info = self.store.write(self.job_id, self.token, lambda path: path.write_bytes(b"whole") and None, Path.stat)
        times = {"sampling_s": 1.0, "encode_s": 0.0, "store_s": 0.0}
        work = FinishedWork(artifact=info.name, size_bytes=5, sha256=info.sha256, **times)
        assert self.repository.succeed(self.job_id, self.token, work)

    def read(self) -> bytes:
        """All that is there now."""
        found = b""
        while piece := self.stream.look():
            found += piece
        return found


@pytest.fixture
def scene(repository: JobRepository, add_job: AddJob, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(repository, add_job(num_frames=64), ArtifactStore(tmp_path / "artifacts"))
    yield made
    made.stream.close()


def test_what_is_written_comes_in_order_until_it_is_finished(scene: Scene) -> None:
    assert scene.stream.look() == b""  # queued
    scene.claim()
    assert scene.stream.look() == b""  # nothing written yet
    scene.grow(b"one ")
    assert scene.read() == b"one "
    assert scene.stream.look() == b""
    scene.grow(b"two ")
    scene.grow(b"three")
    assert scene.read() == b"two three"
    scene.finish()
    assert scene.stream.look() is None


def test_what_comes_before_the_end_is_not_lost(scene: Scene) -> None:
    scene.claim()
    scene.grow(b"x" * 600_000)
    scene.finish()
    assert len(scene.read()) == 600_000
    assert scene.stream.look() is None


def test_another_attempt_goes_on_where_the_first_one_ended(scene: Scene, expire_lease: Callable[[str], None]) -> None:
    scene.claim()
    scene.grow(b"header one two ")
    assert scene.read() == b"header one two "
    expire_lease(scene.job_id)
    scene.repository.sweep_expired()
    assert scene.stream.look() == b""  # it waits again
    scene.claim()
    assert scene.token == 2
    scene.grow(b"header ")
    assert scene.stream.look() == b""  # not as far as the first one was
    scene.grow(b"one two three")
    assert scene.read() == b"three"
    scene.finish()
    assert scene.stream.look() is None


def test_another_attempt_that_gives_other_bytes_ends_the_stream(
    scene: Scene, expire_lease: Callable[[str], None]
) -> None:
    scene.claim()
    scene.grow(b"header one two ")
    scene.read()
    expire_lease(scene.job_id)
    scene.claim()
    scene.grow(b"header one TWO three four")
    with pytest.raises(StreamBrokenError, match="gives other bytes"):
        scene.stream.look()


def test_another_attempt_that_ends_before_what_was_sent_ends_the_stream(
    scene: Scene, expire_lease: Callable[[str], None]
) -> None:
    scene.claim()
    scene.grow(b"header one two ")
    scene.read()
    expire_lease(scene.job_id)
    scene.claim()
    scene.grow(b"header ")
    scene.finish()
    with pytest.raises(StreamBrokenError, match="not how it begins now"):
        scene.stream.look()


def test_a_video_that_fails_cuts_the_stream_off(scene: Scene) -> None:
    scene.claim()
    scene.grow(b"one")
    assert scene.read() == b"one"
    scene.repository.fail(scene.job_id, scene.token, code="generation_failed", message="no")
    with pytest.raises(StreamBrokenError, match="failed"):
        scene.stream.look()


def test_files_that_are_removed_meanwhile_are_read_to_their_end(scene: Scene) -> None:
    scene.claim()
    scene.grow(b"one two")
    assert scene.stream.look() == b"one two"
    scene.grow(b" three")
    scene.finish()
    scene.store.live_path(scene.job_id, scene.token).unlink()
    assert scene.read() == b" three"
    assert scene.stream.look() is None


def test_pieces_wait_for_more(scene: Scene) -> None:
    scene.claim()
    scene.grow(b"one ")
    first = scene.stream.look()
    assert first

    async def follow() -> bytes:
        found = b""
        async for piece in scene.stream.pieces(first):
            found += piece
            if found == b"one ":
                scene.grow(b"two")
                scene.finish()
        return found

    assert anyio.run(follow) == b"one two"
