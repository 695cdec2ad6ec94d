"""Training in real processes: several that do together what one does, and ones that are stopped or killed."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from training.checkpointing import TrainingState, load_newest
from training.config import override
from training.recipes import recipe
from training.runs import load_result, train_autoencoder, train_denoiser
from training.trainer import train

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
WORKER = Path(__file__).with_name("training_worker.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # the networks are tiny: threads would wait for each other
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEADLINE_S = 120


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


def quiet(text: str) -> None:
    """Progress is not looked at here."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and the same runs by one process (``*-one``) and by two (``*-ddp``, ``*-fsdp``)."""
    root = tmp_path_factory.mktemp("training")
    table = worker.write_clips(root / "clips")
    train(worker.Toy(), worker.toy_config(), root / "toy-one", device=CPU, report=quiet)
    train_autoencoder(worker.autoencoder_config(), root / "autoencoder-one", table=table, device=CPU, report=quiet)
    train_denoiser(
        worker.denoiser_config(), root / "denoiser-one",
        table=table, autoencoder=root / "autoencoder-one", alignment_files=worker.alignment_files(root), device=CPU,
        report=quiet,
    )  # fmt: skip
    scenarios = ["toy", "poisoned", "stopped", "networks"]
    done = subprocess.run(
        [*TORCHRUN, str(WORKER), str(root), *scenarios],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Warning" not in done.stderr
    return root


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def figures_of(run: Path) -> np.ndarray:
    """Loss, its parts and the norms of the gradients at every step."""
    entries = [entry for entry in log_of(run) if "loss" in entry]
    names = sorted(entries[0].keys() - {"step", "seconds", "clips_per_second"})
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return np.array([[entry[name] for name in names] for entry in entries])


def state_of(run: Path) -> TrainingState:
    state = load_newest(run / "checkpoints", report=pytest.fail)
    assert state is not None
    return state


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    state = state_of(run)
    return {
        f"{kind}/{group}/{name}": value
        for kind in ("modules", "averages", "optimizers")
        for group, tensors in getattr(state, kind).items()
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", ["toy", "autoencoder", "denoiser"])
def test_two_processes_do_what_one_does(folder: Path, task: str, strategy: str) -> None:
    ours, theirs = figures_of(folder / f"{task}-{strategy}"), figures_of(folder / f"{task}-one")
    assert len(ours) == worker.STEPS
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    # the sums are rounded in another order, and AdamW divides small differences by small numbers
    np.testing.assert_allclose(ours, theirs, rtol=2e-2 if task == "autoencoder" else 1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", ["toy", "denoiser"])
def test_two_processes_save_whole_tensors_of_the_same_run(folder: Path, task: str, strategy: str) -> None:
    ours, theirs = tensors_of(folder / f"{task}-{strategy}"), tensors_of(folder / f"{task}-one")
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[1] for name in ours if name.startswith("averages")} == {"ema-6.5", "ema-2"}
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_results_of_two_processes_are_results(folder: Path, strategy: str) -> None:
    for average in ("ema-6.5", "ema-2"):
        ours = load_result(folder / f"denoiser-{strategy}", part="denoiser", average=average)
        theirs = load_result(folder / "denoiser-one", part="denoiser", average=average)
        assert ours.about["metrics"] == pytest.approx(theirs.about["metrics"], rel=1e-4)
        for name, value in ours.weights.items():
            torch.testing.assert_close(value, theirs.weights[name], rtol=2e-3, atol=1e-4)
    coder = load_result(folder / f"autoencoder-{strategy}", part="autoencoder")
    assert coder.weights["latent_scale"].float().sub(1).abs().max() > 1e-3  # measured, not what it starts with


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_named(folder: Path) -> None:
    said = [json.loads((folder / f"poisoned-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert said[0] == said[1] == {"step": 3, "batch": [f"row {row}" for row in range(8, 16)]}
    (entry,) = [entry for entry in log_of(folder / "poisoned") if "not_finite_at_step" in entry]
    assert (entry["not_finite_at_step"], len(entry["batch"])) == (3, 8)
    assert not (folder / "poisoned" / "checkpoints").exists()


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(folder: Path) -> None:
    said = [json.loads((folder / f"stopped-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert said[0] == said[1] == {"step": 5, "signal": signal.SIGTERM}
    result = train(
        worker.Toy(), worker.toy_config(), folder / "stopped", device=CPU, is_resuming=True, report=quiet
    )  # what fsdp left in pieces, one process takes whole
    assert (result.step, result.is_finished) == (worker.STEPS, True)
    np.testing.assert_allclose(figures_of(folder / "stopped"), figures_of(folder / "toy-one"), rtol=1e-5, atol=1e-7)


SETTINGS = ["loop.steps=110", "loop.checkpoint_every=7", "loop.log_every=1", "loop.evaluate_every=40",
            "loop.batch_size=2", "model.autoencoder.dropout=0.2"]  # fmt: skip


def command(table: Path, out: Path, *options: str) -> list[str]:
    settings = [part for value in SETTINGS for part in ("--set", value)]
    return ["-m", "training.cli", "autoencoder", "autoencoder_tiny", "--data", str(table), "--out", str(out),
            "--device", "cpu", *settings, *options]  # fmt: skip


@contextmanager
def started(command: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes into a file, and is not left behind."""
    with output.open("ab") as stream:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int, output: Path) -> None:
    """Until the log has that step."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines() if (run / "log.jsonl").exists() else []
        if any(line.startswith(f'{{"step": {step},') for line in lines):
            return
        assert process.poll() is None, f"ended too soon: {output.read_text(encoding='utf-8')}"
        assert time.monotonic() < deadline, output.read_text(encoding="utf-8")
        time.sleep(0.002)


def test_a_run_killed_at_random_steps_ends_as_if_nothing_had_been(folder: Path) -> None:
    table, cut, whole = folder / "clips" / "clips.csv", folder / "cut", folder / "whole"
    output = folder / "cut.txt"
    moments = sorted(random.sample(range(8, 100), 3))
    print("killed at steps", moments)
    blows = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
    for number, (moment, blow) in enumerate(zip(moments, blows, strict=True)):
        options = ["--resume"] if number else []
        with started([sys.executable, *command(table, cut, *options)], output) as process:
            wait_for_step(process, cut, moment, output)
            process.send_signal(blow)
            status = process.wait(DEADLINE_S)
        newest = state_of(cut).step
        if blow == signal.SIGTERM:
            assert status == 128 + signal.SIGTERM
            assert newest >= moment  # saved where it was told to stop, not at the checkpoint before
            assert f"stopped at step {newest}" in output.read_text(encoding="utf-8")
            assert not (cut / "result").exists()
        else:
            assert status == -signal.SIGKILL
            assert newest % 7 == 0 or newest < moment
    config = override(recipe("autoencoder_tiny"), SETTINGS)
    for run, is_resuming in ((cut, True), (whole, False)):
        train_autoencoder(config, run, table=table, device=CPU, is_resuming=is_resuming, report=quiet)
    ours, theirs = tensors_of(cut), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    np.testing.assert_array_equal(figures_of(cut), figures_of(whole))
    weights = [(run / "result" / "weights.safetensors").read_bytes() for run in (cut, whole)]
    assert weights[0] == weights[1]


def test_torchrun_told_to_stop_lets_the_run_save(folder: Path) -> None:
    run = folder / "told"
    output = folder / "told.txt"
    settings = ("--set", "loop.checkpoint_every=1000")
    with started([*TORCHRUN, *command(folder / "clips" / "clips.csv", run, *settings)], output) as process:
        wait_for_step(process, run, 10, output)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) != 0  # torchrun's own way to say that it was stopped
    newest = state_of(run).step
    assert f"stopped at step {newest}" in output.read_text(encoding="utf-8")
    assert 10 <= newest < 110
    assert psutil.wait_procs(children, timeout=30)[1] == []
