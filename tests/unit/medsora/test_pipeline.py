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
from medsora.config import SAMPLERS_OF, SHORTCUT
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


def write_variant(
    directory: Path, tiny: Path, *, prediction: str, is_conditional: bool, shortcut_steps: tuple[int, ...] = ()
) -> Path:
    """The tiny checkpoint with another denoiser: of noise, unconditional, or with step sizes."""
    loaded = load_checkpoint(tiny)
    channels = loaded.config.denoiser.in_channels * (2 if prediction == "noise" else 1)
    denoiser = replace(
        loaded.config.denoiser,
        prediction=prediction,
        out_channels=channels,
        has_step_sizes=bool(shortcut_steps),
    )
    limits = replace(
        loaded.manifest.limits,
        samplers=denoiser.samplers,
        num_inference_steps=(2, 4, 1000),
        shortcut_steps=shortcut_steps,
        shortcut_guidance=2.5,
    )
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


@pytest.fixture(scope="module")
def shortcut_checkpoint(checkpoint: Path) -> Path:
    """Its sampler takes 4, 1, 2, 3 or 5 steps, with a guidance of 2.5."""
    return write_variant(
        checkpoint.parent / "shortcut", checkpoint, prediction="velocity", is_conditional=True,
        shortcut_steps=(4, 1, 2, 3, 5),
    )  # fmt: skip


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
@pytest.mark.parametrize("sampler", [sampler for samplers in SAMPLERS_OF.values() for sampler in samplers])
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
    assert {name: sampler.prediction for name, sampler in SAMPLERS.items()} == named | {SHORTCUT: "velocity"}


