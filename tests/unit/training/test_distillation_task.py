"""A network that learns from a teacher to take long steps: its loss, and a whole run through the command line."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from medsora.config import SHORTCUT
from medsora.errors import RequestError
from medsora.models.denoiser import Denoiser
from medsora.pipeline import VideoPipeline
from medsora.request import resolve_request
from training.cli import app
from training.config import TrainConfig, override
from training.data.clips import ClipSet
from training.data.latents import LatentSet
from training.distillation_task import DistillationTask
from training.recipes import recipe
from training.runs import load_result
from training.trajectories import record_trajectories

LOOP = ["--set", "loop.checkpoint_every=20", "--set", "loop.evaluate_every=100", "--device", "cpu"]


def medsora_train(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, f"{result.output} {result.exception}"
    return result.output + str(result.exception or "")


def task(config: TrainConfig) -> DistillationTask:
    generator = torch.Generator().manual_seed(2)
    data = LatentSet(
        latents=torch.randn(6, 4, 4, 4, 4, generator=generator).half(), conditions=torch.zeros(6, 2, dtype=torch.int64)
    )
    clips = ClipSet(
        records=(), num_frames=16, frames=torch.zeros(16, 8, 8, 3, dtype=torch.uint8), starts=torch.zeros(3).long(),
        strides=torch.ones(3).long(), clips=torch.zeros(3).long(), conditions=torch.zeros(3, 2).long(),
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = Denoiser(recipe("denoiser_tiny").model.denoiser).eval()
    for parameter in teacher.parameters():
        if parameter.dim() > 1:  # curved ways, and no zeros
            torch.nn.init.normal_(parameter, std=0.2)
    model = Denoiser(config.model.denoiser)
    model.load_state_dict(model.state_dict() | teacher.state_dict())
    assert config.distillation is not None
    made = record_trajectories(
        teacher, data, torch.ones(6) / 6, config.distillation, clean_prefixes=0.3, generator=generator
    )
    return DistillationTask(config, model.train(), data, data, trajectories=made, clips=clips)


def test_the_step_part_alone_begins_as_nothing_and_is_trained() -> None:
    chosen = task(recipe("denoiser_tiny_shortcut"))
    x, t = torch.randn(2, 4, 4, 4, 4), torch.full((2, 4), 0.5)
    condition = torch.zeros(2, 2, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(chosen.model(x, t, condition), chosen.model(x, t, condition, torch.full((2, 4), 0.25)))
    loss, parts = chosen.loss(torch.Generator().manual_seed(1), 0)
    assert set(parts) == {"velocity_mse", "shortcut_mse"}
    assert float(loss.detach()) == pytest.approx(float(parts["velocity_mse"] + parts["shortcut_mse"]), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert chosen.model.step_out is not None
    assert float(chosen.model.step_out.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_the_last_trajectories_are_kept_for_the_evaluation() -> None:
    chosen = task(recipe("denoiser_tiny_shortcut"))
    assert (len(chosen.trajectories), len(chosen.unseen)) == (16, 8)

    class Exact(torch.nn.Module):
        """Knows where the teacher went."""

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, step: Tensor | None = None) -> Tensor:
            if step is None:
                return torch.zeros_like(x)
            states = chosen.unseen.states.float()
            finest = chosen.unseen.num_intervals
            place = round((1 - float(t.max())) * finest)
            row = [int((states[:, place] - one).abs().flatten(1).amax(1).argmin()) for one in x]
            length = round(float(step.max()) * finest)
            way = states[row, place] - states[row, place + length]
            return way / step.amax(dim=1)[:, None, None, None, None]

    figures = chosen.evaluate(Exact())
    errors = {name: value for name, value in figures.items() if name.startswith("shortcut")}
    assert set(errors) == {f"shortcut_{steps}_error" for steps in (1, 2, 4, 8)}
    assert max(errors.values()) < 2e-2
    assert {"train_velocity_mse", "test_velocity_mse"} <= set(figures)


def test_what_was_distilled_is_sampled_in_few_steps_unless_another_sampler_is_asked_for() -> None:
    assert recipe("denoiser_tiny").model.denoiser.samplers == ("euler", "heun")
    assert recipe("denoiser_tiny_shortcut").model.denoiser.samplers == ("shortcut", "euler", "heun")


def test_a_recipe_with_step_sizes_needs_a_distillation_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match="has_step_sizes"):
        override(recipe("denoiser_tiny"), ["model.denoiser.has_step_sizes=true"])
    with pytest.raises(ValueError, match="has_step_sizes"):
        override(recipe("denoiser_tiny_shortcut"), ["model.denoiser.has_step_sizes=false"])


@pytest.fixture(scope="module")
def root(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``ae``, ``teacher`` and ``student``, and the student as ``checkpoint``."""
    root = tmp_path_factory.mktemp("distilled")
    data = ("--data", table)
    medsora_train("autoencoder", "autoencoder_tiny", *data, "--out", root / "ae", "--set", "loop.steps=10", *LOOP)
    coder = ("--autoencoder", root / "ae")
    medsora_train(
        "denoiser", "denoiser_tiny", *data, *coder, "--out", root / "teacher", "--set", "loop.steps=40",
        "--set", "optimizer.learning_rate=0.01", *LOOP,
    )  # fmt: skip
    medsora_train(
        "distill", "denoiser_tiny_shortcut", *data, *coder, "--teacher", root / "teacher", "--out", root / "student",
        "--set", "loop.steps=40", "--set", "distillation.trajectories=40", "--set", "loop.ema_half_lives=[3]", *LOOP,
    )  # fmt: skip
    medsora_train("export", *coder, "--denoiser", root / "student", "--out", root / "checkpoint")
    return root


