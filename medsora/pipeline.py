"""Requests in, frames out: loads a checkpoint once and keeps nothing of any request."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medsora.checkpoint import LoadedCheckpoint, load_checkpoint
from medsora.diffusion.guidance import guided
from medsora.diffusion.path import each_frame, held, interpolate
from medsora.diffusion.samplers import SAMPLERS, OnStep, Watch, sample
from medsora.errors import BackendError, CheckpointError, VideoError
from medsora.geometry import CHUNK_FRAMES, TEMPORAL_STRIDE, latent_shape
from medsora.graphs import GraphedMap, GraphedSampler
from medsora.manifest import Manifest, find_checkpoint
from medsora.models.autoencoder import StreamState
from medsora.ops import resolve_backend
from medsora.request import GenerationRequest
from medsora.video_io import from_uint8, to_pixels
from medsora.windows import ClipPlan, Window, plan_clip

__all__ = ["BATCH_SIZES", "COMPILED", "Preview", "VideoPipeline", "device_named", "initial_noise"]

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
COMPILED = ("auto", "on", "off")
MAX_SHAPES = 64
"""Shapes that may be compiled for in one process; torch's own limit is 8, after which it no longer compiles."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Frames = UInt8[np.ndarray, "f h w c"]
Picture = UInt8[np.ndarray, "h w c"]

logger = logging.getLogger(__name__)


def initial_noise(
    seed: int, shape: tuple[int, ...], *, step: int | None = None, window: int = 0
) -> Float[Tensor, "c f h w"]:
    """Standard normal noise that depends on the seed and shape alone, not on device or batch. float32, CPU.

    From numpy's frozen generator: it uses all bits of the seed, where torch's on a CPU uses the lowest 32, and its
    numbers are promised never to change.

    Args:
        step: None for where sampling starts; the number of a step for the fresh noise of that step.
        window: Number of the window, of a clip that is made in several; they take no fresh noise.
    """
    key = (0, window) if window else () if step is None else (step,)
    entropy = np.random.SeedSequence(seed, spawn_key=key)
    generator = np.random.RandomState(np.random.MT19937(entropy))
    return torch.from_numpy(generator.standard_normal(shape)).float()


