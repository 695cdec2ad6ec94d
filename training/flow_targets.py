"""What alignment draws towards, computed once a run: features of the motion between neighbouring frames of windows.

Windows overlap, so each pair of frames is measured once, however many windows hold it. Kept beside the cached latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from medsora.geometry import TEMPORAL_STRIDE
from medsora.video_io import from_uint8
from training.data.clips import ClipSet, index_batches
from training.data.tensor_file import keep_tensors, kept_tensors

__all__ = ["FlowTargets", "MeasurePairs", "load_or_measure", "measure_windows", "standardise"]

MeasurePairs = Callable[[Tensor, Tensor], Tensor]
"""(first frames, second frames), both (n 3 h w) in [-1, 1], to features of the motion between them: (n c h w)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowTargets:
    """Features of pairs of frames, and which pairs each window holds."""

    features: Tensor
    """(pairs, c, h, w) float16."""
    pairs: Tensor
    """(windows, frames - 1) int64: the pair of each frame and the next; mirrored windows after the others."""

    def __len__(self) -> int:
        return int(self.pairs.shape[0])

    def gather(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b c f h w"]:
        """Of each latent frame of the windows: mean over the pairs that begin in its four frames.

        The last latent frame has three of them, since nothing is known of the frame after a window.
        """
        groups = torch.split(self.pairs[indices], TEMPORAL_STRIDE, dim=1)
        return torch.stack([self.features[group].mean(dim=1, dtype=torch.float32) for group in groups], dim=2)


def pairs_of_windows(clips: ClipSet) -> tuple[Int[Tensor, "p 2"], Int[Tensor, "n k"]]:
    """All different pairs of neighbouring frames as indices into ``clips.frames``, and the pairs of each window."""
    steps = torch.arange(clips.num_frames, device=clips.starts.device)
    frames = clips.starts[:, None] + clips.strides[:, None] * steps
    both = torch.stack([frames[:, :-1], frames[:, 1:]], dim=-1)
    different, member = torch.unique(both.flatten(0, 1), dim=0, return_inverse=True)
    return different, member.reshape(len(frames), -1)


@torch.no_grad()
def measure_windows(
    clips: ClipSet, measure: MeasurePairs, *, has_flips: bool, is_standardised: bool, batch_size: int
) -> FlowTargets:
    """Measure every pair of neighbouring frames of all windows, and of the mirrored ones after them.

    Args:
        is_standardised: Give each channel mean 0 and deviation 1 over all pairs and places, so that directions of
            feature vectors say how motion differs rather than what all motion has in common.
        batch_size: Pairs at once.
    """
    different, of_windows = pairs_of_windows(clips)
    parts = []
    for is_flipped in (False, True) if has_flips else (False,):
        for rows in index_batches(len(different), batch_size, clips.frames.device):
            pixels = clips.frames[different[rows].T]  # (2 n h w 3)
            frames = rearrange(from_uint8(pixels), "two c n h w -> two n c h w")
            parts.append(measure(*(frames.flip(-1) if is_flipped else frames)).to(torch.float16))
    features = torch.cat(parts)
    if is_standardised:
        standardise(features, batch_size)
    pairs = torch.cat([of_windows, of_windows + len(different)]) if has_flips else of_windows
    return FlowTargets(features=features, pairs=pairs)


def standardise(features: Float[Tensor, "n c h w"], batch_size: int) -> None:
    """Give each channel mean 0 and deviation 1 over all pairs and places, in place and piece by piece.

    Args:
        batch_size: Pairs at once: all of them in float32 may not fit.
    """
    pieces = torch.split(features, batch_size)
    count = features[:, 0].numel()
    mean = torch.stack([piece.sum(dim=(0, 2, 3), dtype=torch.float64) for piece in pieces]).sum(0) / count
    centred = mean.float()[:, None, None]
    squares = [(piece.float() - centred).square().sum(dim=(0, 2, 3), dtype=torch.float64) for piece in pieces]
    deviation = (torch.stack(squares).sum(0) / count).sqrt().clamp_min(1e-6).float()[:, None, None]
    for piece in pieces:
        piece.copy_((piece.float() - centred) / deviation)


def load_or_measure(path: Path, *, key: str, device: torch.device, make: Callable[[], FlowTargets]) -> FlowTargets:
    """Targets from a cache file, or made now and written there.

    Args:
        path: Cache file (safetensors); written under a temporary name and renamed.
        key: Says what they are made from (hashes of the networks, data settings and clips); a file with another key
            is replaced.
    """
    kept = kept_tensors(path, key=key, device=device)
    if kept is not None:
        return FlowTargets(features=kept["features"], pairs=kept["pairs"])
    made = make()
    keep_tensors(path, {"features": made.features, "pairs": made.pairs}, key=key)
    return made
