"""From clips to a generated video through the command line, and what the exported checkpoint says of itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from medsora.checkpoint import load_checkpoint, load_fingerprints
from medsora.errors import CheckpointError
from medsora.fingerprints import FINGERPRINT_BYTES, TrainingFingerprints
from medsora.manifest import read_manifest
from medsora.pipeline import VideoPipeline
from medsora.request import resolve_label, resolve_request
from medsora.video_io import read_video
from training.cli import app
from training.errors import TrainingError
from training.export import describe_labels, export_checkpoint
from training.runs import load_autoencoder, load_result

LOOP = ["--set", "loop.steps=6", "--set", "loop.checkpoint_every=3", "--device", "cpu"]


def medsora_train(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def made(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs ``ae`` and ``dn`` and the checkpoint ``checkpoint``, all made by the command line."""
    root = tmp_path_factory.mktemp("made")
    medsora_train("autoencoder", "autoencoder_tiny", "--data", table, "--out", root / "ae", *LOOP)
    denoiser = ("denoiser", "denoiser_tiny", "--data", table, "--autoencoder", root / "ae", "--out", root / "dn")
    assert "finished at step 6" in medsora_train(*denoiser, *LOOP)
    assert "resumed at step 6" in medsora_train(*denoiser, *LOOP, "--resume")
    (root / "report.json").write_text('{"reconstruction": {"psnr_db": 30.5}}', encoding="utf-8")
    output = medsora_train(
        "export", "--autoencoder", root / "ae", "--denoiser", root / "dn", "--out", root / "checkpoint",
        "--name", "lung-test", "--report", root / "report.json", "--steps", 3, "--guidance", 2,
    )  # fmt: skip
    assert "3 labels" in output
    return root


def test_the_checkpoint_generates_a_clip(made: Path) -> None:
    pipeline = VideoPipeline.from_checkpoint(made / "checkpoint", device="cpu")
    request = resolve_request(pipeline.manifest, label="viral-linear", seed=5)
    assert (request.num_inference_steps, request.guidance_scale, request.num_frames) == (3, 2.0, 16)
    (clip,) = pipeline([request])
    assert clip.shape == (16, 32, 32, 3)
    assert clip.dtype == np.uint8


def test_weights_are_the_averaged_ones_and_work_the_same(made: Path) -> None:
    loaded = load_checkpoint(made / "checkpoint")
    coder, _ = load_autoencoder(made / "ae")
    video = torch.rand(1, 3, 16, 32, 32) * 2 - 1
    assert torch.equal(loaded.autoencoder.encode(video), coder.encode(video))
    for name, value in load_result(made / "dn", part="denoiser").weights.items():
        assert torch.equal(loaded.denoiser.state_dict()[name], value.float())
    saved = load_file(made / "dn" / "checkpoints" / "step-00000006" / "averages.safetensors")
    average = {key.removeprefix("ema-6.5/"): value for key, value in saved.items()}
    stored = load_file(made / "checkpoint" / "denoiser.safetensors")
    for name, value in average.items():
        assert torch.equal(stored[name], value.half())


def test_the_manifest_tells_labels_data_and_training(made: Path) -> None:
    manifest = read_manifest(made / "checkpoint")
    assert manifest.label_names == ("regular-convex", "covid-convex", "viral-linear")
    assert resolve_label(manifest, "COVID-19").name == "covid-convex"
    assert resolve_label(manifest, "Normal lung, curvilinear").name == "regular-convex"
    files = {entry["file"]: entry for entry in manifest.training_data}
    assert set(files) == {"clip0.mp4", "clip1.mp4", "clip2.mp4", "clip3.mp4"}  # no test clip, no uncertain one
    assert files["clip2.mp4"] == {
        "file": "clip2.mp4", "label": "covid-convex", "licence": "CC BY 4.0", "source": "made for tests",
        "attribution": "Author 2",
    }  # fmt: skip
    assert manifest.limits.fps == 8.0
    assert manifest.limits.sizes == ((32, 32),)
    assert (manifest.limits.clean_prefixes, manifest.limits.max_frames) == (True, 512)
    assert manifest.training["denoiser"]["step"] == 6
    assert manifest.training["autoencoder"]["recipe"] == "autoencoder_tiny"
    assert manifest.metrics == {"reconstruction": {"psnr_db": 30.5}}


