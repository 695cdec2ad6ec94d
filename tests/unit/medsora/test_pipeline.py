"""The pipeline: deterministic, independent of its batch, without memory of requests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medsora.checkpoint import load_checkpoint, write_tiny_checkpoint
from medsora.diffusion.samplers import SAMPLERS, Sampler, Step
from medsora.errors import BackendError, CheckpointError, GenerationCanceled
from medsora.pipeline import VideoPipeline, initial_noise
from medsora.request import GenerationRequest, resolve_request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> VideoPipeline:
    return VideoPipeline.from_checkpoint(checkpoint)


def ask(pipeline: VideoPipeline, seed: int, label: str = "covid-convex", **values: object) -> GenerationRequest:
    return resolve_request(pipeline.manifest, label=label, seed=seed, **values)  # type: ignore[arg-type]


def test_frames_are_bytes_of_the_asked_shape(pipeline: VideoPipeline) -> None:
    (clip,) = pipeline([ask(pipeline, 1)])
    assert clip.shape == (16, 32, 32, 3)
    assert clip.dtype == np.uint8
    assert clip.std() > 5


@pytest.mark.parametrize("values", [{}, {"guidance_scale": 3.0}, {"sampler": "heun", "num_inference_steps": 3}])
def test_same_request_gives_the_same_bits(checkpoint: Path, pipeline: VideoPipeline, values: dict[str, object]) -> None:
    first = pipeline([ask(pipeline, 5, **values)])[0]
    pipeline([ask(pipeline, 6, "regular-convex")])  # leaves nothing behind
    assert np.array_equal(pipeline([ask(pipeline, 5, **values)])[0], first)
    fresh = VideoPipeline.from_checkpoint(checkpoint)
    torch.manual_seed(999)  # the global generator plays no part
    assert np.array_equal(fresh([ask(fresh, 5, **values)])[0], first)


def test_seed_label_and_guidance_all_matter(pipeline: VideoPipeline) -> None:
    base = pipeline([ask(pipeline, 1)])[0]
    for other in (
        ask(pipeline, 2),
        ask(pipeline, 1, "regular-convex"),
        ask(pipeline, 1, guidance_scale=4.0),
        ask(pipeline, 1, num_inference_steps=9),
    ):
        assert not np.array_equal(pipeline([other])[0], base)


def test_on_the_reference_back_end_a_clip_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    pipeline = VideoPipeline.from_checkpoint(checkpoint, backend="reference")
    requests = [
        ask(pipeline, seed, label, guidance_scale=2.0)
        for seed, label in ((1, "covid-convex"), (2, "regular-convex"), (3, "covid-convex"))
    ]
    together = pipeline(requests)
    for request, clip in zip(requests, together, strict=True):
        assert np.array_equal(pipeline([request])[0], clip)
    assert np.array_equal(pipeline(requests[::-1])[2], together[0])


def test_on_the_fast_back_end_a_batch_changes_rounding_at_most(pipeline: VideoPipeline) -> None:
    requests = [ask(pipeline, seed) for seed in range(3)]
    for request, clip in zip(requests, pipeline(requests), strict=True):
        alone = pipeline([request])[0].astype(int)
        assert np.abs(alone - clip).max() <= 1


def test_progress_is_reported_step_by_step_in_a_batch_of_any_kind(checkpoint: Path) -> None:
    for backend, expected in (("auto", [(1, 2), (2, 2)]), ("reference", [(1, 4), (2, 4), (3, 4), (4, 4)])):
        pipeline, seen = VideoPipeline.from_checkpoint(checkpoint, backend=backend), []
        requests = [ask(pipeline, seed, num_inference_steps=2) for seed in (1, 2)]
        pipeline(requests, on_step=lambda done, total, seen=seen: seen.append((done, total)))  # type: ignore[misc]
        assert seen == expected


def test_a_callback_stops_the_generation_and_the_next_one_is_well(pipeline: VideoPipeline) -> None:
    steps = []

    def stop(done: int, total: int) -> None:
        steps.append(done)
        if done == 2:
            raise GenerationCanceled

    with pytest.raises(GenerationCanceled):
        pipeline([ask(pipeline, 1, num_inference_steps=50)], on_step=stop)
    assert steps == [1, 2]
    assert pipeline([ask(pipeline, 1)])[0].shape == (16, 32, 32, 3)


def test_noise_depends_on_seed_and_shape_alone() -> None:
    noise = initial_noise(3, (4, 2, 8, 8))
    assert torch.equal(noise, initial_noise(3, (4, 2, 8, 8)))
    assert not torch.equal(noise, initial_noise(4, (4, 2, 8, 8)))
    assert abs(initial_noise(0, (64, 4, 16, 16)).std().item() - 1) < 0.02


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [7, 7 + 2**31, 7 + 2**32, 7 + 2**62, 0, 2**32, 2**62, 2**63 - 1]
    noises = {initial_noise(seed, (2, 1, 2, 2)).numpy().tobytes() for seed in seeds}
    assert len(noises) == len(seeds)


def test_noise_of_a_seed_never_changes() -> None:
    # clips are made again from their seeds, years later: these numbers must stay
    noise = initial_noise(7, (1, 1, 1, 4)).flatten()
    assert torch.allclose(noise, torch.tensor([0.9838023, -1.4327964, 0.2325132, -1.361203]), atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_bfloat16_stays_close_to_float32(checkpoint: Path, pipeline: VideoPipeline, guidance_scale: float) -> None:
    half = VideoPipeline.from_checkpoint(checkpoint, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    values = {"guidance_scale": guidance_scale, "num_inference_steps": 16}
    clip, exact = (p([ask(p, 3, **values)])[0].astype(float) for p in (half, pipeline))
    psnr = 10 * np.log10(255**2 / np.square(clip - exact).mean())
    assert psnr > 40


@pytest.mark.parametrize(("dtype", "state"), [("bfloat16", torch.float32), ("float64", torch.float64)])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_samplers_state_has_at_least_float32(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, state: torch.dtype, guidance_scale: float
) -> None:
    dtypes: list[torch.dtype] = []
    plan = SAMPLERS["euler"].steps(2)

    def step(predict: Any, x: Tensor, *values: float) -> Tensor:
        result = plan[0].function(predict, x, *values)
        dtypes.extend([x.dtype, predict(x, 0.5).dtype, result.dtype])
        return result

    pipeline = VideoPipeline.from_checkpoint(checkpoint, dtype=dtype)
    monkeypatch.setitem(SAMPLERS, "euler", Sampler("velocity", lambda num_steps: [Step(step, (1.0, -1.0))]))
    pipeline([ask(pipeline, 1, guidance_scale=guidance_scale)])
    assert dtypes == [state] * 3


def test_networks_are_in_evaluation_mode(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    networks = (loaded.autoencoder, loaded.denoiser)
    assert not any(module.training for network in networks for module in network.modules())
    training = replace(loaded, autoencoder=loaded.autoencoder.train(), denoiser=loaded.denoiser.train())
    pipeline = VideoPipeline(training, device=torch.device("cpu"), dtype=torch.float32, backend="auto")
    for network in (pipeline.autoencoder, pipeline.denoiser):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_requests_that_cannot_share_a_batch_are_refused(pipeline: VideoPipeline) -> None:
    for requests in ([], [ask(pipeline, 1), ask(pipeline, 1, num_inference_steps=2)]):
        with pytest.raises(ValueError, match="must be alike"):
            pipeline(requests)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' is not available here"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32"),
        ({"backend": "fast"}, "back end must be one of auto, reference"),
    ],
)
def test_what_is_not_there_is_said_before_weights_are_read(
    tmp_path: Path, choice: dict[str, str], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        VideoPipeline.from_checkpoint(tmp_path, **choice)


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        VideoPipeline.from_checkpoint(tmp_path)
