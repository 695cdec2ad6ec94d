"""Encoder processes: the same files as without them, errors that come through, and what happens when one dies."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from waiting import wait_until

from medsora.errors import VideoError
from medsora.provenance import clip_metadata
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.objects import StorageUnavailableError
from server.settings import Settings, load_settings
from server.storage import ArtifactStore, Variant
from server.worker.dataset_clips import ClipDroppedError, DatasetClips
from server.worker.encoders import LANES, EncoderLostError, EncoderProcesses, LocalEncoders, encoder_count
from server.worker.encoding import EncodingOrder
from server.worker.generation import request_of

FRAMES = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)


class Workshop:
    """One encoder process, and claims on jobs for it."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.settings = Settings(data_dir=folder, redis_url="redis://127.0.0.1:1/0", log_level="error")
        self.database = Database(self.settings.database_address)
        migrate(self.database)
        self.repository = JobRepository(self.database, lease_s=60.0, max_attempts=3)
        self.store = ArtifactStore(self.settings.artifacts_dir)
        datasets = DatasetRepository(self.database, lease_s=60.0)
        stores: Any = SimpleNamespace(
            settings=self.settings,
            store=self.store,
            dataset_clips=DatasetClips(datasets, DatasetFiles(self.settings.datasets_dir)),
        )
        self.here = LocalEncoders(stores)
        self.encoders = EncoderProcesses(self.settings, 1, otherwise=self.here)
        self._values = values

    def order(self, seed: int) -> EncodingOrder:
        job = self.repository.add({**self._values, "seed": seed}, max_queued=1000)
        claim = self.repository.claim(job.id, worker="w")
        assert claim is not None
        metadata = clip_metadata(request_of(job), model="tiny", model_sha256="0" * 64)
        return EncodingOrder(claim=claim, metadata=metadata, checkpoint=Path("unused"), dataset=None)

    def process(self) -> psutil.Process:
        (process,) = [
            child for child in psutil.Process().children() if "server.worker.encoder" in " ".join(child.cmdline())
        ]
        return process


@pytest.fixture(scope="module")
def job_values_of_module() -> dict[str, Any]:
    return {
        "model": "tiny", "prompt": "covid lung", "label": "covid-convex", "num_frames": 16, "width": 32, "height": 32,
        "fps": 8.0, "seconds": "2", "num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "euler",
        "prefix_frames": 0, "strength": 1.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, job_values_of_module: dict[str, Any]) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path_factory.mktemp("encoders"), job_values_of_module)
    workshop.encoders.wait_until_ready()
    yield workshop
    workshop.encoders.close()
    workshop.database.close()


def test_a_process_makes_the_same_files_as_a_thread(workshop: Workshop) -> None:
    """All lanes at once, of clips that differ."""
    orders = [workshop.order(seed) for seed in range(2 * LANES)]
    clips = [FRAMES + np.uint8(seed) for seed in range(2 * LANES)]
    with ThreadPoolExecutor(workshop.encoders.lanes) as threads:
        made = list(threads.map(workshop.encoders.run, orders, clips))
    stored = {clip.files[Variant.VIDEO].name: workshop.store.path(clip.files[Variant.VIDEO].name) for clip in made}
    assert all(path.is_file() for path in stored.values())
    assert len({clip.files[Variant.VIDEO].sha256 for clip in made}) == 2 * LANES
    again = workshop.here.run(orders[3], clips[3])
    assert again.files == made[3].files, "names, sizes and hashes"


def test_errors_come_through_with_where_they_came_from(workshop: Workshop) -> None:
    with pytest.raises(VideoError, match="frames") as caught:
        workshop.encoders.run(workshop.order(1), FRAMES[:8])  # not what the job says
    assert "write_checked" in caught.value.__notes__[0]
    assert list(workshop.settings.artifacts_dir.rglob("*.part*")) == []


def test_an_outage_of_the_bucket_is_still_one_in_another_process() -> None:
    error = copy.copy(StorageUnavailableError("the bucket cannot be reached"))  # as pickle does it
    assert (type(error), str(error)) == (StorageUnavailableError, "the bucket cannot be reached")


def test_a_dropped_clip_tells_why_in_any_process() -> None:
    error = copy.copy(ClipDroppedError("dropped_motion", "It does not move."))
    assert (error.code, str(error)) == ("dropped_motion", "It does not move.")


