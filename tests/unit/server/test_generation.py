"""One job from claim to commit, with a model that does as it is told."""

import errno
import json
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from certificates import Authority
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from sqlalchemy.exc import OperationalError
from waiting import wait_until

from medsora.errors import BackendError, CheckpointError, VideoError
from medsora.files import sha256_of
from medsora.provenance import SYNTHETIC_NOTE
from medsora.request import GenerationRequest
from medsora.video_io import probe_video, read_video
from server.checkpoints import Catalogue
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.jobs.database import Database
from server.jobs.measures import BATCH_SIZE
from server.jobs.model import JobStatus
from server.jobs.repository import JobRecord, JobRepository
from server.measures import read_measures
from server.objects import StorageUnavailableError
from server.settings import Settings
from server.storage import ArtifactStore, Variant
from server.worker.batch_limits import BatchLimits
from server.worker.dataset_clips import DatasetClips
from server.worker.encoders import EncoderLostError, LocalEncoders
from server.worker.generation import run_jobs
from server.worker.runtime import WorkerRuntime
from server.worker.signing import check_signature
from server.worker.storage_watch import StorageWatch

AddJob = Callable[..., str]


class FakePipeline:
    """Takes its steps and returns grey clips; ``at_step`` may interfere, ``at_batch`` refuse a batch."""

    def __init__(self) -> None:
        self.at_step: Callable[[int], None] = lambda step: None
        self.at_batch: Callable[[list[GenerationRequest]], None] = lambda requests: None
        self.batches: list[list[int]] = []
        self.steps = 0

    def __call__(self, requests: Any, *, on_step: Callable[[int, int], None], preview: Any) -> list[Any]:
        request = requests[0]
        assert len({one.shape_key for one in requests}) == 1
        self.batches.append([one.seed for one in requests])
        self.at_batch(requests)
        for step in range(1, request.num_inference_steps + 1):
            self.steps = step
            is_wanted = preview.wanted()
            self.at_step(step)
            if is_wanted:
                preview.show(0, [np.full((request.height, request.width, 3), step, dtype=np.uint8)] * len(requests))
            on_step(step, request.num_inference_steps)
            time.sleep(0.002 if request.num_inference_steps > 10 else 0)
        grey = np.full((request.num_frames, request.height, request.width, 3), 128, dtype=np.uint8)
        return [grey.copy() for _ in requests]


class Bench:
    """A worker's runtime around the fake model."""

    def __init__(
        self, folder: Path, repository: JobRepository, database: Database, checkpoint: Path, most: int = 4
    ) -> None:
        self.model = FakePipeline()
        self.repository = repository
        self.store = ArtifactStore(folder / "artifacts")
        self.stopping = threading.Event()
        served = Catalogue.load([str(checkpoint)]).default
        datasets = DatasetRepository(database, lease_s=60.0)
        self.runtime = cast(
            WorkerRuntime,
            SimpleNamespace(
                settings=Settings(
                    data_dir=folder, redis_url="redis://127.0.0.1:1/0", progress_interval_s=0.0, min_free_bytes=0
                ),
                worker_id="w",
                repository=repository,
                store=self.store,
                storage=StorageWatch(self.store.objects),
                stopping=self.stopping,
                giving_up=self.stopping,
                pipeline=lambda name: (served, self.model),
                datasets=datasets,
                dataset_clips=DatasetClips(datasets, DatasetFiles(folder / "datasets")),
                encoders=None,
                limits=BatchLimits(most),
                window=lambda name: 16,
                busy_at=-math.inf,
                batch_s={},
            ),
        )

        self.runtime.encoders = LocalEncoders(self.runtime)

    def run(self, job_id: str) -> JobRecord:
        run_jobs(self.runtime)
        job = self.repository.get(job_id)
        assert job is not None
        return job

    def files(self) -> list[str]:
        return sorted(path.name for path in self.store.objects.root.rglob("*") if path.is_file())


def files_of(job_id: str, attempt: int) -> list[str]:
    """Names of all that is made of one clip."""
    endings = ("lossless.mkv", "mp4", "provenance.json", "spritesheet.jpg", "thumbnail.webp")
    return [f"{job_id}.{attempt}.{ending}" for ending in endings]


@pytest.fixture
def bench(tmp_path: Path, repository: JobRepository, database: Database, tiny_checkpoint: Path) -> Bench:
    return Bench(tmp_path, repository, database, tiny_checkpoint)


