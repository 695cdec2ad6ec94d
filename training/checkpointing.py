"""Resumable training state on disk: weights, averages, optimizers, step. Never read by the server.

A checkpoint is a folder ``step-00001000`` of safetensors and JSON files with their hashes. It is written under
another name, flushed to the disk and renamed, so that a folder of that name is always complete; one that was
damaged later is recognised by its hashes and skipped. Tensors are whole, however many processes trained them. Random
numbers need no saving: every step seeds its own from (run seed, step).
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medsora.files import sha256_of, sync
from medsora.jsonconfig import from_json, to_json
from training.config import TrainConfig
from training.distributed import part_like, whole
from training.errors import TrainingError

__all__ = [
    "Goal",
    "TrainingState",
    "best_checkpoint",
    "checkpoint_path",
    "load_newest",
    "load_state",
    "optimizer_tensors",
    "restore_optimizer",
    "save_state",
]

Tensors = dict[str, Tensor]
MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "step-"
GROUPS = ("modules", "averages", "optimizers")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """Everything that a run needs to go on as if it had not stopped."""

    config: TrainConfig
    step: int
    """Optimizer steps done."""
    seconds: float
    """Training time of all legs so far."""
    modules: dict[str, Tensors]
    """State of the ``model`` and of every network trained beside it."""
    averages: dict[str, Tensors]
    """Parameters of the model in each average, by the average's name."""
    optimizers: dict[str, Tensors]
    """Of each module: ``"<parameter>/<quantity>"``, e.g. ``"head.weight/exp_avg"``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the evaluation at this very step; empty when there was none."""


@dataclass(frozen=True)
class Goal:
    """The figure by which one checkpoint is better than another."""

    metric: str
    best: str
    """``least`` or ``most``."""

    def is_better(self, value: float, than: float | None) -> bool:
        """Whether a value beats another one, or beats having none; what is not finite beats nothing."""
        if not math.isfinite(value):
            return False
        return than is None or (value < than if self.best == "least" else value > than)


def save_state(directory: Path, state: TrainingState, *, keep: int, goal: Goal | None = None) -> Path:
    """Write a checkpoint below ``directory`` and delete all but the newest ``keep`` and the best one.

    Nothing that exists is touched before the new one is complete, so a full disk or a kill loses at most the
    new one.

    Args:
        goal: Says which one is best; None keeps the newest alone.

    Raises:
        OSError: The disk is full or not writable; the unfinished folder is removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for unfinished in directory.glob(f".{PREFIX}*"):  # of a process that was killed while it wrote or deleted
        shutil.rmtree(unfinished, ignore_errors=True)
    final = checkpoint_path(directory, state.step)
    temporary = directory / f".{final.name}.tmp"
    temporary.mkdir()
    try:
        for name in GROUPS:
            save_file(_flatten(getattr(state, name)), temporary / f"{name}.safetensors")
        about = {
            "config": to_json(state.config), "step": state.step, "seconds": state.seconds, "metrics": state.metrics
        }  # fmt: skip
        (temporary / STATE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        hashes = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        aside = _set_aside(final) if final.exists() else None
        temporary.replace(final)
        sync(directory)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
    best = None if goal is None else best_checkpoint(directory, goal)
    for old in _checkpoints(directory)[keep:]:
        if best is None or old != best[0]:
            shutil.rmtree(_set_aside(old), ignore_errors=True)
    return final


def checkpoint_path(directory: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return directory / f"{PREFIX}{step:08d}"


def best_checkpoint(directory: Path, goal: Goal) -> tuple[Path, float] | None:
    """The checkpoint that was evaluated best, and its figure; None where none was evaluated."""
    best: tuple[Path, float] | None = None
    for path in reversed(_checkpoints(directory)):
        try:
            value = json.loads((path / STATE).read_text(encoding="utf-8"))["metrics"].get(goal.metric)
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # damaged: load_newest says so when it matters
        if isinstance(value, float) and goal.is_better(value, None if best is None else best[1]):
            best = path, value
    return best


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
            return load_state(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            report(f"checkpoint {path.name} is damaged ({error}): trying the one before it")
    if found:
        raise TrainingError(f"all {len(found)} checkpoints in {directory} are damaged: start a new run elsewhere")
    return None


def load_state(path: Path) -> TrainingState:
    """Read one checkpoint.

    Raises:
        OSError, ValueError, KeyError, TypeError: It is damaged.
    """
    hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    if set(hashes) != {STATE, *(f"{name}.safetensors" for name in GROUPS)}:
        raise ValueError(f"{MANIFEST} lists {', '.join(sorted(hashes))}")
    for name, digest in hashes.items():
        if sha256_of(path / name) != digest:
            raise ValueError(f"{name} does not have the hash it was saved with")
    about = json.loads((path / STATE).read_text(encoding="utf-8"))
    groups = {name: _unflatten(load_file(path / f"{name}.safetensors")) for name in GROUPS}
    return TrainingState(
        config=from_json(TrainConfig, about["config"], where=f"{path.name}/{STATE}"),
        step=int(about["step"]),
        seconds=float(about["seconds"]),
        metrics=about["metrics"],
        **groups,
    )


def _checkpoints(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob(f"{PREFIX}*"), reverse=True)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that half of one never looks like one."""
    return path.rename(path.with_name(f".{path.name}.old"))


def _flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    return {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, value in tensors.items()
    }


def _unflatten(tensors: Tensors) -> dict[str, Tensors]:
    groups: dict[str, Tensors] = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """The optimizer's running averages by parameter name, whole; cut ones are put together by all processes."""
    found: Tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = whole(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Give an optimizer back what :func:`optimizer_tensors` took.

    Raises:
        TrainingError: A tensor belongs to no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    in_order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {id(parameter): number for number, parameter in enumerate(in_order)}
    numbers = {name: places[id(parameter)] for name, parameter in parameters.items()}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in parameters:
            raise TrainingError(f"the saved optimizer knows {name!r}, which the model does not have")
        is_like_weight = value.shape == parameters[name].shape and value.dim() > 0
        state.setdefault(numbers[name], {})[quantity] = (
            part_like(value, parameters[name].detach()) if is_like_weight else value
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
