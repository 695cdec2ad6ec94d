"""Speed of a checkpoint or a preset here: step, decode, clips a second, share of the matrix rate, memory.

What is timed is the pipeline as requests meet it: compiled and recorded on CUDA, from seeds to frames in the memory of
the host. A step is the difference of a long and a short sampling, over the difference in steps. Each figure is a median
after a warm-up, with the device's own clock on CUDA. Operations are counted from shapes, not measured:

- the denoiser's matrix products, attention over all tokens of a frame, and the state-space recurrence as a recurrence
  (5 a state element and step), whichever back end runs: linear in the number of frames, and comparable between them;
- the decoder's convolutions, as torch counts them;
- nothing element-wise. A multiplication and an addition are two operations.
"""

import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medsora.checkpoint import LoadedCheckpoint
from medsora.config import SAMPLERS_OF, AutoencoderConfig, DenoiserConfig, ModelConfig
from medsora.diffusion.samplers import SAMPLERS
from medsora.errors import RequestError
from medsora.geometry import SPATIAL_STRIDE, is_valid_video_shape, latent_shape
from medsora.manifest import FORMAT_VERSION, Label, Limits, Manifest
from medsora.models.autoencoder import VideoAutoencoder
from medsora.models.denoiser import TIME_FEATURES, Denoiser
from medsora.ops import resolve_backend
from medsora.pipeline import BATCH_SIZES, DTYPES, VideoPipeline, device_named
from medsora.presets import DENOISERS, preset
from medsora.request import GenerationRequest
from medsora.timing import median_seconds

__all__ = [
    "BenchRow",
    "decoder_flops",
    "denoiser_flops",
    "describe",
    "matrix_rate",
    "measure",
    "preset_pipeline",
]

MIB = 2**20
SHORT_RUN, LONG_RUN = 2, 22
"""Steps of the two samplings that a step is the difference of."""
MAX_WHOLE_S = 5.0
"""Seconds after which no further whole call is timed."""


@dataclass(frozen=True)
class BenchRow:
    """Figures of one batch of clips. Times and memory are None where ``error`` says why there are none."""

    batch: int
    num_frames: int
    height: int
    width: int
    num_steps: int
    spatial_backend: str
    """Back end of the mixers in the spatial scans; ``temporal_backend`` in the temporal ones."""
    temporal_backend: str
    guidance_scale: float
    sampler: str
    is_compiled: bool
    step_flops: int
    """Counted in one step on the whole batch; guidance doubles it."""
    decode_flops: int
    warm_up_s: float | None = None
    """First use of this shape: compilation, tuning and recording, where there are any."""
    step_ms: float | None = None
    """One step of the sampler on the whole batch."""
    decode_ms: float | None = None
    """From latents to frames on the device."""
    clips_per_second: float | None = None
    """``batch`` over the time of a whole call, from requests to frames in the memory of the host."""
    share_of_matrix_rate: float | None = None
    """Counted operations of a step, over its time, over the rate of a large matrix product."""
    product_share: float | None = None
    """The same with the scans counted as what a masked matrix product does, not as the recurrence they stand for."""
    peak_memory_mib: float | None = None
    """Allocated on a GPU; on a CPU the most that the process has held so far."""
    error: str | None = None


def preset_pipeline(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    compiled: str = "auto",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    window: int = 16,
) -> VideoPipeline:
    """A pipeline of a preset with random weights: as fast as a trained one, but its clips are noise.

    Args:
        window: Frames that it samples at once, at most.

    Raises:
        RequestError: No such preset or dtype.
        BackendError: No such device or back end here.
    """
    if name not in DENOISERS:
        raise RequestError("preset", f"there is none called {name!r}", tuple(DENOISERS))
    if dtype != "auto" and dtype not in DTYPES:
        raise RequestError("dtype", f"{dtype!r} is none of them", ("auto", *DTYPES))
    place = device_named(device)
    resolve_backend(backend, operator="mixer", length=1)
    config = preset(name, {"finding": ("first", "second")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder, denoiser = VideoAutoencoder(config.require_autoencoder()), Denoiser(config.denoiser)
        # no zeros, which an untrained denoiser is full of: products of zeros draw less power, and clocks rise
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        description="Random weights.",
        modality="",
        intended_use="Measuring speed.",
        licence="",
        created_at="",
        labels=(Label(name="first", description="", condition={"finding": "first"}),),
        limits=Limits(
            sizes=((128, 128),),
            num_frames=(window,),
            fps=8.0,
            num_inference_steps=(2, 250, 1000) if config.denoiser.prediction == "noise" else (1, 30, 1000),
            guidance_scale=(1.0, 1.0, 10.0),
            samplers=SAMPLERS_OF[config.denoiser.prediction],
        ),
    )
    loaded = LoadedCheckpoint(config, manifest, autoencoder, denoiser)
    default = torch.bfloat16 if place.type == "cuda" else torch.float32
    return VideoPipeline(
        loaded,
        device=place,
        dtype=DTYPES.get(dtype, default),
        backend=backend,
        compiled=compiled,
        batch_sizes=batch_sizes,
    )


def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 11) -> float:
    """Operations a second of a large square matrix product of random numbers: what the device can really do.

    Args:
        size: Rows and columns; by default 8192 on a GPU and 1024 on a CPU.
    """
    side = size or (8192 if device.type == "cuda" else 1024)
    # random, not zeros: a GPU draws less power for zeros and then clocks higher than it ever would
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: left @ right, device, repeats=repeats)