def test_job_becomes_a_checked_video_that_says_what_it_is(bench: Bench, add_job: AddJob) -> None:
    job = bench.run(add_job(seed=99))
    assert (job.status, job.attempt, job.steps_done) == (JobStatus.SUCCEEDED, 1, 4)
    assert job.artifact is not None
    assert bench.files() == files_of(job.id, 1)
    path = bench.store.path(job.artifact)
    assert path.stat().st_size == job.size_bytes
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (16, 32, 32)
    origin = json.loads(info.metadata["comment"])
    assert (origin["synthetic"], origin["seed"], origin["label"]) == (True, 99, "covid-convex")
    assert job.id not in str(info.metadata), "equal videos must be equal files"
    assert job.sampling_s is not None
    assert job.encode_s is not None
    assert job.store_s is not None
    assert min(job.sampling_s, job.encode_s, job.store_s) >= 0


def test_stills_are_made_with_the_video_and_say_what_they_are(bench: Bench, add_job: AddJob) -> None:
    jobs = [bench.run(add_job(seed=99)) for _ in range(2)]
    assert jobs[0].thumbnail_sha256 == jobs[1].thumbnail_sha256, "equal videos must have equal stills"
    assert jobs[0].spritesheet_sha256 == jobs[1].spritesheet_sha256
    assert jobs[0].artifact is not None
    for variant, kind, size, sha256 in (
        (Variant.THUMBNAIL, "WEBP", (32, 32), jobs[0].thumbnail_sha256),
        (Variant.SPRITESHEET, "JPEG", (128, 128), jobs[0].spritesheet_sha256),
    ):
        path = bench.store.path(jobs[0].artifact, variant)
        assert sha256_of(path) == sha256
        with Image.open(path) as image:
            assert (image.format, image.size) == (kind, size)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - 128).max() <= 3
            assert image.getexif()[0x010E] == SYNTHETIC_NOTE
            packet = image.info["xmp"].decode()
        assert "digitalsourcetype/trainedAlgorithmicMedia" in packet
        assert '"seed": 99' in packet


def test_an_exact_copy_is_kept_where_that_is_set(bench: Bench, add_job: AddJob) -> None:
    kept = bench.run(add_job(seed=99))
    assert kept.artifact is not None
    exact, fps = read_video(bench.store.path(kept.artifact, Variant.LOSSLESS))
    shown, _ = read_video(bench.store.path(kept.artifact))
    assert (exact.shape, fps) == ((16, 32, 32, 3), 8.0)
    assert np.abs(exact.astype(int) - shown).mean() < 4
    origin = json.loads(bench.store.path(kept.artifact, Variant.PROVENANCE).read_text())
    assert set(origin["files"]) == {"video", "thumbnail", "spritesheet", "lossless"}
    bench.runtime.settings = bench.runtime.settings.model_copy(update={"keep_lossless": False})
    bare = bench.run(add_job(seed=99))
    assert bare.artifact is not None
    assert bare.sha256 == kept.sha256
    assert not bench.store.path(bare.artifact, Variant.LOSSLESS).exists()


def test_still_that_cannot_be_made_fails_the_job_and_leaves_nothing(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.encoding as encoding

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoding, "write_spritesheet", full)
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, "storage_full")
    assert bench.files() == []


def test_second_message_does_nothing(bench: Bench, add_job: AddJob) -> None:
    done = bench.run(add_job())
    bench.model.steps = 0
    assert bench.run(done.id) == done
    assert bench.model.steps == 0
    assert run_jobs(bench.runtime) == 0


def test_canceled_job_stops_at_the_next_step_and_leaves_nothing(bench: Bench, add_job: AddJob) -> None:
    job_id = add_job(num_inference_steps=1000)
    bench.model.at_step = lambda step: bench.repository.request_cancel(job_id) and None if step == 2 else None
    job = bench.run(job_id)
    assert (job.status, job.error_code) == (JobStatus.CANCELED, "cancelled")
    assert bench.model.steps < 1000
    assert bench.files() == []


