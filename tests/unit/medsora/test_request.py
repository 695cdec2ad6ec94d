"""Requests: defaults filled in, everything else checked against the checkpoint's limits."""

import math
from typing import Any

import pytest

from medsora.errors import RequestError
from medsora.manifest import Label, Limits, Manifest
from medsora.request import MAX_SEED, frames_for_seconds, random_seed, resolve_label, resolve_request

MANIFEST = Manifest(
    format_version=1,
    name="lung",
    description="",
    modality="US",
    intended_use="",
    licence="",
    created_at="2026-01-01T00:00:00Z",
    labels=(
        Label(
            name="regular-convex",
            description="",
            synonyms=("normal lung", "Healthy lung (convex probe)"),
            condition={"finding": "regular"},
        ),
        Label(name="covid-convex", description="", condition={"finding": "covid"}),
    ),
    limits=Limits(
        sizes=((128, 128), (64, 32)),
        num_frames=(16, 20),
        fps=8.0,
        num_inference_steps=(1, 30, 200),
        guidance_scale=(1.0, 2.0, 8.0),
        samplers=("euler", "heun"),
    ),
)


def test_defaults_are_the_checkpoints_first() -> None:
    request = resolve_request(MANIFEST, label="covid-convex", seed=7)
    assert (request.width, request.height, request.num_frames) == (128, 128, 16)
    assert (request.num_inference_steps, request.guidance_scale, request.sampler) == (30, 2.0, "euler")


def test_given_values_are_kept_exactly() -> None:
    request = resolve_request(
        MANIFEST, label="covid-convex", seed=MAX_SEED, num_frames=20, height=32, width=64,
        num_inference_steps=200, guidance_scale=8, sampler="heun",
    )  # fmt: skip
    assert request.shape_key == (20, 32, 64, 200, 8.0, "heun")
    assert request.seed == MAX_SEED


@pytest.mark.parametrize(
    "text", ["regular-convex", "Regular Convex", "  NORMAL lung. ", "healthy lung, convex probe", "regular_convex"]
)
def test_labels_are_found_whatever_their_case_and_punctuation(text: str) -> None:
    assert resolve_label(MANIFEST, text).name == "regular-convex"


@pytest.mark.parametrize("text", ["", "lung", "regular", "regular-convex please", "x" * 5000])
def test_unknown_labels_are_refused_with_the_list(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_label(MANIFEST, text)
    assert caught.value.field == "label"
    assert caught.value.allowed == ("regular-convex", "covid-convex")
    assert "allowed: regular-convex, covid-convex" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("seed", {"seed": -1}, f"0 to {MAX_SEED}"),
        ("seed", {"seed": MAX_SEED + 1}, f"0 to {MAX_SEED}"),
        ("size", {"width": 64, "height": 64}, "128x128, 64x32"),
        ("size", {"width": 128}, "128x128, 64x32"),
        ("size", {"height": 128}, "128x128, 64x32"),
        ("num_frames", {"num_frames": 24}, "16, 20"),
        ("num_inference_steps", {"num_inference_steps": 0}, "1 to 200"),
        ("num_inference_steps", {"num_inference_steps": 201}, "1 to 200"),
        ("guidance_scale", {"guidance_scale": 0.99}, "1 to 8"),
        ("guidance_scale", {"guidance_scale": math.nan}, "1 to 8"),
        ("guidance_scale", {"guidance_scale": math.inf}, "1 to 8"),
        ("sampler", {"sampler": "ddim"}, "euler, heun"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused_by_name(field: str, values: dict[str, Any], allowed: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(MANIFEST, **{"label": "covid-convex", "seed": 0, **values})
    assert caught.value.field == field
    assert str(caught.value).endswith(f"allowed: {allowed}")


@pytest.mark.parametrize(("seconds", "frames"), [("2", 16), ("2.0", 16), ("2.5", 20)])
def test_seconds_become_frames(seconds: str, frames: int) -> None:
    assert frames_for_seconds(MANIFEST, seconds) == frames


@pytest.mark.parametrize("seconds", ["4", "", "two", "nan", "-2", "2e400"])
def test_other_seconds_are_refused_with_the_list(seconds: str) -> None:
    with pytest.raises(RequestError, match=r"allowed: 2, 2\.5"):
        frames_for_seconds(MANIFEST, seconds)


def test_drawn_seeds_differ_and_survive_json_readers() -> None:
    seeds = {random_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**53 for seed in seeds)
