"""Resumable training state on disk: weights, average, optimizer, step. Never read by the server.

A checkpoint is a folder ``step-00001000`` of safetensors and JSON files with their hashes. It is written under
another name, flushed to the disk and renamed, so that a folder of that name is always complete; one that was
damaged later is recognised by its hashes and skipped. Random numbers need no saving: every step seeds its own
from (run seed, step).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medsora.files import sha256_of
from medsora.jsonconfig import from_json, to_json
from training.config import TrainConfig
from training.errors import TrainingError

__all__ = ["TrainingState", "load_newest", "optimizer_tensors", "restore_optimizer", "save_state"]

MANIFEST = "manifest.json"
PREFIX = "step-"


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """Everything that a run needs to go on as if it had not stopped."""

    config: TrainConfig
    step: int
    """Optimizer steps done."""
    seconds: float
    """Training time of all legs so far."""
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """``"<parameter>/<quantity>"``, e.g. ``"head.weight/exp_avg"``."""


def save_state(directory: Path, state: TrainingState, *, keep: int) -> Path:
    """Write a checkpoint below ``directory`` and delete all but the newest ``keep``.

    Nothing that exists is touched before the new one is complete, so a full disk or a kill loses at most the
    new one.

    Raises:
        OSError: The disk is full or not writable; the unfinished folder is removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"{PREFIX}{state.step:08d}"
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name in ("model", "average", "optimizer"):
            tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(state, name).items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        about = {"config": to_json(state.config), "step": state.step, "seconds": state.seconds}
        (temporary / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        hashes = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _flush(directory)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _checkpoints(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(directory: Path, *, report: Callable[[str], None]) -> TrainingState | None:
    """Read the newest undamaged checkpoint below ``directory``; None when there is none at all.

    Args:
        report: Called with a sentence for every damaged checkpoint that is passed over.

    Raises:
        TrainingError: There are checkpoints, but every one is damaged.
    """
    found = _checkpoints(directory)
    for path in found:
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"checkpoint {path.name} is damaged ({error}): trying the one before it")
    if found:
        raise TrainingError(f"all {len(found)} checkpoints in {directory} are damaged: start a new run elsewhere")
    return None


def _load(path: Path) -> TrainingState:
    hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    expected = {"average.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"}
    if set(hashes) != expected:
        raise ValueError(f"{MANIFEST} lists {', '.join(sorted(hashes))}")
    for name, digest in hashes.items():
        if sha256_of(path / name) != digest:
            raise ValueError(f"{name} does not have the hash it was saved with")
    about = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return TrainingState(
        config=from_json(TrainConfig, about["config"], where=f"{path.name}/state.json"),
        step=int(about["step"]),
        seconds=float(about["seconds"]),
        model=load_file(path / "model.safetensors"),
        average=load_file(path / "average.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
    )


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{PREFIX}*"), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's running averages by parameter name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer back what :func:`optimizer_tensors` took.

    Raises:
        TrainingError: A tensor belongs to no parameter of the model.
    """
    names = [name for name, _ in model.named_parameters()]
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in names:
            raise TrainingError(f"the saved optimizer knows {name!r}, which the model does not have")
        state.setdefault(names.index(name), {})[quantity] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
