"""The pipeline: deterministic, independent of its batch, without memory of requests."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medsora import graphs
from medsora import pipeline as pipeline_module
from medsora.checkpoint import load_checkpoint, save_checkpoint, write_tiny_checkpoint
from medsora.config import SAMPLERS_OF
from medsora.diffusion.ddpm import alpha_bars, ddpm_step, ddpm_values
from medsora.diffusion.path import velocity_target
from medsora.diffusion.samplers import SAMPLERS, Sampler, Step
from medsora.errors import BackendError, CheckpointError, GenerationCanceled, VideoError
from medsora.manifest import Label
from medsora.models.blocks import LocalAttention, SpatialMamba, TemporalMamba
from medsora.models.denoiser import Denoiser
from medsora.pipeline import VideoPipeline, initial_noise
from medsora.request import GenerationRequest, resolve_request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> VideoPipeline:
    return VideoPipeline.from_checkpoint(checkpoint)


def write_variant(directory: Path, tiny: Path, *, prediction: str, is_conditional: bool) -> Path:
    """The tiny checkpoint with another denoiser: of noise, or unconditional."""
    loaded = load_checkpoint(tiny)
    channels = loaded.config.denoiser.in_channels * (2 if prediction == "noise" else 1)
    denoiser = replace(loaded.config.denoiser, prediction=prediction, out_channels=channels)
    limits = replace(loaded.manifest.limits, samplers=SAMPLERS_OF[prediction], num_inference_steps=(2, 4, 1000))
    config = replace(loaded.config, denoiser=denoiser)
    manifest = replace(loaded.manifest, limits=limits)
    if not is_conditional:
        config = replace(config, denoiser=replace(denoiser, condition_sizes=()), condition_names={})
        manifest = replace(manifest, labels=(Label(name="anything", description="", condition={}),))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Denoiser(config.denoiser)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.05)
    assert loaded.autoencoder is not None
    states = {"autoencoder": loaded.autoencoder.state_dict(), "denoiser": network.state_dict()}
    save_checkpoint(directory, config=config, manifest=manifest, dtype="float32", **states)
    return directory


@pytest.fixture(scope="module")
def noise_checkpoint(checkpoint: Path) -> Path:
    return write_variant(checkpoint.parent / "noise", checkpoint, prediction="noise", is_conditional=True)


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


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_what_fills_a_batch_up_changes_nothing_on_the_reference_back_end(noise_checkpoint: Path, sampler: str) -> None:
    pipeline = VideoPipeline.from_checkpoint(noise_checkpoint, backend="reference")
    asked = ask(pipeline, 1, sampler=sampler, num_inference_steps=2)
    others = [replace(asked, seed=2), replace(asked, seed=3, label="regular-convex")]
    (alone,) = pipeline([asked])
    for requests in ([asked, *others], [*others, asked], [asked, asked]):
        clips = pipeline(requests)
        assert all(
            np.array_equal(clip, alone) == (request == asked) for request, clip in zip(requests, clips, strict=True)
        )


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


def test_a_clip_that_is_not_finite_is_an_error_and_the_next_one_is_well(
    pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipeline.autoencoder.decode
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.autoencoder, "decode", lambda latents: decode(latents) / torch.zeros(()))
        with pytest.raises(VideoError, match="not finite: the sampler has diverged"):
            pipeline([ask(pipeline, 1)])
    assert pipeline([ask(pipeline, 1)])[0].shape == (16, 32, 32, 3)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_that_knows_the_data_gives_it_back(
    checkpoint: Path,
    noise_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    guidance_scale: float,
) -> None:
    """Times, channels and halves of a batch arrive where they belong, whatever the sampler."""
    prediction = SAMPLERS[sampler].prediction
    source = noise_checkpoint if prediction == "noise" else checkpoint
    pipeline = VideoPipeline.from_checkpoint(source, dtype="float64")
    requests = [ask(pipeline, seed, sampler=sampler, guidance_scale=guidance_scale) for seed in (1, 2)]
    data = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)
    noise = torch.stack([initial_noise(seed, (4, 4, 4, 4)) for seed in (1, 2)]).double()
    bars = torch.tensor(alpha_bars(), dtype=torch.float64)

    def oracle(x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        half = len(x) // 2 if guidance_scale != 1 else len(x)
        known, started = (value.repeat(len(x) // half, 1, 1, 1, 1) for value in (data, noise))
        if prediction == "velocity":
            return velocity_target(known, started)
        share = bars[(times * 1000).round().long()][:, None, :, None, None]
        return torch.cat([(x - share.sqrt() * known) / (1 - share).sqrt(), torch.zeros_like(x)], dim=1)

    monkeypatch.setattr(pipeline.denoiser, "forward", oracle)
    assert torch.allclose(pipeline.sample_latents(requests), data, atol=1e-6)


def test_samplers_are_those_that_checkpoints_may_name() -> None:
    named = {name: prediction for prediction, names in SAMPLERS_OF.items() for name in names}
    assert {name: sampler.prediction for name, sampler in SAMPLERS.items()} == named


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_networks_that_predict_noise_make_clips(noise_checkpoint: Path, sampler: str) -> None:
    pipeline = VideoPipeline.from_checkpoint(noise_checkpoint)
    assert ask(pipeline, 1).sampler == "ddim"
    first, again, other = (ask(pipeline, seed, sampler=sampler) for seed in (1, 1, 2))
    clips = [pipeline([request])[0] for request in (first, again, other, replace(first, guidance_scale=3.0))]
    assert clips[0].shape == (16, 32, 32, 3)
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])
    assert not np.array_equal(clips[0], clips[3])


@pytest.mark.parametrize("prediction", SAMPLERS_OF)
def test_networks_without_conditions_make_clips(checkpoint: Path, tmp_path: Path, prediction: str) -> None:
    write_variant(tmp_path / "made", checkpoint, prediction=prediction, is_conditional=False)
    pipeline = VideoPipeline.from_checkpoint(tmp_path / "made")
    requests = [ask(pipeline, seed, "anything") for seed in (1, 2)]
    clips = pipeline(requests)
    assert [clip.shape for clip in clips] == [(16, 32, 32, 3)] * 2
    assert not np.array_equal(*clips)
    # guidance leans away from what is asked without a condition, and that is all that there is
    leaning = pipeline([replace(request, guidance_scale=3.0) for request in requests])
    assert np.abs(np.stack(leaning).astype(int) - np.stack(clips)).max() <= 1


def test_fresh_noise_is_that_of_each_request_and_step(noise_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def step(predict: Any, x: Tensor, *values: float, noise: Tensor) -> Tensor:
        drawn.append(noise)
        return ddpm_step(predict, x, *values, noise=noise)

    plan = [Step(step, values, draws_noise=True) for values in ddpm_values(3)]
    monkeypatch.setitem(SAMPLERS, "ddpm", Sampler("noise", lambda num_steps: plan))
    pipeline = VideoPipeline.from_checkpoint(noise_checkpoint)
    pipeline.sample_latents([ask(pipeline, seed, sampler="ddpm") for seed in (5, 6, 5)])
    assert len(drawn) == 3
    for number, noise in enumerate(drawn):
        for clip, seed in zip(noise, (5, 6, 5), strict=True):
            assert torch.equal(clip, initial_noise(seed, (4, 4, 4, 4), step=number))


def test_the_noise_of_a_step_is_like_no_other() -> None:
    keys = [(seed, step) for seed in (0, 1, 2**32) for step in (None, 0, 1, 2)]
    noises = {initial_noise(seed, (2, 1, 2, 2), step=step).numpy().tobytes() for seed, step in keys}
    assert len(noises) == len(keys)
    # of a few thousand numbers: no correlation with where the sampling starts
    start, fresh = (initial_noise(3, (4, 4, 16, 16), step=step).flatten() for step in (None, 0))
    assert abs(torch.corrcoef(torch.stack([start, fresh]))[0, 1].item()) < 0.05


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
    noise = initial_noise(7, (1, 1, 1, 4), step=2).flatten()
    assert torch.allclose(noise, torch.tensor([1.8308860, -0.0320095, -0.0855469, -0.8778188]), atol=1e-6)


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
        ({"device": "meta"}, "device must be auto, cpu, cuda or mps; got 'meta'"),
        ({"dtype": "int4"}, "dtype must be one of auto, float32"),
        ({"backend": "fast"}, "back end must be one of auto, reference"),
    ],
)
def test_what_is_not_there_is_said_before_weights_are_read(
    tmp_path: Path, choice: dict[str, str], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        VideoPipeline.from_checkpoint(tmp_path, **choice)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"compiled": "sometimes"}, "compiled must be one of auto, on, off; got 'sometimes'"),
        ({"compiled": "on"}, "compiled can be on with a CUDA device only, got cpu"),
        ({"compiled": "on", "backend": "reference"}, "compiled cannot be on with the back end reference"),
        ({"batch_sizes": ()}, r"batch_sizes must be numbers from 1 on, got \(\)"),
        ({"batch_sizes": (4, 0)}, r"batch_sizes must be numbers from 1 on, got \(4, 0\)"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused(checkpoint: Path, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        VideoPipeline.from_checkpoint(checkpoint, device="cpu", **choice)


def test_where_nothing_compiles_auto_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiles(function: object, **options: object) -> object:
        raise RuntimeError("no C compiler\nand many lines more")

    monkeypatch.setattr(torch, "compile", compiles)
    with caplog.at_level(logging.WARNING):
        assert not pipeline_module._can_compile(torch.device("cpu"), "auto")
    assert caplog.messages == ["the networks cannot be compiled here, and run without, which is slower: no C compiler"]
    with pytest.raises(BackendError, match=r"the networks cannot be compiled here: no C compiler$"):
        pipeline_module._can_compile(torch.device("cpu"), "on")


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        VideoPipeline.from_checkpoint(tmp_path)


class Recorded:
    """In place of a CUDA graph: what would be recorded is run again."""

    made = 0

    def __init__(self, function: Callable[[], Any], *, pool: object) -> None:
        type(self).made += 1
        self.replay = function
        function()


class Event:
    """In place of a CUDA event: on a CPU everything has happened by now."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def compiled(
    checkpoint: Path, noise_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[VideoPipeline, VideoPipeline]]:
    """Makes two pipelines: one that goes by graphs as on a GPU, but for the GPU, and one that does not."""
    monkeypatch.setattr(graphs, "GraphedFunction", Recorded)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Denoiser, "compile_parts", lambda denoiser: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def make(
        prediction: str = "velocity", batch_sizes: tuple[int, ...] = (2, 4), **options: str
    ) -> tuple[VideoPipeline, VideoPipeline]:
        source = noise_checkpoint if prediction == "noise" else checkpoint
        by_graphs, plain = (VideoPipeline.from_checkpoint(source, batch_sizes=batch_sizes, **options) for _ in range(2))
        by_graphs._compile()
        assert (by_graphs.is_compiled, plain.is_compiled) == (True, False)
        return by_graphs, plain

    return make


