"""What `medsora bench` counts, measures and refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from medsora.bench import decoder_flops, denoiser_flops, matrix_rate, measure, preset_pipeline
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
    config = replace(DENOISERS[name], condition_sizes=(3,))
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


def test_every_figure_is_there_and_fits_the_others(tiny: VideoPipeline) -> None:
    row = measure(tiny, batch=2, num_frames=8, height=32, width=16, num_steps=5, rate=1e9, repeats=3)
    assert (row.batch, row.num_frames, row.height, row.width, row.num_steps) == (2, 8, 32, 16, 5)
    assert row.error is None
    assert (row.spatial_backend, row.temporal_backend) == ("dual", "dual")
    assert row.step_ms is not None
    assert row.decode_ms is not None
    assert row.step_ms > 0 < row.decode_ms
    assert row.clips_per_second == pytest.approx(2 / (5 * row.step_ms / 1000 + row.decode_ms / 1000))
    assert row.share_of_matrix_rate == pytest.approx(row.step_flops / (row.step_ms / 1000) / 1e9)
    assert row.step_flops == denoiser_flops(DENOISERS["tiny"], latent_shape(8, 32, 16), batch=2)
    assert row.decode_flops == decoder_flops(AUTOENCODERS["tiny"], latent_shape(8, 32, 16), batch=2)
    assert row.peak_memory_mib is not None
    assert 50 < row.peak_memory_mib < 100_000


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
        ({"height": 24}, "size"),
        ({"width": 0}, "size"),
    ],
)
def test_what_cannot_be_measured_is_named(tiny: VideoPipeline, values: dict[str, int], field: str) -> None:
    asked = {"batch": 1, "num_frames": 8, "height": 16, "width": 16, "num_steps": 1, **values}
    with pytest.raises(RequestError) as error:
        measure(tiny, rate=1e9, **asked)  # type: ignore[arg-type]
    assert error.value.field == field


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "huge"}, "preset: .*'huge'; allowed: tiny, small, base, large"),
        ({"dtype": "int8"}, "dtype: 'int8' .*allowed: auto, float32, bfloat16"),
        ({"device": "cuda:99"}, "device: 'cuda:99' is not available here"),
        ({"device": "nowhere"}, "device: 'nowhere' is not available here"),
        ({"device": "meta"}, "device: 'meta' cannot be measured"),
        ({"backend": "fast"}, "back end must be one of auto"),
    ],
)
def test_presets_that_cannot_be_made_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(MedsoraError, match=message):
        preset_pipeline(**{"name": "tiny", **options})


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = ["bench", "--preset", "tiny", "--device", "cpu", "--size", "16x32", "--batch", "1,2", "--frames", "8,16"]
    result = CliRunner().invoke(app, [*command, "--repeats", "1", "--json", str(output)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for words in ("73,728 denoiser", "matrix rate", "clips/s", "peak MiB", "dual, dual", "16x32", "30 steps"):
        assert words in result.output
    figures = json.loads(output.read_text())
    assert figures["network"] == "tiny"
    assert figures["device"] == "cpu"
    assert figures["matrix_rate_tflops"] > 0
    assert [(row["num_frames"], row["batch"]) for row in figures["rows"]] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert all(row["width"] == 16 and row["height"] == 32 for row in figures["rows"])


def test_the_command_measures_checkpoints(tiny_checkpoint: Path) -> None:
    command = ["bench", "--checkpoint", str(tiny_checkpoint), "--device", "cpu", "--size", "16x16", "--frames", "8"]
    result = CliRunner().invoke(app, [*command, "--repeats", "1", "--steps", "4"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "clips a second at 4 steps" in result.output


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
        (["--preset", "tiny", "--json", "none/figures.json"], "json: .*folder does not exist"),
    ],
)
def test_bad_options_are_refused_by_name(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *options])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(message, result.output), result.output
