"""What both networks are trained to do: pure functions of tensors, no state, no model code.

Rectified flow over the path of :mod:`medsora.diffusion.path`, and the autoencoder's reconstruction terms.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from medsora.diffusion.path import interpolate, velocity_target

__all__ = [
    "FlowSample",
    "draw_flow_sample",
    "drop_conditions",
    "flow_matching_loss",
    "focal_frequency_loss",
    "kl_divergence",
    "logit_normal_times",
    "perceptual_distance",
    "sample_posterior",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowSample:
    """One training example of the denoiser: what it is given, and what it should answer."""

    noisy: Float[Tensor, "b c f h w"]
    t: Float[Tensor, "b f"]
    condition: Int[Tensor, "b k"]
    target: Float[Tensor, "b c f h w"]


def logit_normal_times(
    num_clips: int, num_frames: int, *, mean: float, std: float, generator: torch.Generator
) -> Float[Tensor, "b f"]:
    """Draw one time a clip, ``sigmoid(mean + std * normal)``, the same for all its frames.

    Source: Esser et al., arXiv 2403.03206, section 3.1 ("logit-normal sampling").
    """
    draw = torch.randn(num_clips, generator=generator, device=generator.device)
    return torch.sigmoid(mean + std * draw)[:, None].expand(-1, num_frames)


def drop_conditions(
    condition: Int[Tensor, "b k"],
    *,
    null_condition: tuple[int, ...],
    probability: float,
    generator: torch.Generator,
) -> Int[Tensor, "b k"]:
    """Replace all conditions of a clip by their null classes, each clip with the given probability."""
    drops = torch.rand(len(condition), generator=generator, device=generator.device) < probability
    null = torch.tensor(null_condition, device=condition.device, dtype=condition.dtype)
    return torch.where(drops[:, None], null, condition)


def draw_flow_sample(
    latents: Float[Tensor, "b c f h w"],
    condition: Int[Tensor, "b k"],
    *,
    null_condition: tuple[int, ...],
    time_mean: float,
    time_std: float,
    label_dropout: float,
    generator: torch.Generator,
) -> FlowSample:
    """Draw time, noise and dropped conditions for a batch of clean latents."""
    t = logit_normal_times(len(latents), latents.shape[2], mean=time_mean, std=time_std, generator=generator)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    return FlowSample(
        noisy=interpolate(latents, noise, t),
        t=t,
        condition=drop_conditions(
            condition, null_condition=null_condition, probability=label_dropout, generator=generator
        ),
        target=velocity_target(latents, noise),
    )


def flow_matching_loss(velocity: Float[Tensor, "b c f h w"], target: Float[Tensor, "b c f h w"]) -> Float[Tensor, ""]:
    """Mean squared error of the velocity, in float32."""
    return F.mse_loss(velocity.float(), target.float())


def sample_posterior(
    mean: Float[Tensor, "*dims"], logvar: Float[Tensor, "*dims"], noise: Float[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """A draw from a normal distribution, differentiable in its mean and log-variance."""
    return mean + torch.exp(0.5 * logvar) * noise


def kl_divergence(mean: Float[Tensor, "*dims"], logvar: Float[Tensor, "*dims"]) -> Float[Tensor, ""]:
    """Divergence of N(mean, exp(logvar)) from N(0, 1) in nats, mean over all elements.

    Source: Kingma and Welling, arXiv 1312.6114, appendix B.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def focal_frequency_loss(
    reconstruction: Float[Tensor, "b c f h w"], video: Float[Tensor, "b c f h w"]
) -> Float[Tensor, ""]:
    """Squared error of each frame's 2-D spectrum, weighted by its own size.

    The weight of a frequency is its distance over the frame's (and channel's) largest one, held fixed in the
    gradient: frequencies that are reconstructed worst count most.

    Source: Jiang et al., arXiv 2012.12821, the focal frequency loss with alpha = 1 and an orthonormal transform.
    """
    # the transform is linear, so the spectrum of the difference is the difference of the spectra
    difference = torch.fft.fft2(reconstruction.float() - video.float(), norm="ortho")
    squared = difference.real.square() + difference.imag.square()
    with torch.no_grad():
        distance = squared.sqrt()
        largest = distance.amax(dim=(-2, -1), keepdim=True)
        weight = (distance / largest.clamp_min(torch.finfo(distance.dtype).tiny)).clamp(0.0, 1.0)
    loss: Tensor = (weight * squared).mean()
    return loss


def perceptual_distance(
    features: list[Float[Tensor, "n c h w"]], other: list[Float[Tensor, "n c h w"]]
) -> Float[Tensor, ""]:
    """Mean over layers of the squared distance of unit-length feature vectors, mean over pixels.

    The form of Zhang et al., arXiv 1801.03924, equation 1, with all channel weights 1: it is not LPIPS, whose
    learned weights are not used here.
    """
    terms = [
        (F.normalize(a.float(), dim=1, eps=1e-6) - F.normalize(b.float(), dim=1, eps=1e-6)).square().sum(1).mean()
        for a, b in zip(features, other, strict=True)
    ]
    return torch.stack(terms).mean()