def device_named(name: str) -> torch.device:
    """The device of that name, or for ``auto`` CUDA where there is a GPU, else the CPU.

    Raises:
        BackendError: There is none here, or it is of a kind that nothing here runs on.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise BackendError(f"device must be auto, cpu, cuda or mps; got {name!r}")
        # with the number that tensors on it show: what is made once a device is looked up by theirs
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise BackendError(f"device {name!r} is not available here: {first_line}") from error


class Preview(Protocol):
    """Somebody who may want to see what clips will look like while they are sampled."""

    def wanted(self) -> bool:
        """Whether to show the estimate of the step that begins now; asked at every step, so it must be quick."""
        ...

    def show(self, first: int, pictures: list[Picture]) -> None:
        """Take a frame from the beginning of each clip (of the window that is sampled), from request ``first`` on."""
        ...


class VideoPipeline:
    """A checkpoint ready to generate; a call leaves nothing of its request in it. Threads take turns.

    Make one with :meth:`from_checkpoint`. ``manifest`` tells labels and limits.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        compiled: str = "auto",
        batch_sizes: Sequence[int] = BATCH_SIZES,
    ) -> None:
        if checkpoint.autoencoder is None:
            raise CheckpointError(
                f"{checkpoint.manifest.name} has no autoencoder, and makes latents, not video: "
                "give it one with `medsora import-released --autoencoder`"
            )
        if compiled not in COMPILED:
            raise BackendError(f"compiled must be one of {', '.join(COMPILED)}; got {compiled!r}")
        if compiled == "on" and backend == "reference":
            raise BackendError("compiled cannot be on with the back end reference, which runs step by step")
        if compiled == "on" and device.type != "cuda":
            raise BackendError(f"compiled can be on with a CUDA device only, got {device}")
        if not batch_sizes or min(batch_sizes) < 1:
            raise BackendError(f"batch_sizes must be numbers from 1 on, got {tuple(batch_sizes)}")
        self.manifest: Manifest = checkpoint.manifest
        self.config = checkpoint.config
        self.device, self.dtype, self.backend = device, dtype, backend
        self.batch_sizes = tuple(sorted(set(batch_sizes)))
        self.autoencoder = checkpoint.autoencoder.to(device, dtype).eval().requires_grad_(False)
        self.denoiser = checkpoint.denoiser.to(device, dtype).eval().requires_grad_(False)
        self.denoiser.backend = backend
        self._null_condition = torch.tensor(self.config.denoiser.null_condition, dtype=torch.long, device=device)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="noise")
        self._sample_by_graphs: GraphedSampler | None = None
        self._decode: Callable[[Tensor], tuple[Tensor, Tensor]] = self._decode_pixels
        if device.type == "cuda" and compiled != "off" and backend != "reference" and _can_compile(device, compiled):
            self._compile()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        compiled: str = "auto",
        batch_sizes: Sequence[int] = BATCH_SIZES,
    ) -> "VideoPipeline":
        """Load and check a checkpoint.

        Args:
            checkpoint: A directory, or the name of one that comes with the package.
            device: ``auto`` takes CUDA where there is a GPU, else the CPU; or a torch device name.
            dtype: ``auto`` is bfloat16 on CUDA, float32 on the CPU; or float32, bfloat16, float64.
            backend: Of the mixers (:mod:`medsora.ops.mixer`); ``reference`` also samples one clip at a time, so that
                a clip is bit-identical whatever it was asked together with.
            compiled: ``on`` compiles the networks and records their calls as CUDA graphs, when a shape is first asked
                for or by :meth:`warm_up`; ``auto`` does so on CUDA, and where that fails says so and goes on without;
                ``off`` does not.
            batch_sizes: Numbers of clips to compile for. A call of another number is filled up to the next one, or
                split by the largest.

        Raises:
            CheckpointError: It cannot be found, or is damaged.
            BackendError: No such device, dtype or back end here.
        """
        resolve_backend(backend, operator="mixer", length=1)
        if dtype != "auto" and dtype not in DTYPES:
            raise BackendError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")
        place = device_named(device)
        default = torch.bfloat16 if place.type == "cuda" else torch.float32
        return cls(
            load_checkpoint(find_checkpoint(checkpoint)),
            device=place,
            dtype=DTYPES.get(dtype, default),
            backend=backend,
            compiled=compiled,
            batch_sizes=batch_sizes,
        )

    def __call__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        sources: Sequence[Frames] | None = None,
        on_step: OnStep | None = None,
        preview: Preview | None = None,
    ) -> list[Frames]:
        """Generate one clip a request, as one batch.

        Args:
            requests: Made by :func:`medsora.request.resolve_request` for this checkpoint, and alike in shape,
                steps, guidance and sampler, in what is given of them, and in how far an edit goes.
            sources: uint8 RGB (f h w 3) of each request, where requests are of clips that begin with given frames,
                or of edits: as many frames as their ``source_frames``.
            on_step: Called with (steps done, steps in all) after each step; raise
                :class:`medsora.errors.GenerationCanceled` in it to stop.
            preview: Shown the running estimate now and then, where the sampler follows a velocity.

        Returns:
            uint8 RGB frames (f h w 3) of each request, in order. Equal requests give equal frames. Given frames are
            shown as the autoencoder codes them.

        Raises:
            ValueError: No requests, requests that cannot share a batch, or sources that are not theirs.
        """
        self._check(requests, sources)
        clips: list[Frames] = []
        parts = self._parts(len(requests))
        is_plain = self._is_plain(requests[0])
        for number, (count, size) in enumerate(parts):
            part = requests[len(clips) : len(clips) + count]

            def step(done: int, total: int, number: int = number) -> None:
                if on_step is not None:
                    on_step(number * total + done, len(parts) * total)

            reported = step if on_step is not None else None
            if is_plain:
                # what fills a batch up is sampled too, and dropped
                filled = [*part, *[part[-1]] * (size - count)]
                watch = self._watch(preview, len(clips), count)
                with self._lock:
                    clips += self._generate(filled, reported, watch)[:count]
            else:
                given = None if sources is None else sources[len(clips) : len(clips) + count]
                pieces = list(self._in_windows(part, given, size, reported, preview, len(clips)))
                clips += [np.concatenate(of_clip) for of_clip in zip(*pieces, strict=True)]
        return clips

    def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        sources: Sequence[Frames] | None = None,
        on_step: OnStep | None = None,
        preview: Preview | None = None,
    ) -> Iterator[list[Frames]]:
        """As a call, piece by piece: memory does not grow with the length of the clips.

        Returns:
            The next frames of every request, again and again; all pieces together are what a call returns, to the
            rounding of the decoder.

        Raises:
            ValueError: As a call; also for more requests than are sampled as one batch.
        """
        self._check(requests, sources)
        parts = self._parts(len(requests))
        if len(parts) != 1:
            raise ValueError(f"at most {parts[0][0]} requests are streamed together, got {len(requests)}")
        return self._in_windows(requests, sources, parts[0][1], on_step, preview)

    def plan(self, request: GenerationRequest) -> ClipPlan:
        """In which windows the clip is made."""
        return plan_clip(request.num_frames, prefix_frames=request.prefix_frames, window=self.manifest.limits.window)

    def _is_plain(self, request: GenerationRequest) -> bool:
        return not request.source_frames and request.num_frames <= self.manifest.limits.window

    def _check(self, requests: Sequence[GenerationRequest], sources: Sequence[Frames] | None) -> None:
        """Refuse requests that cannot share a batch, and sources that are not theirs."""
        if len({request.shape_key for request in requests}) != 1:
            raise ValueError(
                "requests of one call must be alike in frames, size, steps, guidance, sampler, prefix and strength"
            )
        first = requests[0]
        if not first.source_frames and sources is not None:
            raise ValueError("sources are given, and no request has any")
        sampler = SAMPLERS[first.sampler]
        if not self._is_plain(first) and sampler.prediction != "velocity":
            raise ValueError(f"{first.sampler} samples single windows from noise alone")
        if first.strength < 1 and sampler.steps_from is None:
            raise ValueError(f"{first.sampler} samples from noise alone, and cannot edit")
        if first.source_frames:
            wanted = (first.source_frames, first.height, first.width, 3)
            shapes = [] if sources is None else [source.shape for source in sources]
            if shapes != [wanted] * len(requests) or any(source.dtype != np.uint8 for source in sources or ()):
                raise ValueError(f"each request needs a source of uint8 {wanted}, got {shapes}")

    def warm_up(self, requests: Sequence[GenerationRequest]) -> dict[int, float]:
        """Compile and record what requests of these shapes need, for every batch size; nothing where not compiled.

        Args:
            requests: One of each shape that will be asked for.

        Returns:
            Seconds that each batch size took: minutes when everything is new, seconds when it is in the compilers'
            caches on disk.
        """
        seconds: dict[int, float] = {}
        for size in self.batch_sizes if self._sample_by_graphs is not None else (1,):
            began = time.perf_counter()
            for request in requests:
                shortest = replace(request, num_inference_steps=2)  # both kinds of step, where a plan has two
                self([shortest] * size)
            seconds[size] = time.perf_counter() - began
        return seconds

    def _compile(self) -> None:
        pool = torch.cuda.graph_pool_handle()
        self.denoiser.compile_parts()
        pixels = torch.compile(self._decode_pixels, dynamic=False)
        self._sample_by_graphs = GraphedSampler(self._predict, self._null_condition, pool=pool)
        self._decode = GraphedMap(pixels, pool=pool)

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """How a call is split: clips of each part, and the batch that it runs in."""
        if self.backend == "reference":
            # matrix products of another batch size may round differently: one at a time, or no promise
            return [(1, 1)] * count
        if self._sample_by_graphs is None:
            return [(count, count)]
        most = self.batch_sizes[-1]
        whole, rest = divmod(count, most)
        parts = [(most, most)] * whole
        if rest:
            parts.append((rest, next(size for size in self.batch_sizes if size >= rest)))
        return parts

    def _watch(self, preview: Preview | None, first: int, count: int, *, begin: int = 0) -> Watch | None:
        """What shows ``preview`` the first ``count`` clips of a batch.

        Args:
            first: Number of the request that the batch begins with.
            begin: Latent frame of the window to show: the first that is not known.
        """
        if preview is None:
            return None

        def show(estimate: Tensor) -> None:
            # decoding is causal: the beginning of a clip needs nothing of what follows
            pixels, _ = self._decode_pixels(estimate[:count, :, begin : begin + CHUNK_FRAMES // TEMPORAL_STRIDE])
            preview.show(first, list(pixels[:, -1].cpu().numpy()))

        return Watch(preview.wanted, show)

    def _generate(
        self, requests: Sequence[GenerationRequest], on_step: OnStep | None, watch: Watch | None
    ) -> list[Frames]:
        frames, is_finite = self.decode(self.sample_latents(requests, on_step=on_step, watch=watch))
        if frames.is_cuda:  # one copy, to pinned memory
            on_host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
            frames = on_host.copy_(frames, non_blocking=True)
        if not is_finite.item():  # waits for the device
            raise VideoError("the video has values that are not finite: the sampler has diverged")
        return [clip.numpy() for clip in frames]

    def decode(self, latents: Float[Tensor, "b c f h w"]) -> tuple[Tensor, Tensor]:
        """uint8 frames (b f h w c) of latents, and whether all values were finite (0-d bool), on the device.

        Where the pipeline is compiled both are buffers: copy them, or be done with them before the next call.
        """
        with self._running():
            frames, is_finite = self._decode(latents)
        return frames, is_finite

    def _decode_pixels(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 frames (b f h w c) of latents, and whether all values were finite."""
        video = self.autoencoder.decode(latents.to(self.dtype))
        return to_pixels(video), torch.isfinite(video).all()

    def _predict(self, x: Tensor, t: Any, condition: Tensor, *step: Any) -> Tensor:
        """The network at one time for all frames, or at one of each; the sampler's state keeps its type, only the
        network has its own."""
        times, *steps = (each_frame(value, x) for value in (t, *step))
        predicted: Tensor = self.denoiser(x.to(self.dtype), times, condition, *steps)
        return predicted.to(x.dtype)

    def sample_latents(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None, watch: Watch | None = None
    ) -> Float[Tensor, "b c f h w"]:
        """Sample the latents of requests that are alike, as one batch; see :meth:`__call__`. One window, no sources.

        Where the pipeline is compiled this is a buffer, as in :meth:`decode`, and a new number of requests compiles.
        """
        if not self._is_plain(requests[0]):
            raise ValueError("latents are sampled of clips of one window without sources; stream the others")
        with self._running():
            return self._sample(requests, on_step, watch)

    def _in_windows(
        self,
        requests: Sequence[GenerationRequest],
        sources: Sequence[Frames] | None,
        size: int,
        on_step: OnStep | None,
        preview: Preview | None = None,
        number_of_first: int = 0,
    ) -> Iterator[list[Frames]]:
        """Frames of every request, window by window. The lock is free while the caller has the turn.

        Args:
            size: Batch that it runs in; what fills it up is dropped.
            number_of_first: That of the first request, for ``preview``.
        """
        count, spare = len(requests), size - len(requests)
        requests = [*requests, *[requests[-1]] * spare]
        first, plan = requests[0], self.plan(requests[0])
        decoding = StreamState()
        shown = 0  # frames of the plan that were decoded

        def show(latents: Tensor) -> list[Frames]:
            nonlocal shown
            begin, end = plan.fill - shown, plan.fill + plan.shown - shown
            shown += latents.shape[2] * TEMPORAL_STRIDE
            frames = self._decode_next(latents, decoding)
            return [clip[max(0, begin) : max(0, end)] for clip in frames[:count]]

        given: Tensor | None = None  # latents of the prefix, or of the clip that is edited
        if sources is not None:
            with self._lock, self._running():
                given = self._encode(np.stack([*sources, *[sources[-1]] * spare]), fill=plan.fill)
        known: Tensor | None = None  # the last latents of what is known
        if given is not None and first.prefix_frames:
            known = given
            for chunk in _chunks(given):
                with self._lock, self._running():
                    pieces = show(chunk)
                yield pieces
        for number, window in enumerate(plan.windows):

            def step(done: int, total: int, number: int = number) -> None:
                if on_step is not None:
                    on_step(number * total + done, len(plan.windows) * total)

            with self._lock, self._running():
                edited = None if first.strength == 1 else given
                watch = self._watch(preview, number_of_first, count, begin=window.known // TEMPORAL_STRIDE)
                latents = self._sample_window(requests, number, window, known, edited, step, watch)
                known = latents.clone()
                pieces = show(known[:, :, window.known // TEMPORAL_STRIDE :])
            yield pieces

    def _sample_window(
        self,
        requests: Sequence[GenerationRequest],
        number: int,
        window: Window,
        known: Tensor | None,
        edited: Tensor | None,
        on_step: OnStep,
        watch: Watch | None,
    ) -> Tensor:
        """Latents of a window whose first frames are known.

        Args:
            known: Latents that end where the window's known frames do.
            edited: Latents of the clips that are edited.
        """
        begin, end, length = (frames // TEMPORAL_STRIDE for frames in (window.begin, window.end, window.known))
        is_known = torch.zeros(len(requests), end - begin, dtype=torch.bool, device=self.device)

        def start(noise: Tensor) -> Tensor:
            if edited is not None:
                strength = torch.full(is_known.shape, requests[0].strength, dtype=noise.dtype, device=noise.device)
                noise = interpolate(edited[:, :, begin:end].to(noise.dtype), noise, strength)
            if length:
                assert known is not None  # a plan begins without known frames, or with given ones
                noise[:, :, :length] = known[:, :, -length:].to(noise.dtype)
                is_known[:, :length] = True
            return noise

        requests = [replace(request, num_frames=window.end - window.begin) for request in requests]
        return self._sample(requests, on_step, watch, window=number, start=start, is_known=is_known if length else None)

    def _encode(self, frames: UInt8[np.ndarray, "b f h w c"], *, fill: int) -> Tensor:
        """Latents of videos, with copies of the first frame before it, and of the last after it up to whole chunks."""
        rest = -(fill + frames.shape[1]) % CHUNK_FRAMES
        padded = np.concatenate(
            [frames[:, :1].repeat(fill, axis=1), frames, frames[:, -1:].repeat(rest, axis=1)], axis=1
        )
        state, latents = StreamState(), []
        for begin in range(0, padded.shape[1], CHUNK_FRAMES):
            chunk = torch.from_numpy(padded[:, begin : begin + CHUNK_FRAMES]).to(self.device)
            latents.append(self.autoencoder.encode(from_uint8(chunk).to(self.dtype), state))
        return torch.cat(latents, dim=2)

    def _decode_next(self, latents: Tensor, state: StreamState) -> list[Frames]:
        """Frames of the next latents of videos, chunk by chunk; never by graphs, which cannot keep the state.

        Raises:
            VideoError: They are not finite.
        """
        decoded = []
        for chunk in _chunks(latents):
            video = self.autoencoder.decode(chunk.to(self.dtype), state)
            if not torch.isfinite(video).all():
                raise VideoError("the video has values that are not finite: the sampler has diverged")
            decoded.append(to_pixels(video).cpu().numpy())
        return list(np.concatenate(decoded, axis=1))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """What the networks run under. All of it is a thread's own, so each call sets it."""
        if self.is_compiled and torch._dynamo.config.recompile_limit < MAX_SHAPES:
            torch._dynamo.config.recompile_limit = MAX_SHAPES
        # the pipeline's GPU is the current one: that is where streams, graphs and kernels of our own go
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode(not self.is_compiled), torch.no_grad():
            yield

    @property
    def is_compiled(self) -> bool:
        """Whether the networks are compiled, and their calls recorded as CUDA graphs."""
        return self._sample_by_graphs is not None

    def _sample(
        self,
        requests: Sequence[GenerationRequest],
        on_step: OnStep | None,
        watch: Watch | None,
        *,
        window: int = 0,
        start: Callable[[Tensor], Tensor] = lambda noise: noise,
        is_known: Tensor | None = None,
    ) -> Tensor:
        """Latents of requests that are alike.

        Args:
            window: Which one of their clips.
            start: From noise to where the sampler begins.
            is_known: Frames (b f) that this leaves clean, which stay as they are.
        """
        first = requests[0]
        latent = latent_shape(first.num_frames, first.height, first.width)
        shape = (self.config.denoiser.in_channels, *latent)
        precision = torch.float64 if self.dtype == torch.float64 else torch.float32

        def noise_of_step(step: int | None) -> Tensor:
            # numpy lets go of the interpreter's lock: drawn one by one, 64 clips would wait 30 ms for their noise
            draws = self._threads.map(
                lambda request: initial_noise(request.seed, shape, step=step, window=window), requests
            )
            return torch.stack(list(draws)).to(precision).to(self.device)

        conditions = {label.name: label.condition for label in self.manifest.labels}
        indices = [self.config.condition_indices(conditions[request.label]) for request in requests]
        condition = torch.tensor(indices, dtype=torch.long).reshape(len(requests), -1).to(self.device)
        sampler = SAMPLERS[first.sampler]
        steps = sampler.steps(first.num_inference_steps)
        if first.strength < 1:
            assert sampler.steps_from is not None  # _check
            steps = sampler.steps_from(first.num_inference_steps, first.strength)
        guidance_scale = 1.0 if sampler.has_built_in_guidance else first.guidance_scale
        noise = start(noise_of_step(None))
        if self._sample_by_graphs is not None:
            self.denoiser.make_tables(latent, self.device)
            return self._sample_by_graphs.sample(
                steps,
                noise,
                condition,
                guidance_scale,
                is_known=is_known,
                draw_noise=noise_of_step,
                on_step=on_step,
                watch=watch,
            )
        predict = guided(self._predict, condition, self._null_condition, guidance_scale)
        if is_known is not None:
            predict = held(predict, is_known)
        return sample(steps, predict, noise, draw_noise=noise_of_step, on_step=on_step, watch=watch)


def _chunks(latents: Float[Tensor, "b c f h w"]) -> list[Tensor]:
    """Latents chunk by chunk of what the autoencoder codes as one."""
    length = CHUNK_FRAMES // TEMPORAL_STRIDE
    return [latents[:, :, begin : begin + length] for begin in range(0, latents.shape[2], length)]


def _can_compile(device: torch.device, compiled: str) -> bool:
    """Whether torch can compile for the device: a C compiler may be missing, most often."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if compiled == "on":
            raise BackendError(f"the networks cannot be compiled here: {reason}") from error
        logger.warning("the networks cannot be compiled here, and run without, which is slower: %s", reason)
        return False
    return True
