"""Figures of merit against other implementations, known answers and constructed cases."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from medsora.video_io import from_uint8
from training.data.clips import ClipSet
from training.metrics import (
    frechet_distance,
    gaussian_statistics,
    high_frequency_energy,
    measure_reconstruction,
    motion_statistics,
    psnr_db,
    ssim,
)


def clip_set(frames: torch.Tensor, num_frames: int) -> ClipSet:
    starts = torch.arange(len(frames) - num_frames + 1)
    return ClipSet(
        records=(),
        num_frames=num_frames,
        frames=frames,
        starts=starts,
        strides=torch.ones_like(starts),
        clips=torch.zeros_like(starts),
        conditions=torch.zeros(len(starts), 1, dtype=torch.int64),
    )


def noisy_pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (2, 4, 32, 40, 3)).astype(np.uint8)
    noisy = (clean + rng.normal(0, 12, clean.shape)).clip(0, 255).round().astype(np.uint8)
    return clean, noisy


def test_psnr_and_ssim_equal_scikit_image() -> None:
    clean, noisy = noisy_pair()
    ours = [from_uint8(torch.from_numpy(clip)) for clip in (noisy, clean)]
    for index, value in enumerate(psnr_db(*ours).tolist()):
        assert math.isclose(value, peak_signal_noise_ratio(clean[index], noisy[index], data_range=255), rel_tol=1e-6)
    for index, value in enumerate(ssim(*ours).tolist()):
        theirs = [
            structural_similarity(
                clean[index, frame].astype(np.float64), noisy[index, frame].astype(np.float64), data_range=255,
                channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            )
            for frame in range(4)
        ]  # fmt: skip
        assert math.isclose(value, float(np.mean(theirs)), rel_tol=1e-4)


def test_high_frequency_energy_counts_only_fine_detail() -> None:
    columns = torch.arange(32.0)
    fine = torch.cos(2 * math.pi * columns * 12 / 32).expand(1, 1, 1, 32, 32)
    coarse = torch.cos(2 * math.pi * columns * 3 / 32).expand(1, 1, 1, 32, 32)
    total = fine.square().sum().item()  # Parseval
    assert math.isclose(high_frequency_energy(fine).item(), total, rel_tol=1e-4)
    assert high_frequency_energy(coarse).item() < 1e-4 * total
    assert math.isclose(high_frequency_energy(fine + coarse + 1).item(), total, rel_tol=1e-4)
    noise = torch.randn(1, 3, 2, 31, 33)  # odd sizes: the half spectrum holds everything but column 0 twice
    full = torch.fft.fft2(noise, norm="ortho").abs().square()
    radius = torch.hypot(torch.fft.fftfreq(31)[:, None], torch.fft.fftfreq(33)[None])
    torch.testing.assert_close(high_frequency_energy(noise)[0], full[..., radius > 0.25].sum())


def test_reconstruction_of_the_identity_and_of_a_blur() -> None:
    clips = clip_set(torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8), 8)
    same = measure_reconstruction(lambda video: video, clips, batch_size=4)
    assert same.psnr_db > 100
    assert same.ssim > 0.9999
    assert abs(same.high_frequency_ratio - 1) < 1e-6
    assert same.num_windows == 13
    flat = measure_reconstruction(torch.zeros_like, clips, batch_size=5)
    assert flat.high_frequency_ratio < 1e-6
    assert flat.psnr_db < 15
    assert flat.psnr_db_worst <= flat.psnr_db


def test_flicker_tells_new_noise_from_steady_motion() -> None:
    noise = torch.randint(0, 256, (1, 32, 16, 16, 3), dtype=torch.uint8)
    ramp = (torch.arange(32) * 5).to(torch.uint8)[None, :, None, None, None].expand(1, -1, 16, 16, 3)
    still = torch.full((1, 8, 16, 16, 3), 90, dtype=torch.uint8)
    assert 1.55 < motion_statistics(noise)["flicker"].item() < 1.8
    assert motion_statistics(ramp)["motion"].item() == 5
    assert motion_statistics(ramp)["flicker"].item() < 1e-6
    assert motion_statistics(still)["motion"].item() == 0
    assert motion_statistics(still)["flicker"].item() == 0


def test_frechet_distance_of_known_gaussians() -> None:
    # commuting covariances: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    a, b = torch.tensor([4.0, 1.0, 9.0, 0.0, 2.0]).double(), torch.tensor([1.0, 1.0, 4.0, 3.0, 0.0]).double()
    first = (torch.zeros(5, dtype=torch.float64), basis @ a.diag() @ basis.T)
    second = (torch.ones(5, dtype=torch.float64), basis @ b.diag() @ basis.T)
    expected = 5 + float((a.sqrt() - b.sqrt()).square().sum())
    assert math.isclose(frechet_distance(first, second), expected, rel_tol=1e-6)
    assert math.isclose(frechet_distance(second, first), expected, rel_tol=1e-6)


def test_frechet_distance_of_equal_sets_is_zero_also_with_few_samples() -> None:
    features = torch.rand(10, 40) * 50  # covariance of rank 9 in 40 dimensions
    assert frechet_distance(gaussian_statistics(features), gaussian_statistics(features.flip(0))) < 1e-3
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_statistics(features[:1])


def test_gaussian_statistics_equal_numpy() -> None:
    features = torch.randn(100, 7)
    mean, covariance = gaussian_statistics(features)
    np.testing.assert_allclose(mean.numpy(), features.double().numpy().mean(0))
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.double().numpy().T))