def test_a_second_denoiser_may_start_from_the_checkpoint(made: Path, table: Path, tmp_path: Path) -> None:
    medsora_train(
        "denoiser", "denoiser_tiny", "--data", table, "--autoencoder", made / "checkpoint", "--out", tmp_path / "dn",
        "--init", made / "checkpoint", "--set", "loop.steps=1", "--device", "cpu",
        "--set", "denoiser_loss.clean_prefixes=0",
    )  # fmt: skip
    manifest = export_checkpoint(
        tmp_path / "c", autoencoder_run=made / "checkpoint", denoiser_run=tmp_path / "dn", name="again"
    )
    assert manifest.training["autoencoder"] == read_manifest(made / "checkpoint").training["autoencoder"]
    assert (manifest.limits.clean_prefixes, manifest.limits.max_frames) == (False, None)
    assert (tmp_path / "c/autoencoder.safetensors").read_bytes() == (
        made / "checkpoint/autoencoder.safetensors"
    ).read_bytes()


def test_fingerprints_of_the_training_clips_go_into_the_checkpoint(made: Path, table: Path, tmp_path: Path) -> None:
    manifest = export_checkpoint(
        tmp_path / "c", autoencoder_run=made / "checkpoint", denoiser_run=made / "dn", name="marked", table=table
    )
    marks = load_fingerprints(tmp_path / "c")
    assert len(marks) % FINGERPRINT_BYTES == 0 < len(marks)
    frames, fps = read_video(table.parent / "clip2.mp4")
    clip = frames[:: round(fps / 8)][:16]  # its first window
    assert TrainingFingerprints(marks).resemblance(clip[:, :, ::-1]) > 0.99
    assert load_checkpoint(tmp_path / "c").manifest.fingerprints == manifest.fingerprints
    assert manifest.fingerprints is not None
    assert manifest.fingerprints.max_resemblance is not None
    figures = manifest.metrics["training_copies"]
    assert figures["fingerprints"] == len(marks) // FINGERPRINT_BYTES
    assert figures["planted"]["unchanged"]["share"] == figures["planted"]["mirrored"]["share"]
    assert "through the autoencoder" in figures["planted"]
    (tmp_path / "c" / "fingerprints.bin").write_bytes(bytes(len(marks)))
    with pytest.raises(CheckpointError, match="altered"):
        load_fingerprints(tmp_path / "c")
    assert read_manifest(made / "checkpoint").fingerprints is None


