"""The training loop, top to bottom, for both parts of the model.

Nothing is read back from the device except every ``log_every`` steps: data are there already, random numbers are
drawn there, and whether a loss was finite is remembered there until somebody looks.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from medsora.jsonconfig import to_json
from training.checkpointing import (
    TrainingState,
    load_newest,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from training.config import OptimizerConfig, TrainConfig, differences
from training.ema import ExponentialMovingAverage
from training.errors import NonFiniteError, TrainingError
from training.tasks import Task

__all__ = ["TrainResult", "learning_rate_at", "step_seed", "train"]

Report = Callable[[str], None]
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a leg of a run ended."""

    average: nn.Module
    """The averaged network, in evaluation mode."""
    step: int
    """Steps done, all legs together."""
    seconds: float
    """Training time, all legs together."""
    is_finished: bool
    """False: stopped by a signal or the time budget, to be resumed."""
    reason: str
    metrics: dict[str, float]
    """Figures of the last evaluation; empty when none was made."""


def step_seed(seed: int, step: int) -> int:
    """Seed of one step's random numbers: far apart for neighbouring steps and seeds, the same in every leg."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return (mixed ^ (mixed >> 27)) % 2**63


def learning_rate_at(config: OptimizerConfig, step: int, progress: float) -> float:
    """Learning rate of a step.

    Args:
        step: Steps done before it; the rate rises linearly over the first ``warmup_steps``.
        progress: Share of the run that is over, 0 to 1; a cosine falls over it.
    """
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant":
        return config.learning_rate * warmup
    falling = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return config.learning_rate * warmup * (config.final_fraction + (1.0 - config.final_fraction) * falling)


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient norm was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def observe(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Note a step; does not wait for the device."""
        is_bad = ~torch.isfinite(loss.detach() + gradient_norm.detach()) & (self._first_bad < 0)
        self._first_bad = torch.where(is_bad, step, self._first_bad)

    def check(self) -> None:
        """Wait for the device; raise :class:`NonFiniteError` if any step so far was bad."""
        step = int(self._first_bad)
        if step >= 0:
            raise NonFiniteError(step)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM and SIGINT into a polite request: yields a function that says which one came, if any."""
    received: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    watched = (signal.SIGTERM, signal.SIGINT)
    before = {}
    try:
        for number in watched:
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    task: Task,
    config: TrainConfig,
    directory: Path,
    *,
    device: torch.device,
    is_resuming: bool = False,
    time_budget_s: float | None = None,
    started: float | None = None,
    report: Report = print,
) -> TrainResult:
    """Train until the run is over, a signal comes, or this leg's time is up; then save.

    Args:
        directory: Of the run: gets ``checkpoints/`` and ``log.jsonl`` (one line a log entry or evaluation).
        is_resuming: Go on from the newest undamaged checkpoint there, or from the start when there is none.
        time_budget_s: Stop this leg so many seconds after ``started``.
        started: ``time.monotonic()`` at which this leg's time began to count; default now. Give the start of
            the process where loading data and compiling should count too.
        report: Called with progress lines.

    Raises:
        NonFiniteError: A loss or gradient was not finite. Nothing from after that step was saved.
        TrainingError: The folder holds a run already (and ``is_resuming`` is false), or another run.
    """
    started = time.monotonic() if started is None else started
    model, loop = task.model, config.loop
    model.train()
    average = ExponentialMovingAverage(model, loop.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
        fused=device.type == "cuda",
    )
    step, seconds_before = 0, 0.0
    state = _state_to_resume(directory, config, is_resuming, report)
    if state is not None:
        step, seconds_before = state.step, state.seconds
        model.load_state_dict(state.model)
        average.model.load_state_dict(state.average)
        restore_optimizer(optimizer, model, state.optimizer)
        report(f"resumed at step {step}")
    directory.mkdir(parents=True, exist_ok=True)
    if loop.compile:
        task.compile()

    generator = torch.Generator(device)
    guard = FiniteGuard(device)
    metrics: dict[str, float] = {}
    saved_at = evaluated_at = step if state is not None else -1

    def elapsed() -> float:
        return time.monotonic() - started

    def save() -> None:
        nonlocal saved_at
        guard.check()
        save_state(
            directory / CHECKPOINTS,
            TrainingState(
                config=config,
                step=step,
                seconds=seconds_before + elapsed(),
                model=model.state_dict(),
                average=average.model.state_dict(),
                optimizer=optimizer_tensors(optimizer, model),
            ),
            keep=loop.keep_checkpoints,
        )
        saved_at = step

    def evaluate() -> None:
        nonlocal metrics, evaluated_at
        metrics = task.evaluate(average.model)
        evaluated_at = step
        _log(directory, {"step": step, "seconds": round(seconds_before + elapsed(), 1), "evaluation": metrics})
        report(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    window_start, window_step = time.monotonic(), step
    with stop_on_signals() as signal_received:
        while True:
            seconds = seconds_before + elapsed()
            reason, is_finished = _reason_to_stop(config, step, seconds, elapsed(), time_budget_s, signal_received())
            if reason:
                break
            torch.manual_seed(step_seed(loop.seed + 1, step))  # dropout
            generator.manual_seed(step_seed(loop.seed, step))
            rate = learning_rate_at(config.optimizer, step, _progress(config, step, seconds))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=loop.precision == "bf16"):
                loss, parts = task.loss(generator, step)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
            guard.observe(step, loss, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            step += 1

            if step % loop.log_every == 0 or step == 1:
                guard.check()  # waits for the device, so the clock below is honest
                now = time.monotonic()
                speed = (step - window_step) * loop.batch_size / (now - window_start)
                window_start, window_step = now, step
                values = {"loss": float(loss.detach()), "gradient_norm": float(norm)}
                values |= {name: float(part) for name, part in parts.items()}
                seconds = seconds_before + elapsed()
                _log(
                    directory,
                    {"step": step, "seconds": round(seconds, 1), "learning_rate": rate,
                     "clips_per_second": round(speed, 1), **values},
                )  # fmt: skip
                left = _seconds_left(config, step, seconds, speed)
                report(
                    f"step {step}/{loop.steps}  "
                    + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                    + f"  {speed:.0f} clips/s  {left:.0f} s left"
                )
            if step % loop.evaluate_every == 0:
                evaluate()
            if step % loop.checkpoint_every == 0:
                save()
        guard.check()
        if saved_at != step:
            save()
        if is_finished and evaluated_at != step:
            evaluate()
    seconds = seconds_before + elapsed()
    report(f"{'finished' if is_finished else 'stopped'} at step {step} after {seconds:.0f} s: {reason}")
    return TrainResult(
        average=average.model, step=step, seconds=seconds, is_finished=is_finished, reason=reason, metrics=metrics
    )


def _state_to_resume(directory: Path, config: TrainConfig, is_resuming: bool, report: Report) -> TrainingState | None:
    folder = directory / CHECKPOINTS
    if not is_resuming:
        if folder.is_dir() and any(folder.iterdir()):
            raise TrainingError(f"{directory} holds a run already: go on with --resume, or choose another folder")
        return None
    state = load_newest(folder, report=report)
    if state is None:
        return None
    changed = differences(state.config, config)
    if changed:
        raise TrainingError(
            f"{directory} holds a run with other settings, which would not be the same run any more: "
            + "; ".join(changed)
        )
    return replace(state, config=config)


def _reason_to_stop(
    config: TrainConfig,
    step: int,
    seconds: float,
    leg_seconds: float,
    time_budget_s: float | None,
    signal_name: str | None,
) -> tuple[str, bool]:
    """Why the loop ends here ("" to go on), and whether that is the end of the run."""
    loop = config.loop
    if step >= loop.steps:
        return f"{loop.steps} steps done", True
    if loop.total_seconds is not None and seconds >= loop.total_seconds:
        return f"{loop.total_seconds:g} s of training done", True
    if signal_name is not None:
        return f"{signal_name} received", False
    if time_budget_s is not None and leg_seconds >= time_budget_s:
        return f"time budget of {time_budget_s:g} s used", False
    return "", False


def _progress(config: TrainConfig, step: int, seconds: float) -> float:
    loop = config.loop
    if loop.clock == "seconds" and loop.total_seconds is not None:
        return seconds / loop.total_seconds
    return step / loop.steps


def _seconds_left(config: TrainConfig, step: int, seconds: float, clips_per_second: float) -> float:
    left = (config.loop.steps - step) * config.loop.batch_size / max(clips_per_second, 1e-9)
    if config.loop.total_seconds is not None:
        left = min(left, max(0.0, config.loop.total_seconds - seconds))
    return left


def _log(directory: Path, entry: dict[str, object]) -> None:
    with (directory / LOG).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(to_json(entry)) + "\n")
