"""Copies of training clips, made on purpose in the ways a copy may differ, to see which of them are found."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from medsora.video_io import read_video, write_mp4

__all__ = ["planted_copies"]

Clips = UInt8[Tensor, "n f h w 3"]


def planted_copies(
    clips: Clips, *, reconstruct: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Altered copies of clips, by a name that says how.

    Args:
        clips: Sizes even.
        reconstruct: Clips through the autoencoder: the way that a copy made by a latent model goes.
        seed: Of the noise.
    """
    shift = max(1, round(clips.shape[2] / 64))
    copies = {
        "unchanged": clips,
        "mirrored": clips.flip(3),
        "re-encoded (H.264, crf 28)": _reencoded(clips, 28),
        "re-encoded (H.264, crf 38)": _reencoded(clips, 38),
        f"shifted by {shift} pixels": _shifted(clips, shift, -shift),
        f"shifted by {2 * shift} pixels": _shifted(clips, -2 * shift, 2 * shift),
        "enlarged by 5 %": _enlarged(clips, 1.05),
        "brighter (gain 1.15, plus 15)": _levels(clips, 1.15, 15),
        "darker (gain 0.8, less 5)": _levels(clips, 0.8, -5),
        "noisy (10 grey levels)": _noisy(clips, 10, seed),
    }
    if reconstruct is not None:
        copies["through the autoencoder"] = reconstruct(clips)
        mixed = _shifted(reconstruct(clips).flip(3), shift // 2, shift)
        copies["autoencoder, mirrored, shifted, brighter, noisy"] = _noisy(_levels(mixed, 1.1, 5), 5, seed)
    return copies


def _levels(clips: Tensor, gain: float, offset: float) -> Tensor:
    return (clips.float() * gain + offset).round().clamp(0, 255).to(torch.uint8)


def _noisy(clips: Tensor, std: float, seed: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = std * torch.randn(clips.shape, generator=generator).to(clips.device)
    return (clips.float() + noise).round().clamp(0, 255).to(torch.uint8)


def _shifted(clips: Tensor, down: int, right: int) -> Tensor:
    """Moved by whole pixels; the border goes on where nothing comes in."""
    n, _, height, width, _ = clips.shape
    images = rearrange(clips, "n f h w c -> (n f) c h w").float()
    reach = max(abs(down), abs(right))
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    moved = padded[:, :, reach - down : reach - down + height, reach - right : reach - right + width]
    return rearrange(moved.to(torch.uint8), "(n f) c h w -> n f h w c", n=n)


def _enlarged(clips: Tensor, factor: float) -> Tensor:
    n, _, height, width, _ = clips.shape
    images = rearrange(clips, "n f h w c -> (n f) c h w").float()
    large = F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)
    top, left = (large.shape[2] - height) // 2, (large.shape[3] - width) // 2
    cut = large[:, :, top : top + height, left : left + width].round().clamp(0, 255)
    return rearrange(cut.to(torch.uint8), "(n f) c h w -> n f h w c", n=n)


def _reencoded(clips: Tensor, crf: int) -> Tensor:
    decoded = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "copy.mp4"
        for clip in clips:
            write_mp4(path, clip.cpu().numpy(), fps=8, crf=crf)
            decoded.append(torch.from_numpy(read_video(path)[0]))
    return torch.stack(decoded).to(clips.device)