def test_averages_are_chosen_after_training(table: Path, tmp_path: Path) -> None:
    several = ("--set", "loop.ema_half_lives=[6.5, 1.5]", "--set", "loop.evaluate_every=3")
    medsora_train("autoencoder", "autoencoder_tiny", "--data", table, "--out", tmp_path / "ae", *LOOP, *several,
                  "--set", "loop.best_metric=psnr_db", "--set", "loop.best=most")  # fmt: skip
    averages = ("ema-6.5", "ema-1.5", "best")
    coders = {name: load_autoencoder(tmp_path / "ae", average=name) for name in (*averages, None)}
    assert len({digest for _, digest in coders.values()}) >= 2
    assert coders[None][1] == coders["ema-6.5"][1] != coders["ema-1.5"][1]
    scales = [coders[name][0].latent_scale for name in averages]
    assert all((scale - 1).abs().max() > 1e-3 for scale in scales)  # measured for each
    assert not torch.equal(scales[0], scales[1])

    denoiser = ("denoiser", "denoiser_tiny", "--data", table, "--autoencoder", tmp_path / "ae", *LOOP, *several)
    medsora_train(*denoiser, "--autoencoder-ema", "ema-1.5", "--out", tmp_path / "dn")
    export = ("export", "--autoencoder", tmp_path / "ae", "--denoiser", tmp_path / "dn")
    for name in ("ema-6.5", "ema-1.5"):
        medsora_train(*export, "--ema", name, "--out", tmp_path / name)
        stored = load_checkpoint(tmp_path / name)
        assert stored.manifest.training["denoiser"]["average"] == name
        chosen = load_result(tmp_path / "dn", part="denoiser", average=name)
        assert stored.manifest.training["denoiser"]["metrics"] == chosen.about["metrics"] != {}
        for key, value in chosen.weights.items():
            assert torch.equal(stored.denoiser.state_dict()[key], value.float())
        # whichever the denoiser's, the autoencoder is the one that it was trained on
        assert stored.manifest.training["autoencoder"]["average"] == "ema-1.5"
        assert torch.equal(stored.autoencoder.latent_scale, scales[1])
    assert (tmp_path / "ema-6.5/denoiser.safetensors").read_bytes() != (
        tmp_path / "ema-1.5/denoiser.safetensors"
    ).read_bytes()
    with pytest.raises(TrainingError, match=r"no average 'best'; it has ema-6\.5, ema-1\.5"):
        medsora_train(*export, "--ema", "best", "--out", tmp_path / "none")
    with pytest.raises(TrainingError, match=r"holds no averages to choose ema-1\.5 from"):
        load_autoencoder(tmp_path / "ema-1.5", average="ema-1.5")


def test_parts_that_do_not_belong_together_are_refused(made: Path, table: Path, tmp_path: Path) -> None:
    medsora_train(
        "autoencoder", "autoencoder_tiny", "--data", table, "--out", tmp_path / "ae", "--set", "loop.seed=1", *LOOP
    )
    with pytest.raises(TrainingError, match="was not trained on the autoencoder"):
        export_checkpoint(tmp_path / "c", autoencoder_run=tmp_path / "ae", denoiser_run=made / "dn", name="x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(TrainingError, match="choose another folder"):
        export_checkpoint(tmp_path / "mine", autoencoder_run=made / "ae", denoiser_run=made / "dn", name="x")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not (tmp_path / "c").exists()


def test_other_labels_are_called_after_their_values() -> None:
    conditions = [{"finding": "cyst", "probe": "convex"}, {"finding": "covid", "probe": "convex"}]
    assert [label.name for label in describe_labels(conditions)] == ["cyst-convex", "covid-convex"]
    words = [{"label": "Geschw\u00fcr, klein"}, {"label": "\u606f\u8089"}, {"label": "\u6b63\u5e38"}]
    assert [label.name for label in describe_labels(words)] == ["Geschw\u00fcr_klein", "\u606f\u8089", "\u6b63\u5e38"]
    assert [label.condition for label in describe_labels(words)] == words
    with pytest.raises(TrainingError, match="would both be called 'grade_1'"):
        describe_labels([{"label": "grade 1+"}, {"label": "grade 1-"}])


def test_the_command_line_explains_mistakes(table: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    start = ["autoencoder", "autoencoder_tiny", "--data", str(table), "--out", str(tmp_path)]
    for arguments, message in (
        ([*start, "--set", "loop.step=5"], "is no field of the recipe"),
        ([*start, "--device", "abacus"], "is not available here"),
        (["denoiser", "huge", "--data", "x", "--autoencoder", "x", "--out", "x"], "recipe must be one of"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())


def test_command_names_are_fixed() -> None:
    of_data, of_training = {"prepare", "verify", "latents", "fingerprints"}, {"autoencoder", "denoiser", "distill"}
    names = of_data | of_training | {"compare", "evaluate", "export"}
    assert {command.name for command in app.registered_commands} == names
