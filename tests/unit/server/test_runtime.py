"""What a sampling process does before its first job."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.database import Database
from server.jobs.workers import WorkerRegistry
from server.settings import Settings
from server.worker import runtime
from server.worker.runtime import STOP_SIGNAL, WorkerRuntime


@pytest.fixture(autouse=True)
def _restore_handler() -> Iterator[None]:
    before = signal.getsignal(STOP_SIGNAL)
    yield
    signal.signal(STOP_SIGNAL, before)


def test_stop_signal_is_heard_before_anything_slow_begins(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = runtime.migrate

    def stopped_meanwhile(database: Database) -> None:
        assert callable(signal.getsignal(STOP_SIGNAL)), "the signal would not be heard"
        signal.raise_signal(STOP_SIGNAL)
        slow(database)

    monkeypatch.setattr(runtime, "migrate", stopped_meanwhile)
    made = WorkerRuntime(settings)
    assert made.stopping.is_set()
    made.start()
    (record,) = WorkerRegistry(made.database, heartbeat_s=60.0).alive()
    assert record.models == (), "a model was loaded for nothing"
    made.close()


def test_damaged_checkpoint_is_reported_without_its_folder(
    settings: Settings, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, damaged)
    (damaged / "denoiser.safetensors").write_bytes(b"cut off")
    made = WorkerRuntime(settings.model_copy(update={"checkpoints": (str(damaged),)}))
    made.start()
    try:
        (record,) = WorkerRegistry(made.database, heartbeat_s=60.0).alive()
    finally:
        made.close()
    assert record.models == ()
    assert record.problem is not None
    assert record.problem.startswith("denoiser.safetensors has 7 bytes")
