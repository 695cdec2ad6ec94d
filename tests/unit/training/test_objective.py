"""Losses against their formulas written out plainly."""

import math

import torch

from training.objective import (
    draw_flow_sample,
    drop_conditions,
    flow_matching_loss,
    focal_frequency_loss,
    kl_divergence,
    logit_normal_times,
    perceptual_distance,
    sample_posterior,
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
