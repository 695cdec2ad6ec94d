"""What `medsora bench` counts, measures and refuses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from medsora import bench
from medsora.bench import decoder_flops, denoiser_flops, describe, matrix_rate, measure, preset_pipeline
from medsora.cli import app
from medsora.config import AutoencoderConfig, DenoiserConfig
from medsora.errors import MedsoraError, RequestError
from medsora.geometry import latent_shape
from medsora.models.denoiser import Denoiser
from medsora.pipeline import VideoPipeline
from medsora.presets import AUTOENCODERS, DENOISERS
from medsora.timing import median_seconds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> VideoPipeline:
    return preset_pipeline("tiny", device="cpu")


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("latent", [(2, 4, 8), (6, 16, 16)])
def test_a_step_is_counted_as_torch_counts_it(name: str, latent: tuple[int, int, int]) -> None:
    config = replace(DENOISERS[name], depth=3, condition_sizes=(3,))  # all blocks cost the same
    with torch.device("meta"):
        denoiser = Denoiser(config, backend="dual")
        inputs = torch.empty(2, config.in_channels, *latent), torch.empty(2, latent[0])
        condition = torch.zeros(2, 1, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        denoiser(*inputs, condition)
    assert denoiser_flops(config, latent, batch=2, ssd_form="dual") == counter.get_total_flops()


def test_the_recurrence_is_counted_from_its_definition() -> None:
    """h = a h + x B, y = C h: a product, a product and a sum, a product and a sum for each value of the state."""
    config = DenoiserConfig(hidden_size=64, depth=1, d_state=16, headdim=32, temporal_directions=2)
    latent = (4, 8, 8)
    without = denoiser_flops(replace(config, d_state=1), latent) - denoiser_flops(config, latent)
    projections = 2 * (2 * 64 * 2 * 15) * (4 * 4 * 4)  # B and C of 15 more values, in both mixers
    scans = 6 * 5 * 128 * 15 * (4 * 4 * 4)  # each token is scanned four times in space and twice in time
    assert -without == projections + scans


def test_counts_grow_in_proportion_to_frames_and_batch() -> None:
    for name in DENOISERS:
        steps = [denoiser_flops(DENOISERS[name], latent_shape(frames, 128, 128)) for frames in (16, 32, 64, 128)]
        assert steps == [steps[0] * factor for factor in (1, 2, 4, 8)]
        assert denoiser_flops(DENOISERS[name], latent_shape(16, 128, 128), batch=7) == 7 * steps[0]
    decodes = [decoder_flops(AUTOENCODERS["tiny"], latent_shape(frames, 32, 32)) for frames in (16, 32, 64)]
    assert decodes == [decodes[0] * factor for factor in (1, 2, 4)]
    assert decoder_flops(AUTOENCODERS["tiny"], latent_shape(16, 32, 32), batch=3) == 3 * decodes[0]


def test_the_decoder_is_counted_convolution_by_convolution() -> None:
    config = AutoencoderConfig(
        channels=(2, 3, 4), latent_channels=5, decoder_blocks=1, has_frequency_compensation=False
    )

    def convolution(inputs: int, outputs: int, frames: int, places: int, *, size: int = 3) -> int:
        return 2 * inputs * outputs * frames * size * size * places

    def block(channels: int, places: int) -> int:
        return convolution(channels, channels, 3, places) + convolution(channels, channels, 1, places)

    eighth, quarter, half = 2 * 2 * 2, 2 * 4 * 4, 4 * 8 * 8  # places of 8 frames of 16x16
    expected = (
        convolution(5, 4, 3, eighth) + 2 * block(4, eighth) + convolution(4, 12, 1, eighth)
        + block(3, quarter) + convolution(3, 16, 1, quarter)
        + block(2, half) + convolution(2, 24, 3, half)
    )  # fmt: skip
    assert decoder_flops(config, latent_shape(8, 16, 16)) == expected


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps to take the difference of, and a small matrix product: figures that are there, if not good ones."""
    monkeypatch.setattr(bench, "LONG_RUN", bench.SHORT_RUN + 1)
    monkeypatch.setattr(bench, "matrix_rate", partial(matrix_rate, size=64, repeats=1))


