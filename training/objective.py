"""What both networks are trained to do: pure functions of tensors, no state, no model code.

Rectified flow over the path of :mod:`medsora.diffusion.path`, the noise prediction of :mod:`medsora.diffusion.ddpm`
with its learned variance, and the autoencoder's reconstruction and adversarial terms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medsora.diffusion.ddpm import NUM_TRAINED_TIMES, alpha_bars
from medsora.diffusion.path import interpolate, velocity_target

__all__ = [
    "DenoisingSample",
    "adversarial_loss",
    "discriminator_loss",
    "draw_clean_prefixes",
    "draw_flow_sample",
    "draw_noise_sample",
    "drop_conditions",
    "flow_matching_loss",
    "focal_frequency_loss",
    "kl_divergence",
    "logit_normal_times",
    "noise_prediction_loss",
    "perceptual_distance",
    "sample_posterior",
    "variance_bound",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingSample:
    """Training examples of the denoiser: what it is given, and what it should answer."""

    noisy: Float[Tensor, "b c f h w"]
    t: Float[Tensor, "b f"]
    condition: Int[Tensor, "b k"]
    target: Float[Tensor, "b c f h w"]
    """The velocity, or the noise."""
    data: Float[Tensor, "b c f h w"]
    """The latents that were made noisy."""
    is_noisy: Bool[Tensor, "b f"]
    """False for the frames of a clean prefix, of which nothing is asked."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "DenoisingSample":
        """The same of every tensor: to take some of the clips."""
        return DenoisingSample(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


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


def draw_clean_prefixes(
    num_clips: int, num_frames: int, *, probability: float, generator: torch.Generator
) -> Bool[Tensor, "b f"]:
    """Mark the first frames of some clips, any number of them but never all, as known: they are held clean.

    So one network learns to go on from frames it is given, besides making clips from nothing. The idea is that of
    per-frame noise levels, of which a clean prefix is the case that is used (Chen et al., arXiv 2407.01392).

    Args:
        probability: Of a clip to have a prefix. One frame alone has none to know.
    """
    draw = torch.rand(2, num_clips, generator=generator, device=generator.device)
    # 1 is added to whole numbers: added to the draw, it would round the largest one up to all frames
    length = (1 + (draw[1] * (num_frames - 1)).long()) * ((draw[0] < probability) & (num_frames > 1))
    return torch.arange(num_frames, device=generator.device) < length[:, None]


def draw_flow_sample(
    latents: Float[Tensor, "b c f h w"],
    condition: Int[Tensor, "b k"],
    *,
    null_condition: tuple[int, ...],
    time_mean: float,
    time_std: float,
    label_dropout: float,
    generator: torch.Generator,
    clean_prefixes: float = 0.0,
) -> DenoisingSample:
    """Draw time, noise, clean prefixes and dropped conditions for a batch of clean latents.

    Args:
        clean_prefixes: Share of clips whose first frames are held at t = 0.
    """
    t = logit_normal_times(len(latents), latents.shape[2], mean=time_mean, std=time_std, generator=generator)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    dropped = drop_conditions(condition, null_condition=null_condition, probability=label_dropout, generator=generator)
    is_known = draw_clean_prefixes(*t.shape, probability=clean_prefixes, generator=generator)
    t = torch.where(is_known, 0.0, t)
    return DenoisingSample(
        noisy=interpolate(latents, noise, t),
        t=t,
        condition=dropped,
        target=velocity_target(latents, noise),
        data=latents,
        is_noisy=~is_known,
    )


def flow_matching_loss(
    velocity: Float[Tensor, "b c f h w"],
    target: Float[Tensor, "b c f h w"],
    is_noisy: Bool[Tensor, "b f"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity in float32: over the noisy frames of each clip, then over clips.

    Args:
        is_noisy: Default all of them.
    """
    if is_noisy is None:
        return F.mse_loss(velocity.float(), target.float())
    return _mean_over_noisy((velocity.float() - target.float()).square(), is_noisy)


def _mean_over_noisy(error: Float[Tensor, "b c f h w"], is_noisy: Bool[Tensor, "b f"]) -> Float[Tensor, ""]:
    of_frames = rearrange(error, "b c f h w -> b f (c h w)").mean(dim=2) * is_noisy
    return (of_frames.sum(dim=1) / is_noisy.sum(dim=1)).mean()


def draw_noise_sample(
    latents: Float[Tensor, "b c f h w"],
    condition: Int[Tensor, "b k"],
    *,
    null_condition: tuple[int, ...],
    label_dropout: float,
    generator: torch.Generator,
) -> DenoisingSample:
    """Draw one of the 1000 steps, all alike, noise and dropped conditions for a batch of clean latents.

    Source: Ho et al., arXiv 2006.11239, equation 4 and algorithm 1.
    """
    size, frames = len(latents), latents.shape[2]
    step = torch.randint(NUM_TRAINED_TIMES, (size,), generator=generator, device=generator.device)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    share = _shares(latents.device)[0][step][:, None, None, None, None].to(latents.dtype)
    return DenoisingSample(
        noisy=share.sqrt() * latents + (1.0 - share).sqrt() * noise,
        t=(step.to(latents.dtype) / NUM_TRAINED_TIMES)[:, None].expand(-1, frames),
        condition=drop_conditions(
            condition, null_condition=null_condition, probability=label_dropout, generator=generator
        ),
        target=noise,
        data=latents,
        is_noisy=torch.ones(size, frames, dtype=torch.bool, device=latents.device),
    )


@cache
def _shares(device: torch.device) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """The data's share of the variance at each trained step and at the one before it (1 before the first), float64."""
    bars = alpha_bars()
    return (
        torch.tensor(bars, dtype=torch.float64, device=device),
        torch.tensor([1.0, *bars[:-1]], dtype=torch.float64, device=device),
    )


def noise_prediction_loss(
    prediction: Float[Tensor, "b c2 f h w"], sample: DenoisingSample
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean squared error of the predicted noise, and the variational bound that the variance alone answers for.

    Their sum is what is minimised: the bound of one step of 1000 counts once, which is a weight of 0.001 for that of
    all steps.

    Args:
        prediction: Noise, and as many channels that say where between its bounds the log-variance lies.

    Source: Nichol and Dhariwal, arXiv 2102.09672, section 3.1 and equation 16, with the mean held fixed in the bound.
    """
    noise, place = prediction.float().chunk(2, dim=1)
    error = _mean_over_noisy((noise - sample.target.float()).square(), sample.is_noisy)
    return error, variance_bound(noise.detach(), place, sample)


def variance_bound(
    noise: Float[Tensor, "b c f h w"], place: Float[Tensor, "b c f h w"], sample: DenoisingSample
) -> Float[Tensor, ""]:
    """Term of the variational bound at the drawn step, in bits an element.

    Divergence of the network's step back from the true one given the data; at step 0 instead the negative log
    probability of the data in cells as wide as a grey level of [-1, 1]. Latents do not end at -1 and 1, so no cell
    is open to one side as those of pixels are.

    Args:
        place: -1 for the least log-variance (that of the true step), 1 for the greatest (log beta).

    Source: Ho et al., arXiv 2006.11239, equations 5 to 8 and 13; Nichol and Dhariwal, arXiv 2102.09672, equation 15.
    """
    step = (sample.t[:, 0] * NUM_TRAINED_TIMES).round().long()
    now, before = (shares[step][:, None, None, None, None] for shares in _shares(step.device))
    beta = 1.0 - now / before
    # at step 0 the true variance is 0: that of step 1 stands in for it
    first = _shares(step.device)[1][1], _shares(step.device)[0][1]
    of_step_1 = (1.0 - first[1] / first[0]) * (1.0 - first[0]) / (1.0 - first[1])
    variance = torch.where(before < 1.0, beta * (1.0 - before) / (1.0 - now), of_step_1)
    least, greatest = variance.log().float(), beta.log().float()
    share = (place.float() + 1.0) / 2.0
    log_variance = share * greatest + (1.0 - share) * least

    # float64: close to the data both means nearly agree, and their difference is what counts
    of_data = beta * before.sqrt() / (1.0 - now)
    noisy, data = sample.noisy.double(), sample.data.double()
    estimate = (noisy - (1.0 - now).sqrt() * noise.double()) / now.sqrt()
    difference = (of_data * (data - estimate)).float()
    divergence = 0.5 * (
        log_variance - least - 1.0 + (least - log_variance).exp() + difference.square() * (-log_variance).exp()
    )
    # the mean of step 0 is the estimate itself
    of_cells = _cell_nats((data - estimate).float(), log_variance)
    nats = torch.where(step[:, None, None, None, None] > 0, divergence, of_cells)
    return nats.mean() / math.log(2.0)


def _cell_nats(difference: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log probability that a normal distribution gives to the cell of 2/255 around a value."""
    precision = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((difference + 1.0 / 255.0) * precision)
    lower = torch.special.ndtr((difference - 1.0 / 255.0) * precision)
    nats: Tensor = -(upper - lower).clamp_min(1e-12).log()
    return nats


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


def discriminator_loss(of_real: Float[Tensor, "*n"], of_coded: Float[Tensor, "*m"]) -> Float[Tensor, ""]:
    """What a discriminator minimises: scores of real videos above 1, of reconstructions below -1.

    Source: Lim and Ye, arXiv 1705.02894 (hinge loss).
    """
    return 0.5 * (F.relu(1.0 - of_real.float()).mean() + F.relu(1.0 + of_coded.float()).mean())


def adversarial_loss(of_coded: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """What the autoencoder minimises against a discriminator: minus the score of its reconstructions."""
    return -of_coded.float().mean()
