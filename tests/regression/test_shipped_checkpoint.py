"""The checkpoint that comes with the package still makes the clips that it made when it was released."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from medsora.pipeline import VideoPipeline
from medsora.request import resolve_request

LABELS = ("covid-convex", "regular-linear")
SUMMARIES = Path(__file__).with_name("shipped_checkpoint.json")
Grey = NDArray[np.float64]  # f h w, 0 to 255


@pytest.fixture(scope="module")
def clips() -> dict[str, Grey]:
    """A clip of each label by the default settings, in grey levels."""
    pipeline = VideoPipeline.from_checkpoint("lung-ultrasound-small", device="cpu", dtype="float32")
    made = {}
    for label in LABELS:
        request = resolve_request(pipeline.manifest, label=label, seed=1)
        made[label] = pipeline([request])[0].mean(axis=-1)
    return made


def block_means(clip: Grey) -> Grey:
    """Means over 4 x 8 x 8 equal blocks of frames, rows and columns."""
    frames, height, width = clip.shape
    return clip.reshape(4, frames // 4, 8, height // 8, 8, width // 8).mean(axis=(1, 3, 5))


@pytest.mark.parametrize("label", LABELS)
def test_a_seed_gives_the_clip_that_it_always_gave(clips: dict[str, Grey], label: str) -> None:
    expected = np.array(json.loads(SUMMARIES.read_text())[label])
    # in grey levels; rounding on another machine stays far below
    assert np.abs(block_means(clips[label]) - expected).max() < 1


@pytest.mark.parametrize("label", LABELS)
def test_the_clip_looks_like_a_moving_picture(clips: dict[str, Grey], label: str) -> None:
    clip = clips[label]
    assert clip.shape == (16, 128, 128)
    assert clip.mean(axis=0).std() > 15, "flat"
    assert np.ptp(clip) > 128, "no contrast"
    steps = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2))
    assert steps.min() > 0.3, "a frame stands still"
    assert steps.max() < 12, "a frame has little to do with the one before"
    assert np.abs(np.diff(clip.mean(axis=(1, 2)))).max() < 8, "brightness flashes"


def test_the_field_of_view_has_the_probes_shape(clips: dict[str, Grey]) -> None:
    for side in (slice(0, 12), slice(-12, None)):
        # a convex probe sees a sector, with black beside its top; a linear one sees a rectangle
        assert clips["covid-convex"][:, :12, side].mean() < 6
        assert clips["regular-linear"][:, :12, side].mean() > 40
