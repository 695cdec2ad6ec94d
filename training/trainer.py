"""The training loop, top to bottom, for both parts of the model, in one process or in several.

Nothing is read back from the device except every ``log_every`` steps: data are there already, random numbers are
drawn there, and whether a loss was finite is remembered there until somebody looks.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpointing import (
    Goal,
    TrainingState,
    best_checkpoint,
    checkpoint_path,
    load_newest,
    load_state,
    save_state,
)
from training.config import OptimizerConfig, TrainConfig, differences
from training.distributed import Processes
from training.errors import NonFiniteError, TrainingError
from training.logbook import Logbook
from training.progress import StepBar
from training.signals import stop_on_signals
from training.tasks import Task
from training.trained import Trained

__all__ = ["BEST", "TrainResult", "learning_rate_at", "step_seed", "train"]

Report = Callable[[str], None]
CHECKPOINTS = "checkpoints"
BEST = "best"
"""Name under which a result has the first average of the best checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a leg of a run ended."""

    average: nn.Module
    """The network with its first average's weights, in evaluation mode; in the first process only: elsewhere it is
    the network in training."""
    averages: dict[str, dict[str, Tensor]]
    """State of the network in every average and, where there is a goal, in the ``best`` checkpoint; empty in all
    processes but the first."""
    step: int
    """Steps done, all legs together."""
    seconds: float
    """Training time, all legs together: with evaluations, without loading and what else comes before the loop."""
    is_finished: bool
    """False: stopped by a signal or the time budget, to be resumed."""
    reason: str
    signal_number: int = 0
    """The signal that stopped it; 0 for none."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of the last evaluation of each of ``averages`` that was evaluated."""


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
        self._is_here = torch.zeros((), dtype=torch.bool, device=device)

    def observe(self, step: int, loss: Tensor, norm: Tensor, own_loss: Tensor) -> None:
        """Note a step; does not wait for the device.

        Args:
            loss, norm: Of all processes together, so that all find the same step.
            own_loss: Of this process's share.
        """
        is_first = ~torch.isfinite(loss + norm) & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, step, self._first_bad)
        self._is_here = torch.where(is_first, ~torch.isfinite(own_loss.detach()), self._is_here)

    def first_bad(self) -> tuple[int, bool]:
        """Wait for the device: the step (-1 for none), and whether the loss of this process's share was to blame."""
        return int(self._first_bad), bool(self._is_here)


