from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import medsora.video_io
from medsora.checkpoint import write_tiny_checkpoint
from medsora.cli import app
from medsora.manifest import read_manifest
from medsora.pipeline import VideoPipeline
from medsora.provenance import SYNTHETIC_NOTE
from medsora.request import resolve_request
from medsora.video_io import probe_video, read_video, write_ffv1


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(checkpoint: Path, output: Path, *more: object) -> Result:
    return run("generate", "--checkpoint", checkpoint, "--label", "covid-convex", "-o", output, *more)


def expected_clip(checkpoint: Path, seed: int) -> np.ndarray:
    request = resolve_request(read_manifest(checkpoint), label="covid-convex", seed=seed)
    return VideoPipeline.from_checkpoint(checkpoint, device="cpu")([request])[0]


def test_generate_writes_the_clip_of_that_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = generate(tiny_checkpoint, tmp_path / "clip.mkv", "--seed", 7, "--lossless", "--device", "cpu")
    assert result.exit_code == 0, result.output
    frames, fps = read_video(tmp_path / "clip.mkv")
    np.testing.assert_array_equal(frames, expected_clip(tiny_checkpoint, 7))
    assert fps == read_manifest(tiny_checkpoint).limits.fps
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mkv"]


def test_generate_says_what_it_did(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = generate(tiny_checkpoint, tmp_path / "clip.mp4", "--seed", 7, "--steps", 3, "--sampler", "heun")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in ("label covid-convex", "seed 7", "heun, 3 steps", "16 frames, 32x32, 8/s", "seconds"):
        assert words in shown
    assert "3/3" in result.stderr  # the progress bar arrived


def test_the_file_says_it_is_synthetic_and_how_to_repeat_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert generate(tiny_checkpoint, tmp_path / "clip.mp4", "--seed", 7, "--guidance", 1.5).exit_code == 0
    metadata = probe_video(tmp_path / "clip.mp4").metadata
    assert metadata["description"] == SYNTHETIC_NOTE
    settings = json.loads(metadata["comment"])
    assert (settings["model"], settings["seed"], settings["guidance_scale"]) == ("tiny", 7, 1.5)
    assert settings["model_sha256"] == json.loads(run("info", tiny_checkpoint, "--json").stdout)["manifest_sha256"]


def test_without_a_seed_two_clips_differ(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert generate(tiny_checkpoint, tmp_path / f"{name}.mkv", "--lossless").exit_code == 0
    assert not np.array_equal(read_video(tmp_path / "one.mkv")[0], read_video(tmp_path / "two.mkv")[0])


def test_an_existing_file_is_kept_unless_forced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("precious")
    refused = generate(tiny_checkpoint, path)
    assert (refused.exit_code, path.read_text()) == (2, "precious")
    assert "--force" in refused.stderr
    assert generate(tiny_checkpoint, path, "--force").exit_code == 0
    assert probe_video(path).num_frames == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "brain"], "label: tiny has no label 'brain'; allowed: regular-convex, covid-convex"),
        (["--steps", 0], "num_inference_steps"),
        (["--frames", 17], "num_frames"),
        (["--size", "64x64"], "allowed: 32x32"),
        (["--size", "wide"], "WIDTHxHEIGHT"),
        (["--guidance", "nan"], "guidance_scale"),
        (["--sampler", "ddim"], "allowed: euler, heun"),
        (["--seed", -1], "seed"),
        (["--device", "no-such-device"], "no-such-device"),
        (["--checkpoint", "no-such-checkpoint"], "no-such-checkpoint"),
        (["--from", "frame.png"], "from: tiny was trained without clean prefixes (limits.clean_prefixes"),
        (["-o", "clip.avi"], ".mp4"),
        (["-o", "clip.mp4", "--lossless"], ".mkv"),
        (["-o", "none/clip.mp4"], "folder does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_code_2(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = generate(tiny_checkpoint, Path("clip.mp4"), *options)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def going_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, saying that it was trained with clean prefixes."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "tiny", max_frames=64)


