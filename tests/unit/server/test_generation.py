"""One job from claim to commit, with a model that does as it is told."""

import errno
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from certificates import Authority
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from sqlalchemy.exc import OperationalError

from medsora.errors import BackendError, CheckpointError, VideoError
from medsora.files import sha256_of
from medsora.provenance import SYNTHETIC_NOTE
from medsora.video_io import probe_video
from server.checkpoints import Catalogue
from server.jobs.model import JobStatus
from server.jobs.repository import JobRecord, JobRepository
from server.settings import Settings
from server.storage import ArtifactStore, Variant
from server.worker.generation import run_job
from server.worker.runtime import WorkerRuntime
from server.worker.signing import check_signature

AddJob = Callable[..., str]


class FakePipeline:
    """Takes four steps and returns a grey clip; ``at_step`` may interfere."""

    def __init__(self) -> None:
        self.at_step: Callable[[int], None] = lambda step: None
        self.steps = 0

    def __call__(self, requests: Any, *, on_step: Callable[[int, int], None], preview: Any) -> list[Any]:
        (request,) = requests
        for step in range(1, request.num_inference_steps + 1):
            self.steps = step
            is_wanted = preview.wanted()
            self.at_step(step)
            if is_wanted:
                preview.show(0, [np.full((request.height, request.width, 3), step, dtype=np.uint8)])
            on_step(step, request.num_inference_steps)
        return [np.full((request.num_frames, request.height, request.width, 3), 128, dtype=np.uint8)]


class Bench:
    """A worker's runtime around the fake model."""

    def __init__(self, folder: Path, repository: JobRepository, checkpoint: Path) -> None:
        self.model = FakePipeline()
        self.repository = repository
        self.store = ArtifactStore(folder / "artifacts")
        self.stopping = threading.Event()
        served = Catalogue.load([str(checkpoint)]).default
        self.runtime = cast(
            WorkerRuntime,
            SimpleNamespace(
                settings=Settings(
                    data_dir=folder, redis_url="redis://127.0.0.1:1/0", progress_interval_s=0.0, min_free_bytes=0
                ),
                worker_id="w",
                repository=repository,
                store=self.store,
                stopping=self.stopping,
                pipeline=lambda name: (served, self.model),
            ),
        )

    def run(self, job_id: str) -> JobRecord:
        run_job(self.runtime, job_id)
        job = self.repository.get(job_id)
        assert job is not None
        return job

    def files(self) -> list[str]:
        return sorted(path.name for path in self.store.root.rglob("*") if path.is_file())


def files_of(job_id: str, attempt: int) -> list[str]:
    """Names of all that is made of one clip."""
    endings = ("mp4", "provenance.json", "spritesheet.jpg", "thumbnail.webp")
    return [f"{job_id}.{attempt}.{ending}" for ending in endings]


@pytest.fixture
def bench(tmp_path: Path, repository: JobRepository, tiny_checkpoint: Path) -> Bench:
    return Bench(tmp_path, repository, tiny_checkpoint)


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


def test_still_that_cannot_be_made_fails_the_job_and_leaves_nothing(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.generation as generation

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(generation, "write_spritesheet", full)
    job = bench.run(add_job())
    assert (job.status, job.error_code) == (JobStatus.FAILED, "storage_full")
    assert bench.files() == []


def test_second_message_does_nothing(bench: Bench, add_job: AddJob) -> None:
    done = bench.run(add_job())
    bench.model.steps = 0
    assert bench.run(done.id) == done
    assert bench.model.steps == 0
    run_job(bench.runtime, "video_" + "0" * 32)


def test_canceled_job_stops_at_the_next_step_and_leaves_nothing(bench: Bench, add_job: AddJob) -> None:
    job_id = add_job()
    bench.model.at_step = lambda step: bench.repository.request_cancel(job_id) and None if step == 2 else None
    job = bench.run(job_id)
    assert (job.status, job.error_code) == (JobStatus.CANCELED, "cancelled")
    assert bench.model.steps == 2
    assert bench.files() == []


def test_cancellation_while_encoding_wins(bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import server.worker.generation as generation

    job_id = add_job()
    write = generation.write_mp4

    def slow_write(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        bench.repository.request_cancel(job_id)

    monkeypatch.setattr(generation, "write_mp4", slow_write)
    assert bench.run(job_id).status is JobStatus.CANCELED
    assert bench.files() == []


def test_late_worker_removes_its_own_file_and_nothing_else(
    bench: Bench, add_job: AddJob, expire_lease: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.generation as generation

    job_id = add_job()
    write = generation.write_mp4

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(generation, "write_mp4", write)
        write(*args, **kwargs)
        expire_lease(job_id)
        run_job(bench.runtime, job_id)  # the second worker takes over and finishes

    monkeypatch.setattr(generation, "write_mp4", overtaken)
    job = bench.run(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)
    assert bench.files() == files_of(job_id, 2)


def test_lost_answer_to_a_commit_does_not_cost_the_file(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed = bench.repository.succeed
    calls = []

    def commit_and_lose_the_answer(*args: Any) -> bool:
        calls.append(args)
        if len(calls) == 1:
            succeed(*args)
            raise OperationalError("commit", {}, Exception("connection lost"))
        return succeed(*args)

    monkeypatch.setattr(bench.repository, "succeed", commit_and_lose_the_answer)
    job = bench.run(add_job())
    assert len(calls) == 2
    assert job.status is JobStatus.SUCCEEDED
    assert bench.files() == files_of(job.id, 1)


def test_job_is_left_to_the_reaper_while_its_table_cannot_be_written(
    bench: Bench, add_job: AddJob, expire_lease: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.worker.generation as generation

    def broken(*_: Any) -> bool:
        raise OperationalError("update", {}, Exception("disk I/O error"))

    job_id = add_job()
    with monkeypatch.context() as patch:
        patch.setattr(bench.repository, "succeed", broken)
        patch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda pause_s: None))
        job = bench.run(job_id)
    assert (job.status, job.attempt, job.error_code) == (JobStatus.RUNNING, 1, None)
    expire_lease(job_id)
    bench.repository.sweep_expired()
    job = bench.run(job_id)
    assert (job.status, job.attempt) == (JobStatus.SUCCEEDED, 2)


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
    import server.worker.generation as generation

    write = generation.write_mp4
    monkeypatch.setattr(generation, "write_mp4", lambda path, frames, **kw: write(path, frames[:8], **kw))
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
    assert not [path for path in store.root.rglob("*") if path.is_file()]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.write(job, 1, lambda path: write_mp4(path, noise, fps=8.0), lambda path: None)
"""


def test_real_encoder_that_runs_out_of_room(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ran = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "artifacts")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("lost", ["video", "thumbnail", "spritesheet"])
def test_what_does_not_say_that_it_is_synthetic_is_not_published(
    bench: Bench, add_job: AddJob, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    import server.worker.generation as generation

    name = {"video": "write_mp4", "thumbnail": "write_thumbnail", "spritesheet": "write_spritesheet"}[lost]
    write = getattr(generation, name)

    def write_bare(path: Path, frames: Any, **options: Any) -> None:
        if lost == "video":
            write(path, frames, fps=options["fps"])
        else:
            write(path, frames, metadata=options["metadata"])
            with Image.open(path) as image:
                image.load()
                bare = Image.fromarray(np.asarray(image))
            bare.save(path)

    monkeypatch.setattr(generation, name, write_bare)
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