def test_cancellation_while_encoding_wins(bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.worker.encoding as encoding

    job_id = add_job()
    write = encoding.write_mp4

    def slow_write(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        bench.repository.request_cancel(job_id)

    monkeypatch.setattr(encoding, "write_mp4", slow_write)
    assert bench.run(job_id).status is JobStatus.CANCELED
    assert bench.files() == []


def test_late_worker_removes_its_own_file_and_nothing_else(
    bench: Bench, add_job: AddJob, expire_lease: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.encoding as encoding

    job_id = add_job()
    write = encoding.write_mp4

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(encoding, "write_mp4", write)
        write(*args, **kwargs)
        expire_lease(job_id)
        run_jobs(bench.runtime)  # the second worker takes over and finishes

    monkeypatch.setattr(encoding, "write_mp4", overtaken)
    job = bench.run(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert bench.files() == files_of(job_id, 2)


def test_lost_answer_to_a_commit_does_not_cost_the_file(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed = bench.repository.succeed_all
    calls = []

    def commit_and_lose_the_answer(*args: Any) -> set[str]:
        calls.append(args)
        if len(calls) == 1:
            succeed(*args)
            raise OperationalError("commit", {}, Exception("connection lost"))
        return succeed(*args)

    monkeypatch.setattr(bench.repository, "succeed_all", commit_and_lose_the_answer)
    job = bench.run(add_job())
    assert len(calls) == 2
    assert job.status is JobStatus.SUCCEEDED
    assert bench.files() == files_of(job.id, 1)


def test_job_is_left_to_the_reaper_while_its_table_cannot_be_written(
    bench: Bench, add_job: AddJob, expire_lease: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.finishing as finishing

    def broken(*_: Any) -> set[str]:
        raise OperationalError("update", {}, Exception("disk I/O error"))

    job_id = add_job()
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, "succeed_all", broken)
        patch.setattr(
            finishing, "time", SimpleNamespace(time=time.time, monotonic=lambda: 0.0, sleep=lambda pause_s: None)
        )
        job = bench.run(job_id)
    assert (job.status, job.attempt, job.error_code) == (JobStatus.RUNNING, 1, None)
    expire_lease(job_id)
    bench.repository.sweep_expired()
    job = bench.run(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)


def test_a_turn_ends_quietly_while_no_job_can_be_claimed(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = add_job()
    outage = OperationalError("select", None, Exception("gone"))
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, "claim_next", MagicMock(side_effect=outage))
        assert run_jobs(bench.runtime) == 0
    assert "no job can be claimed now" in caplog.text
    assert bench.run(job_id).status is JobStatus.SUCCEEDED


def test_stopping_worker_hands_the_job_back(bench: Bench, add_job: AddJob) -> None:
    bench.model.at_step = lambda step: bench.stopping.set() if step == 2 else None
    job = bench.run(add_job())
    assert (job.status, job.attempt, job.handed_back, job.published_at) == (JobStatus.QUEUED, 1, 1, None)
    assert bench.model.steps == 2
    assert bench.files() == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("/secret/path/a.safetensors is bad"), "checkpoint_invalid", ": a.safetensors is bad"),
        (BackendError("no CUDA in /secret/path"), "device_unavailable", "no CUDA in path"),
        (SoftTimeLimitExceeded(), "time_limit_exceeded", "longer than a job may take"),
        (MemoryError(), "out_of_memory", "too little free memory"),
        (VideoError("values that are not finite"), "generation_failed", "not finite"),
        (VideoError("/secret/path/a b/c.mp4: holds no video"), "generation_failed", ": c.mp4: holds no video"),
        (RuntimeError("/secret/path"), "generation_failed", "RuntimeError"),
        (OSError(28, "No space left on device"), "generation_failed", "OSError"),
    ],
)
def test_errors_have_codes(bench: Bench, add_job: AddJob, error: Exception, code: str, message: str) -> None:
    def fail(step: int) -> None:
        raise error

    bench.model.at_step = fail
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, code)
    assert job.error_message is not None
    assert message in job.error_message
    assert "/" not in job.error_message
    assert bench.files() == []
    bench.model.at_step = lambda step: None
    assert bench.run(add_job()).status is JobStatus.SUCCEEDED


def test_short_file_is_not_published(bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.worker.encoding as encoding

    write = encoding.write_mp4
    monkeypatch.setattr(encoding, "write_mp4", lambda path, frames, **kw: write(path, frames[:8], **kw))
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, "generation_failed")
    assert "8 frames" in str(job.error_message)
    assert bench.files() == []


def test_disk_floor_is_checked_before_sampling(bench: Bench, add_job: AddJob) -> None:
    settings = bench.runtime.settings
    bench.runtime.settings = settings.model_copy(update={"min_free_bytes": 2**62})
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, "storage_full")
    assert bench.model.steps == 0