def smooth_frames(count: int) -> np.ndarray:
    coarse = np.random.RandomState(3).randint(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def test_a_clip_begins_with_the_given_frames(going_on: Path, tmp_path: Path) -> None:
    given, fps = smooth_frames(8), read_manifest(going_on).limits.fps
    write_ffv1(tmp_path / "start.mkv", given, fps=fps)
    begun = tmp_path / "begun.mkv"
    result = generate(going_on, begun, "--seed", 7, "--lossless", "--from", tmp_path / "start.mkv", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "8 of them given" in " ".join(result.stdout.split())
    request = resolve_request(read_manifest(going_on), label="covid-convex", seed=7, prefix_frames=8)
    (expected,) = VideoPipeline.from_checkpoint(going_on, device="cpu")([request], sources=[given])
    np.testing.assert_array_equal(read_video(begun)[0], expected)
    origin = json.loads(probe_video(begun).metadata["comment"])
    digest = hashlib.sha256((tmp_path / "start.mkv").read_bytes()).hexdigest()
    assert (origin["prefix_frames"], origin["source"]) == (8, {"kind": "reference", "sha256": digest})


def test_a_clip_beyond_a_window_begins_with_a_picture(going_on: Path, tmp_path: Path) -> None:
    Image.fromarray(smooth_frames(1)[0]).save(tmp_path / "frame.png")
    result = generate(going_on, tmp_path / "long.mp4", "--frames", 24, "--steps", 2, "--from", tmp_path / "frame.png")
    assert result.exit_code == 0, result.output
    assert probe_video(tmp_path / "long.mp4").num_frames == 24


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("large.png", "from: has 64x32 pixels; allowed: 32x32"),
        ("glass.png", "transparent"),
        ("moving.webp", "animation"),
        ("cut.png", "damaged picture"),
        ("fast.mkv", "from: has 25 frames a second; allowed: 8"),
        ("whole.mkv", "from: has more than 15 frames"),
        ("text.txt", "text.txt"),
        ("none.png", "none.png"),
    ],
)
def test_a_beginning_that_does_not_fit_is_refused(going_on: Path, tmp_path: Path, name: str, words: str) -> None:
    frames = smooth_frames(16)
    pictures = [Image.fromarray(frame) for frame in frames[:2]]
    pictures[0].resize((64, 32)).save(tmp_path / "large.png")
    pictures[0].convert("RGBA").save(tmp_path / "solid.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "glass.png")
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:])
    (tmp_path / "cut.png").write_bytes((tmp_path / "solid.png").read_bytes()[:60])
    write_ffv1(tmp_path / "fast.mkv", frames[:8], fps=25.0)
    write_ffv1(tmp_path / "whole.mkv", frames, fps=8.0)
    (tmp_path / "text.txt").write_text("no picture")
    result = generate(going_on, tmp_path / "clip.mp4", "--from", tmp_path / name)
    assert result.exit_code == (1 if name == "none.png" else 2), result.output
    assert words in result.stderr
    assert not (tmp_path / "clip.mp4").exists()


def test_an_altered_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    altered = altered_copy(tiny_checkpoint, tmp_path)
    result = generate(altered, tmp_path / "clip.mp4")
    assert result.exit_code == 2
    assert "denoiser.safetensors" in result.stderr
    assert not (tmp_path / "clip.mp4").exists()


def test_a_full_disk_leaves_no_partial_file(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = medsora.video_io.write_mp4

    def write_and_fill_up(path: Path, *arguments: object, **options: object) -> None:
        real_write(path, *arguments, **options)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(medsora.video_io, "write_mp4", write_and_fill_up)
    result = generate(tiny_checkpoint, tmp_path / "clip.mp4")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def altered_copy(checkpoint: Path, folder: Path) -> Path:
    """The same checkpoint with one bit of the last weight flipped."""
    copy = shutil.copytree(checkpoint, folder / "altered")
    weights = copy / "denoiser.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return copy


def test_info_shows_labels_limits_and_files(tiny_checkpoint: Path) -> None:
    result = run("info", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in ("covid-convex", "covid lung", "32x32", "1 to 1000, default 4", "euler, heun", "Tests only."):
        assert words in shown


def test_info_as_json_is_the_whole_manifest(tiny_checkpoint: Path) -> None:
    shown = json.loads(run("info", tiny_checkpoint, "--json").stdout)
    manifest = json.loads((tiny_checkpoint / "manifest.json").read_text())
    assert {key: shown[key] for key in manifest} == manifest
    pipeline = VideoPipeline.from_checkpoint(tiny_checkpoint, device="cpu")
    for name, module in (("autoencoder", pipeline.autoencoder), ("denoiser", pipeline.denoiser)):
        values = sum(value.numel() for value in module.state_dict().values())
        assert shown["files_found"][f"{name}.safetensors"]["values"] == values


@pytest.mark.parametrize("as_json", [False, True])
def test_info_tells_an_altered_file(tiny_checkpoint: Path, tmp_path: Path, as_json: bool) -> None:
    altered = altered_copy(tiny_checkpoint, tmp_path)
    (altered / "autoencoder.safetensors").unlink()
    result = run("info", altered, *(["--json"] if as_json else []))
    assert result.exit_code == 2
    assert "missing or altered: autoencoder.safetensors, denoiser.safetensors" in result.stderr


def test_info_lists_licences_and_every_attribution(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    clip = {"file": "a.mp4", "licence": "CC BY 4.0", "source": "a collection", "attribution": "[A. Author]"}
    manifest["training_data"] = [clip, {**clip, "file": "b.mp4"}]
    manifest["metrics"] = {"psnr_db": {"test": 34.5}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    short = " ".join(run("info", copy).stdout.split())
    assert re.search(r"CC BY 4\.0 \W+ 2 ", short)
    assert "psnr_db.test 34.5" in short
    assert "[A. Author]" not in short
    assert "[A. Author]" in run("info", copy, "--training-data").stdout


def test_info_of_no_checkpoint_is_code_2(tmp_path: Path) -> None:
    result = run("info", tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path) in result.stderr.replace("\n", "")


def test_info_and_help_load_no_torch(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from medsora.cli import app\n"
        f"assert CliRunner().invoke(app, ['info', {str(tiny_checkpoint)!r}]).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
