"""The pipeline as CUDA graphs: equal to the same plans step by step, again and again, whatever ran before.

Errors are norms relative to the plain result. The weights are large, so that another label moves the latents by a
third at least. In float32 both run the same operations but for what the compiler fuses, a few units in the last place
that so large a network amplifies: 1e-3. In bfloat16 fused operations also round less often, and the plain pipeline is
itself 2 to 9 % away from float32: 0.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from medsora.diffusion.samplers import SAMPLERS
from medsora.errors import GenerationCanceled
from medsora.manifest import Label
from medsora.request import GenerationRequest

pytest.importorskip("av", reason="the pipeline needs PyAV")
from medsora import bench
from medsora.pipeline import VideoPipeline

pytestmark = [
    pytest.mark.gpu,
    # torch's compiler warns of what it imports, and that float32 is not tf32; were that an error, nothing would compile
    pytest.mark.filterwarnings(r"ignore:::torch\."),
    pytest.mark.usefixtures("no_shape_checks"),
]

BATCH = 4
# guidance doubles what the network sees: half as many clips run in what was compiled for a batch without
CLIPS = {1.0: BATCH, 3.0: BATCH // 2}
FLOAT32_BOUND = 1e-3


def pipeline_of(prediction: str, *, dtype: str, compiled: str, device: str = "cuda") -> VideoPipeline:
    """Preset ``tiny`` with large random weights that predicts velocity or noise."""
    original = bench.preset

    def preset(name: str, conditions: dict[str, tuple[str, ...]]) -> object:
        config = original(name, conditions)
        channels = config.denoiser.in_channels * (2 if prediction == "noise" else 1)
        denoiser = replace(
            config.denoiser, prediction=prediction, out_channels=channels, has_step_sizes=prediction == "velocity"
        )
        return replace(config, denoiser=denoiser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "preset", preset)
        pipeline = bench.preset_pipeline("tiny", device=device, dtype=dtype, compiled=compiled, batch_sizes=(BATCH,))
    generator = torch.Generator().manual_seed(0)
    for weight in pipeline.denoiser.parameters():
        if weight.dim() > 1:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    labels = tuple(Label(name=name, description="", condition={"finding": name}) for name in ("first", "second"))
    pipeline.manifest = replace(pipeline.manifest, labels=labels)
    return pipeline


@pytest.fixture(scope="module")
def velocity() -> VideoPipeline:
    return pipeline_of("velocity", dtype="float32", compiled="on")


def ask(
    sampler: str, seeds: Sequence[int] = range(BATCH), *, label: str = "first", guidance_scale: float = 1.0
) -> list[GenerationRequest]:
    request = GenerationRequest(
        label=label,
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


def each_setting(pipeline: VideoPipeline) -> Iterator[list[GenerationRequest]]:
    for sampler in pipeline.config.denoiser.samplers:
        for guidance_scale, clips in CLIPS.items():
            for label in ("first", "second"):  # the second goes by what was recorded for the first
                yield ask(sampler, range(clips), label=label, guidance_scale=guidance_scale)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def compare_samplers(graphed: VideoPipeline, plain: VideoPipeline) -> None:
    assert (graphed.is_compiled, plain.is_compiled) == (True, False)
    for requests in each_setting(plain):
        assert distance(latents(graphed, requests), latents(plain, requests)) <= FLOAT32_BOUND, requests[0]


def compare_decoding(graphed: VideoPipeline, plain: VideoPipeline, *, levels: int) -> None:
    shape = (BATCH, plain.config.denoiser.in_channels, 4, 4, 4)
    for seed in (1, 2):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()
        (got, is_finite), (expected, _) = graphed.decode(values), plain.decode(values)
        assert is_finite.item()
        apart = (got.int() - expected.int()).abs().float()
        assert apart.quantile(0.99).item() <= levels
    assert not graphed.decode(values / 0)[1].item()


def test_graphs_in_float32_equal_the_same_plans_step_by_step(velocity: VideoPipeline) -> None:
    plain = pipeline_of("velocity", dtype="float32", compiled="off")
    compare_samplers(velocity, plain)
    compare_decoding(velocity, plain, levels=1)


def test_graphs_of_a_network_that_predicts_noise() -> None:
    graphed, plain = (pipeline_of("noise", dtype="float32", compiled=compiled) for compiled in ("on", "off"))
    compare_samplers(graphed, plain)


def test_graphs_in_bfloat16_are_as_close_as_its_rounding() -> None:
    """A network of large random weights lets rounding grow, most of all in long steps: so what counts is the distance
    to float32, next to that of the same arithmetic step by step."""
    exact = pipeline_of("velocity", dtype="float32", compiled="off")
    graphed, plain = (pipeline_of("velocity", dtype="bfloat16", compiled=compiled) for compiled in ("on", "off"))
    for requests in each_setting(plain):
        expected = latents(exact, requests)
        rounding = distance(latents(plain, requests), expected)
        assert distance(latents(graphed, requests), expected) <= 1.5 * rounding + 0.02, requests[0]
    compare_decoding(graphed, plain, levels=16)


def test_a_replay_gives_the_same_bits_whatever_ran_between(velocity: VideoPipeline) -> None:
    first = np.stack(velocity(ask("euler")))
    sampled = latents(velocity, ask("euler"))
    velocity(ask("heun", range(10, 14)))
    latents(velocity, ask("euler", range(20, 22), label="second", guidance_scale=3.0))
    assert np.array_equal(np.stack(velocity(ask("euler"))), first)
    assert torch.equal(latents(velocity, ask("euler")), sampled)
    assert np.array_equal(velocity.decode(sampled)[0].cpu().numpy(), first)
    assert not np.array_equal(np.stack(velocity(ask("euler", range(30, 34)))), first)
    assert not np.array_equal(np.stack(velocity(ask("euler", label="second"))), first)


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


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_host_does_not_wait_inside_a_sampling(velocity: VideoPipeline, sampler: str) -> None:
    velocity.sample_latents(ask(sampler))  # recording waits
    by_graphs = velocity._sample_by_graphs
    assert by_graphs is not None
    steps = SAMPLERS[sampler].steps(4)
    noise = torch.randn(BATCH, velocity.config.denoiser.in_channels, 4, 4, 4, device="cuda")
    condition = torch.zeros(BATCH, 1, dtype=torch.long, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampled = by_graphs.sample(steps, noise, condition, 1.0)
        with pytest.raises(RuntimeError, match="synchronizing"):
            sampled.sum().item()  # that would have been noticed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(sampled).all()


def test_graphs_go_on_from_given_frames_as_steps_one_by_one_do(velocity: VideoPipeline) -> None:
    plain = pipeline_of("velocity", dtype="float32", compiled="off")
    generator = np.random.RandomState(0)
    sources = [generator.randint(0, 256, (8, 32, 32, 3)).astype(np.uint8) for _ in range(BATCH)]
    for sampler in ("euler", "heun"):
        for guidance_scale, clips in CLIPS.items():
            requests = [
                replace(one, prefix_frames=8) for one in ask(sampler, range(clips), guidance_scale=guidance_scale)
            ]
            before = latents(velocity, ask(sampler))
            got, expected = (one(requests, sources=sources[:clips]) for one in (velocity, plain))
            apart = np.abs(np.stack(got).astype(int) - np.stack(expected).astype(int))
            assert np.quantile(apart, 0.99) <= 2
            # what runs without a prefix has a recording of its own
            assert torch.equal(latents(velocity, ask(sampler)), before)


def test_warm_up_says_how_long_each_batch_size_took(velocity: VideoPipeline) -> None:
    velocity.warm_up([ask("euler")[0]])
    seconds = velocity.warm_up([ask("euler")[0]])
    assert list(seconds) == [BATCH]
    assert 0 < seconds[BATCH] < 10  # everything is compiled by now


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(velocity: VideoPipeline) -> None:
    """Streams, graphs and kernels of our own go to the current GPU, unless told otherwise."""
    other = pipeline_of("velocity", dtype="float32", compiled="on", device="cuda:1")
    for guidance_scale, clips in CLIPS.items():
        requests = ask("euler", range(clips), guidance_scale=guidance_scale)
        got, expected = latents(other, requests), latents(velocity, requests)
        assert got.device == torch.device("cuda", 1)
        assert (got.cpu() - expected.cpu()).norm() <= FLOAT32_BOUND * expected.norm().cpu()
    assert torch.cuda.current_device() == 0


class Onlooker:
    """Looks at the running estimate of some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.step = steps, 0
        self.shown: dict[int, list[np.ndarray]] = {}  # type: ignore[type-arg]

    def wanted(self) -> bool:
        self.step += 1
        return self.step in self.steps

    def show(self, first: int, pictures: list[np.ndarray]) -> None:  # type: ignore[type-arg]
        assert first == 0
        self.shown[self.step] = pictures


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_previews_of_recorded_steps_change_nothing(velocity: VideoPipeline, sampler: str) -> None:
    requests = ask(sampler)
    plain = velocity(requests)
    steps = requests[0].num_inference_steps
    onlooker = Onlooker({1, steps})
    clips = velocity(requests, preview=onlooker)
    assert set(onlooker.shown) == {1, steps}
    for clip, other, early, late in zip(clips, plain, onlooker.shown[1], onlooker.shown[steps], strict=True):
        assert np.array_equal(clip, other)
        # after the last step the estimate is the clip, decoded by itself and without the compiler
        assert np.abs(late.astype(int) - clip[7].astype(int)).max() <= 3
        assert not np.array_equal(early, late)