FULL_DISK = """
import signal, sys, resource
from pathlib import Path
import numpy as np
from medsora.video_io import write_mp4
from server.storage import ArtifactStore, StorageFullError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
store = ArtifactStore(Path(sys.argv[1]))
noise = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
job = "video_" + "0" * 32
try:
    store.write(job, 1, lambda path: write_mp4(path, noise, fps=8.0), lambda path: None)
    sys.exit("no error")
except StorageFullError:
    assert not [path for path in store.objects.root.rglob("*") if path.is_file()]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.write(job, 1, lambda path: write_mp4(path, noise, fps=8.0), lambda path: None)
"""


def test_real_encoder_that_runs_out_of_room(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "artifacts")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def status_of(bench: Bench, job_ids: list[str]) -> list[str]:
    jobs = [bench.repository.get(job_id) for job_id in job_ids]
    return [job.status.value for job in jobs if job is not None]


def attempts_of(bench: Bench, job_ids: list[str]) -> list[int]:
    jobs = [bench.repository.get(job_id) for job_id in job_ids]
    return [job.attempt - job.handed_back for job in jobs if job is not None]


def test_jobs_that_are_alike_are_sampled_together(bench: Bench, add_job: AddJob) -> None:
    ids = [add_job(seed=seed) for seed in range(6)]
    other = add_job(seed=6, num_inference_steps=5)
    assert run_jobs(bench.runtime) == 7
    assert bench.model.batches == [[0, 1, 2, 3], [4, 5], [6]]
    assert status_of(bench, [*ids, other]) == ["succeeded"] * 7
    assert bench.files() == sorted(name for job_id in [*ids, other] for name in files_of(job_id, 1))
    assert [bench.repository.get(job_id).batch_size for job_id in ids] == [4, 4, 4, 4, 2, 2]  # type: ignore[union-attr]


def test_late_comers_join_a_batch_that_is_not_full(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add_job(seed=seed) for seed in range(2)]
    bench.runtime.settings = bench.runtime.settings.model_copy(update={"batch_wait_ms": 50})
    wait = bench.stopping.wait

    def wait_and_add(timeout: float) -> bool:
        if len(ids) == 2:
            ids.extend(add_job(seed=seed) for seed in range(2, 7))
        return wait(timeout)

    monkeypatch.setattr(bench.stopping, "wait", wait_and_add)
    run_jobs(bench.runtime)
    assert bench.model.batches[0] == [0, 1, 2, 3]
    assert status_of(bench, ids) == ["succeeded"] * 7


def test_one_canceled_job_leaves_the_batch_and_the_others_go_on(bench: Bench, add_job: AddJob) -> None:
    ids = [add_job(seed=seed, num_inference_steps=100) for seed in range(3)]
    bench.model.at_step = lambda step: bench.repository.request_cancel(ids[1]) and None if step == 2 else None
    run_jobs(bench.runtime)
    assert bench.model.steps == 100
    assert status_of(bench, ids) == ["succeeded", "canceled", "succeeded"]
    assert bench.files() == sorted([*files_of(ids[0], 1), *files_of(ids[2], 1)])


def test_job_that_fails_does_not_fail_its_neighbours(bench: Bench, add_job: AddJob) -> None:
    def refuse(requests: list[GenerationRequest]) -> None:
        if any(request.seed == 2 for request in requests):
            raise VideoError("values that are not finite")

    bench.model.at_batch = refuse
    ids = [add_job(seed=seed) for seed in range(4)]
    run_jobs(bench.runtime)
    assert bench.model.batches == [[0, 1, 2, 3], [0, 1], [2, 3], [2], [3]]
    assert status_of(bench, ids) == ["succeeded", "succeeded", "failed", "succeeded"]
    assert attempts_of(bench, ids) == [1, 1, 1, 1]


