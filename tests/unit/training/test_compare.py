"""Runs measured alike: the same labels, seeds and real windows for all, and clear refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from training.cli import app
from training.compare import Compared, compare_runs, comparison_table
from training.errors import TrainingError
from training.evaluation.config import EvaluationConfig
from training.evaluation.networks import EvaluationNetworks, squeezenet_frames
from training.squeezenet import SqueezeNet

LOOP = ["--set", "loop.steps=4", "--device", "cpu"]
SETTINGS = EvaluationConfig(num_samples=6, batch_size=3)


def medsora_train(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def root(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one autoencoder: ``flow``, the same once more as ``again``, ``ddpm``; ``other`` is of another one."""
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("ae", 0), ("ae2", 1)):
        medsora_train(
            "autoencoder",
            "autoencoder_tiny",
            "--data",
            table,
            "--out",
            root / name,
            *LOOP,
            "--set",
            f"loop.seed={seed}",
        )
    noise = [
        "--set", "model.denoiser.prediction=noise", "--set", "model.denoiser.out_channels=8",
        "--set", "denoiser_loss.clean_prefixes=0",
    ]  # fmt: skip
    for name, coder, more in (("flow", "ae", []), ("again", "ae", []), ("ddpm", "ae", noise), ("other", "ae2", [])):
        medsora_train(
            "denoiser", "denoiser_tiny", "--data", table, "--autoencoder", root / coder, "--out", root / name, *LOOP,
            "--set", "loop.ema_half_lives=[2,3]", "--set", "loop.steps=20", "--set", "optimizer.learning_rate=0.03",
            *more,
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def networks() -> EvaluationNetworks:
    torch.manual_seed(0)
    network = SqueezeNet()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # features then differ from picture to picture
    return EvaluationNetworks(squeezenet=squeezenet_frames(network.eval().requires_grad_(False)))


def compare(root: Path, table: Path, networks: EvaluationNetworks, *runs: str, **more: object) -> list[Compared]:
    lines, floor = compare_runs(
        [root / run for run in runs], table=table, autoencoder=root / "ae", networks=networks,
        device=torch.device("cpu"), settings=SETTINGS, report=lambda text: None, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    assert set(floor) == {name + end for name in lines[0].to_test for end in ("", "_same_labels")}
    assert all(value > 0 for value in floor.values())
    return lines


def test_equal_runs_have_equal_figures_and_other_settings_others(
    root: Path, table: Path, networks: EvaluationNetworks
) -> None:
    lines = compare(root, table, networks, "flow", "again", "ddpm", num_inference_steps=(2, 3))
    assert [(line.run, line.sampler, line.num_inference_steps) for line in lines] == [
        ("flow", "euler", 2), ("flow", "euler", 3), ("again", "euler", 2), ("again", "euler", 3), ("ddpm", "ddim", 2),
        ("ddpm", "ddim", 3),
    ]  # fmt: skip
    assert dataclasses.replace(lines[2], run="flow") == lines[0]
    assert len({line.to_test["frechet_squeezenet"] for line in lines}) == 4
    assert all(line.motion > 0 and -1 <= line.resemblance <= 1 for line in lines)
    # the test split has one label, of which there are fewer samples
    assert all(line.to_test_same_labels != line.to_test for line in lines)


def test_averages_and_guidance_are_settings_too(root: Path, table: Path, networks: EvaluationNetworks) -> None:
    lines = compare(root, table, networks, "flow", averages=("ema-2", "ema-3"), guidance_scales=(1.0, 4.0))
    settings = [(line.average, line.guidance_scale) for line in lines]
    assert settings == [("ema-2", 1.0), ("ema-2", 4.0), ("ema-3", 1.0), ("ema-3", 4.0)]
    assert len({line.to_train["frechet_squeezenet"] for line in lines}) == 4


def test_a_run_of_another_autoencoder_is_refused(root: Path, table: Path, networks: EvaluationNetworks) -> None:
    with pytest.raises(TrainingError, match="other was trained on the latents of another autoencoder"):
        compare(root, table, networks, "flow", "other")


def test_the_command_prints_a_table_and_writes_the_figures(root: Path, table: Path, tmp_path: Path) -> None:
    torch.save(
        {
            key.removeprefix("fires.").replace(".conv", "/conv", 1) if key.startswith("fires.") else key: value
            for key, value in SqueezeNet().state_dict().items()
        },
        tmp_path / "squeezenet.pth",
    )
    output = medsora_train(
        "compare", root / "flow", "--data", table, "--autoencoder", root / "ae",
        "--squeezenet", tmp_path / "squeezenet.pth", "--steps", 2, "--samples", 6, "--out", tmp_path / "figures.json",
        "--device", "cpu",
    )  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    lines = [Compared(**line) for line in figures["lines"]]
    assert output.rstrip().endswith("\n".join(comparison_table(lines, figures["floor"])))
    assert "| flow | ema-6.5 | 2 euler | 1.5 |" in output or "| flow | ema-2 | 2 euler | 1.5 |" in output
