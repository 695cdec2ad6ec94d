"""Requests: defaults filled in, everything else checked against the checkpoint's limits."""

import math
from dataclasses import replace
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
    assert request.shape_key == (20, 32, 64, 200, 8.0, "heun", 0, 1.0)
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


LONG = replace(MANIFEST, limits=replace(MANIFEST.limits, num_frames=(16,), clean_prefixes=True, max_frames=64))


@pytest.mark.parametrize(("seconds", "frames"), [("2", 16), ("3", 24), ("3.0", 24), ("8", 64)])
def test_with_clean_prefixes_whole_chunks_beyond_the_window_can_be_had(seconds: str, frames: int) -> None:
    assert frames_for_seconds(LONG, seconds) == frames
    assert resolve_request(LONG, label="covid-convex", seed=1, num_frames=frames).num_frames == frames


@pytest.mark.parametrize("seconds", ["1", "2.5", "9", "8.5", "0", "-2", "nan", "inf", "1e300", "x"])
def test_other_lengths_are_refused_with_what_can_be_had(seconds: str) -> None:
    with pytest.raises(RequestError) as caught:
        frames_for_seconds(LONG, seconds)
    assert caught.value.allowed == ("2", "multiples of 1 from 3 to 8")


@pytest.mark.parametrize("frames", [8, 20, 72])
def test_other_numbers_of_frames_are_refused_with_what_can_be_had(frames: int) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(LONG, label="covid-convex", seed=1, num_frames=frames)
    assert caught.value.allowed == ("16", "multiples of 8 from 24 to 64")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prefix_frames": 16}, "prefix_frames"),
        ({"prefix_frames": -1}, "prefix_frames"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.1}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"strength": 0.5, "prefix_frames": 8}, "strength"),
    ],
)
def test_sources_that_make_no_sense_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_request(LONG, label="covid-convex", seed=1, **values)
    assert caught.value.field == field


def test_a_checkpoint_without_clean_prefixes_takes_edits_and_no_prefixes() -> None:
    plain = replace(MANIFEST, limits=replace(MANIFEST.limits, num_frames=(16,)))
    assert resolve_request(plain, label="covid-convex", seed=1, strength=0.5).source_frames == 16
    with pytest.raises(RequestError, match=r"limits\.clean_prefixes") as caught:
        resolve_request(plain, label="covid-convex", seed=1, prefix_frames=8)
    assert caught.value.field == "prefix_frames"


def test_edits_need_a_sampler_that_can_begin_midway() -> None:
    noise = replace(MANIFEST, limits=replace(MANIFEST.limits, samplers=("ddim",)))
    with pytest.raises(RequestError) as caught:
        resolve_request(noise, label="covid-convex", seed=1, strength=0.5)
    assert caught.value.allowed == ("euler", "heun")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_frames": 64}, "only with limits.clean_prefixes"),
        ({"clean_prefixes": True, "max_frames": 8}, "from 16 on"),
        ({"clean_prefixes": True, "max_frames": 20}, "a multiple of 8"),
        ({"clean_prefixes": True, "num_frames": (8,)}, "a known chunk"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MANIFEST, limits=replace(MANIFEST.limits, **{"num_frames": (16,), **limits}))