def test_clip_that_cannot_be_stored_does_not_fail_its_neighbours(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.encoding as encoding

    ids = [add_job(seed=seed) for seed in range(3)]
    write = encoding.write_thumbnail

    def refuse_one(path: Path, *args: Any, **options: Any) -> None:
        if ids[1] in path.name:
            raise OSError(errno.EIO, "bad block")
        write(path, *args, **options)

    monkeypatch.setattr(encoding, "write_thumbnail", refuse_one)
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["succeeded", "failed", "succeeded"]
    assert bench.files() == sorted([*files_of(ids[0], 1), *files_of(ids[2], 1)])


def test_clip_whose_encoder_is_lost_runs_alone_and_fails_where_that_does_not_help(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add_job(seed=seed) for seed in range(3)]
    run = bench.runtime.encoders.run
    asked: list[int] = []

    def lose(order: Any, frames: Any) -> Any:
        made = run(order, frames)
        seed = order.claim.job.seed
        asked.append(seed)
        if seed == 1 or (seed == 2 and asked.count(2) == 1):  # they were in the same process
            raise EncoderLostError("the process that encoded it is lost")
        return made

    monkeypatch.setattr(bench.runtime.encoders, "run", lose)
    run_jobs(bench.runtime)
    assert bench.model.batches == [[0, 1, 2], [1], [1], [2]]
    assert status_of(bench, ids) == ["succeeded", "failed", "succeeded"]
    assert attempts_of(bench, ids) == [1, 3, 2]
    lost = bench.repository.get(ids[1])
    assert lost is not None
    assert lost.error_code == "attempts_exhausted"
    assert bench.files() == sorted([*files_of(ids[0], 1), *files_of(ids[2], 2)])


def test_outage_of_the_database_while_a_clip_of_a_dataset_is_kept_leaves_it_to_the_reaper(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add_job(seed=seed) for seed in range(2)]
    run = bench.runtime.encoders.run

    def fail_one(order: Any, frames: Any) -> Any:
        if order.claim.job.seed == 0:
            raise OperationalError("SELECT 1", None, Exception("the server is gone"))
        return run(order, frames)

    monkeypatch.setattr(bench.runtime.encoders, "run", fail_one)
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["running", "succeeded"], "its lease runs out"


def test_lack_of_memory_halves_the_batch_and_is_remembered(bench: Bench, add_job: AddJob) -> None:
    class OutOfMemoryError(RuntimeError):  # as torch's
        pass

    def refuse(requests: list[GenerationRequest]) -> None:
        if len(requests) > 1:
            raise OutOfMemoryError("CUDA out of memory")

    bench.model.at_batch = refuse
    ids = [add_job(seed=seed) for seed in range(6)]
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["succeeded"] * 6
    assert attempts_of(bench, ids) == [1] * 6
    sizes = [len(batch) for batch in bench.model.batches]
    assert sizes == [4, 2, 1, 1, 2, 1, 1, 1, 1], "the last two are taken one by one from the beginning"


class ProcessEndedError(BaseException):
    """In place of the end of this process."""


def test_a_broken_device_ends_the_process_and_the_others_of_the_batch_go_on(
    bench: Bench, add_job: AddJob, repository: JobRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An assertion on the device leaves a context in which nothing works any more."""
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise ProcessEndedError

    def break_it(requests: list[GenerationRequest]) -> None:
        if 666 in {request.seed for request in requests}:
            raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("server.worker.generation.os._exit", end)
    monkeypatch.setattr("server.worker.generation.logging.shutdown", lambda: None)
    bench.model.at_batch = break_it
    bad, good = add_job(seed=666), add_job(seed=1)
    with pytest.raises(ProcessEndedError):
        run_jobs(bench.runtime)
    assert [repository.get(job_id).status.value for job_id in (bad, good)] == ["queued", "queued"]  # type: ignore[union-attr]
    with pytest.raises(ProcessEndedError):  # a process a job that breaks it
        run_jobs(bench.runtime)
    run_jobs(bench.runtime)
    done, failed = repository.get(good), repository.get(bad)
    assert done is not None
    assert failed is not None
    assert (done.status, failed.status, failed.error_code) == (
        JobStatus.SUCCEEDED,
        JobStatus.FAILED,
        "generation_failed",
    )
    assert codes == [70, 70]


def test_soft_time_limit_lets_each_of_a_batch_try_alone(bench: Bench, add_job: AddJob) -> None:
    def refuse(requests: list[GenerationRequest]) -> None:
        if len(requests) > 1 or requests[0].seed == 1:
            raise SoftTimeLimitExceeded

    bench.model.at_batch = refuse
    ids = [add_job(seed=seed) for seed in range(3)]
    for _ in range(4):
        run_jobs(bench.runtime)
    assert bench.model.batches == [[0, 1, 2], [0], [1], [2]]
    assert status_of(bench, ids) == ["succeeded", "failed", "succeeded"]


def test_stopping_worker_hands_the_whole_batch_back(bench: Bench, add_job: AddJob) -> None:
    bench.model.at_step = lambda step: bench.stopping.set() if step == 2 else None
    ids = [add_job(seed=seed) for seed in range(3)]
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["queued"] * 3
    assert attempts_of(bench, ids) == [0] * 3
    assert bench.files() == []


def test_turn_ends_and_says_that_there_is_more(bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.worker.generation as generation

    hints: list[Any] = []
    monkeypatch.setattr(generation, "_publish_hint", lambda *args: hints.append(args))
    monkeypatch.setattr(type(bench.runtime.settings), "turn_s", 0.05)
    bench.model.at_batch = lambda requests: time.sleep(0.03)
    ids = [add_job(seed=seed) for seed in range(40)]
    assert 4 <= run_jobs(bench.runtime) < 40
    assert len(hints) == 1
    while run_jobs(bench.runtime):
        pass
    assert status_of(bench, ids) == ["succeeded"] * 40


def test_while_a_batch_is_sampled_the_two_before_are_stored(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many at most: test_finishing.py."""
    import server.worker.encoding as encoding

    write, third_begun = encoding.write_mp4, threading.Event()

    def slow_write(*args: Any, **options: Any) -> None:
        assert third_begun.wait(20), "no overlap"
        write(*args, **options)

    monkeypatch.setattr(encoding, "write_mp4", slow_write)
    bench.model.at_batch = lambda requests: third_begun.set() if len(bench.model.batches) == 3 else None
    ids = [add_job(seed=seed) for seed in range(16)]
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["succeeded"] * 16


def test_a_batch_that_cannot_be_finished_is_left_to_the_reaper_and_harms_no_other(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed_all = bench.repository.succeed_all
    ids = [add_job(seed=seed) for seed in range(12)]

    def broken(rows: Any) -> Any:
        if {job_id for job_id, *_ in rows} & set(ids[:4]):
            raise RuntimeError("a bug")
        return succeed_all(rows)

    monkeypatch.setattr(bench.repository, "succeed_all", broken)
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["running"] * 4 + ["succeeded"] * 8
    assert bench.model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_clip_that_nobody_wants_any_more_may_stay_where_it_cannot_be_removed(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.encoding as encoding

    def no_answer(*_: Any) -> None:
        raise StorageUnavailableError("no answer")

    write = encoding.write_mp4
    ids = [add_job(seed=seed) for seed in range(4)]

    def cancelled_meanwhile(*args: Any, **options: Any) -> None:
        bench.repository.request_cancel(ids[0])
        write(*args, **options)

    monkeypatch.setattr(encoding, "write_mp4", cancelled_meanwhile)
    monkeypatch.setattr(bench.store, "remove_attempt", no_answer)
    run_jobs(bench.runtime)
    assert status_of(bench, ids) == ["canceled"] + ["succeeded"] * 3


def wait_for_status(bench: Bench, job_ids: list[str], status: str) -> None:
    wait_until(lambda: set(status_of(bench, job_ids)) == {status}, timeout_s=20, what=f"jobs that are {status}")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch is claimed as soon as one begins, however long its like took."""
    monkeypatch.setattr("server.worker.next_batch._AHEAD_S", math.inf)


@pytest.mark.usefixtures("at_once")
def test_the_next_batch_is_claimed_while_a_full_one_of_known_length_is_sampled(bench: Bench, add_job: AddJob) -> None:
    ids = [add_job(seed=seed) for seed in range(12)]
    others: list[list[str]] = []

    def at_step(step: int) -> None:
        if step == 4:
            if len(bench.model.batches) == 2:
                wait_for_status(bench, ids[8:], "running")
            others.append(status_of(bench, ids[4 * len(bench.model.batches) :]))

    bench.model.at_step = at_step
    assert run_jobs(bench.runtime) == 12
    assert others == [["queued"] * 8, ["running"] * 4, []], "nobody knew how long the first one would take"
    assert bench.model.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert status_of(bench, ids) == ["succeeded"] * 12
    assert attempts_of(bench, ids) == [1] * 12


@pytest.mark.usefixtures("at_once")
def test_what_was_claimed_ahead_is_handed_back_at_a_stop(bench: Bench, add_job: AddJob) -> None:
    ids = [add_job(seed=seed) for seed in range(12)]

    def at_batch(requests: list[GenerationRequest]) -> None:
        if len(bench.model.batches) == 2:
            wait_for_status(bench, ids[8:], "running")
            bench.stopping.set()

    bench.model.at_batch = at_batch
    assert run_jobs(bench.runtime) == 8
    assert bench.model.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    jobs = [bench.repository.get(job_id) for job_id in ids]
    assert [job.handed_back for job in jobs if job is not None] == [0] * 4 + [1] * 8
    assert status_of(bench, ids) == ["succeeded"] * 4 + ["queued"] * 8
    assert attempts_of(bench, ids) == [1] * 4 + [0] * 8


@pytest.mark.usefixtures("at_once")
def test_nothing_is_claimed_ahead_beside_a_batch_that_is_not_full(bench: Bench, add_job: AddJob) -> None:
    for seed in range(3):
        add_job(seed=seed)
    run_jobs(bench.runtime)
    late: list[str] = []
    found: list[str] = []

    def at_batch(requests: list[GenerationRequest]) -> None:
        if not late:
            late.append(add_job(seed=9))
            time.sleep(0.3)
            found.extend(status_of(bench, late))

    bench.model.at_batch = at_batch
    for seed in range(3):
        add_job(seed=seed)
    run_jobs(bench.runtime)
    assert found == ["queued"]
    assert status_of(bench, late) == ["succeeded"]


def test_nothing_is_claimed_ahead_by_a_worker_that_stops(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.next_batch._AHEAD_S", 0.1)
    bench.runtime.giving_up = threading.Event()  # what is begun is finished

    def at_batch(requests: list[GenerationRequest]) -> None:
        if len(bench.model.batches) == 2:
            bench.stopping.set()
        time.sleep(0.5)

    bench.model.at_batch = at_batch
    ids = [add_job(seed=seed) for seed in range(12)]
    assert run_jobs(bench.runtime) == 8
    assert status_of(bench, ids) == ["succeeded"] * 8 + ["queued"] * 4
    jobs = [bench.repository.get(job_id) for job_id in ids]
    assert [job.handed_back for job in jobs if job is not None] == [0] * 12


@pytest.mark.usefixtures("at_once")
def test_a_job_that_a_worker_was_lost_with_is_not_claimed_ahead(
    bench: Bench, add_job: AddJob, expire_lease: Callable[[str], None]
) -> None:
    suspect = add_job(seed=666)
    bench.repository.claim_next(worker="lost", most=lambda job: 1)
    ids = [add_job(seed=seed) for seed in range(12)]
    attempts: list[int] = []

    def at_batch(requests: list[GenerationRequest]) -> None:
        if len(bench.model.batches) == 2:
            expire_lease(suspect)
            time.sleep(0.5)
        job = bench.repository.get(suspect)
        assert job is not None
        attempts.append(job.attempt - job.handed_back)

    bench.model.at_batch = at_batch
    run_jobs(bench.runtime)
    assert [666] in bench.model.batches, "it was sampled together with others"
    assert attempts[:2] == [1, 1], "it was in the process beside a batch"
    assert status_of(bench, [suspect, *ids]) == ["succeeded"] * 13


@pytest.mark.usefixtures("at_once")
def test_a_batch_that_is_claimed_is_made_though_the_turn_is_over(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.generation._publish_hint", lambda *args: None)
    ids = [add_job(seed=seed) for seed in range(16)]

    def at_batch(requests: list[GenerationRequest]) -> None:
        if len(bench.model.batches) == 2:
            wait_for_status(bench, ids[8:12], "running")
            time.sleep(max(0.0, until - time.monotonic()))

    bench.model.at_batch = at_batch
    monkeypatch.setattr(type(bench.runtime.settings), "turn_s", 2.0)
    until = time.monotonic() + 2.1
    assert run_jobs(bench.runtime) == 12
    jobs = [bench.repository.get(job_id) for job_id in ids]
    assert [job.handed_back for job in jobs if job is not None] == [0] * 16


def test_batches_are_counted(bench: Bench, add_job: AddJob, database: Database) -> None:
    for seed in range(9):
        add_job(seed=seed)
    run_jobs(bench.runtime)
    (sums,) = read_measures(database, [BATCH_SIZE])[BATCH_SIZE.name].values()
    assert sums.counts == {"4.0": 2, "1.0": 1}


@pytest.mark.parametrize("lost", ["video", "thumbnail", "spritesheet"])
def test_what_does_not_say_that_it_is_synthetic_is_not_published(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    import server.worker.encoding as encoding

    name = {"video": "write_mp4", "thumbnail": "write_thumbnail", "spritesheet": "write_spritesheet"}[lost]
    write = getattr(encoding, name)

    def write_bare(path: Path, frames: Any, **options: Any) -> None:
        if lost == "video":
            write(path, frames, fps=options["fps"])
        else:
            write(path, frames, metadata=options["metadata"])
            with Image.open(path) as image:
                image.load()
                bare = Image.fromarray(np.asarray(image))
            bare.save(path)

    monkeypatch.setattr(encoding, name, write_bare)
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, "generation_failed")
    assert "does not say that it is synthetic" in str(job.error_message)
    assert bench.files() == []


def test_origin_beside_the_files(bench: Bench, add_job: AddJob) -> None:
    job = bench.run(add_job(seed=99, prompt="a private matter"))
    assert job.artifact is not None
    text = bench.store.path(job.artifact, Variant.PROVENANCE).read_text()
    origin = json.loads(text)
    assert origin["job_id"] == job.id
    assert (origin["synthetic"], origin["not_for_diagnosis"], origin["has_c2pa_manifest"]) == (True, True, False)
    assert (origin["seed"], origin["label"], origin["sampler"]) == (99, "covid-convex", "euler")
    assert len(origin["model_sha256"]) == 64
    assert origin["files"]["video"] == {"sha256": job.sha256, "size_bytes": job.size_bytes}
    assert origin["files"]["thumbnail"]["sha256"] == job.thumbnail_sha256
    assert "private matter" not in text


def test_files_of_a_job_are_signed_where_a_certificate_is_set(bench: Bench, add_job: AddJob, tmp_path: Path) -> None:
    authority = Authority()
    issued = authority.issue("signer.example.com", ExtendedKeyUsageOID.EMAIL_PROTECTION)
    (tmp_path / "chain.pem").write_bytes(issued.certificate + authority.certificate)
    (tmp_path / "key.pem").write_bytes(issued.key)
    paths = {"c2pa_certificate": tmp_path / "chain.pem", "c2pa_private_key": tmp_path / "key.pem"}
    bench.runtime.settings = bench.runtime.settings.model_copy(update=paths)
    job = bench.run(add_job())
    assert job.artifact is not None
    for variant in (Variant.VIDEO, Variant.THUMBNAIL, Variant.SPRITESHEET):
        check_signature(bench.store.path(job.artifact, variant))
    assert json.loads(bench.store.path(job.artifact, Variant.PROVENANCE).read_text())["has_c2pa_manifest"] is True
    assert sha256_of(bench.store.path(job.artifact)) == job.sha256


def test_preview_of_a_followed_job(bench: Bench, add_job: AddJob) -> None:
    bench.runtime.settings = bench.runtime.settings.model_copy(update={"preview_interval_s": 0.001})
    shown: list[int] = []
    show = bench.repository.show_preview

    def keep(job_id: str, token: int, image: bytes, *, steps_done: int) -> None:
        shown.append(steps_done)
        show(job_id, token, image, steps_done=steps_done)

    bench.repository.show_preview = keep  # type: ignore[method-assign]
    bench.run(add_job())
    assert shown == []  # nobody looks
    followed = add_job()
    bench.repository.want_previews([followed], [], for_s=60.0)
    bench.run(followed)
    assert shown
    assert set(shown) <= {1, 2, 3, 4}


def test_a_bucket_that_fails_costs_no_attempt(bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, next_id = add_job(), add_job(seed=8, num_inference_steps=8)
    is_down = True
    publish, probes = bench.store.objects.publish, []

    def fail(*arguments: Any) -> None:
        if is_down:
            raise StorageUnavailableError("the bucket does not answer")
        publish(*arguments)

    def probe() -> None:
        probes.append(is_down)
        if is_down:
            raise StorageUnavailableError("the bucket does not answer")

    monkeypatch.setattr(bench.store.objects, "publish", fail)
    monkeypatch.setattr(bench.store.objects, "probe", probe)
    for _ in range(5):  # far more than a job has attempts
        job = bench.run(job_id)
        assert job.status is JobStatus.QUEUED
    assert (job.attempt, job.handed_back) == (1, 1), "it is not begun again while files cannot be stored"
    assert len(probes) >= 5
    is_down = False
    assert bench.run(job_id).status is JobStatus.SUCCEEDED
    assert bench.run(next_id).status is JobStatus.SUCCEEDED
    assert sorted(bench.files()) == sorted(
        name for each in (job_id, next_id) for name in files_of(each, bench.run(each).attempt)
    )