def test_a_process_that_is_lost_is_replaced(workshop: Workshop) -> None:
    process = workshop.process()
    process.suspend()
    problems: list[Exception] = []

    def encode(seed: int) -> None:
        try:
            workshop.encoders.run(workshop.order(seed), FRAMES)
        except EncoderLostError as error:
            problems.append(error)

    threads = [threading.Thread(target=encode, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    wait_until(
        lambda: workshop.repository.count_waiting() == 0 and workshop.encoders._free.qsize() == LANES - 2,
        timeout_s=30,
        what="two clips in its hands",
    )
    process.kill()
    for thread in threads:
        thread.join()
    assert len(problems) == 2, "those that were under way are told"
    made = [workshop.encoders.run(workshop.order(seed), FRAMES) for seed in range(LANES + 1)]  # on every lane
    assert len(made) == LANES + 1
    assert workshop.process().pid != process.pid
    workshop.process().kill()  # while it has nothing to do: no clip needs to know
    wait_until(lambda: served_by(workshop.encoders).has_ended(), timeout_s=30, what="its end")
    assert workshop.encoders.run(workshop.order(9), FRAMES).files


@pytest.mark.parametrize("side", [32, 512], ids=["and all is sent", "while it is sent more than a socket holds"])
def test_a_process_that_hangs_is_ended(workshop: Workshop, side: int) -> None:
    encoders = EncoderProcesses(workshop.settings, 1, otherwise=workshop.here, clip_limit_s=0.5)
    encoders.wait_until_ready()
    hung = psutil.Process(served_by(encoders).pid)
    hung.suspend()
    with pytest.raises(EncoderLostError):
        encoders.run(workshop.order(20), np.zeros((16, side, side, 3), np.uint8))
    assert not hung.is_running()
    encoders.close()


def test_a_process_that_has_served_for_long_is_replaced(workshop: Workshop) -> None:
    """Clips that it has in hand are finished; then it ends."""
    encoders = EncoderProcesses(workshop.settings, 1, otherwise=workshop.here, clips_of_a_process=LANES + 2)
    encoders.wait_until_ready()  # counts for a clip a lane
    first = psutil.Process(served_by(encoders).pid)
    orders = [workshop.order(seed) for seed in range(30, 34)]
    with ThreadPoolExecutor(encoders.lanes) as threads:
        assert len(list(threads.map(encoders.run, orders, [FRAMES] * 4))) == 4
    assert served_by(encoders).pid != first.pid
    assert not first.is_running()
    encoders.close()


@pytest.mark.parametrize("fault", ["ends", "cannot be made"])
def test_where_none_can_be_started_the_sampling_process_encodes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    started: list[object] = []

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(arguments)
        if fault == "cannot be made":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real([sys.executable, "-c", "raise SystemExit(1)"], **options)

    real = subprocess.Popen
    monkeypatch.setattr("server.worker.encoders.subprocess.Popen", popen)
    encoders = EncoderProcesses(workshop.settings, 1, otherwise=workshop.here)
    encoders.wait_until_ready()
    assert encoders.run(workshop.order(40), FRAMES).files
    assert len(started) == 1, "it is not tried again at once"
    assert "cannot be started" in caplog.text
    monkeypatch.undo()
    encoders._places[0]._not_before = 0.0  # later
    assert encoders.run(workshop.order(41), FRAMES).files
    assert served_by(encoders).taken == 1
    encoders.close()


def test_secrets_from_files_reach_it(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-secret-that-is-long-enough\n")
    monkeypatch.setenv("MEDSORA_REDIS_PASSWORD_FILE", str(secret))
    settings = load_settings(data_dir=workshop.settings.data_dir, redis_url="redis://127.0.0.1:1/0")
    assert settings.redis_password is not None
    encoders = EncoderProcesses(settings, 1, otherwise=workshop.here)
    encoders.wait_until_ready()
    encoders.run(workshop.order(50), FRAMES)
    assert served_by(encoders).taken == LANES + 1
    encoders.close()


def test_it_hears_no_signals_and_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from server.settings import Settings;"
        "from server.worker.encoders import EncoderProcesses;"
        f"encoders = EncoderProcesses(Settings(data_dir=Path({str(tmp_path)!r})), 1, otherwise=None);"
        "encoders.wait_until_ready();"
        "print(encoders._places[0].process.pid, flush=True); sys.stdin.read(); os._exit(70)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    encoder = psutil.Process(int(parent.stdout.readline()))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(encoder.pid, number)
        time.sleep(0.1)
        assert encoder.status() != psutil.STATUS_ZOMBIE, number
    parent.stdin.close()
    assert parent.wait(30) == 70
    parent.stdout.close()
    encoder.wait(30)


@pytest.mark.parametrize(
    ("cores", "sampling", "asked", "count"),
    [
        (2, 1, None, 2),
        (16, 1, None, 16),
        (64, 1, None, 32),
        (16, 4, None, 4),
        (2, 4, None, 1),
        (16, 1, 0, 0),
        (2, 1, 3, 3),
    ],
)
def test_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, cores: int, sampling: int, asked: int | None, count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert encoder_count(Settings(worker_processes=sampling, encoder_processes=asked)) == count


def served_by(encoders: EncoderProcesses) -> Any:
    process = encoders._places[0].process
    assert process is not None
    return process