@pytest.fixture
def slow_clock(tiny: VideoPipeline, short_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time by what is computed: 10 ms a call of the denoiser, 500 ms a decode, 1 ms for anything else."""
    counted = {"denoiser": 0, "decoder": 0}

    def count(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counting(*operands: torch.Tensor) -> torch.Tensor:
            counted[name] += 1
            return function(*operands)

        return counting

    def seconds(function: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 2) -> float:
        before = dict(counted)
        function()
        calls = {name: counted[name] - before[name] for name in counted}
        return 0.001 + 0.010 * calls["denoiser"] + 0.500 * calls["decoder"]

    monkeypatch.setattr(tiny.denoiser, "forward", count("denoiser", tiny.denoiser.forward))
    monkeypatch.setattr(tiny.autoencoder, "decode", count("decoder", tiny.autoencoder.decode))
    monkeypatch.setattr(bench, "median_seconds", seconds)


@pytest.mark.usefixtures("slow_clock")
@pytest.mark.parametrize(
    ("sampler", "guidance_scale", "calls_a_step", "calls_a_clip"),
    [("euler", 1.0, 1, 5), ("euler", 3.0, 1, 5), ("heun", 1.0, 2, 9)],
)
def test_every_figure_is_there_and_fits_the_others(
    tiny: VideoPipeline, sampler: str, guidance_scale: float, calls_a_step: int, calls_a_clip: int
) -> None:
    options = {"sampler": sampler, "guidance_scale": guidance_scale}
    row = measure(tiny, batch=2, num_frames=8, height=32, width=16, num_steps=5, rate=1e9, repeats=3, **options)
    assert (row.batch, row.num_frames, row.height, row.width, row.num_steps) == (2, 8, 32, 16, 5)
    assert (row.sampler, row.guidance_scale, row.is_compiled, row.error) == (sampler, guidance_scale, False, None)
    assert (row.spatial_backend, row.temporal_backend) == ("dual", "dual")
    latent, denoised = latent_shape(8, 32, 16), 2 if guidance_scale == 1 else 4  # guidance denoises every clip twice
    assert row.step_flops == denoiser_flops(DENOISERS["tiny"], latent, batch=denoised)
    assert row.decode_flops == decoder_flops(AUTOENCODERS["tiny"], latent, batch=2)
    step_s = 0.010 * calls_a_step
    assert row.step_ms == pytest.approx(1000 * step_s)  # without what a sampling takes beside its steps
    assert row.decode_ms == pytest.approx(501)
    assert row.clips_per_second == pytest.approx(2 / (0.501 + 0.010 * calls_a_clip))
    assert row.share_of_matrix_rate == pytest.approx(row.step_flops / step_s / 1e9)
    products = denoiser_flops(DENOISERS["tiny"], latent, batch=denoised, ssd_form="dual")
    assert row.product_share == pytest.approx(products / step_s / 1e9)
    assert row.warm_up_s is not None
    assert row.warm_up_s > 0
    assert row.peak_memory_mib is not None
    assert 50 < row.peak_memory_mib < 100_000


@pytest.mark.usefixtures("slow_clock")
def test_a_clip_is_by_default_made_as_the_checkpoint_makes_it(
    tiny: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = tiny.manifest.limits
    assert (limits.samplers[0], limits.num_inference_steps[1], limits.guidance_scale[1]) == ("euler", 30, 1)
    others = replace(limits, samplers=("heun",), num_inference_steps=(1, 3, 9), guidance_scale=(1.0, 2.0, 3.0))
    monkeypatch.setattr(tiny, "manifest", replace(tiny.manifest, limits=others))
    row = measure(tiny, batch=1, num_frames=8, height=16, width=16, rate=1e9, repeats=1)
    assert (row.sampler, row.num_steps, row.guidance_scale) == ("heun", 3, 2.0)


def test_what_the_figures_depend_on_is_described(tiny: VideoPipeline) -> None:
    about = describe(tiny, rate=2e12)
    assert about["denoiser_parameters"] == sum(weight.numel() for weight in tiny.denoiser.state_dict().values())
    assert (about["network"], about["device"], about["gpu"], about["dtype"]) == ("tiny", "cpu", None, "float32")
    assert about["matrix_rate_tflops"] == 2


def test_too_large_a_batch_is_a_row_that_says_so(tiny: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(tiny.autoencoder, "decode", decode)
    row = measure(tiny, batch=1, num_frames=8, height=16, width=16, num_steps=1, rate=1e9, repeats=1)
    assert row.error == "out of memory"
    assert row.step_ms is row.clips_per_second is None
    assert row.step_flops > 0


def test_a_median_is_of_the_calls_after_the_warm_up() -> None:
    calls: list[int] = []
    assert median_seconds(lambda: calls.append(0), CPU, repeats=3, warmup=2) < 0.1
    assert len(calls) == 5
    assert 1e6 < matrix_rate(CPU, torch.float32, size=64, repeats=3) < 1e15


def test_presets_have_random_weights_that_are_the_same_each_time(tiny: VideoPipeline) -> None:
    state = torch.get_rng_state()
    again = preset_pipeline("tiny", device="cpu", dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.dtype == torch.bfloat16
    for name, weight in tiny.denoiser.state_dict().items():
        assert torch.equal(weight.bfloat16(), again.denoiser.state_dict()[name])
    assert all(parameter.abs().max() > 0 for parameter in tiny.denoiser.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"batch": 0}, "batch"),
        ({"num_steps": 0}, "steps"),
        ({"repeats": 0}, "repeats"),
        ({"num_frames": 12}, "frames"),
        ({"num_frames": 0}, "frames"),
        ({"num_frames": 24}, "frames"),  # more than one window
        ({"height": 24}, "size"),
        ({"width": 0}, "size"),
        ({"sampler": "ddim"}, "sampler"),
        ({"guidance_scale": 0.5}, "guidance"),
        ({"guidance_scale": float("nan")}, "guidance"),
    ],
)
def test_what_cannot_be_measured_is_named(tiny: VideoPipeline, values: dict[str, Any], field: str) -> None:
    asked = {"batch": 1, "num_frames": 8, "height": 16, "width": 16, "num_steps": 1, **values}
    with pytest.raises(RequestError) as error:
        measure(tiny, rate=1e9, **asked)
    assert error.value.field == field


def test_a_network_that_predicts_noise_takes_samplers_and_steps_of_its_own(
    tiny: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = replace(tiny.config.denoiser, prediction="noise", out_channels=8)
    monkeypatch.setattr(tiny, "config", replace(tiny.config, denoiser=denoiser))
    asked = {"batch": 1, "num_frames": 8, "height": 16, "width": 16, "rate": 1e9}
    with pytest.raises(RequestError, match="sampler: 'euler' does not fit this network; allowed: ddim, ddpm"):
        measure(tiny, num_steps=2, **asked)
    with pytest.raises(RequestError, match="steps: must be at least 2, got 1"):
        measure(tiny, sampler="ddim", num_steps=1, **asked)


def test_a_device_without_a_clock_here_is_named(tiny: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "device", torch.device("mps"))
    with pytest.raises(RequestError, match="device: 'mps' has no clock here; allowed: cpu, cuda"):
        measure(tiny, batch=1, num_frames=8, height=16, width=16, rate=1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "huge"}, "preset: .*'huge'; allowed: tiny, small, base, large"),
        ({"dtype": "int8"}, "dtype: 'int8' .*allowed: auto, float32, bfloat16"),
        ({"device": "cuda:99"}, "^device 'cuda:99' is not available here: "),
        ({"device": "nowhere"}, "^device 'nowhere' is not available here: "),
        ({"device": "meta"}, "^device must be auto, cpu, cuda or mps; got 'meta'"),
        ({"backend": "fast"}, "back end must be one of auto"),
    ],
)
def test_presets_that_cannot_be_made_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(MedsoraError, match=message):
        preset_pipeline(**{"name": "tiny", **options})


@pytest.mark.usefixtures("short_runs")
def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = ["bench", "--preset", "tiny", "--device", "cpu", "--size", "16x32", "--batch", "1,2", "--frames", "8,24"]
    options = ["--repeats", "1", "--steps", "2", "--guidance", "2.5", "--sampler", "heun", "--json", str(output)]
    result = CliRunner().invoke(app, [*command, *options], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for words in ("73,728 denoiser", "matrix rate", "clips/s", "peak MiB", "dual, dual"):
        assert words in result.output
    assert result.output.endswith("16x32; heun, 2 steps, guidance 2.5; not compiled\n")
    figures = json.loads(output.read_text())
    assert figures["network"] == "tiny"
    assert figures["device"] == "cpu"
    assert figures["matrix_rate_tflops"] > 0
    assert [(row["num_frames"], row["batch"]) for row in figures["rows"]] == [(8, 1), (8, 2), (24, 1), (24, 2)]
    assert all(row["width"] == 16 and row["height"] == 32 for row in figures["rows"])


@pytest.mark.usefixtures("short_runs")
def test_the_command_measures_checkpoints(tiny_checkpoint: Path) -> None:
    command = ["bench", "--checkpoint", str(tiny_checkpoint), "--device", "cpu", "--size", "16x16", "--frames", "8"]
    result = CliRunner().invoke(app, [*command, "--repeats", "1"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert result.output.endswith("16x16; euler, 4 steps, no guidance; not compiled\n")


def test_the_table_says_where_memory_ran_out(tiny: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(tiny.autoencoder, "decode", decode)
    monkeypatch.setattr(bench, "preset_pipeline", lambda name, **options: tiny)
    command = ["bench", "--preset", "tiny", "--size", "16x16", "--frames", "8", "--steps", "1"]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "out of memory" in result.output


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "preset: give either --preset or --checkpoint"),
        (["--preset", "tiny", "--checkpoint", "x"], "preset: give either"),
        (["--checkpoint", "no-such-checkpoint"], "no-such-checkpoint"),
        (["--preset", "tiny", "--batch", "1,x"], "batch: '1,x'"),
        (["--preset", "tiny", "--batch", ""], "batch: ''"),
        (["--preset", "tiny", "--frames", "0"], "frames: '0'"),
        (["--preset", "tiny", "--frames", "12"], "frames: must be a positive multiple of 8, got 12"),
        (["--preset", "tiny", "--size", "17x16"], "size: .*17x16"),
        (["--preset", "tiny", "--size", "large"], "size: 'large'"),
        (["--preset", "tiny", "--steps", "0"], "steps: must be at least 1"),
        (["--preset", "tiny", "--sampler", "ddpm"], "sampler: 'ddpm' does not fit this network; allowed: euler, heun"),
        (["--preset", "tiny", "--guidance", "0"], "guidance: must be at least 1, got 0.0"),
        (["--preset", "tiny", "--device", "cuda:99"], "device 'cuda:99' is not available here"),
        (["--preset", "tiny", "--compiled", "perhaps"], "compiled must be one of auto, on, off; got 'perhaps'"),
        (["--preset", "tiny", "--json", "none/figures.json"], "json: .*folder does not exist"),
    ],
)
def test_bad_options_are_refused_by_name(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *options])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(message, result.output), result.output
