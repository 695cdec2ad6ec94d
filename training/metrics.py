"""Figures of merit, each with its source. Pure functions of tensors; none is to be called FVD, FID or LPIPS.

Videos are floats in [-1, 1], (b 3 f h w); clips are uint8 (f, h, w, 3).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from medsora.video_io import from_uint8, to_uint8
from training.data.clips import ClipSet, index_batches

__all__ = [
    "Reconstruction",
    "frechet_distance",
    "gaussian_statistics",
    "high_frequency_energy",
    "measure_reconstruction",
    "motion_statistics",
    "psnr_db",
    "ssim",
]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well windows survive coding; pixels rounded to 8 bits, as they are delivered."""

    psnr_db: float
    """Mean over windows."""
    psnr_db_worst: float
    """Of the worst window."""
    ssim: float
    """Mean over windows, each the mean over its frames."""
    high_frequency_ratio: float
    """Energy above half the Nyquist frequency, reconstruction over original; 1 is all of it."""
    num_windows: int


@torch.no_grad()
def measure_reconstruction(code: Callable[[Tensor], Tensor], clips: ClipSet, *, batch_size: int) -> Reconstruction:
    """Send every window of ``clips`` through ``code`` and compare what comes out.

    Args:
        code: Video in [-1, 1] to its reconstruction of the same shape.
    """
    psnr: list[Tensor] = []
    similarity: list[Tensor] = []
    energy: list[Tensor] = []
    for indices in index_batches(len(clips), batch_size, clips.frames.device):
        video = from_uint8(clips.gather(indices, torch.zeros_like(indices, dtype=torch.bool)))
        reconstruction = from_uint8(to_uint8(code(video)))
        psnr.append(psnr_db(reconstruction, video))
        similarity.append(ssim(reconstruction, video))
        energy.append(torch.stack([high_frequency_energy(reconstruction), high_frequency_energy(video)]))
    decibels = torch.cat(psnr)
    ours, theirs = torch.cat(energy, dim=1).sum(dim=1)
    return Reconstruction(
        psnr_db=float(decibels.mean()),
        psnr_db_worst=float(decibels.min()),
        ssim=float(torch.cat(similarity).mean()),
        high_frequency_ratio=float(ours / theirs),
        num_windows=len(clips),
    )


def psnr_db(video: Float[Tensor, "b c f h w"], other: Float[Tensor, "b c f h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each window in decibels; the peak is the whole range of 2."""
    error = (video.double() - other.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-12))


def ssim(video: Float[Tensor, "b c f h w"], other: Float[Tensor, "b c f h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each window: mean over its frames, colours and pixels.

    Gaussian weights of standard deviation 1.5 over 11x11 pixels, K1 = 0.01, K2 = 0.03, no border: the
    settings of Wang et al. 2004 (IEEE TIP 13(4), section III.C).
    """
    # black must be 0: the brightness term compares ratios of means
    x, y = (rearrange((clip.double() + 1.0) / 2.0, "b c f h w -> (b c f) 1 h w") for clip in (video, other))
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=video.device)
    kernel = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    kernel = kernel / kernel.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, kernel[None, None, :, None]), kernel[None, None, None, :])

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    )
    return score.flatten(1).mean(dim=1).reshape(len(video), -1).mean(dim=1)


def high_frequency_energy(video: Float[Tensor, "b c f h w"]) -> Float[Tensor, " b"]:
    """Energy of the frames' spectra at radii above half the Nyquist frequency (a quarter cycle a pixel)."""
    power = torch.fft.rfft2(video.float(), norm="ortho").abs().square()
    vertical = torch.fft.fftfreq(video.shape[-2], device=video.device)
    horizontal = torch.fft.rfftfreq(video.shape[-1], device=video.device)
    radius = torch.hypot(vertical[:, None], horizontal[None, :])
    # the half spectrum holds every column but the first and (for even widths) the last twice over
    twice = torch.full_like(horizontal, 2.0)
    twice[0] = 1.0
    if video.shape[-1] % 2 == 0:
        twice[-1] = 1.0
    energy: Tensor = (power * ((radius > 0.25) * twice)).flatten(1).sum(dim=1)
    return energy


def motion_statistics(clips: UInt8[Tensor, "n f h w 3"]) -> dict[str, Float[Tensor, " n"]]:
    """How each clip moves; on grey levels 0 to 255.

    Returns:
        ``motion``: mean absolute change from frame to frame. ``flicker``: mean absolute second difference in
        time over ``motion``; noise that is new in every frame gives 1.7, steady motion of smooth structure
        less. ``brightness_flicker``: mean absolute second difference of the frames' mean brightness.
    """
    grey = clips.float().mean(dim=-1)
    first = grey.diff(dim=1)
    motion = first.abs().flatten(1).mean(dim=1)
    second = first.diff(dim=1).abs().flatten(1).mean(dim=1)
    brightness = grey.mean(dim=(2, 3)).diff(n=2, dim=1).abs().mean(dim=1)
    return {
        "motion": motion,
        "flicker": second / motion.clamp_min(1e-6),
        "brightness_flicker": brightness,
    }


def gaussian_statistics(
    features: Float[Tensor, "n d"], *, ddof: int = 1
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and covariance of feature vectors, in float64 on the CPU.

    Args:
        ddof: The covariance is divided by ``n - ddof``.

    Raises:
        ValueError: Fewer than two vectors.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, got {len(features)}")
    values = features.double().cpu()
    mean = values.mean(dim=0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - ddof)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet distance between two Gaussians given as (mean, covariance).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)``: the symmetric form has real eigenvalues of at
    least 0 also for singular covariances, of which few samples make many.

    Source: Dowson and Landau 1982 (J. Multivariate Analysis 12), the distance between normal distributions.
    """
    (mean1, covariance1), (mean2, covariance2) = first, second
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    middle = root @ covariance2 @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0.0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(0.0, float(distance))