def denoiser_flops(
    config: DenoiserConfig, latent: tuple[int, int, int], *, batch: int = 1, ssd_form: str = "recurrence"
) -> int:
    """Operations of one denoiser call on latents of (frames, height, width); see the module for what counts.

    Args:
        ssd_form: ``recurrence``, or ``dual`` for what the masked matrix products of that back end do: quadratic in
            the length of a scan.
    """
    frames, rows, columns = latent[0], latent[1] // config.patch_size, latent[2] // config.patch_size
    tokens, width, inner = frames * rows * columns, config.hidden_size, config.d_inner
    patch_in, patch_out = (channels * config.patch_size**2 for channels in (config.in_channels, config.out_channels))

    def linear(count: int, inputs: int, outputs: int) -> int:
        return 2 * count * inputs * outputs

    def modulation(outputs: int) -> int:
        rank = config.modulation_rank
        if rank is None:
            return linear(frames, width, outputs * width)
        return linear(frames, width, rank) + linear(frames, rank, outputs * width)

    def ssd(sequences: int, length: int) -> int:
        if ssd_form == "dual":
            return 2 * sequences * length**2 * (config.d_state + inner)
        return 5 * sequences * length * inner * config.d_state

    project = linear(tokens, width, 2 * inner + 2 * config.d_state + config.num_heads)
    merge = linear(tokens, inner, width)
    attention = 3 * linear(tokens, width, width) + 2 * linear(tokens, rows * columns, width)
    planes = 2 * (ssd(rows, frames * columns) + ssd(columns, frames * rows))  # each plane there and back
    spatial = project + planes + 2 * (merge + linear(tokens, width, width))
    temporal = project + config.temporal_directions * ssd(rows * columns, frames) + merge
    block = modulation(9) + attention + spatial + temporal
    time_embedding = linear(frames, TIME_FEATURES, width) + linear(frames, width, width)
    ends = linear(tokens, patch_in, width) + modulation(2) + linear(tokens, width, patch_out)
    return batch * (config.depth * block + time_embedding + ends)


def decoder_flops(config: AutoencoderConfig, latent: tuple[int, int, int], *, batch: int = 1) -> int:
    """Operations of the convolutions that decode latents of (frames, height, width)."""
    with torch.device("meta"), torch.inference_mode():
        autoencoder = VideoAutoencoder(config).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            autoencoder.decode(torch.empty(1, config.latent_channels, *latent))
    return batch * counter.get_total_flops()


