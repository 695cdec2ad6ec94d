"""A small synthetic data set: drifting speckle, 32x32 pixels, written through the real video writer."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from medsora.video_io import write_mp4
from training.data.manifest import COLUMNS

FRAMES, FPS = 60, 16.0
ROWS = [  # label, probe, split, cuts
    ("regular", "convex", "train", ""),
    ("regular", "convex", "train", "33"),
    ("covid", "convex", "train", ""),
    ("viral", "linear", "train", ""),
    ("uncertain", "linear", "train", ""),
    ("regular", "convex", "test", ""),
]


def speckle(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Smooth noise that drifts sideways, darker with depth: (frames, 32, 32, 3) uint8."""
    field = rng.uniform(0, 255, (32, 96))
    for axis in (0, 1, 1):
        field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / 3
    field = (field - field.mean()) * 2.5 + np.linspace(170, 70, 32)[:, None]
    grey = np.stack([np.roll(field, index // 2, axis=1)[:, :32] for index in range(frames)])
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These networks are so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clips.csv with six clips beside it. Do not write to it."""
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    with (root / "clips.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for index, (label, probe, split, cuts) in enumerate(ROWS):
            write_mp4(root / f"clip{index}.mp4", speckle(rng, FRAMES), fps=FPS, crf=8)
            writer.writerow(
                [f"clip{index}.mp4", "lung_ultrasound", label, probe, split, f"patient{index}", FRAMES, FPS, cuts,
                 "CC BY 4.0", "made for tests", f"Author {index}"]
            )  # fmt: skip
    return root / "clips.csv"
