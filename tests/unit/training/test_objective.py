"""Losses against their formulas written out plainly."""

import math

import pytest
import torch
from torch import Tensor

from medsora.diffusion.ddpm import alpha_bars
from training.objective import (
    DenoisingSample,
    adversarial_loss,
    discriminator_loss,
    draw_clean_prefixes,
    draw_flow_sample,
    draw_noise_sample,
    drop_conditions,
    flow_matching_loss,
    focal_frequency_loss,
    kl_divergence,
    logit_normal_times,
    noise_prediction_loss,
    perceptual_distance,
    sample_posterior,
    variance_bound,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flow_sample_lies_on_the_path_to_the_noise_it_asks_for() -> None:
    latents, condition = torch.randn(6, 3, 2, 4, 4), torch.zeros(6, 2, dtype=torch.int64)
    sample = draw_flow_sample(
        latents, condition, null_condition=(4, 2), time_mean=0.0, time_std=1.0, label_dropout=0.0, generator=generator()
    )
    t = sample.t[:, None, :, None, None]
    noise = sample.target + latents
    torch.testing.assert_close(sample.noisy, (1 - t) * latents + t * noise)
    assert abs(float(noise.mean())) < 0.15
    assert 0.9 < float(noise.std()) < 1.1
    assert flow_matching_loss(sample.target, sample.target) == 0
    assert flow_matching_loss(sample.target + 2, sample.target).item() == 4


def test_times_are_one_a_clip_with_the_asked_distribution() -> None:
    t = logit_normal_times(20_000, 4, mean=0.5, std=0.8, generator=generator())
    assert t.shape == (20_000, 4)
    assert torch.equal(t, t[:, :1].expand(-1, 4))
    logits = torch.logit(t[:, 0].double())
    assert abs(float(logits.mean()) - 0.5) < 0.02
    assert abs(float(logits.std()) - 0.8) < 0.02


def test_clean_prefixes_are_as_frequent_as_asked_and_of_every_length() -> None:
    known = draw_clean_prefixes(20_000, 4, probability=0.3, generator=generator())
    length = known.sum(dim=1)
    assert torch.equal(known, torch.arange(4) < length[:, None])  # the first frames, without a gap
    shares = [float((length == n).float().mean()) for n in range(5)]
    assert shares == pytest.approx([0.7, 0.1, 0.1, 0.1, 0.0], abs=0.01)
    assert not draw_clean_prefixes(1000, 1, probability=0.9, generator=generator()).any()


@pytest.mark.parametrize("num_frames", [2, 3, 4, 5, 8, 9, 17])
def test_the_largest_number_that_is_drawn_still_leaves_a_frame(
    num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = torch.tensor([0.0, 1 - 2**-24])[:, None]  # of the decision, and of the length
    monkeypatch.setattr(torch, "rand", lambda *size, **options: largest)
    known = draw_clean_prefixes(1, num_frames, probability=0.5, generator=generator())
    assert known.sum() == num_frames - 1


def test_frames_of_a_prefix_are_the_data_at_time_0_and_do_not_count() -> None:
    latents, condition = torch.randn(64, 3, 4, 4, 4), torch.zeros(64, 2, dtype=torch.int64)
    options = {"null_condition": (4, 2), "time_mean": 0.0, "time_std": 1.0, "label_dropout": 0.5}
    sample = draw_flow_sample(latents, condition, **options, clean_prefixes=0.5, generator=generator())
    known = ~sample.is_noisy
    assert 10 < int(known.any(dim=1).sum()) < 54
    assert torch.equal(sample.t == 0, known)
    assert torch.equal(sample.noisy.transpose(1, 2)[known], latents.transpose(1, 2)[known])
    wrong = sample.target + 100 * known[:, None, :, None, None]
    assert flow_matching_loss(wrong, sample.target, sample.is_noisy) == 0
    # a clip counts as much with one noisy frame as with four
    error = torch.arange(4.0)[None, None, :, None, None].expand_as(latents).sqrt()
    means = [float(torch.arange(4.0)[row].mean()) for row in sample.is_noisy]
    loss = flow_matching_loss(sample.target + error, sample.target, sample.is_noisy)
    assert float(loss) == pytest.approx(sum(means) / 64, rel=1e-5)
    # prefixes come after all other draws: those without are the same
    without = draw_flow_sample(latents, condition, **options, generator=generator())
    assert torch.equal(without.target, sample.target)
    assert torch.equal(without.condition, sample.condition)
    assert torch.equal(without.t[sample.is_noisy], sample.t[sample.is_noisy])


def noise_sample(step: int, latents: Tensor, noise: Tensor) -> DenoisingSample:
    share = alpha_bars()[step]
    return DenoisingSample(
        noisy=share**0.5 * latents + (1 - share) ** 0.5 * noise,
        t=torch.full((len(latents), latents.shape[2]), step / 1000),
        condition=torch.zeros(len(latents), 0, dtype=torch.int64),
        target=noise,
        data=latents,
        is_noisy=torch.ones(len(latents), latents.shape[2], dtype=torch.bool),
    )


def test_noise_samples_are_at_uniform_trained_steps() -> None:
    latents = torch.randn(8000, 2, 1, 2, 2)
    sample = draw_noise_sample(
        latents, torch.zeros(8000, 1, dtype=torch.int64), null_condition=(3,), label_dropout=0.25, generator=generator()
    )
    steps = (sample.t[:, 0] * 1000).round().long()
    torch.testing.assert_close(steps / 1000, sample.t[:, 0], atol=1e-7, rtol=0)
    assert int(steps.min()) < 5
    assert int(steps.max()) in range(995, 1000)
    assert abs(float(steps.double().mean()) - 499.5) < 15
    share = torch.tensor(alpha_bars())[steps][:, None, None, None, None]
    torch.testing.assert_close(sample.noisy, (share.sqrt() * latents + (1 - share).sqrt() * sample.target).float())
    assert abs(float((sample.condition == 3).float().mean()) - 0.25) < 0.02


@pytest.mark.parametrize("step", [1, 2, 40, 999])
def test_variance_bound_is_the_divergence_of_two_normal_distributions(step: int) -> None:
    """Posterior and model written out with the paper's betas, against torch's own divergence."""
    latents, noise = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    predicted, place = noise + 0.3 * torch.randn_like(noise), torch.rand_like(noise) * 2 - 1
    sample, bars = noise_sample(step, latents, noise), alpha_bars()
    alpha = bars[step] / bars[step - 1]
    beta, posterior = 1 - alpha, (1 - alpha) * (1 - bars[step - 1]) / (1 - bars[step])

    def mean(data: Tensor) -> Tensor:  # DDPM, equation 7
        return (bars[step - 1] ** 0.5 * beta * data + alpha**0.5 * (1 - bars[step - 1]) * sample.noisy.double()) / (
            1 - bars[step]
        )

    estimate = (sample.noisy.double() - (1 - bars[step]) ** 0.5 * predicted.double()) / bars[step] ** 0.5
    share = (place.double() + 1) / 2
    deviation = torch.exp(0.5 * (share * math.log(beta) + (1 - share) * math.log(posterior)))
    true = torch.distributions.Normal(mean(latents.double()), posterior**0.5)
    expected = torch.distributions.kl_divergence(true, torch.distributions.Normal(mean(estimate), deviation)).mean()
    found = variance_bound(predicted, place, sample)
    torch.testing.assert_close(found.double(), expected / math.log(2), rtol=1e-3, atol=1e-6)
    # the true noise with the true variance leaves nothing to say
    assert abs(float(variance_bound(noise, torch.full_like(noise, -1.0), sample))) < 1e-4


def test_variance_bound_at_the_data_is_a_probability_of_cells() -> None:
    latents, noise = torch.randn(1, 1, 1, 2, 2) * 3, torch.randn(1, 1, 1, 2, 2)
    sample = noise_sample(0, latents, noise)
    # of the true noise the mean is the data, so the cell is the middle one: its mass by the error function
    bars = alpha_bars()
    beta = 1 - bars[1] / bars[0]
    for place, variance in ((-1.0, beta * (1 - bars[0]) / (1 - bars[1])), (1.0, 1 - bars[0])):
        mass = math.erf(1 / 255 / math.sqrt(2 * variance))
        bits = variance_bound(noise, torch.full_like(noise, place), sample)
        assert float(bits) == pytest.approx(-math.log2(mass), abs=1e-3)
    assert variance_bound(noise + 50, torch.zeros_like(noise), sample).isfinite()


def test_the_bound_moves_the_variance_and_not_the_noise() -> None:
    latents, noise = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    prediction = torch.randn(2, 6, 2, 2, 2, requires_grad=True)
    error, bound = noise_prediction_loss(prediction, noise_sample(30, latents, noise))
    bound.backward()
    assert torch.equal(prediction.grad[:, :3], torch.zeros(2, 3, 2, 2, 2))
    assert (prediction.grad[:, 3:] != 0).all()
    prediction.grad = None
    error.backward()
    assert torch.equal(prediction.grad[:, 3:], torch.zeros(2, 3, 2, 2, 2))
    torch.testing.assert_close(prediction.grad[:, :3], 2 * (prediction.detach()[:, :3] - noise) / noise.numel())


def test_the_discriminator_is_content_beyond_the_margin() -> None:
    real, coded = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, coded).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert discriminator_loss(real + 1, coded - 1).item() == 0
    assert adversarial_loss(coded).item() == 1.5


def test_conditions_are_dropped_together_and_as_often_as_asked() -> None:
    condition = torch.tensor([[1, 0]]).expand(20_000, 2)
    dropped = drop_conditions(condition, null_condition=(4, 2), probability=0.1, generator=generator())
    is_null = (dropped == torch.tensor([4, 2])).all(dim=1)
    assert torch.equal(dropped[~is_null], condition[~is_null])
    assert abs(float(is_null.float().mean()) - 0.1) < 0.01


def test_focal_frequency_equals_the_plain_loop() -> None:
    x, y = torch.rand(2, 3, 2, 6, 8, dtype=torch.float64), torch.rand(2, 3, 2, 6, 8, dtype=torch.float64)
    total, count = 0.0, 0
    for image, other in zip(x.flatten(0, 2).tolist(), y.flatten(0, 2).tolist(), strict=True):
        distances = []
        for u in range(6):
            for v in range(8):
                value = 0j
                for row in range(6):
                    for column in range(8):
                        angle = -2 * math.pi * (u * row / 6 + v * column / 8)
                        value += (image[row][column] - other[row][column]) * complex(math.cos(angle), math.sin(angle))
                distances.append(abs(value) / math.sqrt(48))
        total += sum((distance / max(distances)) * distance**2 for distance in distances)
        count += len(distances)
    assert math.isclose(focal_frequency_loss(x, y).item(), total / count, rel_tol=1e-5)


def test_focal_frequency_of_equal_videos_has_a_gradient_of_zero() -> None:
    video = torch.rand(1, 3, 2, 8, 8, requires_grad=True)
    loss = focal_frequency_loss(video, video.detach())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(video.grad, torch.zeros_like(video))


def test_focal_weight_takes_no_gradient() -> None:
    target, video = torch.rand(1, 1, 1, 8, 8), torch.rand(1, 1, 1, 8, 8, requires_grad=True)
    focal_frequency_loss(video, target).backward()
    spectrum = torch.fft.fft2(video.detach() - target, norm="ortho")
    weight = spectrum.abs() / spectrum.abs().max()
    # the derivative of mean(w |F d|^2) with w fixed: 2 F* (w F d) over the number of elements
    expected = 2 * torch.fft.ifft2(weight * spectrum, norm="ortho").real / 64
    torch.testing.assert_close(video.grad, expected)


def test_kl_agrees_with_torchs_distributions() -> None:
    mean, logvar = torch.randn(50), torch.randn(50)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_posterior_draw_has_its_mean_and_deviation() -> None:
    noise = torch.randn(50_000)
    draw = sample_posterior(torch.full((50_000,), 3.0), torch.full((50_000,), math.log(0.25)), noise)
    assert abs(float(draw.mean()) - 3.0) < 0.01
    assert abs(float(draw.std()) - 0.5) < 0.01


def test_perceptual_distance_is_the_angle_not_the_length() -> None:
    a, b = torch.rand(2, 5, 3, 3), torch.rand(2, 5, 3, 3)
    assert perceptual_distance([a], [3 * a]).item() < 1e-10
    direct = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1).mean()
    torch.testing.assert_close(perceptual_distance([a, a], [b, a]), direct / 2)
