"""A whole evaluation: without and with all networks, on clips made for tests, and through the command line."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from training.cli import app
from training.errors import TrainingError
from training.evaluate import EvaluationConfig, evaluate_checkpoint, summary
from training.evaluation.networks import EvaluationNetworks, load_networks, squeezenet_frames
from training.prepare.cache import INDEX
from training.prepare.config import PrepareConfig
from training.prepare.pipeline import prepare
from training.recipes import recipe
from training.squeezenet import SqueezeNet

DATA = dataclasses.replace(recipe("denoiser_tiny").data, excluded_labels=("uncertain", "viral"))
SETTINGS = EvaluationConfig(
    num_samples=7, batch_size=4, num_inference_steps=2, resamples=20, sheet_clips=1, planted=3, windows_of_a_patient=4
)


def still(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(first), 2, *first.shape[2:])


def run(checkpoint: Path, table: Path, out: Path, networks: EvaluationNetworks, **changes: Any) -> dict[str, Any]:
    settings = dataclasses.replace(SETTINGS, **changes)
    return evaluate_checkpoint(
        checkpoint, out, table=table, data=DATA, networks=networks, device=torch.device("cpu"), settings=settings,
        report=lambda text: None,
    )  # fmt: skip


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []


@pytest.fixture(scope="module")
def squeezenet() -> EvaluationNetworks:
    return EvaluationNetworks(squeezenet=squeezenet_frames(random_squeezenet()))


@pytest.fixture(scope="module")
def plain(
    tiny_checkpoint: Path, table: Path, squeezenet: EvaluationNetworks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("plain")
    return out, run(tiny_checkpoint, table, out, squeezenet)


def test_a_report_a_page_and_sheets_are_written(plain: tuple[Path, dict[str, Any]], tiny_checkpoint: Path) -> None:
    out, figures = plain
    assert {path.name for path in out.iterdir()} == {
        "report.json", "report.html", "samples.png", "reconstruction.png", "nearest.png"
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == figures
    assert all(math.isfinite(number) for number in numbers(figures))
    digest = hashlib.sha256((tiny_checkpoint / "denoiser.safetensors").read_bytes()).hexdigest()
    assert figures["checkpoint"]["sha256"]["denoiser.safetensors"] == digest
    assert set(figures["data"]["sha256"]) == {"clips.csv"}
    assert sum(figures["samples"]["per_label"].values()) == 7
    assert any("1 patient" in text for text in figures["warnings"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("Closest training clip: clip") == 2 * 2 + 2 * 6  # caption and alternative text
    assert "CC BY 4.0" in page


def test_stand_ins_keep_their_names(plain: tuple[Path, dict[str, Any]]) -> None:
    _, figures = plain
    metrics = figures["frechet"]["all_labels"]["metrics"]
    assert set(metrics) == {"frechet_squeezenet", "frechet_squeezenet_motion"}
    assert set(figures["absent"]) >= {"FVD", "CD-FVD", "FID and inception score", "Flow warping error"}
    measured = {key: value for key, value in figures.items() if key != "absent"}
    assert not {"fid", "fvd", "warping"} & {word.lower() for word in json.dumps(measured).replace('"', " ").split()}
    assert "warping_error" not in figures["clips"]["all_labels"]["samples"]
    assert "inception_score" not in figures


def test_noise_is_further_from_the_test_clips_than_the_floor(plain: tuple[Path, dict[str, Any]]) -> None:
    _, figures = plain
    pairs = figures["frechet"]["all_labels"]["metrics"]["frechet_squeezenet"]["pairs"]
    assert pairs["samples_to_test"]["value"] > 2 * pairs["train_to_test"]["value"]
    assert pairs["samples_to_test"]["over_floor"]["value"] > 2
    low, high = pairs["samples_to_test"]["interval"]
    assert low < pairs["samples_to_test"]["value"] < high
    narrow = pairs["samples_to_test"]["interval_samples"]
    assert narrow[1] - narrow[0] < 1.5 * (high - low)
    memory = figures["memorisation"]
    assert memory["samples"]["copies"]["value"] == 0
    assert memory["samples"]["copies"]["interval"][1] > 0.3  # none of seven proves little
    assert memory["planted"]["mirrored"]["recall"]["value"] == 1
    assert set(memory["threshold"]["per_patient"]) == {
        "lung_ultrasound/patient5 (test)",
        *(f"lung_ultrasound/patient{number} (train)" for number in range(3)),
    }
    labels = figures["clips"]["by_label"]
    assert labels["regular-convex"].keys() == {"samples", "train", "test"}
    assert labels["covid-convex"].keys() == {"samples", "train"}  # no such test clip
    assert len(summary(figures)) == 3


def test_all_networks_give_all_figures(
    tiny_checkpoint: Path, table: Path, tmp_path: Path, network_files: dict[str, Path], squeezenet: EvaluationNetworks,
) -> None:  # fmt: skip
    torch.save(caffe_names(), tmp_path / "squeezenet.pth")
    loaded = load_networks(squeezenet=tmp_path / "squeezenet.pth", **network_files, device="cpu")
    networks = dataclasses.replace(
        loaded, clip=squeezenet.squeezenet, flow=still, flow_record={"protocol": "no motion"}
    )
    figures = run(tiny_checkpoint, table, tmp_path / "out", networks, num_samples=4, resamples=6)
    assert figures["absent"] == {}
    metrics = figures["frechet"]["all_labels"]["metrics"]
    assert list(metrics) == ["fvd", "cd_fvd", "fid", "frechet_squeezenet", "frechet_squeezenet_motion"]
    assert [metric["ddof"] for metric in metrics.values()] == [0, 0, 1, 1, 1]
    assert set(figures["inception_score"]) == {"samples", "train", "test"}
    assert 1 <= figures["inception_score"]["samples"]["value"] <= 10
    for name in ("warping_error", "frame_consistency_clip"):
        assert set(figures["clips"]["all_labels"]["test"][name]) == {"value", "interval"}
    assert figures["networks"]["I3D"]["sha256"] == hashlib.sha256(network_files["i3d"].read_bytes()).hexdigest()


def test_a_prepared_cache_gives_the_same_kind_of_report(
    tiny_checkpoint: Path, table: Path, tmp_path: Path, squeezenet: EvaluationNetworks
) -> None:
    prepare(table, tmp_path / "cache", PrepareConfig(height=32, width=32, excluded_labels=("uncertain",)))
    figures = run(tiny_checkpoint, tmp_path / "cache", tmp_path / "out", squeezenet, num_samples=3, resamples=0)
    assert figures["data"]["splits"]["test"]["clips"] == 1
    digest = hashlib.sha256((tmp_path / "cache" / INDEX).read_bytes()).hexdigest()
    assert figures["data"]["sha256"] == {INDEX: digest}  # which has the hash of every shard


def test_without_resamples_there_are_no_intervals(
    tiny_checkpoint: Path, table: Path, tmp_path: Path, squeezenet: EvaluationNetworks
) -> None:
    figures = run(tiny_checkpoint, table, tmp_path, squeezenet, num_samples=3, resamples=0, dtype="bfloat16")
    assert (
        "interval" not in figures["frechet"]["all_labels"]["metrics"]["frechet_squeezenet"]["pairs"]["samples_to_test"]
    )
    assert "interval" not in figures["clips"]["all_labels"]["samples"]["motion"]
    assert figures["samples"]["dtype"] == "bfloat16"


def test_windows_of_another_size_are_refused(
    tiny_checkpoint: Path, table: Path, tmp_path: Path, squeezenet: EvaluationNetworks
) -> None:
    data, said = dataclasses.replace(DATA, num_frames=8), list[str]()
    with pytest.raises(TrainingError, match=r"generated clips are \(16, 32, 32\).*windows \(8, 32, 32\)"):
        evaluate_checkpoint(
            tiny_checkpoint, tmp_path, table=table, data=data, networks=squeezenet, device=torch.device("cpu"),
            settings=SETTINGS, report=said.append,
        )  # fmt: skip
    assert not said  # before the samples, which may take hours


def test_data_of_other_conditions_are_refused(
    tiny_checkpoint: Path, table: Path, squeezenet: EvaluationNetworks, tmp_path: Path
) -> None:
    data = dataclasses.replace(DATA, condition_columns={"finding": "label"})
    with pytest.raises(TrainingError, match="is conditioned on finding, probe, the data on finding: "):
        evaluate_checkpoint(
            tiny_checkpoint, tmp_path, table=table, data=data, networks=squeezenet, device=torch.device("cpu"),
            settings=SETTINGS,
        )  # fmt: skip


def test_the_command_line_measures_a_checkpoint(tiny_checkpoint: Path, table: Path, tmp_path: Path) -> None:
    torch.save(caffe_names(), tmp_path / "squeezenet.pth")
    arguments = [
        "evaluate", tiny_checkpoint, "--data", table, "--squeezenet", tmp_path / "squeezenet.pth", "--out",
        tmp_path / "out", "--recipe", "denoiser_tiny", "--set", 'data.excluded_labels=["uncertain", "viral"]',
        "--samples", 3, "--steps", 1, "--resamples", 4, "--device", "cpu", "--seed", 3,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Fr\u00e9chet, SqueezeNet, single frames:" in result.output
    assert "copies of training clips: 0 of 3" in result.output
    figures = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert figures["samples"]["first_seed"] == 3
    assert figures["networks"]["SqueezeNet"]["file"] == "squeezenet.pth"


def random_squeezenet() -> SqueezeNet:
    """Random weights that keep the signal's size: features then differ from picture to picture."""
    torch.manual_seed(0)
    network = SqueezeNet()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return network.eval().requires_grad_(False)


def caffe_names() -> dict[str, torch.Tensor]:
    return {
        key.removeprefix("fires.").replace(".conv", "/conv", 1) if key.startswith("fires.") else key: value
        for key, value in random_squeezenet().state_dict().items()
    }
