"""The loop: it learns, resumes to the bit, stops cleanly, and notices what is not finite."""

import dataclasses
import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training import trainer
from training.checkpointing import TrainingState, load_newest
from training.config import OptimizerConfig, TrainConfig, override
from training.distributed import Processes, Share
from training.errors import NonFiniteError, TrainingError
from training.recipes import recipe
from training.runs import load_result, train_autoencoder, train_denoiser
from training.trainer import learning_rate_at, step_seed, train

CPU = torch.device("cpu")


class Regression:
    """A task small enough for many runs: fit a line, with dropout, so that every random number counts."""

    def __init__(
        self, *, poison_at: int | None = None, interrupt_at: int | None = None, has_critic: bool = False
    ) -> None:
        torch.manual_seed(7)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.critic = nn.Linear(1, 1) if has_critic else None
        self.calls, self.poison_at, self.interrupt_at = 0, poison_at, interrupt_at

    def compile(self) -> None:
        raise AssertionError("not asked for")

    def auxiliary(self) -> dict[str, nn.Module]:
        return {} if self.critic is None else {"critic": self.critic}

    def take_share(self, share: Share) -> None:
        raise AssertionError("there is one process")

    def describe(self, generator: torch.Generator) -> list[str]:
        return [f"clip {torch.rand(1, generator=generator).item():.6f}", *(f"clip {number}" for number in range(1, 11))]

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(16, 4, generator=generator)
        answer = self.model(x)
        loss = (answer[:, 0] - x.sum(dim=1)).square().mean()
        if self.critic is not None and step >= 25:  # one that starts late
            loss = loss + (self.critic(answer.detach()) - 3).square().mean()
        if self.calls == self.poison_at:
            loss = loss * float("nan")
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls += 1
        return loss, {"mse": loss.detach()}

    def show(self, average: nn.Module) -> dict[str, np.ndarray]:
        return {"ramp": np.arange(5 * 8 * 8 * 3, dtype=np.int64).astype(np.uint8).reshape(5, 8, 8, 3)}

    def evaluate(self, average: nn.Module) -> dict[str, float]:
        return {"norm": float(sum(parameter.square().sum() for parameter in average.parameters()))}


def config(**loop: object) -> TrainConfig:
    base = recipe("autoencoder_tiny")
    return dataclasses.replace(
        base,
        loop=dataclasses.replace(base.loop, **{"steps": 60, "checkpoint_every": 20, "evaluate_every": 60, **loop}),  # type: ignore[arg-type]
    )


def quiet(text: str) -> None:
    """Progress is not looked at here."""


class KilledError(Exception):
    pass


def flatten(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()}


