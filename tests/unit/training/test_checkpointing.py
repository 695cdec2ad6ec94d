"""Saved state: complete or not there, hashes checked, a damaged one passed over."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import training.checkpointing as checkpointing
from training.checkpointing import (
    Goal,
    TrainingState,
    best_checkpoint,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from training.errors import TrainingError
from training.recipes import recipe


def state(step: int, figure: float | None = None) -> TrainingState:
    tensors = {"weight": torch.full((4, 4), float(step)), "count": torch.tensor(step)}
    return TrainingState(
        config=recipe("autoencoder_tiny"),
        step=step,
        seconds=step / 2,
        modules={"model": tensors, "critic": {"deep/weight": torch.ones(1)}},
        averages={"ema-5": tensors},
        optimizers={"model": tensors},
        metrics={} if figure is None else {"error": figure},
    )


def test_newest_state_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save_state(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    loaded = load_newest(tmp_path, report=pytest.fail)
    assert loaded is not None
    assert (loaded.step, loaded.seconds, loaded.config) == (100, 50.0, recipe("autoencoder_tiny"))
    assert torch.equal(loaded.optimizers["model"]["weight"], torch.full((4, 4), 100.0))
    assert loaded.modules["model"]["count"].item() == 100
    assert loaded.modules["critic"].keys() == {"deep/weight"}
    assert torch.equal(loaded.averages["ema-5"]["weight"], torch.full((4, 4), 100.0))


@pytest.mark.parametrize(("best", "kept"), [("least", 2), ("most", 3)])
def test_the_best_stays_beside_the_newest(tmp_path: Path, best: str, kept: int) -> None:
    goal = Goal("error", best)
    assert best_checkpoint(tmp_path, goal) is None
    figures = {1: 0.5, 2: 0.1, 3: 0.9, 4: float("nan"), 5: None, 6: 0.5, 7: 0.3}
    for step, figure in figures.items():
        save_state(tmp_path, state(step, figure), keep=2, goal=goal)
    found = best_checkpoint(tmp_path, goal)
    assert found is not None
    assert (found[0].name, found[1]) == (f"step-{kept:08d}", figures[kept])
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:08d}" for step in (kept, 6, 7)}
    assert best_checkpoint(tmp_path, Goal("accuracy", best)) is None


def test_a_damaged_description_is_not_the_best(tmp_path: Path) -> None:
    goal = Goal("error", "least")
    for step, figure in ((1, 0.5), (2, 0.1)):
        path = save_state(tmp_path, state(step, figure), keep=2, goal=goal)
    (path / "state.json").write_text('{"metrics": [', encoding="utf-8")
    found = best_checkpoint(tmp_path, goal)
    assert found is not None
    assert found[0].name == "step-00000001"


def test_what_is_not_finite_is_never_better() -> None:
    for best in ("least", "most"):
        goal = Goal("error", best)
        assert goal.is_better(1.0, None)
        assert not goal.is_better(float("nan"), None)
        assert not goal.is_better(float("inf"), 1.0)
        assert not goal.is_better(float("-inf"), 1.0)
        assert not goal.is_better(1.0, 1.0)


WRITER = """
import sys
import torch
from pathlib import Path
from training.checkpointing import TrainingState, save_state
from training.recipes import recipe
torch.set_num_threads(1)
config = recipe("autoencoder_tiny")
print("ready", flush=True)
for step in range(int(sys.argv[2]), 10**6):
    tensors = {"weight": torch.full((300, 300), float(step))}
    save_state(
        Path(sys.argv[1]),
        TrainingState(config=config, step=step, seconds=0.0, modules={"model": tensors}, averages={}, optimizers={}),
        keep=2,
    )
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    newest = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(max(1, newest))], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout as stream:
            assert stream.readline() == "ready\n"
        for _ in range(30):
            time.sleep(rng.uniform(0.0, 0.02))
            process.send_signal(signal.SIGSTOP)  # what another process finds at this moment
            damaged: list[str] = []
            loaded = load_newest(tmp_path, report=damaged.append)
            if loaded is not None:
                newest = max(newest, loaded.step)
                assert damaged == []
                assert torch.equal(loaded.modules["model"]["weight"], torch.full((300, 300), float(loaded.step)))
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        loaded = load_newest(tmp_path, report=pytest.fail)
        assert loaded is None or loaded.modules["model"]["weight"][0, 0] == loaded.step
    assert newest > 2
    save_state(tmp_path, state(10**7), keep=2)
    assert not list(tmp_path.glob(".*"))


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "new", report=pytest.fail) is None


@pytest.mark.parametrize(
    "name", ["modules.safetensors", "averages.safetensors", "optimizers.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save_state(tmp_path, state(step), keep=2)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    said: list[str] = []
    loaded = load_newest(tmp_path, report=said.append)
    assert loaded is not None
    assert loaded.step == 1
    assert len(said) == 1
    assert "step-00000002 is damaged" in said[0]


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save_state(tmp_path, state(3), keep=2) / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(TrainingError, match="all 1 checkpoints"):
        load_newest(tmp_path, report=lambda text: None)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, state(1), keep=2)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, state(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    loaded = load_newest(tmp_path, report=pytest.fail)
    assert loaded is not None
    assert loaded.step == 1


def test_optimizer_state_goes_by_name() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer, model).items()}
    assert "0.weight/exp_avg" in tensors
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    twin.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(twin.parameters(), lr=0.1)
    restore_optimizer(other, twin, tensors)
    step(model, optimizer)
    step(twin, other)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(TrainingError, match=r"'9\.weight'"):
        restore_optimizer(other, twin, {"9.weight/exp_avg": torch.zeros(1)})
