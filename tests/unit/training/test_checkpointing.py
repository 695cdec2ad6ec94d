"""Saved state: complete or not there, hashes checked, a damaged one passed over."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

import training.checkpointing as checkpointing
from training.checkpointing import TrainingState, load_newest, optimizer_tensors, restore_optimizer, save_state
from training.errors import TrainingError
from training.recipes import recipe


def state(step: int) -> TrainingState:
    tensors = {"weight": torch.full((4, 4), float(step)), "count": torch.tensor(step)}
    return TrainingState(
        config=recipe("autoencoder_tiny"),
        step=step,
        seconds=step / 2,
        model=tensors,
        average=tensors,
        optimizer=tensors,
    )


def test_newest_state_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save_state(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    loaded = load_newest(tmp_path, report=pytest.fail)
    assert loaded is not None
    assert (loaded.step, loaded.seconds, loaded.config) == (100, 50.0, recipe("autoencoder_tiny"))
    assert torch.equal(loaded.optimizer["weight"], torch.full((4, 4), 100.0))
    assert loaded.model["count"].item() == 100


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "new", report=pytest.fail) is None


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
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
