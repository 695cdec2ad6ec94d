"""Requests in, frames out: loads a checkpoint once and keeps nothing of any request."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medsora.checkpoint import LoadedCheckpoint, load_checkpoint
from medsora.diffusion.guidance import guided_velocity
from medsora.diffusion.samplers import SAMPLERS
from medsora.diffusion.schedule import timesteps
from medsora.errors import BackendError, CheckpointError
from medsora.geometry import latent_shape
from medsora.manifest import Manifest, find_checkpoint
from medsora.ops import resolve_backend
from medsora.request import GenerationRequest
from medsora.video_io import to_uint8

__all__ = ["VideoPipeline", "initial_noise"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Frames = UInt8[np.ndarray, "f h w c"]


def initial_noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "c f h w"]:
    """Standard normal noise that depends on the seed and shape alone, not on device or batch. float32, CPU.

    From numpy's frozen generator: it uses all bits of the seed, where torch's on a CPU uses the lowest 32, and its
    numbers are promised never to change.
    """
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))
    return torch.from_numpy(generator.standard_normal(shape)).float()


class VideoPipeline:
    """A checkpoint ready to generate; safe to share, since a call leaves no trace in it.

    Make one with :meth:`from_checkpoint`. ``manifest`` tells labels and limits.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, *, device: torch.device, dtype: torch.dtype, backend: str) -> None:
        if checkpoint.autoencoder is None:
            raise CheckpointError(
                f"{checkpoint.manifest.name} has no autoencoder, and makes latents, not video: "
                "give it one with `medsora import-released --autoencoder`"
            )
        self.manifest: Manifest = checkpoint.manifest
        self.config = checkpoint.config
        self.device, self.dtype, self.backend = device, dtype, backend
        self.autoencoder = checkpoint.autoencoder.to(device, dtype).eval().requires_grad_(False)
        self.denoiser = checkpoint.denoiser.to(device, dtype).eval().requires_grad_(False)
        self.denoiser.backend = backend

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path, *, device: str = "auto", dtype: str = "auto", backend: str = "auto"
    ) -> "VideoPipeline":
        """Load and check a checkpoint.

        Args:
            checkpoint: A directory, or the name of one that comes with the package.
            device: ``auto`` takes CUDA where there is a GPU, else the CPU; or a torch device name.
            dtype: ``auto`` is bfloat16 on CUDA, float32 on the CPU; or float32, bfloat16, float64.
            backend: Of the SSD operator; ``reference`` also samples one clip at a time, so that a clip is
                bit-identical whatever it was asked together with.

        Raises:
            CheckpointError: It cannot be found, or is damaged.
            BackendError: No such device, dtype or back end here.
        """
        resolve_backend(backend, length=1)
        if dtype != "auto" and dtype not in DTYPES:
            raise BackendError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            place = torch.device(name)
            if place.type not in ("cpu", "cuda", "mps"):
                raise BackendError(f"device must be auto, cpu, cuda or mps; got {name!r}")
            torch.zeros(1, device=place)
        except (RuntimeError, AssertionError) as error:
            first_line = str(error).splitlines()[0]
            raise BackendError(f"device {name!r} is not available here: {first_line}") from error
        default = torch.bfloat16 if place.type == "cuda" else torch.float32
        loaded = load_checkpoint(find_checkpoint(checkpoint))
        if loaded.config.denoiser.out_channels != loaded.config.denoiser.in_channels:
            raise CheckpointError(f"{checkpoint}: its denoiser predicts a variance too, which no sampler here takes")
        return cls(loaded, device=place, dtype=DTYPES.get(dtype, default), backend=backend)

    def __call__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Frames]:
        """Generate one clip a request, as one batch.

        Args:
            requests: Made by :func:`medsora.request.resolve_request` for this checkpoint, and alike in shape,
                steps, guidance and sampler.
            on_step: Called with (steps done, steps in all) after each step; raise
                :class:`medsora.errors.GenerationCanceled` in it to stop.

        Returns:
            uint8 RGB frames (f h w 3) of each request, in order. Equal requests give equal frames.

        Raises:
            ValueError: No requests, or requests that cannot share a batch.
        """
        if len({request.shape_key for request in requests}) != 1:
            raise ValueError("requests of one call must be alike in frames, size, steps, guidance and sampler")
        if self.backend == "reference" and len(requests) > 1:
            # matrix products of another batch size may round differently: one at a time, or no promise
            return self._one_by_one(requests, on_step)
        with torch.inference_mode():
            video = self.autoencoder.decode(self._sample(requests, on_step))
            frames = to_uint8(video)
        return [clip.numpy() for clip in frames.cpu()]

    def _one_by_one(
        self, requests: Sequence[GenerationRequest], on_step: Callable[[int, int], None] | None
    ) -> list[Frames]:
        clips: list[Frames] = []
        for index, request in enumerate(requests):

            def step(done: int, total: int, index: int = index) -> None:
                if on_step is not None:
                    on_step(index * total + done, len(requests) * total)

            clips += self([request], on_step=step)
        return clips

    def _sample(
        self, requests: Sequence[GenerationRequest], on_step: Callable[[int, int], None] | None
    ) -> Float[Tensor, "b c f h w"]:
        first = requests[0]
        latent = latent_shape(first.num_frames, first.height, first.width)
        shape = (self.config.denoiser.in_channels, *latent)
        noise = torch.stack([initial_noise(request.seed, shape) for request in requests])
        conditions = {label.name: label.condition for label in self.manifest.labels}
        indices = [self.config.condition_indices(conditions[request.label]) for request in requests]
        condition = torch.tensor(indices, device=self.device)
        null = torch.tensor(self.config.denoiser.null_condition, device=self.device)

        def velocity(x: Tensor, t: float, condition: Tensor) -> Tensor:
            times = torch.full((x.shape[0], x.shape[2]), t, device=self.device)
            # the state of the sampler stays in float32; only the network runs in the chosen type
            predicted: Tensor = self.denoiser(x.to(self.dtype), times, condition)
            return predicted.to(x.dtype)

        state = noise.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        latents: Tensor = SAMPLERS[first.sampler](
            guided_velocity(velocity, condition, null, first.guidance_scale),
            state,
            timesteps(first.num_inference_steps),
            on_step=on_step,
        )
        return latents.to(self.dtype)