def test_long_steps_come_nearer_to_the_teacher() -> None:
    more = ["distillation.trajectories=72", "distillation.held_out=8", "distillation.batch_size=32"]
    chosen = task(override(recipe("denoiser_tiny_shortcut"), more))
    before = chosen.evaluate(chosen.model.eval())
    optimizer = torch.optim.Adam(chosen.model.train().parameters(), lr=2e-3)
    for step in range(60):
        loss, _ = chosen.loss(torch.Generator().manual_seed(step), step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = chosen.evaluate(chosen.model.eval())
    for name in ("shortcut_1_error", "shortcut_4_error"):
        assert after[name] < 0.8 * before[name], (name, before[name], after[name])


def test_the_run_says_who_taught_it(root: Path) -> None:
    lines = [json.loads(line) for line in (root / "student" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("shortcut_4_error" in line.get("evaluation", {}) for line in lines)
    about = load_result(root / "student", part="denoiser").about
    assert about["teacher_sha256"] == load_result(root / "teacher", part="denoiser").about["sha256"]


def test_the_checkpoint_samples_in_few_steps_by_default_and_in_many_on_demand(root: Path) -> None:
    pipeline = VideoPipeline.from_checkpoint(root / "checkpoint", device="cpu")
    limits = pipeline.manifest.limits
    assert limits.samplers == (SHORTCUT, "euler", "heun")
    assert (limits.shortcut_steps, limits.shortcut_guidance) == ((4, 1, 2, 8), 1.5)
    label = limits and pipeline.manifest.labels[0].name
    few = resolve_request(pipeline.manifest, label=label, seed=1)
    assert (few.sampler, few.num_inference_steps, few.guidance_scale) == (SHORTCUT, 4, 1.5)
    many = resolve_request(pipeline.manifest, label=label, seed=1, sampler="euler", num_inference_steps=6)
    assert many.guidance_scale == limits.guidance_scale[1]
    steps: list[tuple[int, int]] = []
    (clip,) = pipeline([few], on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (other,) = pipeline([many])
    assert clip.shape == other.shape == (16, 32, 32, 3)
    with pytest.raises(RequestError, match=r"num_inference_steps.*1, 2, 4, 8 with sampler shortcut; another number"):
        resolve_request(pipeline.manifest, label=label, seed=1, num_inference_steps=30)
    with pytest.raises(RequestError, match=r"guidance_scale.*1.5, which is built into sampler shortcut"):
        resolve_request(pipeline.manifest, label=label, seed=1, guidance_scale=3.0)


def test_few_steps_go_on_from_given_frames_and_edits_take_another_sampler(root: Path) -> None:
    pipeline = VideoPipeline.from_checkpoint(root / "checkpoint", device="cpu")
    label = pipeline.manifest.labels[0].name
    request = resolve_request(pipeline.manifest, label=label, seed=1, prefix_frames=8)
    assert request.sampler == SHORTCUT
    (source,) = pipeline([resolve_request(pipeline.manifest, label=label, seed=2)])
    (clip,) = pipeline([request], sources=[source[:8]])
    assert clip.shape == source.shape
    edit = resolve_request(pipeline.manifest, label=label, seed=1, strength=0.5, num_inference_steps=4)
    assert edit.sampler == "euler"
    (edited,) = pipeline([edit], sources=[source])
    assert edited.shape == source.shape


def test_shortcut_of_a_network_without_step_sizes_is_refused(root: Path, tmp_path: Path) -> None:
    output = medsora_train(
        "export", "--autoencoder", root / "ae", "--denoiser", root / "teacher", "--out", tmp_path / "no",
        "--sampler", SHORTCUT, code=1,
    )  # fmt: skip
    assert "predicts velocity is sampled by euler or heun, not shortcut" in output
    assert not (tmp_path / "no").exists()


def test_a_teacher_is_asked_for_and_must_fit(root: Path, table: Path, tmp_path: Path) -> None:
    common = ("--data", table, "--autoencoder", root / "ae", "--out", tmp_path / "run", *LOOP)
    assert "is no recipe of a distillation" in medsora_train(
        "distill", "denoiser_tiny", *common, "--teacher", root / "teacher", code=2
    )
    assert "given no teacher" in medsora_train("denoiser", "denoiser_tiny_shortcut", *common, code=1)
    assert "another shape" in medsora_train(
        "distill", "denoiser_tiny_shortcut", *common, "--teacher", root / "student", code=1
    )
