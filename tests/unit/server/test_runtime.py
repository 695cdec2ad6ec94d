"""What a sampling process does before its first job."""

import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from medsora.manifest import read_manifest
from medsora.pipeline import VideoPipeline
from medsora.request import GenerationRequest, resolve_request
from server.jobs.database import Database
from server.jobs.workers import WorkerRecord, WorkerRegistry
from server.settings import Settings
from server.worker import runtime
from server.worker.celery_app import STOP_SIGNAL
from server.worker.runtime import WorkerRuntime


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
    (record,) = registry(made).alive()
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
        (record,) = registry(made).alive()
    finally:
        made.close()
    assert record.models == ()
    assert record.problem is not None
    assert record.problem.startswith("denoiser.safetensors has 7 bytes")


def with_limits(checkpoint: Path, copy: Path, **limits: object) -> Path:
    """A copy of a checkpoint that says it can do something else."""
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["limits"].update(limits)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def registry(made: WorkerRuntime) -> WorkerRegistry:
    return WorkerRegistry(made.database, heartbeat_s=60.0)


def started(settings: Settings) -> WorkerRuntime:
    made = WorkerRuntime(settings)
    made.start()
    return made


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """What the pipelines made in this test are warmed up for; nothing is generated."""
    asked: list[GenerationRequest] = []

    def warm_up(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        asked.extend(requests)
        return {size: 60.0 / size for size in self.batch_sizes}

    monkeypatch.setattr(VideoPipeline, "warm_up", warm_up)
    return asked


def test_pipeline_is_made_as_the_settings_say(settings: Settings, warmed: list[GenerationRequest]) -> None:
    made = started(settings.model_copy(update={"compiled": "off", "batch_sizes": (2, 5)}))
    _, pipeline = made.pipeline("tiny")
    assert pipeline.batch_sizes == (2, 5)
    assert not pipeline.is_compiled
    made.close()


def test_compiling_that_must_be_done_is_a_problem_without_a_gpu(settings: Settings) -> None:
    made = started(settings.model_copy(update={"device": "cpu", "compiled": "on"}))
    (record,) = registry(made).alive()
    made.close()
    assert record.models == ()
    assert record.problem is not None
    assert "compiled can be on with a CUDA device only" in record.problem


def test_warm_up_is_for_what_is_asked_for_by_default(settings: Settings, warmed: list[GenerationRequest]) -> None:
    started(settings).close()
    manifest = read_manifest(Path(settings.checkpoints[0]))
    assert warmed == [resolve_request(manifest, label=manifest.labels[0].name, seed=0)]


def test_warm_up_for_all_shapes_leaves_nothing_to_the_first_jobs(
    settings: Settings, tmp_path: Path, tiny_checkpoint: Path, warmed: list[GenerationRequest]
) -> None:
    several = with_limits(
        tiny_checkpoint, tmp_path / "several", sizes=[[32, 32], [64, 32]], num_frames=[16, 32],
        guidance_scale=[1.0, 1.0, 4.0], samplers=["euler", "heun"],
    )  # fmt: skip
    started(settings.model_copy(update={"checkpoints": (str(several),), "warm_up_shapes": "all"})).close()
    sizes = {(asked.width, asked.height) for asked in warmed}
    lengths = {asked.num_frames for asked in warmed}
    ways = {(asked.sampler, asked.guidance_scale != 1) for asked in warmed}
    assert (sizes, lengths) == ({(32, 32), (64, 32)}, {16, 32})
    assert ways == {("euler", False), ("euler", True), ("heun", False), ("heun", True)}
    assert len(warmed) == len({asked.shape_key for asked in warmed}) == len(sizes) * len(lengths) * len(ways)


def test_warm_up_for_all_shapes_goes_on_from_known_frames_where_that_can_be_asked_for(
    settings: Settings, tmp_path: Path, tiny_checkpoint: Path, warmed: list[GenerationRequest]
) -> None:
    able = with_limits(tiny_checkpoint, tmp_path / "able", clean_prefixes=True, max_frames=64)
    started(settings.model_copy(update={"checkpoints": (str(able),), "warm_up_shapes": "all"})).close()
    assert {asked.num_frames for asked in warmed} == {16, 24}


def test_seconds_of_the_warm_up_are_logged_and_reported(
    settings: Settings, warmed: list[GenerationRequest], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=runtime.__name__)
    made = started(settings.model_copy(update={"device": "cpu", "batch_sizes": (1, 8)}))
    (record,) = registry(made).alive()
    made.close()
    assert (record.models, record.problem) == (("tiny",), None)
    assert record.warm_up_s == {"tiny": {"1": 60.0, "8": 7.5}}
    loaded, warm = (record.getMessage() for record in caplog.records)
    assert loaded.startswith("model tiny is loaded on cpu (not compiled) after ")
    assert warm == "model tiny is warmed up: 60.0 s at batch 1, 7.5 s at batch 8"


def test_nobody_is_told_ready_while_it_warms_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    made = WorkerRuntime(settings.model_copy(update={"worker_heartbeat_s": 0.01}))
    seen: list[WorkerRecord] = []

    def warm_up(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        begun = time.time()
        while not seen or seen[0].age_s > time.time() - begun:  # until a sign of life that was given meanwhile
            seen[:] = registry(made).alive()
            time.sleep(0.005)
        return {1: 0.1}

    monkeypatch.setattr(VideoPipeline, "warm_up", warm_up)
    made.start()
    (after,) = registry(made).alive()
    made.close()
    assert seen[0].problem is not None
    assert "is starting" in seen[0].problem
    assert (after.models, after.problem) == (("tiny",), None)


def test_stop_signal_breaks_the_warm_up_off(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=runtime.__name__)

    def warm_up(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        try:
            signal.raise_signal(STOP_SIGNAL)
        except Exception:
            raise AssertionError("a compiler would have caught it") from None
        finally:
            signal.raise_signal(STOP_SIGNAL)  # comes again and again, and must not disturb the way out
        raise AssertionError("it went on")

    monkeypatch.setattr(VideoPipeline, "warm_up", warm_up)
    made = started(settings.model_copy(update={"checkpoints": (*settings.checkpoints, "another")}))
    (record,) = registry(made).alive()
    signal.raise_signal(STOP_SIGNAL)
    made.close()
    assert made.stopping.is_set()
    assert record.problem is not None, "it would be told ready"
    assert caplog.records[-1].getMessage() == "the warm-up of model tiny is broken off: this process stops"


def test_what_fails_on_the_way_out_of_a_warm_up_is_no_problem(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warm_up(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        try:
            signal.raise_signal(STOP_SIGNAL)
        finally:
            raise RuntimeError("the graph that was being recorded is not valid")

    monkeypatch.setattr(VideoPipeline, "warm_up", warm_up)
    started(settings).close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_without_a_gpu_the_warm_up_is_one_short_call(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[GenerationRequest]] = []
    call = VideoPipeline.__call__

    def counted(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> object:
        calls.append(list(requests))
        return call(self, requests)

    monkeypatch.setattr(VideoPipeline, "__call__", counted)
    started(settings.model_copy(update={"device": "cpu", "batch_sizes": (1, 8, 64)})).close()
    ((request,),) = calls
    assert request.num_inference_steps <= 2


def test_no_warm_up_where_none_is_wanted(settings: Settings, warmed: list[GenerationRequest]) -> None:
    made = started(settings.model_copy(update={"warm_up": False}))
    made.pipeline("tiny")
    made.close()
    assert warmed == []


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> list[str]:
    """Let compiled pipelines, or all, fail at their warm-up; returns how they are asked to be compiled."""
    asked: list[str] = []
    load = VideoPipeline.from_checkpoint.__func__  # type: ignore[attr-defined]

    def from_checkpoint(cls: type[VideoPipeline], directory: Path, **options: Any) -> VideoPipeline:
        asked.append(options["compiled"])
        pipeline = load(cls, directory, **{**options, "compiled": "off"})
        if options["compiled"] != "off":
            pipeline._sample_by_graphs = object()  # as if this machine had a GPU
        return pipeline  # type: ignore[no-any-return]

    def warm_up(self: VideoPipeline, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        if self.is_compiled or not compiled:
            raise error
        return {1: 0.1}

    monkeypatch.setattr(VideoPipeline, "from_checkpoint", classmethod(from_checkpoint))
    monkeypatch.setattr(VideoPipeline, "warm_up", warm_up)
    return asked


class CompilationError(Exception):
    """Triton's own errors are no RuntimeError."""


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nMore lines."), CompilationError("at 3:4")])
def test_what_cannot_be_compiled_runs_without(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    asked = failing(error, monkeypatch, compiled=True)
    made = started(settings.model_copy(update={"batch_sizes": (1, 1024)}))
    (record,) = registry(made).alive()
    assert not made.pipeline("tiny")[1].is_compiled
    made.close()
    assert asked == ["auto", "off"]
    assert (record.models, record.problem) == (("tiny",), None)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    reason = str(error).splitlines()[0]
    assert warning.startswith(
        f"tiny could not be warmed up: {reason}; fewer or smaller MEDSORA_BATCH_SIZES (now 1,1024)"
    )
    assert "slower" in warning


def test_what_must_be_compiled_is_refused_with_what_to_change(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = failing(RuntimeError("CUDA out of memory."), monkeypatch, compiled=True)
    made = started(settings.model_copy(update={"compiled": "on"}))
    (record,) = registry(made).alive()
    made.close()
    assert (asked, record.models) == (["on"], ())
    assert record.problem is not None
    assert record.problem.startswith("tiny could not be warmed up: CUDA out of memory.; fewer or smaller MEDSORA_BATCH")
    assert "MEDSORA_COMPILED=off" in record.problem


def test_a_device_that_fails_in_any_case_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(RuntimeError("CUDA error: unspecified launch failure"), monkeypatch, compiled=False)
    made = started(settings)
    (record,) = registry(made).alive()
    made.close()
    assert (record.models, record.problem) == (
        (), "tiny could not be warmed up: CUDA error: unspecified launch failure",
    )  # fmt: skip


def test_a_job_in_whose_time_a_model_is_loaded_keeps_its_time_limit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = started(settings.model_copy(update={"checkpoints": ("/gone",)}))
    made.settings = settings
    asked = failing(SoftTimeLimitExceeded(), monkeypatch, compiled=True)
    with pytest.raises(SoftTimeLimitExceeded):
        made.pipeline("tiny")
    made.close()
    assert asked == ["auto"]


def test_a_model_that_fits_no_memory_is_reported(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_checkpoint(*_: object, **__: object) -> VideoPipeline:
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(VideoPipeline, "from_checkpoint", from_checkpoint)
    made = started(settings)
    (record,) = registry(made).alive()
    made.close()
    assert record.problem == "tiny cannot be loaded: RuntimeError."


def test_a_limit_that_replaces_processes_after_every_job_is_warned_of(
    settings: Settings, warmed: list[GenerationRequest], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings.model_copy(update={"encoder_processes": 0})  # which would refuse what follows
    started(settings.model_copy(update={"worker_max_memory_mib": 2**30})).close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    started(settings.model_copy(update={"worker_max_memory_mib": 1})).close()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "more than MEDSORA_WORKER_MAX_MEMORY_MIB (1)" in record.getMessage()
