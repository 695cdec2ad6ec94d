"""Causal video autoencoder with frequency compensation: video (b 3 f h w) <-> latents (b c f/4 h/8 w/8).

Follows MedSora (arXiv 2411.01647) in its strides, its chunks of 8 frames, and its two frequency-compensation
modules; the base network is our own, small enough to train and ship: a 3-D Haar stem in place of the first
strided stage, and causal convolutions throughout. No layer looks beyond the chunk of 8 frames that it is in, so
a long video coded chunk by chunk with a :class:`StreamState` equals the same video coded whole.

Axis letters: b batch, c channels, f frames, h height, w width. Inside, activations are (b f) c h w.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from medsora.config import AutoencoderConfig
from medsora.geometry import CHUNK_FRAMES, TEMPORAL_STRIDE, latent_shape

__all__ = ["StreamState", "VideoAutoencoder", "haar_forward", "haar_inverse"]

CHUNK_LATENTS = CHUNK_FRAMES // TEMPORAL_STRIDE
LOGVAR_RANGE = (-30.0, 20.0)


class StreamState:
    """The last frames that each causal convolution saw: what the next chunk of the same video needs.

    Make one for each video and direction, pass it with every chunk in order, and drop it at the end.
    """

    def __init__(self) -> None:
        self._tails: dict[nn.Module, Tensor] = {}

    def prepend(self, module: nn.Module, x: Float[Tensor, "b f c h w"], length: int) -> Tensor:
        """``x`` with the ``length`` frames before it, and remember those for the next chunk."""
        tail = self._tails.get(module)
        padded = _repeat_first(x, length) if tail is None else torch.cat([tail, x], dim=1)
        self._tails[module] = padded[:, -length:].clone()  # a view would hold on to the whole chunk
        return padded


def _repeat_first(x: Tensor, length: int) -> Tensor:
    # the past of a video's first frame is taken to be that frame, not black: no fade-in at the start
    return torch.cat([x[:, :1].expand(-1, length, -1, -1, -1), x], dim=1)


def haar_forward(video: Float[Tensor, "b c f h w"]) -> Float[Tensor, "b c8 f2 h2 w2"]:
    """Orthonormal 3-D Haar transform over 2x2x2 cells: 8 bands a channel at half size."""
    x = rearrange(video, "b c (f p) (h q) (w r) -> b c p q r f h w", p=2, q=2, r=2)
    for axis in (2, 3, 4):
        low, high = x.unbind(axis)
        x = torch.stack([low + high, low - high], dim=axis) * 0.5**0.5
    return rearrange(x, "b c p q r f h w -> b (c p q r) f h w")


def haar_inverse(bands: Float[Tensor, "b c8 f h w"]) -> Float[Tensor, "b c f2 h2 w2"]:
    """Undo :func:`haar_forward` exactly (to rounding)."""
    x = rearrange(bands, "b (c p q r) f h w -> b c p q r f h w", p=2, q=2, r=2)
    for axis in (2, 3, 4):
        low, high = x.unbind(axis)
        x = torch.stack([low + high, low - high], dim=axis) * 0.5**0.5
    return rearrange(x, "b c p q r f h w -> b c (f p) (h q) (w r)")


class CausalConv3d(nn.Module):
    """3-D convolution that sees no future frame: kernel (k, 3, 3), same size out as in.

    Computed as a 2-D convolution over the k frames stacked as channels, which is the same sum and, in
    channels-last layout, 1.2 to 5 times as fast as ``F.conv3d`` on a CPU (docs/experiments.md).
    """

    def __init__(self, in_channels: int, out_channels: int, *, frames: int = 3, size: int = 3) -> None:
        super().__init__()
        self.frames, self.padding = frames, size // 2
        convolution = nn.Conv3d(in_channels, out_channels, (frames, size, size))
        self.weight, self.bias = convolution.weight, convolution.bias  # torch's default initialisation

    def forward(self, x: Tensor, num_frames: int, state: StreamState | None) -> Tensor:  # ((b f) c h w)
        weight = rearrange(self.weight, "o i k p q -> o (k i) p q")
        weight = weight.contiguous(memory_format=torch.channels_last)
        if self.frames > 1:
            clips = rearrange(x, "(b f) c h w -> b f c h w", f=num_frames)
            past = self.frames - 1
            padded = state.prepend(self, clips, past) if state else _repeat_first(clips, past)
            shifted = [padded[:, k : k + num_frames].flatten(0, 1) for k in range(self.frames)]
            x = torch.cat(shifted, dim=1)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of each pixel: needs no other pixel or frame, so chunks agree."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:  # ((b f) c h w)
        scale = x.float().square().mean(dim=1, keepdim=True).add(1e-6).rsqrt()
        return x * scale.to(x.dtype) * self.gain[:, None, None].to(x.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, causal 3x3x3 convolution; norm, SiLU, 1x3x3 convolution; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = CausalConv3d(channels, channels, frames=3)
        self.conv2 = CausalConv3d(channels, channels, frames=1)

    def forward(self, x: Tensor, num_frames: int, state: StreamState | None) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)), num_frames, state)
        h = self.conv2(F.silu(self.norm2(h)), num_frames, state)
        return x + h


class FrequencyCompensationA(nn.Module):
    """Type A: two 3x3 convolutions with ReLU over the two latent frames of a chunk stacked as channels, added.

    Source: MedSora's released autoencoder, "2D" adapter, after the middle block of encoder and decoder.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        stacked = CHUNK_LATENTS * channels
        self.conv1, self.conv2 = (
            nn.Conv2d(stacked, stacked, 3, padding=1),
            nn.Conv2d(stacked, stacked, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:  # ((b f) c h w), f even
        stacked = rearrange(x, "(n f) c h w -> n (f c) h w", f=CHUNK_LATENTS)
        stacked = F.relu(self.conv2(F.relu(self.conv1(stacked))))
        return x + rearrange(stacked, "n (f c) h w -> (n f) c h w", f=CHUNK_LATENTS)


class FrequencyCompensationB(nn.Module):
    """Type B: batch norm, ReLU, dropout, 3x3x3 convolution, added; causal here, so that chunks agree.

    Source: MedSora's released autoencoder, "3D" adapter, after each decoder up block.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        # over (b f) h w: the same statistics as BatchNorm3d over b f h w
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv = CausalConv3d(channels, channels, frames=3)

    def forward(self, x: Tensor, num_frames: int, state: StreamState | None) -> Tensor:
        h: Tensor = self.conv(self.dropout(F.relu(self.norm(x))), num_frames, state)
        return x + h


class Encoder(nn.Module):
    """Haar stem, then stages at 1/2, 1/4 and 1/8, a middle block, compensation A, and mean and log-variance."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.channels

        def stage(channels: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(channels) for _ in range(config.encoder_blocks))

        self.stem = CausalConv3d(8 * config.in_channels, half, frames=1)
        self.stage1 = stage(half)
        self.down1 = nn.Conv2d(2 * half, quarter, 3, stride=2, padding=1)  # on pairs of frames: 2x in time too
        self.stage2 = stage(quarter)
        self.down2 = nn.Conv2d(quarter, eighth, 3, stride=2, padding=1)
        self.stage3 = stage(eighth)
        self.middle = ResidualBlock(eighth)
        self.compensation = FrequencyCompensationA(eighth) if config.has_frequency_compensation else None
        self.norm = ChannelNorm(eighth)
        self.head = CausalConv3d(eighth, 2 * config.latent_channels, frames=1)

    def forward(self, video: Tensor, state: StreamState | None) -> Tensor:  # (b 3 f h w) -> (b 2c f/4 h/8 w/8)
        bands = haar_forward(video)
        frames = bands.shape[2]
        x: Tensor = rearrange(bands, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
        x = self.stem(x, frames, state)
        for block in self.stage1:
            x = block(x, frames, state)
        frames //= 2
        x = self.down1(rearrange(x, "(n p) c h w -> n (p c) h w", p=2))
        for block in self.stage2:
            x = block(x, frames, state)
        x = self.down2(x)
        for block in [*self.stage3, self.middle]:
            x = block(x, frames, state)
        if self.compensation is not None:
            x = self.compensation(x)
        x = self.head(F.silu(self.norm(x)), frames, state)
        return rearrange(x, "(b f) c h w -> b c f h w", f=frames)


class Decoder(nn.Module):
    """Middle block, compensation A, three up blocks each with compensation B, and the inverse Haar transform."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.channels

        def stage(channels: int) -> nn.ModuleList:
            return nn.ModuleList(ResidualBlock(channels) for _ in range(config.decoder_blocks))

        def compensation(channels: int) -> nn.Module | None:
            return FrequencyCompensationB(channels, config.dropout) if config.has_frequency_compensation else None

        self.stem = CausalConv3d(config.latent_channels, eighth, frames=3)
        self.middle = ResidualBlock(eighth)
        self.compensation = FrequencyCompensationA(eighth) if config.has_frequency_compensation else None
        self.stage1 = stage(eighth)
        self.up1 = CausalConv3d(eighth, 4 * quarter, frames=1)
        self.compensation1 = compensation(quarter)
        self.stage2 = stage(quarter)
        self.up2 = CausalConv3d(quarter, 8 * half, frames=1)
        self.compensation2 = compensation(half)
        self.stage3 = stage(half)
        self.compensation3 = compensation(half)
        self.norm = ChannelNorm(half)
        self.head = CausalConv3d(half, 8 * config.in_channels, frames=3)

    def forward(self, z: Tensor, state: StreamState | None) -> Tensor:  # (b c f h w) -> (b 3 4f 8h 8w)
        frames = z.shape[2]
        x = rearrange(z, "b c f h w -> (b f) c h w").contiguous(memory_format=torch.channels_last)
        x = self.middle(self.stem(x, frames, state), frames, state)
        if self.compensation is not None:
            x = self.compensation(x)
        for block in self.stage1:
            x = block(x, frames, state)
        x = rearrange(self.up1(x, frames, state), "n (c q r) h w -> n c (h q) (w r)", q=2, r=2)
        if self.compensation1 is not None:
            x = self.compensation1(x, frames, state)
        for block in self.stage2:
            x = block(x, frames, state)
        x = rearrange(self.up2(x, frames, state), "n (p c q r) h w -> (n p) c (h q) (w r)", p=2, q=2, r=2)
        frames *= 2
        if self.compensation2 is not None:
            x = self.compensation2(x, frames, state)
        for block in self.stage3:
            x = block(x, frames, state)
        if self.compensation3 is not None:
            x = self.compensation3(x, frames, state)
        bands = self.head(F.silu(self.norm(x)), frames, state)
        return haar_inverse(rearrange(bands, "(b f) c h w -> b c f h w", f=frames))


class VideoAutoencoder(nn.Module):
    """Codes video as latents of zero mean and unit variance, and back.

    ``z`` is the network's own space; ``latents`` are ``(z - latent_mean) / latent_scale``, with the mean and
    scale of each channel over the training set kept in the weights. Call ``eval()`` before use: compensation B
    holds batch norm and dropout.
    """

    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_scale", torch.ones(config.latent_channels))

    def posterior(
        self, video: Float[Tensor, "b c f h w"], state: StreamState | None = None
    ) -> tuple[Float[Tensor, "b z f4 h8 w8"], Float[Tensor, "b z f4 h8 w8"]]:
        """Mean and log-variance of ``z`` for a video in [-1, 1].

        Args:
            video: Frames a multiple of 8; height and width multiples of 8.
            state: For a chunk of a longer video: the state that saw the chunks before it.

        Raises:
            ValueError: The shape cannot be coded.
        """
        latent_shape(*video.shape[2:])
        mean, logvar = self.encoder(video, state).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_z(
        self, z: Float[Tensor, "b z f h w"], state: StreamState | None = None
    ) -> Float[Tensor, "b c f4 h8 w8"]:
        """Video of ``z``; about [-1, 1], not clamped. ``z`` has an even number of frames (``ValueError``)."""
        if z.shape[2] % CHUNK_LATENTS:
            raise ValueError(f"latents must have a multiple of {CHUNK_LATENTS} frames, got {z.shape[2]}")
        video: Tensor = self.decoder(z, state)
        return video

    def encode(
        self, video: Float[Tensor, "b c f h w"], state: StreamState | None = None
    ) -> Float[Tensor, "b z f4 h8 w8"]:
        """Normalised latents (the posterior's mean) of a video in [-1, 1]; see :meth:`posterior`."""
        mean, _ = self.posterior(video, state)
        return (mean - self._channelwise(self.latent_mean)) / self._channelwise(self.latent_scale)

    def decode(
        self, latents: Float[Tensor, "b z f h w"], state: StreamState | None = None
    ) -> Float[Tensor, "b c f4 h8 w8"]:
        """Video of normalised latents; see :meth:`decode_z`."""
        z = latents * self._channelwise(self.latent_scale) + self._channelwise(self.latent_mean)
        return self.decode_z(z, state)

    @staticmethod
    def _channelwise(value: Tensor) -> Tensor:
        return value[:, None, None, None]