def train(
    task: Task,
    config: TrainConfig,
    directory: Path,
    *,
    device: torch.device,
    processes: Processes | None = None,
    is_resuming: bool = False,
    time_budget_s: float | None = None,
    started: float | None = None,
    report: Report = print,
) -> TrainResult:
    """Train until the run is over, a signal comes, or this leg's time is up; then save.

    Args:
        directory: Of the run: gets ``checkpoints/``, ``log.jsonl`` and ``tensorboard/``. All processes must see it.
        processes: Those that train together; default this one alone.
        is_resuming: Go on from the newest undamaged checkpoint there, or from the start when there is none.
        time_budget_s: Stop this leg so many seconds after ``started``.
        started: ``time.monotonic()`` at which this leg's time began to count; default now. Give the start of
            the process where loading data and compiling should count too.
        report: Called with progress lines.

    Raises:
        NonFiniteError: A loss or gradient was not finite. Nothing from after that step was saved.
        TrainingError: The folder holds a run already (and ``is_resuming`` is false), or another run; the batch
            cannot be shared out evenly; the last checkpoint cannot be written.
    """
    began = time.monotonic()
    processes = processes or Processes(device)
    loop = config.loop
    if loop.batch_size % processes.count:
        raise TrainingError(f"loop.batch_size {loop.batch_size} cannot be shared out to {processes.count} processes")
    if processes.count > 1:
        task.take_share(processes.share)
    prepared_s = processes.from_first(0.0 if started is None else began - started)
    state = _state_to_resume(directory, config, is_resuming, processes, report)
    step, seconds_before = (0, 0.0) if state is None else (state.step, state.seconds)
    trained = Trained(task, config, processes, state)
    first_average, *other_averages = trained.averages.names
    goal = None if loop.best_metric is None else Goal(loop.best_metric, loop.best)
    best = processes.from_first(goal and best_checkpoint(directory / CHECKPOINTS, goal))
    best_value: float | None = None if best is None else best[1]
    guard, generator = FiniteGuard(device), torch.Generator(device)
    metrics: dict[str, dict[str, float]] = {}
    saved_at, evaluated_at = -1 if state is None else step, -1
    if state is not None and state.metrics:
        metrics[first_average], evaluated_at = state.metrics, step
    del state

    def elapsed() -> float:
        return time.monotonic() - began

    def check() -> None:
        """Wait for the device; raise if any step so far was not finite."""
        bad_step, is_here = guard.first_bad()
        if bad_step >= 0:
            generator.manual_seed(step_seed(loop.seed, bad_step))
            found = processes.gather((is_here, task.describe(generator)))
            blamed = [clips for is_to_blame, clips in found if is_to_blame] or [clips for _, clips in found]
            windows = [clip for clips in blamed for clip in clips]
            log.write(step, seconds_before + elapsed(), {"not_finite_at_step": bad_step, "batch": windows})
            raise NonFiniteError(bad_step, windows)

    def save(*, is_last: bool = False) -> None:
        """Write a checkpoint. A full disk does not end the run, unless this is the last one."""
        nonlocal saved_at
        check()
        figures = metrics.get(first_average, {}) if evaluated_at == step else {}
        made = trained.state(config, step, seconds_before + elapsed(), figures)
        problem: str | None = None
        if processes.is_first:
            try:
                save_state(directory / CHECKPOINTS, made, keep=loop.keep_checkpoints, goal=goal)
            except OSError as error:
                problem = f"the checkpoint of step {step} cannot be written: {error}"
        problem = processes.from_first(problem)
        if problem is None:
            saved_at = step
        elif is_last:
            raise TrainingError(problem)
        else:
            log.write(step, seconds_before + elapsed(), {"not_saved": problem})
            report(f"{problem}; training goes on")

    def evaluate(names: list[str]) -> bool:
        """Measure averages; returns whether the first one is now better than in every checkpoint."""
        nonlocal evaluated_at, best_value
        for name in names:
            network = trained.average_network(name)
            figures = processes.from_first(task.evaluate(network) if processes.is_first else {})
            metrics[name] = figures
            log.write(step, seconds_before + elapsed(), {"average": name, "evaluation": figures})
            log.plot(step, f"evaluation of {name}", figures)
            report(f"step {step}  {name}  " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
            if name == first_average and processes.is_first:
                log.show(step, task.show(network), fps=config.data.target_fps)
        evaluated_at = step
        if goal is None:
            return False
        if goal.metric not in metrics[first_average]:
            raise TrainingError(
                f"loop.best_metric is {goal.metric!r}; an evaluation has {', '.join(metrics[first_average])}"
            )
        value = metrics[first_average][goal.metric]
        is_best = goal.is_better(value, best_value)
        best_value = value if is_best else best_value
        return is_best

    window_start, window_step = time.monotonic(), step
    with (
        Logbook(directory if processes.is_first else None, step=step) as log,
        StepBar(loop.steps, step, is_wanted=processes.is_first) as bar,
        stop_on_signals() as signal_received,
    ):
        while True:
            seconds, signal_number = processes.agree(seconds_before + elapsed(), signal_received())
            leg_seconds = seconds - seconds_before + prepared_s
            reason, is_finished = _reason_to_stop(config, step, seconds, leg_seconds, time_budget_s, signal_number)
            if reason:
                break
            # dropout; where it is not drawn for the whole batch, each share must have numbers of its own
            torch.manual_seed(step_seed(loop.seed + 1, step) + (0 if device.type == "cpu" else processes.share.rank))
            generator.manual_seed(step_seed(loop.seed, step))
            rate = learning_rate_at(config.optimizer, step, _progress(config, step, seconds))
            with torch.autocast(device.type, torch.bfloat16, enabled=loop.precision == "bf16"):
                own_loss, parts = task.loss(generator, step)
            norms = trained.descend(own_loss, rate, step)
            loss = processes.mean(own_loss.detach())
            guard.observe(step, loss, torch.stack([*norms.values()]).sum(), own_loss)
            step += 1
            bar.advance(step)

            if step % loop.log_every == 0 or step == 1:
                check()  # waits for the device, so the clock below is honest
                now = time.monotonic()
                speed = (step - window_step) * loop.batch_size / (now - window_start)
                window_start, window_step = now, step
                values = {"loss": float(loss), "gradient_norm": float(norms.pop("model"))}
                values |= {f"{name}_gradient_norm": float(norm) for name, norm in norms.items()}
                values |= {name: float(processes.mean(part)) for name, part in parts.items()}
                seconds = seconds_before + elapsed()
                figures = {"learning_rate": rate, "clips_per_second": round(speed, 1), **values}
                log.write(step, seconds, figures)
                log.plot(step, "training", figures)
                left = _seconds_left(config, step, seconds, speed)
                bar.tell(loss=values["loss"], clips_per_second=speed, seconds_left=left)
                if not bar.is_shown:
                    report(
                        f"step {step}/{loop.steps}  "
                        + "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                        + f"  {speed:.0f} clips/s  {left:.0f} s left"
                    )
            is_measured = step % loop.evaluate_every == 0
            if is_measured or step % loop.checkpoint_every == 0:
                save()  # before the evaluation, which may outlast the patience of whoever sends a SIGTERM
            if is_measured:
                if evaluate([first_average]):
                    save()  # again, with its figures
                window_start, window_step = time.monotonic(), step
        check()
        if saved_at != step:
            save(is_last=True)
        unmeasured = [*([] if evaluated_at == step else [first_average]), *other_averages]
        if is_finished and unmeasured and evaluate(unmeasured):
            save(is_last=True)
        seconds = seconds_before + elapsed()
        report(f"{'finished' if is_finished else 'stopped'} at step {step} after {seconds:.0f} s: {reason}")

    averages = {name: trained.average_state(name) for name in trained.averages.names}
    found_best = best_checkpoint(directory / CHECKPOINTS, goal) if goal is not None and processes.is_first else None
    if found_best is not None:
        kept = load_state(found_best[0])
        averages[BEST] = kept.modules["model"] | kept.averages[first_average]
        metrics[BEST] = kept.metrics
    return TrainResult(
        average=trained.average_network(first_average),
        averages=averages if processes.is_first else {},
        step=step,
        seconds=seconds,
        is_finished=is_finished,
        reason=reason,
        signal_number=signal_number if not is_finished else 0,
        metrics=metrics,
    )


def _state_to_resume(
    directory: Path, config: TrainConfig, is_resuming: bool, processes: Processes, report: Report
) -> TrainingState | None:
    """The newest state in a run's folder: the first process chooses, all read the same."""
    folder = directory / CHECKPOINTS
    state, problem = None, None
    if processes.is_first:
        try:
            state = _newest_state(folder, config, is_resuming, report)
        except TrainingError as error:
            problem = str(error)
    problem, step = processes.from_first((problem, None if state is None else state.step))
    if problem is not None:
        raise TrainingError(problem)
    if step is None:
        return None
    if state is None:
        state = load_state(checkpoint_path(folder, step))
    report(f"resumed at step {step}")
    return replace(state, config=config)


def _newest_state(folder: Path, config: TrainConfig, is_resuming: bool, report: Report) -> TrainingState | None:
    if not is_resuming:
        if folder.is_dir() and any(folder.iterdir()):
            raise TrainingError(f"{folder.parent} holds a run already: go on with --resume, or choose another folder")
        return None
    state = load_newest(folder, report=report)
    changed = [] if state is None else differences(state.config, config)
    if changed:
        raise TrainingError(
            f"{folder.parent} holds a run with other settings, which would not be the same run any more: "
            + "; ".join(changed)
        )
    return state


def _reason_to_stop(
    config: TrainConfig,
    step: int,
    seconds: float,
    leg_seconds: float,
    time_budget_s: float | None,
    signal_number: int,
) -> tuple[str, bool]:
    """Why the loop ends here ("" to go on), and whether that is the end of the run."""
    loop = config.loop
    if step >= loop.steps:
        return f"{loop.steps} steps done", True
    if loop.total_seconds is not None and seconds >= loop.total_seconds:
        return f"{loop.total_seconds:g} s of training done", True
    if signal_number:
        return f"{signal.Signals(signal_number).name} received", False
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
