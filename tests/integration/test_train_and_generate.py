"""The whole way by the command line: one's own videos, a cache, two runs, one of them killed, a checkpoint, a clip."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from medsora.manifest import read_manifest
from medsora.video_io import read_video, write_mp4
from training.cli import app
from training.squeezenet import SqueezeNet

pytestmark = pytest.mark.integration

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # the networks are tiny: threads would wait for each other
DEADLINE_S = 120
SIZE = ("--height", 32, "--width", 32)
SHORT = ("--set", "loop.steps=10", "--set", "loop.checkpoint_every=5", "--device", "cpu")


def medsora_train(*arguments: object) -> str:
    """In this process, for each new one loads torch again."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run(program: str, *arguments: object) -> str:
    done = subprocess.run(
        command(program, *arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(program: str, *arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name(program)), *map(str, arguments)]


def write_videos(folder: Path, lengths: Mapping[str, int]) -> None:
    """Four drifting scenes of each label, 48x40 pixels, 8 frames a second."""
    rng = np.random.default_rng(0)
    for label, frames in lengths.items():
        (folder / label).mkdir(parents=True)
        for number in range(4):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 12, 3), dtype=np.uint8))
            scene = np.asarray(coarse.resize((48 + frames, 40), Image.Resampling.BICUBIC))
            clip = np.stack([scene[:, index : index + 48] for index in range(frames)])
            write_mp4(folder / label / f"{number}.mp4", clip, fps=8, crf=12)


def write_squeezenet(path: Path) -> None:
    """Random weights in Caffe's layer names."""
    torch.manual_seed(0)
    weights = {}
    for name, value in SqueezeNet().state_dict().items():
        _, is_fire, rest = name.partition("fires.")
        weights[rest.replace(".", "/", 1) if is_fire else name] = value
    torch.save(weights, path)


def kill_after_a_checkpoint(run_folder: Path, program: str, *arguments: object) -> int:
    """Start a command, SIGKILL it when it has saved; returns the newest step that it leaves."""
    process = subprocess.Popen(command(program, *arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not list(run_folder.glob("checkpoints/step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    return max(int(path.name.removeprefix("step-")) for path in run_folder.glob("checkpoints/step-*"))


def test_from_videos_with_labels_of_ones_own_to_a_clip(tmp_path: Path) -> None:
    cache, coder, runs = tmp_path / "cache", tmp_path / "coder", tmp_path / "denoiser"
    # a label whose clips are all too short for a window is never trained, and must not be offered
    write_videos(tmp_path / "videos", {"normal mucosa": 24, "polyp": 24, "brief": 12})
    prepared = medsora_train("prepare", tmp_path / "videos", "--out", cache, *SIZE, "--min-frames", 8)
    assert "label: brief, normal mucosa, polyp" in prepared

    said = medsora_train("autoencoder", "autoencoder_tiny", "--data", cache, "--out", coder, *SHORT,
               "--set", "loop.ema_half_lives=[6.5, 2]")  # fmt: skip
    assert "train: 3 of the clips are without a scene of 16 frames" in said
    assert "normal mucosa: " in said
    of_coder = ("--data", cache, "--autoencoder", coder)
    medsora_train("latents", "denoiser_tiny", *of_coder, "--autoencoder-ema", "ema-2", "--device", "cpu")
    denoiser = ("medsora-train", "denoiser", "denoiser_tiny", *of_coder, "--autoencoder-ema", "ema-2", "--out", runs,
                *SHORT, "--set", "loop.ema_half_lives=[6.5, 2]", "--set", "loop.best_metric=test_velocity_mse",
                "--set")  # fmt: skip
    step = kill_after_a_checkpoint(runs, *denoiser, "loop.steps=1000000")
    said = run(*denoiser, f"loop.steps={step + 7}", "--resume")
    assert f"resumed at step {step}" in said
    assert f"finished at step {step + 7}" in said
    assert not list(runs.glob("latents-*"))  # those of the cache were its own

    checkpoint = tmp_path / "polyps"
    medsora_train("export", "--autoencoder", coder, "--denoiser", runs, "--out", checkpoint, "--steps", 2,
                  "--ema", "ema-2")  # fmt: skip
    weights = tmp_path / "squeezenet.pth"
    write_squeezenet(weights)
    medsora_train("evaluate", checkpoint, "--data", cache, "--recipe", "denoiser_tiny", "--squeezenet", weights,
        "--out", tmp_path / "report", "--samples", 4, "--resamples", 0, "--device", "cpu")  # fmt: skip
    assert (tmp_path / "report/report.html").is_file()
    manifest = read_manifest(checkpoint)
    assert manifest.name == "polyps"
    assert manifest.label_names == ("normal_mucosa", "polyp")
    assert len(manifest.training_data) == 6
    assert manifest.training["autoencoder"]["average"] == manifest.training["denoiser"]["average"] == "ema-2"

    clip = tmp_path / "clip.mp4"
    run("medsora", "generate", "--checkpoint", checkpoint, "--label", "normal mucosa", "--output", clip,
        "--device", "cpu")  # fmt: skip
    frames, fps = read_video(clip)
    assert frames.shape == (16, 32, 32, 3)
    assert fps == pytest.approx(8.0)