def assert_same_state(first: Path, second: Path) -> None:
    states = [load_newest(folder / "checkpoints", report=pytest.fail) for folder in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].step == states[1].step
    for group in ("modules", "averages", "optimizers"):
        ours, theirs = (flatten(getattr(state, group)) for state in states)
        assert ours.keys() == theirs.keys()
        assert len(ours) > 0
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), f"{group}/{name}"


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines about steps."""
    return [line for line in log_lines(folder) if "loss" in line]


def losses(folder: Path) -> dict[int, float]:
    steps = [line["step"] for line in log_of(folder)]
    assert len(set(steps)) == len(steps)
    return {line["step"]: line["loss"] for line in log_of(folder)}


@pytest.mark.parametrize("killed_at", [30, 50])
def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, killed_at: int) -> None:
    def die(text: str) -> None:
        if text.startswith(f"step {killed_at}/"):
            raise KilledError

    train(Regression(), config(), tmp_path / "whole", device=CPU, report=quiet)
    with pytest.raises(KilledError):
        train(Regression(), config(), tmp_path / "cut", device=CPU, report=die)
    said: list[str] = []
    result = train(Regression(), config(), tmp_path / "cut", device=CPU, is_resuming=True, report=said.append)
    assert f"resumed at step {killed_at - 10}" in said
    assert (result.step, result.is_finished) == (60, True)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(Regression(), config(), tmp_path / "whole", device=CPU, report=quiet)
    result = train(Regression(interrupt_at=33), config(), tmp_path / "cut", device=CPU, report=quiet)
    assert (result.step, result.is_finished, result.reason) == (34, False, "SIGTERM received")
    assert signal.getsignal(signal.SIGTERM) is before
    train(Regression(), config(), tmp_path / "cut", device=CPU, is_resuming=True, report=quiet)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    train(Regression(), config(), tmp_path / "whole", device=CPU, report=quiet)
    rng, legs = random.Random(), 0
    result = None
    while result is None or not result.is_finished:
        steps = rng.randint(0, 5)  # of this leg, less one
        result = train(
            Regression(interrupt_at=steps), config(), tmp_path / "cut", device=CPU, is_resuming=legs > 0, report=quiet
        )
        legs += 1
    assert legs >= 10
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_time_budget_stops_and_saves(tmp_path: Path) -> None:
    result = train(Regression(), config(), tmp_path / "a", device=CPU, time_budget_s=1e-9, report=quiet)
    assert (result.step, result.is_finished) == (0, False)
    assert "time budget" in result.reason
    resumed = train(Regression(), config(), tmp_path / "a", device=CPU, is_resuming=True, report=quiet)
    assert resumed.is_finished
    train(Regression(), config(), tmp_path / "whole", device=CPU, report=quiet)
    assert_same_state(tmp_path / "whole", tmp_path / "a")


def test_total_seconds_end_the_run_with_an_evaluation(tmp_path: Path) -> None:
    timed = config(total_seconds=1e-9, clock="seconds")
    result = train(Regression(), timed, tmp_path, device=CPU, report=quiet)
    assert (result.step, result.is_finished) == (0, True)
    assert set(result.metrics["ema-6.5"]) == {"norm"}


def test_loading_and_compiling_count_for_the_time_budget_and_not_as_training(tmp_path: Path) -> None:
    an_hour_ago = time.monotonic() - 3600
    timed = config(total_seconds=600.0, clock="seconds")
    result = train(Regression(), timed, tmp_path / "a", device=CPU, started=an_hour_ago, report=quiet)
    assert (result.step, result.is_finished) == (60, True)
    assert result.seconds < 600
    result = train(
        Regression(), timed, tmp_path / "b", device=CPU, started=an_hour_ago, time_budget_s=3000, report=quiet
    )
    assert (result.step, result.is_finished) == (0, False)


def test_nan_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 33") as caught:
        train(Regression(poison_at=33), config(), tmp_path, device=CPU, report=quiet)
    assert caught.value.step == 33
    state = load_newest(tmp_path / "checkpoints", report=pytest.fail)
    assert state is not None
    assert state.step == 20
    assert all(value.isfinite().all() for value in state.modules["model"].values())


def test_nan_names_the_clips_of_its_batch(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(Regression(poison_at=33), config(), tmp_path, device=CPU, report=quiet)
    drawn = torch.rand(1, generator=torch.Generator().manual_seed(step_seed(0, 33))).item()
    assert caught.value.batch[0] == f"clip {drawn:.6f}"  # what that step drew, not what the last one did
    assert len(caught.value.batch) == 11
    assert f"on clip {drawn:.6f}; clip 1; " in str(caught.value)
    assert "and 3 more" in str(caught.value)
    last = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["not_finite_at_step"], last["batch"]) == (33, list(caught.value.batch))


def test_a_network_trained_beside_the_model_resumes_too(tmp_path: Path) -> None:
    def critic_of(folder: Path) -> dict[str, Tensor]:
        state = load_newest(folder / "checkpoints", report=pytest.fail)
        assert state is not None
        assert (
            state.averages["ema-6.5"].keys() == dict(Regression().model.named_parameters()).keys()
        )  # the model's alone
        return state.modules["critic"]

    before = Regression(has_critic=True).critic
    train(Regression(has_critic=True), config(), tmp_path / "whole", device=CPU, report=quiet)
    for interrupt_at in (15, 18):  # before the critic has an optimizer state, and after
        cut = tmp_path / f"cut{interrupt_at}"
        train(Regression(has_critic=True, interrupt_at=interrupt_at), config(), cut, device=CPU, report=quiet)
        assert before is not None
        assert torch.equal(critic_of(cut)["weight"], before.weight)
        again = Regression(has_critic=True, interrupt_at=interrupt_at)
        train(again, config(), cut, device=CPU, is_resuming=True, report=quiet)
        train(Regression(has_critic=True), config(), cut, device=CPU, is_resuming=True, report=quiet)
        assert_same_state(tmp_path / "whole", cut)
    assert not torch.equal(critic_of(tmp_path / "whole")["weight"], before.weight)
    with pytest.raises(TrainingError, match="networks critic, model; this run trains model"):
        train(Regression(), config(steps=70), tmp_path / "whole", device=CPU, is_resuming=True, report=quiet)


def test_the_critic_does_not_change_how_the_model_is_clipped(tmp_path: Path) -> None:
    for name, has_critic in (("alone", False), ("beside", True)):
        train(Regression(has_critic=has_critic), config(log_every=1), tmp_path / name, device=CPU, report=quiet)
    norms = [[line["gradient_norm"] for line in log_of(tmp_path / name)] for name in ("alone", "beside")]
    assert norms[0] == norms[1]
    assert any(line["critic_gradient_norm"] > 1 for line in log_of(tmp_path / "beside"))


class Scripted(Regression):
    """Its evaluations give a figure that is highest at step 40 and lowest at step 30."""

    figures: ClassVar = {10: 0.5, 20: 0.4, 30: 0.1, 40: 0.9, 50: 0.3, 60: 0.2}

    def evaluate(self, average: nn.Module) -> dict[str, float]:
        return {"error": self.figures[self.steps]}

    def loss(self, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.steps = step + 1
        return super().loss(generator, step)


@pytest.mark.parametrize(("best", "kept"), [("least", 30), ("most", 40)])
def test_the_best_checkpoint_is_kept_and_its_average_is_a_result(tmp_path: Path, best: str, kept: int) -> None:
    settings = config(best_metric="error", best=best, evaluate_every=10, checkpoint_every=30)
    result = train(Scripted(), settings, tmp_path, device=CPU, report=quiet)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (kept, 50, 60)]
    assert result.metrics["best"] == {"error": Scripted.figures[kept]}
    stored = load_file(tmp_path / "checkpoints" / f"step-{kept:08d}" / "averages.safetensors")
    for name, value in result.averages["best"].items():
        if f"ema-6.5/{name}" in stored:
            assert torch.equal(value, stored[f"ema-6.5/{name}"])
    assert not torch.equal(result.averages["best"]["0.weight"], result.averages["ema-6.5"]["0.weight"])


def test_what_is_done_is_saved_before_it_is_measured(tmp_path: Path) -> None:
    class Killed(Regression):
        def evaluate(self, average: nn.Module) -> dict[str, float]:
            raise KilledError

    with pytest.raises(KilledError):
        train(Killed(), config(evaluate_every=30), tmp_path, device=CPU, report=quiet)
    state = load_newest(tmp_path / "checkpoints", report=pytest.fail)
    assert state is not None
    assert state.step == 30


def test_the_best_so_far_is_known_after_a_restart(tmp_path: Path) -> None:
    settings = config(best_metric="error", evaluate_every=10, checkpoint_every=30)
    train(Scripted(interrupt_at=44), settings, tmp_path, device=CPU, report=quiet)
    result = train(Scripted(), settings, tmp_path, device=CPU, is_resuming=True, report=quiet)
    assert result.metrics["best"] == {"error": 0.1}
    with pytest.raises(TrainingError, match="best_metric is 'psnr'; an evaluation has norm"):
        train(Regression(), config(best_metric="psnr"), tmp_path / "b", device=CPU, report=quiet)


@pytest.mark.parametrize("goal", [None, "norm"])
def test_a_finished_run_that_is_resumed_has_its_figures_again(goal: str | None, tmp_path: Path) -> None:
    settings = config(ema_half_lives=(6.5, 2.0), best_metric=goal)
    first = train(Regression(), settings, tmp_path, device=CPU, report=quiet)
    again = train(Regression(), settings, tmp_path, device=CPU, is_resuming=True, report=quiet)
    assert again.metrics == first.metrics
    assert again.metrics.keys() == again.averages.keys()


def test_every_half_life_has_an_average_and_figures(tmp_path: Path) -> None:
    result = train(Regression(), config(ema_half_lives=(25.0, 2.0, 5.0)), tmp_path, device=CPU, report=quiet)
    assert list(result.averages) == ["ema-25", "ema-2", "ema-5"]
    assert result.metrics.keys() == result.averages.keys()
    newest = load_newest(tmp_path / "checkpoints", report=pytest.fail)
    assert newest is not None
    distance = {
        name: float((state["3.weight"] - newest.modules["model"]["3.weight"]).norm())
        for name, state in result.averages.items()
    }
    assert distance["ema-2"] < distance["ema-5"] < distance["ema-25"]  # the shorter, the closer behind
    assert torch.equal(result.averages["ema-2"]["1.running_mean"], newest.modules["model"]["1.running_mean"])


def test_a_full_disk_does_not_end_the_run_but_the_last_checkpoint_must_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full_at = trainer.save_state, {20, 40}

    def save(directory: Path, state: TrainingState, **options: Any) -> Path:
        if state.step in full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(directory, state, **options)

    monkeypatch.setattr(trainer, "save_state", save)
    said: list[str] = []
    result = train(Regression(), config(), tmp_path / "a", device=CPU, report=said.append)
    assert result.is_finished
    assert sum("cannot be written: [Errno 28] No space left on device; training goes on" in line for line in said) == 2
    assert [line["step"] for line in log_lines(tmp_path / "a") if "not_saved" in line] == [20, 40]
    full_at.add(60)
    with pytest.raises(TrainingError, match="step 60 cannot be written"):
        train(Regression(), config(), tmp_path / "b", device=CPU, report=quiet)


def test_batches_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    three = Processes(CPU, share=Share(0, 3))
    with pytest.raises(TrainingError, match="batch_size 2 cannot be shared out to 3"):
        train(Regression(), config(), tmp_path, device=CPU, processes=three, report=quiet)


def test_nan_is_never_saved_even_between_log_lines(tmp_path: Path) -> None:
    rare = config(log_every=1000)
    with pytest.raises(NonFiniteError, match="step 25"):
        train(Regression(poison_at=25), rare, tmp_path, device=CPU, report=quiet)
    state = load_newest(tmp_path / "checkpoints", report=pytest.fail)
    assert state is not None
    assert state.step == 20


def test_another_run_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    train(Regression(), config(), tmp_path, device=CPU, report=quiet)
    with pytest.raises(TrainingError, match="--resume"):
        train(Regression(), config(), tmp_path, device=CPU, report=quiet)
    other = override(config(), ["optimizer.learning_rate=0.5"])
    with pytest.raises(TrainingError, match=r"optimizer.learning_rate: 0.002 -> 0.5"):
        train(Regression(), other, tmp_path, device=CPU, is_resuming=True, report=quiet)


def test_learning_rate_warms_up_and_falls() -> None:
    schedule = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    assert learning_rate_at(schedule, 0, 0.0) == 0.1
    assert learning_rate_at(schedule, 99, 0.0) == 1.0
    assert abs(learning_rate_at(schedule, 99, 0.5) - 0.55) < 1e-12
    assert abs(learning_rate_at(schedule, 99, 1.0) - 0.1) < 1e-12
    constant = dataclasses.replace(schedule, schedule="constant")
    assert learning_rate_at(constant, 99, 0.9) == 1.0


def test_step_seeds_differ() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(-1, 500)}
    assert len(seeds) == 20 * 501
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def autoencoder_run(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "autoencoder"
    settings = override(recipe("autoencoder_tiny"), ["loop.steps=80"])
    train_autoencoder(settings, folder, table=table, device=CPU, report=quiet)
    return folder


def test_the_autoencoder_learns_speckle(autoencoder_run: Path) -> None:
    found = losses(autoencoder_run)
    assert found[80] < 0.7 * found[1]


def test_latents_are_standardised_over_the_training_windows(autoencoder_run: Path, table: Path) -> None:
    from training.data.latents import encode_windows
    from training.runs import load_autoencoder, load_split

    made = load_result(autoencoder_run, part="autoencoder")
    coder, _ = load_autoencoder(autoencoder_run)
    clips = load_split(table, made.config.data, made.config.model, "train", device=CPU)
    latents = encode_windows(coder, clips, has_flips=False, batch_size=16).latents.float()
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.02
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.02
    # mirrored windows follow, and are coded from mirrored pixels, not mirrored latents
    both = encode_windows(coder, clips, has_flips=True, batch_size=16)
    assert torch.equal(both.latents[: len(clips)].float(), latents)
    assert len(both) == 2 * len(clips)
    assert not torch.equal(both.latents[len(clips) :], both.latents[: len(clips)])
    assert torch.equal(both.conditions[len(clips) :], clips.conditions)


def test_the_denoiser_learns_and_its_latents_are_cached(autoencoder_run: Path, table: Path, tmp_path: Path) -> None:
    settings = override(
        recipe("denoiser_tiny"), ["loop.steps=100", "loop.batch_size=8", "optimizer.learning_rate=0.005"]
    )
    first = override(settings, ["loop.steps=1"])
    options = {"table": table, "autoencoder": autoencoder_run, "device": CPU, "report": quiet}
    before = train_denoiser(first, tmp_path, **options).metrics["ema-6.5"]  # type: ignore[arg-type]
    cache = tmp_path / "latents-train.safetensors"
    stamp = cache.stat().st_mtime_ns
    after = train_denoiser(settings, tmp_path, is_resuming=True, **options).metrics["ema-6.5"]  # type: ignore[arg-type]
    assert after["train_velocity_mse"] < 0.9 * before["train_velocity_mse"]
    assert cache.stat().st_mtime_ns == stamp
    cache.write_bytes(b"damaged")
    train_denoiser(settings, tmp_path, is_resuming=True, **options)  # type: ignore[arg-type]
    assert cache.stat().st_size > 1000


def test_runs_refuse_what_does_not_belong(autoencoder_run: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds a run of part autoencoder, not denoiser"):
        load_result(autoencoder_run, part="denoiser")
    with pytest.raises(TrainingError, match="recipe for the denoiser"):
        train_autoencoder(recipe("denoiser_tiny"), tmp_path, table=table, device=CPU, report=quiet)
    settings = override(recipe("autoencoder_tiny"), ["autoencoder_loss.perceptual=0.1"])
    with pytest.raises(TrainingError, match="--squeezenet"):
        train_autoencoder(settings, tmp_path, table=table, device=CPU, report=quiet)
    settings = override(recipe("denoiser_tiny"), ["model.autoencoder.channels=[8, 8, 8]"])
    with pytest.raises(TrainingError, match="another shape"):
        train_denoiser(settings, tmp_path, table=table, autoencoder=autoencoder_run, device=CPU, report=quiet)
    weights = tmp_path / "result" / "weights.safetensors"
    weights.parent.mkdir()
    (weights.parent / "result.json").write_bytes((autoencoder_run / "result" / "result.json").read_bytes())
    weights.write_bytes((autoencoder_run / "result" / "weights.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(TrainingError, match=r"does not have the hash|no usable result"):
        load_result(tmp_path, part="autoencoder")