@pytest.mark.parametrize("num_steps", [1, 4])
def test_shortcut_is_told_how_far_it_goes_and_is_not_guided_again(
    shortcut_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    pipeline = VideoPipeline.from_checkpoint(shortcut_checkpoint, dtype="float64")
    asked: list[tuple[list[float], list[float]]] = []
    data = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    started = initial_noise(1, (4, 4, 4, 4)).double()

    def oracle(x: Tensor, times: Tensor, condition: Tensor, step: Tensor) -> Tensor:
        assert len(x) == 1
        asked.append((times[0].tolist(), step[0].tolist()))
        return velocity_target(data, started[None])

    monkeypatch.setattr(pipeline.denoiser, "forward", oracle)
    request = ask(pipeline, 1, num_inference_steps=num_steps)
    assert (request.sampler, request.guidance_scale) == (SHORTCUT, 2.5)
    assert torch.allclose(pipeline.sample_latents([request]), data, atol=1e-6)
    assert asked == [([1 - place / num_steps] * 4, [1 / num_steps] * 4) for place in range(num_steps)]


def test_a_network_with_step_sizes_makes_clips_of_either_kind(shortcut_checkpoint: Path) -> None:
    pipeline = VideoPipeline.from_checkpoint(shortcut_checkpoint)
    few, one, many = (ask(pipeline, 1), ask(pipeline, 1, num_inference_steps=1), ask(pipeline, 1, sampler="euler"))
    clips = [pipeline([request])[0] for request in (few, one, many)]
    assert not any(np.array_equal(clips[a], clips[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortcut_steps": ()}, "shortcut_steps go with the sampler"),
        ({"samplers": ("euler",)}, "shortcut_steps go with the sampler"),
        ({"shortcut_steps": (4, 0)}, "must be 1 or more"),
        ({"shortcut_guidance": 0.5}, "must be 1 or more"),
    ],
)
def test_limits_of_shortcut_that_contradict_themselves_are_refused(
    shortcut_checkpoint: Path, changes: dict[str, Any], message: str
) -> None:
    manifest = load_checkpoint(shortcut_checkpoint).manifest
    with pytest.raises(ValueError, match=message):
        replace(manifest, limits=replace(manifest.limits, **changes))


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

    def record(self, stream: object) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def compiled(
    checkpoint: Path, noise_checkpoint: Path, shortcut_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[VideoPipeline, VideoPipeline]]:
    """Makes two pipelines: one that goes by graphs as on a GPU, but for the GPU, and one that does not."""
    monkeypatch.setattr(graphs, "GraphedFunction", Recorded)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Denoiser, "compile_parts", lambda denoiser: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)

    def make(
        sampler: str = "euler",
        batch_sizes: tuple[int, ...] = (2, 4),
        source: Path | None = None,
        **options: str,
    ) -> tuple[VideoPipeline, VideoPipeline]:
        able = {SHORTCUT: shortcut_checkpoint, **dict.fromkeys(SAMPLERS_OF["noise"], noise_checkpoint)}
        source = source or able.get(sampler, checkpoint)
        by_graphs, plain = (VideoPipeline.from_checkpoint(source, batch_sizes=batch_sizes, **options) for _ in range(2))
        by_graphs._compile()
        assert (by_graphs.is_compiled, plain.is_compiled) == (True, False)
        return by_graphs, plain

    return make


Compiled = Callable[..., tuple[VideoPipeline, VideoPipeline]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_graphs_sample_what_steps_one_by_one_do(compiled: Compiled, sampler: str) -> None:
    by_graphs, plain = compiled(sampler)
    # one recording serves every number of steps, scale and label: what it was made for must not stay in it
    labels, others = ("covid-convex", "regular-convex"), ("regular-convex", "regular-convex")
    for num_steps, guidance_scale, names in ((2, 1.0, labels), (5, 1.0, others), (3, 3.0, labels), (2, 1.5, others)):
        values = {"sampler": sampler, "num_inference_steps": num_steps}
        if sampler != SHORTCUT:
            values["guidance_scale"] = guidance_scale
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
    by_graphs, plain = compiled(sampler, dtype="float64")
    scale = 2.5 if sampler == SHORTCUT else 1.1
    requests = [ask(plain, seed, sampler=sampler, num_inference_steps=3, guidance_scale=scale) for seed in (1, 2)]
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


@pytest.fixture(scope="module")
def prefix_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, saying that it was trained with clean prefixes."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "tiny", max_frames=64)


@pytest.fixture(scope="module")
def going_on(prefix_checkpoint: Path) -> VideoPipeline:
    return VideoPipeline.from_checkpoint(prefix_checkpoint)


def pictures(seed: int, frames: int) -> Any:
    """Smooth random frames."""
    coarse = np.random.RandomState(seed).randint(0, 256, (frames, 4, 4, 3)).astype(np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def coded(pipeline: VideoPipeline, frames: Any) -> Any:
    """What the autoencoder makes of whole chunks."""
    video = torch.from_numpy(frames)[None].permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.autoencoder.decode(pipeline.autoencoder.encode(video.to(pipeline.dtype)))
    return ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()


def differ(one: Any, other: Any) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_known_frames_are_seen_at_time_0_and_stay(
    prefix_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, guidance_scale: float
) -> None:
    """A network that knows the data of what is new gives back: the given, then the data."""
    pipeline = VideoPipeline.from_checkpoint(prefix_checkpoint, dtype="float64")
    requests = [ask(pipeline, seed, sampler=sampler, guidance_scale=guidance_scale, prefix_frames=8) for seed in (1, 2)]
    sources = [pictures(seed, 8) for seed in (1, 2)]
    given = pipeline._encode(np.stack(sources), fill=0)
    data = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)
    noise = torch.stack([initial_noise(seed, (4, 4, 4, 4)) for seed in (1, 2)]).double()
    times_seen = []

    def oracle(x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        times_seen.append(times)
        repeats = len(x) // 2
        assert torch.equal(x[:, :, :2], given.repeat(repeats, 1, 1, 1, 1))
        return velocity_target(data, noise).repeat(repeats, 1, 1, 1, 1)

    decoded = []
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(pipeline.denoiser, "forward", oracle)
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda z, state: decoded.append(z) or decode(z, state))
    pipeline(requests, sources=sources)
    assert torch.equal(decoded[0], given)
    assert torch.allclose(torch.cat(decoded[1:], dim=2), data[:, :, 2:], atol=1e-6)
    for times in times_seen:
        assert (times[:, :2] == 0).all()
        assert (times[:, 2:] == times[0, 2]).all()
        assert times[0, 2] > 0


def test_a_long_clip_begins_as_the_short_one_and_every_window_sees_what_came_before(
    going_on: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    network = going_on.denoiser.forward
    spy = lambda x, t, c: seen.append((x.clone(), t.clone())) or network(x, t, c)  # noqa: E731
    monkeypatch.setattr(going_on.denoiser, "forward", spy)
    request = ask(going_on, 5, num_frames=32, num_inference_steps=2)
    pieces = [piece for (piece,) in going_on.stream([request])]
    assert [len(piece) for piece in pieces] == [16, 8, 8]
    monkeypatch.undo()
    (whole,), (short,) = going_on([request]), going_on([replace(request, num_frames=16)])
    assert np.array_equal(np.concatenate(pieces), whole)
    assert differ(whole[:16], short) <= 1
    assert differ(whole[16:24], whole[24:]) > 0
    known = [x[:, :, :2] for x, _ in seen]
    assert torch.equal(known[2], known[3])  # both steps of the second window
    assert not torch.equal(known[3], known[4])
    assert [t[0].tolist() for _, t in seen[2:4]] == [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]


def test_between_windows_there_is_no_seam(going_on: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded window by window is what decoding all latents at once gives."""
    latents = []
    decode = going_on.autoencoder.decode
    monkeypatch.setattr(going_on.autoencoder, "decode", lambda z, state: latents.append(z) or decode(z, state))
    (clip,) = going_on([ask(going_on, 5, num_frames=40)])
    monkeypatch.undo()
    frames, _ = going_on.decode(torch.cat(latents, dim=2))
    assert differ(clip, frames[0].numpy()) <= 1


def test_windows_have_noise_of_their_own() -> None:
    shape = (1, 4, 2, 2)
    keys = [
        (seed, step, window) for seed in (1, 2) for step, window in ((None, 0), (0, 0), (1, 0), (None, 1), (None, 2))
    ]
    noises = {initial_noise(seed, shape, step=step, window=w).numpy().tobytes() for seed, step, w in keys}
    assert len(noises) == len(keys)


def test_a_streamed_clip_is_made_as_it_is_taken(going_on: VideoPipeline) -> None:
    done: list[tuple[int, int]] = []
    request = ask(going_on, 5, num_frames=64, num_inference_steps=2)
    stream = going_on.stream([request], on_step=lambda *step: done.append(step))
    next(stream)
    assert done == [(1, 14), (2, 14)]
    (other,) = going_on([ask(going_on, 1)])  # the pipeline is free meanwhile
    rest = [piece for (piece,) in stream]
    assert done[-1] == (14, 14)
    assert sum(map(len, rest)) == 48
    assert differ(other, going_on([ask(going_on, 1)])[0]) == 0


@pytest.mark.parametrize("prefix_frames", [1, 5, 8, 12])
def test_a_clip_begins_with_the_given_frames_as_they_are_coded(going_on: VideoPipeline, prefix_frames: int) -> None:
    source = pictures(3, prefix_frames)
    (clip,) = going_on([ask(going_on, 5, prefix_frames=prefix_frames)], sources=[source])
    assert clip.shape == (16, 32, 32, 3)
    fill = -prefix_frames % 8
    filled = np.concatenate([source[:1].repeat(fill, axis=0), source])
    assert differ(clip[:prefix_frames], coded(going_on, filled)[fill:]) <= 1


def test_what_comes_after_depends_on_what_is_given(going_on: VideoPipeline) -> None:
    request = ask(going_on, 5, prefix_frames=1)
    one, again, other = (going_on([request], sources=[pictures(seed, 1)])[0] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert differ(one[1:], other[1:]) > 8


def test_each_clip_of_a_batch_goes_on_from_its_own_frames(prefix_checkpoint: Path) -> None:
    exact = VideoPipeline.from_checkpoint(prefix_checkpoint, backend="reference")
    requests = [ask(exact, seed, prefix_frames=8) for seed in (1, 2, 1)]
    sources = [pictures(seed, 8) for seed in (1, 2, 3)]
    together = exact(requests, sources=sources)
    for request, source, clip in zip(requests, sources, together, strict=True):
        assert np.array_equal(exact([request], sources=[source])[0], clip)


def test_the_weaker_an_edit_the_more_of_the_clip_stays(going_on: VideoPipeline) -> None:
    source = pictures(7, 16)
    base = coded(going_on, source)
    apart = []
    for strength in (0.02, 0.3, 0.9):
        request = ask(going_on, 5, strength=strength, num_inference_steps=8)
        (clip,) = going_on([request], sources=[source])
        apart.append(np.abs(clip - base).mean())
    assert apart[0] < apart[1] < apart[2]
    assert apart[0] < 4
    assert differ(clip, going_on([ask(going_on, 5, num_inference_steps=8)])[0]) > 8  # and not from noise alone


def test_a_long_edit_goes_through_the_windows_of_its_source(going_on: VideoPipeline) -> None:
    source = pictures(7, 32)
    (clip,) = going_on([ask(going_on, 5, num_frames=32, strength=0.02)], sources=[source])
    assert np.abs(clip - coded(going_on, source)).mean() < 4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_graphs_go_on_from_given_frames_as_steps_one_by_one_do(
    compiled: Compiled, prefix_checkpoint: Path, sampler: str, guidance_scale: float
) -> None:
    by_graphs, plain = compiled(source=prefix_checkpoint)
    values = {"sampler": sampler, "guidance_scale": guidance_scale, "num_inference_steps": 3}
    # without a prefix, with one, and with a longer one: one recording for all prefixes, another without
    for prefix_frames in (0, 8, 12, 0, 1):
        requests = [ask(plain, seed, **values, prefix_frames=prefix_frames) for seed in range(3)]
        sources = [pictures(seed, prefix_frames) for seed in range(3)] if prefix_frames else None
        clips, expected = (one(requests, sources=sources) for one in (by_graphs, plain))
        assert len(clips) == 3
        assert all(differ(clip, other) <= 1 for clip, other in zip(clips, expected, strict=True))
    assert by_graphs._sample_by_graphs is not None
    recorded = {key[-2] for key in by_graphs._sample_by_graphs._graphs}
    assert recorded == {True, False}


def test_sources_that_are_not_the_requests_are_refused(going_on: VideoPipeline, noise_checkpoint: Path) -> None:
    request = ask(going_on, 1, prefix_frames=8)
    for sources in (None, [], [pictures(1, 7)], [pictures(1, 8).astype(np.float32)], [pictures(1, 8)] * 2):
        with pytest.raises(ValueError, match="needs a source"):
            going_on([request], sources=sources)
    with pytest.raises(ValueError, match="no request has any"):
        going_on([ask(going_on, 1)], sources=[pictures(1, 16)])
    with pytest.raises(ValueError, match="alike"):
        going_on([request, ask(going_on, 1)], sources=[pictures(1, 8)] * 2)
    with pytest.raises(ValueError, match="one window"):
        going_on.sample_latents([request])
    by_noise = VideoPipeline.from_checkpoint(noise_checkpoint)
    with pytest.raises(ValueError, match="ddim samples single windows"):
        by_noise([replace(ask(by_noise, 1, sampler="ddim"), strength=0.5)], sources=[pictures(1, 16)])


def test_clean_prefixes_are_for_a_predicted_velocity(prefix_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="clean_prefixes is for a predicted velocity"):
        write_variant(tmp_path / "noise", prefix_checkpoint, prediction="noise", is_conditional=True)


class Onlooker:
    """Looks at the running estimate of some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.step, self.shown = steps, 0, []  # type: tuple[set[int], int, list[tuple[int, int, Any]]]

    def wanted(self) -> bool:
        self.step += 1
        return self.step in self.steps

    def show(self, first: int, pictures: list[Any]) -> None:
        self.shown.append((self.step, first, pictures))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_previews_come_to_be_the_clip_and_change_nothing(pipeline: VideoPipeline, sampler: str) -> None:
    manifest = pipeline.manifest
    requests = [
        resolve_request(manifest, label=manifest.labels[0].name, seed=seed, num_inference_steps=4, sampler=sampler)
        for seed in (1, 2)
    ]
    onlooker = Onlooker({1, 4})
    clips = pipeline(requests, preview=onlooker)
    for clip, plain in zip(clips, pipeline(requests), strict=True):
        assert np.array_equal(clip, plain)
    (first_step, _, early), (last_step, _, late) = onlooker.shown
    assert (first_step, last_step) == (1, 4)
    for clip, before, after in zip(clips, early, late, strict=True):
        assert (after.shape, after.dtype) == (clip[7].shape, np.uint8)
        # after the last step the estimate is the clip; decoding alone may round differently than with what follows
        assert np.abs(after.astype(int) - clip[7].astype(int)).max() <= 1
        assert not np.array_equal(before, after)


def test_a_picture_is_made_only_when_it_is_wanted(pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    request = resolve_request(pipeline.manifest, label=pipeline.manifest.labels[0].name, seed=1, num_inference_steps=4)
    decodes = []
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(
        pipeline.autoencoder, "decode", lambda latents: decodes.append(latents.shape) or decode(latents)
    )
    pipeline([request], preview=Onlooker(set()))
    assert len(decodes) == 1
    pipeline([request], preview=Onlooker({2}))
    assert [shape[2] for shape in decodes] == [4, 2, 4]


def test_previews_of_a_long_clip_show_what_comes_next(going_on: VideoPipeline) -> None:
    request = ask(going_on, 1, num_frames=32)
    steps = request.num_inference_steps
    windows = len(going_on.plan(request).windows)
    assert windows > 1
    onlooker = Onlooker({steps * number for number in range(1, windows + 1)})
    (clip,) = going_on([request], preview=onlooker)
    assert np.array_equal(clip, going_on([request])[0])
    assert len(onlooker.shown) == windows
    assert differ(onlooker.shown[0][2][0], clip[7]) <= 1


@pytest.mark.parametrize("sampler", ["euler", "heun", SHORTCUT])
def test_previews_of_recorded_steps(compiled: Compiled, sampler: str) -> None:
    by_graphs, _ = compiled(sampler)
    requests = [ask(by_graphs, seed, sampler=sampler, num_inference_steps=4) for seed in (1, 2)]
    plain = [clip.copy() for clip in by_graphs(requests)]
    steps = requests[0].num_inference_steps
    onlooker = Onlooker({1, steps})
    clips = by_graphs(requests, preview=onlooker)
    (_, _, early), (_, _, late) = onlooker.shown
    for clip, other, before, after in zip(clips, plain, early, late, strict=True):
        assert np.array_equal(clip, other)
        assert differ(after, clip[7]) <= 1
        assert not np.array_equal(before, after)
