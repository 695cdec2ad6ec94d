"""RAFT-small, a frozen optical-flow network, in the layout of the published ``raft-small.pth``; and flow as colour.

Architecture: Teed and Deng, arXiv 2003.12039, the small variant of its appendix (bottleneck blocks, a radius of 3, one
convolutional GRU), with the sizes and conventions that the published weights ask for. The weights are a file that the
caller names. Axis letters: n pairs of frames, c channels, h height, w width.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from training.errors import TrainingError
from training.weights import read_weights

__all__ = ["MOTION_CHANNELS", "Raft", "flow_to_colour", "load_raft"]

MOTION_CHANNELS = 96
"""Channels of the recurrent state, from which RAFT-small reads the flow."""
CONTEXT_CHANNELS = 64
FEATURE_CHANNELS = 128
LEVELS, RADIUS = 4, 3
STRIDE = 8
LEAST_SIZE = 16
COLOUR_RUNS = (15, 6, 4, 11, 13, 6)
"""Steps of the colour wheel from red to yellow, green, cyan, blue, magenta and back to red."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions at a quarter of the width, added to the input."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, is_normed: bool) -> None:
        super().__init__()
        self.is_normed = is_normed
        self.conv1 = nn.Conv2d(in_channels, channels // 4, 1)
        self.conv2 = nn.Conv2d(channels // 4, channels // 4, 3, stride=stride, padding=1)
        self.conv3 = nn.Conv2d(channels // 4, channels, 1)
        self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in (self.conv1, self.conv2, self.conv3):
            y = F.relu(_norm(convolution(y), self.is_normed))
        if self.downsample is not None:
            x = _norm(self.downsample(x), self.is_normed)
        return F.relu(x + y)


def _norm(x: Tensor, is_normed: bool) -> Tensor:
    return F.instance_norm(x) if is_normed else x  # no gain, no bias: the file has none


class FrameEncoder(nn.Module):
    """Features at an eighth of the size."""

    def __init__(self, out_channels: int, *, is_normed: bool) -> None:
        super().__init__()
        self.is_normed = is_normed
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2, padding=3)

        def layer(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                Bottleneck(in_channels, channels, stride, is_normed=is_normed),
                Bottleneck(channels, channels, 1, is_normed=is_normed),
            )

        self.layer1, self.layer2, self.layer3 = layer(32, 32, 1), layer(32, 64, 2), layer(64, 96, 2)
        self.conv2 = nn.Conv2d(96, out_channels, 1)

    def forward(self, frames: Tensor) -> Tensor:
        x = F.relu(_norm(self.conv1(frames), self.is_normed))
        features: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return features


class MotionEncoder(nn.Module):
    """What the correlations around the present estimate, and the estimate itself, say of the motion."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 96, 1)
        self.convf1 = nn.Conv2d(2, 64, 7, padding=3)
        self.convf2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv = nn.Conv2d(128, 80, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        of_flow = F.relu(self.convf2(F.relu(self.convf1(flow))))
        together = torch.cat([F.relu(self.convc1(correlation)), of_flow], dim=1)
        return torch.cat([F.relu(self.conv(together)), flow], dim=1)


class ConvolutionalGru(nn.Module):
    """A gated recurrent unit whose matrices are 3x3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        channels = MOTION_CHANNELS + CONTEXT_CHANNELS + 82
        self.convz, self.convr, self.convq = (nn.Conv2d(channels, MOTION_CHANNELS, 3, padding=1) for _ in range(3))

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([state, x], dim=1)
        update, reset = torch.sigmoid(self.convz(both)), torch.sigmoid(self.convr(both))
        candidate = torch.tanh(self.convq(torch.cat([reset * state, x], dim=1)))
        return (1.0 - update) * state + update * candidate


class FlowHead(nn.Module):
    """The change of the flow, in cells of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(MOTION_CHANNELS, 128, 3, padding=1)
        self.conv2 = nn.Conv2d(128, 2, 3, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        change: Tensor = self.conv2(F.relu(self.conv1(state)))
        return change


class UpdateBlock(nn.Module):
    """One step of the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = MotionEncoder(), ConvolutionalGru(), FlowHead()

    def forward(self, state: Tensor, context: Tensor, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        state = self.gru(state, torch.cat([context, self.encoder(flow, correlation)], dim=1))
        return state, self.flow_head(state)


class CorrelationPyramid:
    """Scalar products of every cell of one frame with every cell of the other, at four resolutions of the other."""

    def __init__(self, first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"]) -> None:
        self.shape = (first.shape[0], *first.shape[2:])
        products = torch.einsum("ncp,ncq->npq", first.flatten(2), second.flatten(2)) / math.sqrt(first.shape[1])
        level = rearrange(products, "n p (h w) -> (n p) 1 h w", h=second.shape[2])
        self.levels = [level]
        for _ in range(LEVELS - 1):
            if min(level.shape[2:]) < 2:
                break  # a level without cells: all that could be looked up in it lies outside, and counts as 0
            level = F.avg_pool2d(level, 2)
            self.levels.append(level)

    def around(self, coordinates: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n k h w"]:
        """The products within :data:`RADIUS` cells of where each cell is thought to have gone, level by level."""
        n, h, w = self.shape
        steps = torch.arange(-RADIUS, RADIUS + 1, device=coordinates.device, dtype=coordinates.dtype)
        # the published weights count the offsets to the right slowest, those downwards fastest
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
        centres = rearrange(coordinates, "n xy h w -> (n h w) 1 1 xy")
        found = []
        for number, level in enumerate(self.levels):
            size = torch.tensor(level.shape[:1:-1], device=level.device, dtype=level.dtype)  # width, height
            place = (2.0 * (centres / 2**number + offsets) + 1.0) / size - 1.0
            found.append(F.grid_sample(level, place, align_corners=False).flatten(1))
        missing = (LEVELS - len(found)) * (2 * RADIUS + 1) ** 2
        return F.pad(
            rearrange(torch.cat(found, dim=1), "(n h w) k -> n k h w", n=n, h=h, w=w), (0, 0, 0, 0, 0, missing)
        )


class Raft(nn.Module):
    """RAFT-small; always in evaluation mode, never trained."""

    def __init__(self, *, num_updates: int = 12) -> None:
        super().__init__()
        self.num_updates = num_updates
        self.fnet = FrameEncoder(FEATURE_CHANNELS, is_normed=True)
        self.cnet = FrameEncoder(MOTION_CHANNELS + CONTEXT_CHANNELS, is_normed=False)
        self.update_block = UpdateBlock()

    def forward(self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2 h w"]:
        """Where each pixel of the first frame is in the second: to the right and downwards, in pixels.

        Args:
            first, second: RGB in [-1, 1]; height and width multiples of 8, at least 16. The network was trained on
                frames of several hundred pixels.

        Raises:
            ValueError: The size does not fit.
        """
        return self.flow_and_motion(first, second)[0]

    @torch.no_grad()
    def flow_and_motion(
        self, first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]
    ) -> tuple[Float[Tensor, "n 2 h w"], Float[Tensor, "n m h8 w8"]]:
        """The flow, and the recurrent state that it was read from: 96 channels at an eighth of the size, in [-1, 1].

        The state is what alignment uses: all that the network knows of the motion at a place.
        """
        height, width = first.shape[2:]
        if height % STRIDE or width % STRIDE or min(height, width) < LEAST_SIZE:
            raise ValueError(
                f"frames must be multiples of {STRIDE} pixels, at least {LEAST_SIZE}, got {width}x{height}"
            )
        features = self.fnet(torch.cat([first, second]))
        correlation = CorrelationPyramid(*features.chunk(2))
        state, context = self.cnet(first).split([MOTION_CHANNELS, CONTEXT_CHANNELS], dim=1)
        state, context = torch.tanh(state), F.relu(context)
        here = _coordinates(state)
        flow = torch.zeros_like(here)
        for _ in range(self.num_updates):
            state, change = self.update_block(state, context, correlation.around(here + flow), flow)
            flow = flow + change
        return STRIDE * F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=True), state


def _coordinates(like: Tensor) -> Tensor:
    """Column and row of every cell: (n 2 h w)."""
    rows, columns = (torch.arange(size, device=like.device, dtype=like.dtype) for size in like.shape[2:])
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return grid.expand(len(like), -1, -1, -1)


def load_raft(path: Path, *, device: torch.device | str = "cpu") -> Raft:
    """Build the network from a weight file, frozen.

    Args:
        path: ``.safetensors``, or a torch file that holds nothing but tensors; names as in the published
            ``raft-small.pth``, with or without its prefix ``module.``.

    Raises:
        TrainingError: No such file, unreadable, or other names or shapes than RAFT-small's.
    """
    weights = {name.removeprefix("module."): value for name, value in read_weights(path, "RAFT").items()}
    network = Raft()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"{path} holds no RAFT-small in the published layout: {error}") from error
    return network.to(device).eval().requires_grad_(False)


def flow_to_colour(flow: Float[Tensor, "n 2 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Flow as RGB in [0, 1]: hue is the direction, saturation the length over the largest one of that frame.

    Source: Baker et al., A Database and Evaluation Methodology for Optical Flow, IJCV 92 (2011): the colour code of
    its figures, a wheel of 55 hues, white where nothing moves.
    """
    length = flow.norm(dim=1, keepdim=True)
    largest = length.amax(dim=(2, 3), keepdim=True)
    share = length / largest.clamp_min(torch.finfo(flow.dtype).tiny)
    wheel = _colour_wheel().to(flow)
    # to the right is red, which begins the wheel; from there over yellow, which is down
    turn = (torch.atan2(-flow[:, 1], -flow[:, 0]) / math.pi + 1.0) / 2.0 * (len(wheel) - 1)
    below = turn.floor().long().clamp(0, len(wheel) - 1)
    hue = torch.lerp(wheel[below], wheel[(below + 1) % len(wheel)], (turn - below)[..., None])
    colour: Tensor = 1.0 - share * (1.0 - rearrange(hue, "n h w c -> n c h w"))
    return colour


def _colour_wheel() -> Float[Tensor, "k 3"]:
    """Hues from red on; each run moves one primary up or down."""
    hues: list[list[float]] = []
    colour = [1.0, 0.0, 0.0]
    for run, count in enumerate(COLOUR_RUNS):
        primary, is_rising = (run * 2 + 1) % 3, run % 2 == 0
        for step in range(count):
            colour[primary] = step / count if is_rising else 1.0 - step / count
            hues.append(list(colour))
        colour[primary] = float(is_rising)
    return torch.tensor(hues)