Compiled = Callable[..., tuple[VideoPipeline, VideoPipeline]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_sample_what_steps_one_by_one_do(compiled: Compiled, sampler: str) -> None:
    by_graphs, plain = compiled(SAMPLERS[sampler].prediction)
    # one recording serves every number of steps, scale and label: what it was made for must not stay in it
    labels, others = ("covid-convex", "regular-convex"), ("regular-convex", "regular-convex")
    for num_steps, guidance_scale, names in ((2, 1.0, labels), (5, 1.0, others), (3, 3.0, labels), (2, 1.5, others)):
        values = {"sampler": sampler, "num_inference_steps": num_steps, "guidance_scale": guidance_scale}
        requests = [ask(plain, seed, name, **values) for seed, name in enumerate(names)]
        sampled, expected = (pipeline.sample_latents(requests) for pipeline in (by_graphs, plain))
        assert torch.allclose(sampled, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("count", "parts"),
    [(1, [(1, 2)]), (2, [(2, 2)]), (3, [(3, 4)]), (4, [(4, 4)]), (9, [(4, 4), (4, 4), (1, 2)])],
)
def test_a_call_is_split_and_filled_up_to_the_sizes_that_are_compiled(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, count: int, parts: list[tuple[int, int]]
) -> None:
    by_graphs, plain = compiled(batch_sizes=(4, 2, 4))
    batches, seen = [], []
    sample = VideoPipeline.sample_latents

    def counting(pipeline: VideoPipeline, requests: list[GenerationRequest], **options: Any) -> Tensor:
        batches.append(len(requests))
        return sample(pipeline, requests, **options).clone()

    monkeypatch.setattr(VideoPipeline, "sample_latents", counting)
    requests = [ask(plain, seed, num_inference_steps=2) for seed in range(count)]
    clips = by_graphs(requests, on_step=lambda done, total: seen.append((done, total)))
    assert by_graphs._parts(count) == parts
    assert batches == [size for _, size in parts]
    assert seen == [(done + 1, 2 * len(parts)) for done in range(2 * len(parts))]
    for clip, expected in zip(clips, plain(requests), strict=True):
        assert np.abs(clip.astype(int) - expected).max() <= 1


def test_a_call_is_one_batch_where_nothing_is_compiled(pipeline: VideoPipeline, checkpoint: Path) -> None:
    assert pipeline._parts(100) == [(100, 100)]
    assert VideoPipeline.from_checkpoint(checkpoint, backend="reference")._parts(3) == [(1, 1)] * 3


def test_a_graph_that_was_stopped_in_its_midst_is_well_the_next_time(compiled: Compiled) -> None:
    by_graphs, _ = compiled()
    requests = [ask(by_graphs, seed) for seed in (1, 2)]
    expected = by_graphs.sample_latents(requests).clone()
    done: list[int] = []

    def stop(step: int, total: int) -> None:
        done.append(step)
        if step == 2:
            raise GenerationCanceled

    with pytest.raises(GenerationCanceled):
        by_graphs([ask(by_graphs, seed, "regular-convex") for seed in (8, 9)], on_step=stop)
    assert done == [1, 2]
    assert torch.equal(by_graphs.sample_latents(requests), expected)


def test_after_warming_up_nothing_is_left_to_record(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    by_graphs, _ = compiled()
    monkeypatch.setattr(Recorded, "made", 0)
    values = {"sampler": "heun", "guidance_scale": 3.0}
    seconds = by_graphs.warm_up([ask(by_graphs, 1, **values)])
    assert list(seconds) == [2, 4]
    assert all(value > 0 for value in seconds.values())
    assert Recorded.made == 2 * 3  # of each batch size: a step of each kind, and a decode
    asked = ask(by_graphs, 2, "regular-convex", num_inference_steps=3, sampler="heun", guidance_scale=1.5)
    by_graphs([asked] * 3)
    by_graphs([asked])
    assert Recorded.made == 2 * 3
    by_graphs([replace(asked, guidance_scale=1.0)])
    assert Recorded.made == 2 * 3 + 2  # without guidance the network sees half as many clips


def test_where_nothing_is_compiled_warming_up_is_one_clip(pipeline: VideoPipeline) -> None:
    seconds = pipeline.warm_up([ask(pipeline, 1, num_inference_steps=1000)])
    assert list(seconds) == [1]
    assert 0 < seconds[1] < 30


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_in_float64_have_its_digits(compiled: Compiled, sampler: str) -> None:
    by_graphs, plain = compiled(SAMPLERS[sampler].prediction, dtype="float64")
    requests = [ask(plain, seed, sampler=sampler, num_inference_steps=3, guidance_scale=1.1) for seed in (1, 2)]
    sampled, expected = (pipeline.sample_latents(requests) for pipeline in (by_graphs, plain))
    # the network's time is float32 in both; the rest is good to 1e-16 a step
    assert torch.allclose(sampled, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_tables_made_before_a_network_is_compiled_are_those_that_it_looks_up(compiled: Compiled) -> None:
    # "cpu:0" stands for "cuda": a device of the same tensors by another name
    by_graphs, _ = compiled(device="cpu:0")
    assert by_graphs.device == torch.zeros(1, device="cpu:0").device
    by_graphs.sample_latents([ask(by_graphs, seed) for seed in (1, 2)])
    modules = list(by_graphs.denoiser.modules())
    made = [len(module.walks._made) for module in modules if isinstance(module, SpatialMamba | TemporalMamba)]
    made += [len(module._turns) for module in modules if isinstance(module, LocalAttention)]
    assert made == [1] * 3 * by_graphs.config.denoiser.depth


def test_every_thread_may_compile_for_many_shapes(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    by_graphs, _ = compiled()
    limits: list[int] = []
    predict = by_graphs.denoiser.forward

    def forward(*operands: Tensor) -> Tensor:
        limits.append(torch._dynamo.config.recompile_limit)
        return predict(*operands)

    monkeypatch.setattr(by_graphs.denoiser, "forward", forward)
    with ThreadPoolExecutor(1) as other:  # settings of torch's compiler are a thread's own
        other.submit(by_graphs, [ask(by_graphs, 1)]).result()
    assert limits
    assert min(limits) >= pipeline_module.MAX_SHAPES


def test_a_graph_is_recorded_on_the_gpu_that_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, device: int) -> None:
            self.device = device

        def wait_stream(self, other: "Stream") -> None:
            assert other.device == self.device

    recorded: list[Stream] = []

    def record(graph: object, *, pool: object, stream: Stream) -> AbstractContextManager[None]:
        recorded.append(stream)
        return nullcontext()

    fakes = {"Stream": Stream, "CUDAGraph": object, "graph": record, "stream": lambda stream: nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_side_stream", cache(graphs._side_stream.__wrapped__))
    for device in (0, 1, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=device: Stream(device))
        graphs.GraphedFunction(lambda: None, pool=None)
    assert [stream.device for stream in recorded] == [0, 1, 1, 0]
    # one for all graphs of a GPU, since a pool's memory is used again on the same stream alone
    assert (recorded[1], recorded[0]) == (recorded[2], recorded[3])
