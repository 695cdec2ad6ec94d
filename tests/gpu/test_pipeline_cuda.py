"""The pipeline as CUDA graphs: equal to the same plans step by step, again and again, whatever ran before.

In float32 both run the same operations but for what the compiler fuses: 1e-4 over a few steps of random weights. In
bfloat16 fused operations also round less often: 3e-2.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from medsora.config import SAMPLERS_OF
from medsora.diffusion.samplers import SAMPLERS
from medsora.errors import GenerationCanceled
from medsora.request import GenerationRequest

pytest.importorskip("av", reason="the pipeline needs PyAV")
from medsora import bench
from medsora.pipeline import VideoPipeline

pytestmark = pytest.mark.gpu

BATCH = 4


def pipeline_of(prediction: str, *, dtype: str, compiled: str) -> VideoPipeline:
    """Preset ``tiny`` with random weights that predicts velocity or noise."""
    original = bench.preset

    def preset(name: str, conditions: dict[str, tuple[str, ...]]) -> object:
        config = original(name, conditions)
        channels = config.denoiser.in_channels * (2 if prediction == "noise" else 1)
        return replace(config, denoiser=replace(config.denoiser, prediction=prediction, out_channels=channels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "preset", preset)
        return bench.preset_pipeline("tiny", dtype=dtype, compiled=compiled, batch_sizes=(BATCH,))


@pytest.fixture(scope="module")
def velocity() -> VideoPipeline:
    return pipeline_of("velocity", dtype="float32", compiled="on")


def ask(sampler: str, seeds: Sequence[int] = range(BATCH), *, guidance_scale: float = 1.0) -> list[GenerationRequest]:
    request = GenerationRequest(
        label="first",
        seed=0,
        num_frames=16,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        sampler=sampler,
    )
    return [replace(request, seed=seed) for seed in seeds]


def latents(pipeline: VideoPipeline, requests: list[GenerationRequest]) -> torch.Tensor:
    return pipeline.sample_latents(requests).clone()


@pytest.mark.parametrize(
    ("prediction", "dtype", "guidance_scale", "bound"),
    [
        ("velocity", "float32", 3.0, 1e-4),
        ("noise", "float32", 1.0, 1e-4),
        ("velocity", "bfloat16", 1.0, 3e-2),
    ],
)
def test_graphs_equal_the_same_plans_step_by_step(
    prediction: str, dtype: str, guidance_scale: float, bound: float
) -> None:
    graphed, plain = (pipeline_of(prediction, dtype=dtype, compiled=compiled) for compiled in ("on", "off"))
    assert (graphed.is_compiled, plain.is_compiled) == (True, False)
    for sampler in SAMPLERS_OF[prediction]:
        requests = ask(sampler, guidance_scale=guidance_scale)
        expected, got = latents(plain, requests), latents(graphed, requests)
        error = ((got - expected).norm() / expected.norm()).item()
        print(prediction, dtype, sampler, f"{error:.1e}")
        assert error <= bound
        frames, expected_frames = graphed(requests), plain(requests)
        apart = np.abs(np.stack(frames).astype(int) - np.stack(expected_frames))
        assert np.quantile(apart, 0.99) <= (1 if dtype == "float32" else 16)


def test_a_replay_gives_the_same_bits_whatever_ran_between(velocity: VideoPipeline) -> None:
    first = np.stack(velocity(ask("euler")))
    velocity(ask("heun", range(10, 14)))
    velocity(ask("euler", range(20, 24), guidance_scale=3.0))
    assert np.array_equal(np.stack(velocity(ask("euler"))), first)
    assert not np.array_equal(np.stack(velocity(ask("euler", range(30, 34)))), first)


def test_what_fills_a_batch_up_is_dropped(velocity: VideoPipeline) -> None:
    whole = velocity(ask("euler"))
    some = velocity(ask("euler", range(3)))
    many = velocity(ask("euler", range(6)))
    assert (len(some), len(many)) == (3, 6)
    assert all(np.array_equal(a, b) for a, b in zip(some, whole[:3], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(many[:4], whole, strict=True))


def test_a_cancelled_call_leaves_the_next_one_right(velocity: VideoPipeline) -> None:
    expected = np.stack(velocity(ask("euler")))
    done: list[int] = []

    def cancel(step: int, total: int) -> None:
        done.append(step)
        if step == 2:
            raise GenerationCanceled

    with pytest.raises(GenerationCanceled):
        velocity(ask("euler", range(10, 14)), on_step=cancel)
    assert done == [1, 2]
    assert np.array_equal(np.stack(velocity(ask("euler"))), expected)
    steps: list[tuple[int, int]] = []
    velocity(ask("euler"), on_step=lambda step, total: steps.append((step, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_host_does_not_wait_inside_a_sampling(velocity: VideoPipeline) -> None:
    requests = ask("euler")
    velocity.sample_latents(requests)
    sampler = velocity._sample_by_graphs
    assert sampler is not None
    steps = SAMPLERS["euler"].steps(4)
    noise = torch.randn(BATCH, velocity.config.denoiser.in_channels, 4, 4, 4, device="cuda")
    condition = torch.zeros(BATCH, 1, dtype=torch.long, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(steps, noise, condition, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_warm_up_says_how_long_each_batch_size_took(velocity: VideoPipeline) -> None:
    seconds = velocity.warm_up([ask("euler")[0]])
    assert list(seconds) == [BATCH]
    assert 0 < seconds[BATCH] < 10  # everything is compiled by now