def measure(
    pipeline: VideoPipeline,
    *,
    batch: int,
    num_frames: int,
    height: int,
    width: int,
    rate: float,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    repeats: int = 7,
) -> BenchRow:
    """Time one batch.

    Args:
        num_steps: Of a whole clip; like ``guidance_scale`` and ``sampler`` by default the checkpoint's.
        rate: From :func:`matrix_rate`.

    Raises:
        RequestError: A value that cannot be measured; names the field.
    """
    config, limits = pipeline.config, pipeline.manifest.limits
    if pipeline.device.type not in ("cpu", "cuda"):
        raise RequestError("device", f"{str(pipeline.device)!r} has no clock here", ("cpu", "cuda"))
    chosen = limits.samplers[0] if sampler is None else sampler
    request = GenerationRequest(
        label=pipeline.manifest.labels[0].name,
        seed=0,
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=limits.default_steps(chosen) if num_steps is None else num_steps,
        guidance_scale=limits.default_guidance(chosen) if guidance_scale is None else guidance_scale,
        sampler=chosen,
    )
    known = config.denoiser.samplers
    if request.sampler not in known:
        raise RequestError("sampler", f"{request.sampler!r} does not fit this network", known)
    if not request.guidance_scale >= 1:
        raise RequestError("guidance", f"must be at least 1, got {request.guidance_scale}")
    least = 2 if config.denoiser.prediction == "noise" else 1
    for field, value, low in (
        ("batch", batch, 1),
        ("steps", request.num_inference_steps, least),
        ("repeats", repeats, 1),
    ):
        if value < low:
            raise RequestError(field, f"must be at least {low}, got {value}")
    patch_size = config.denoiser.patch_size
    if not is_valid_video_shape(num_frames, 8 * patch_size, 8 * patch_size, patch_size=patch_size):
        raise RequestError("frames", f"must be a positive multiple of 8, got {num_frames}")
    if num_frames > limits.window:
        raise RequestError("frames", f"at most {limits.window} are sampled at once, got {num_frames}")
    if not is_valid_video_shape(num_frames, height, width, patch_size=patch_size):
        step = SPATIAL_STRIDE * patch_size
        raise RequestError("size", f"width and height must be positive multiples of {step}, got {width}x{height}")
    latent = latent_shape(num_frames, height, width)
    rows, columns = latent[1] // patch_size, latent[2] // patch_size
    is_guided = request.guidance_scale != 1 and not SAMPLERS[request.sampler].has_built_in_guidance
    calls = 2 if is_guided else 1
    counted = BenchRow(
        batch=batch,
        num_frames=num_frames,
        height=height,
        width=width,
        num_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        sampler=request.sampler,
        is_compiled=pipeline.is_compiled,
        # the operator sees both directions of a scan as one batch
        spatial_backend=_backend_of(pipeline, latent[0] * columns, 2 * calls * batch * rows),
        temporal_backend=_backend_of(
            pipeline, latent[0], config.denoiser.temporal_directions * calls * batch * rows * columns
        ),
        step_flops=denoiser_flops(config.denoiser, latent, batch=calls * batch),
        decode_flops=decoder_flops(_autoencoder_of(config), latent, batch=batch),
    )
    products = denoiser_flops(config.denoiser, latent, batch=calls * batch, ssd_form="dual")
    try:
        times = _timed(pipeline, [request] * batch, counted.step_flops, products, rate=rate, repeats=repeats)
    except torch.OutOfMemoryError:
        times = {"error": "out of memory"}
    return BenchRow(**{**asdict(counted), **times})


def _autoencoder_of(config: ModelConfig) -> AutoencoderConfig:
    assert config.autoencoder is not None  # a pipeline has one
    return config.autoencoder


def _backend_of(pipeline: VideoPipeline, length: int, batch: int) -> str:
    return resolve_backend(
        pipeline.backend, operator="mixer", length=length, batch=batch, device=pipeline.device, dtype=pipeline.dtype
    )


def _timed(
    pipeline: VideoPipeline,
    requests: list[GenerationRequest],
    step_flops: int,
    product_flops: int,
    *,
    rate: float,
    repeats: int,
) -> dict[str, Any]:
    device, batch = pipeline.device, len(requests)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    pipeline([replace(request, num_inference_steps=SHORT_RUN) for request in requests])
    warm_up_s = time.perf_counter() - began

    def sample(num_steps: int) -> float:
        asked = [replace(request, num_inference_steps=num_steps) for request in requests]
        return median_seconds(lambda: pipeline.sample_latents(asked), device, repeats=repeats, warmup=1)

    step_s = (sample(LONG_RUN) - sample(SHORT_RUN)) / (LONG_RUN - SHORT_RUN)
    latents = pipeline.sample_latents([replace(request, num_inference_steps=SHORT_RUN) for request in requests]).clone()
    decode_s = median_seconds(lambda: pipeline.decode(latents), device, repeats=repeats)
    whole_s = median_seconds(
        lambda: pipeline(requests),
        device,
        repeats=max(1, min(repeats, int(MAX_WHOLE_S / (requests[0].num_inference_steps * step_s)))),
    )
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
    else:
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux
    return {
        "warm_up_s": warm_up_s,
        "step_ms": 1000 * step_s,
        "decode_ms": 1000 * decode_s,
        "clips_per_second": batch / whole_s,
        "share_of_matrix_rate": step_flops / step_s / rate,
        "product_share": product_flops / step_s / rate,
        "peak_memory_mib": peak_bytes / MIB,
    }


def describe(pipeline: VideoPipeline, *, rate: float) -> dict[str, Any]:
    """What the figures depend on: network, device, types, the rate of a large matrix product."""
    gpu = torch.cuda.get_device_name(pipeline.device) if pipeline.device.type == "cuda" else None

    def count(parameters: Sequence[Tensor]) -> int:
        return sum(parameter.numel() for parameter in parameters)

    return {
        "network": pipeline.manifest.name,
        "denoiser_parameters": count(list(pipeline.denoiser.parameters())),
        "autoencoder_parameters": count(list(pipeline.autoencoder.parameters())),
        "device": str(pipeline.device),
        "gpu": gpu,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "matrix_rate_tflops": rate / 1e12,
    }
