"""The autoencoder: exact wavelets, causality, chunked coding, frequency compensation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medsora.models.autoencoder import (
    CausalConv3d,
    FrequencyCompensationA,
    FrequencyCompensationB,
    StreamState,
    VideoAutoencoder,
    haar_forward,
    haar_inverse,
)
from medsora.presets import AUTOENCODERS

TINY = AUTOENCODERS["tiny"]


def model(**changes: object) -> VideoAutoencoder:
    made = VideoAutoencoder(replace(TINY, **changes)).eval()  # type: ignore[arg-type]
    made.latent_mean.uniform_(-1, 1)
    made.latent_scale.uniform_(0.5, 2)
    for module in made.modules():  # as after training: batch norm that does something
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return made


def test_haar_is_orthonormal_and_inverts() -> None:
    video = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    bands = haar_forward(video)
    assert bands.shape == (2, 24, 2, 3, 4)
    assert torch.allclose(bands.square().sum(), video.square().sum())
    assert torch.allclose(haar_inverse(bands), video)


def test_haar_puts_a_constant_into_the_lowest_band_alone() -> None:
    bands = haar_forward(torch.ones(1, 1, 2, 2, 2))
    assert torch.allclose(bands.flatten(), torch.tensor([8.0**0.5, 0, 0, 0, 0, 0, 0, 0]))


def frames_first(video: Tensor) -> Tensor:
    """b c f h w -> (b f) c h w, as activations lie inside the network."""
    return video.transpose(1, 2).flatten(0, 1)


def causal(video: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3-D convolution of b c f h w whose kernel ends at the present frame; before the first frame, that frame."""
    past = weight.shape[2] - 1
    seen = torch.cat([video[:, :, :1]] * past + [video], dim=2)
    return F.conv3d(seen, weight, bias, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))


@pytest.mark.parametrize(("frames", "size"), [(3, 3), (1, 3), (2, 1)])
@torch.no_grad()
def test_causal_convolution_equals_a_3d_convolution_over_present_and_past(frames: int, size: int) -> None:
    convolution = CausalConv3d(3, 5, frames=frames, size=size).double()
    video = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected = causal(video, convolution.weight, convolution.bias)
    assert torch.allclose(convolution(frames_first(video), 4, None), frames_first(expected))
    state = StreamState()
    parts = [convolution(frames_first(part), 2, state).unflatten(0, (2, 2)) for part in video.split(2, dim=2)]
    assert torch.allclose(torch.cat(parts, dim=1).flatten(0, 1), frames_first(expected))


@torch.no_grad()
def test_compensation_a_adds_two_rectified_convolutions_of_a_chunks_frames_stacked_as_channels() -> None:
    module = FrequencyCompensationA(3).double()
    h = torch.randn(4, 3, 5, 6, dtype=torch.float64)  # two chunks of two latent frames
    result = module(h)
    for first in (0, 2):
        stacked = torch.cat([h[first], h[first + 1]])[None]
        inner = F.conv2d(stacked, module.conv1.weight, module.conv1.bias, padding=1).clamp(min=0)
        added = F.conv2d(inner, module.conv2.weight, module.conv2.bias, padding=1).clamp(min=0)
        assert (added > 0).any()
        assert torch.allclose(result[first : first + 2] - h[first : first + 2], added.unflatten(1, (2, 3))[0])


@torch.no_grad()
def test_compensation_b_adds_a_convolution_of_what_is_normed_and_rectified() -> None:
    module = FrequencyCompensationB(3, dropout=0.5).double().eval()
    norm = module.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    for value in (norm.running_mean, norm.bias):
        value.uniform_(-1, 1)
    for value in (norm.running_var, norm.weight):
        value.uniform_(0.5, 2)
    h = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)

    def per_channel(value: Tensor) -> Tensor:
        return value[:, None, None, None]

    normed = (h - per_channel(norm.running_mean)) / per_channel(norm.running_var + norm.eps).sqrt()
    rectified = (normed * per_channel(norm.weight) + per_channel(norm.bias)).clamp(min=0)
    expected = h + causal(rectified, module.conv.weight, module.conv.bias)
    assert torch.allclose(module(frames_first(h), 4, None), frames_first(expected))


@torch.no_grad()
def test_a_still_video_has_no_fade_in() -> None:
    autoencoder = model(has_frequency_compensation=False)  # type A tells the two latent frames of a chunk apart
    latents = autoencoder.encode((torch.rand(1, 3, 1, 32, 32) * 2 - 1).expand(-1, -1, 16, -1, -1))
    assert torch.allclose(latents, latents[:, :, :1].expand_as(latents), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("bias", "expected"), [(1e4, 20.0), (-1e4, -30.0), (0.5, 0.5)])
def test_log_variance_stays_where_its_exponential_is_finite(bias: float, expected: float) -> None:
    autoencoder = model()
    head = autoencoder.encoder.head
    head.weight.zero_()
    head.bias.fill_(bias)
    mean, logvar = autoencoder.posterior(torch.rand(1, 3, 8, 32, 32))
    assert torch.equal(logvar, torch.full_like(logvar, expected))
    assert torch.equal(mean, torch.full_like(mean, bias))  # the mean is not bounded


@pytest.mark.parametrize("shape", [(8, 32, 32), (16, 40, 24), (24, 64, 64)])
def test_shapes(shape: tuple[int, int, int]) -> None:
    autoencoder, video = model(), torch.rand(2, 3, *shape) * 2 - 1
    latents = autoencoder.encode(video)
    assert latents.shape == (2, 4, shape[0] // 4, shape[1] // 8, shape[2] // 8)
    assert autoencoder.decode(latents).shape == video.shape


def test_chunked_coding_equals_whole_coding() -> None:
    autoencoder, video = model(), torch.rand(1, 3, 40, 32, 32) * 2 - 1
    latents = autoencoder.encode(video)
    for step in (8, 16, 24):
        state = StreamState()
        parts = [autoencoder.encode(video[:, :, i : i + step], state) for i in range(0, 40, step)]
        assert torch.allclose(torch.cat(parts, dim=2), latents, atol=1e-5)
    decoded = autoencoder.decode(latents)
    for step in (2, 4, 6):
        state = StreamState()
        parts = [autoencoder.decode(latents[:, :, i : i + step], state) for i in range(0, 10, step)]
        assert torch.allclose(torch.cat(parts, dim=2), decoded, atol=1e-5)


def test_chunks_need_their_state() -> None:
    autoencoder, video = model(), torch.rand(1, 3, 16, 32, 32) * 2 - 1
    parts = [autoencoder.encode(video[:, :, i : i + 8]) for i in (0, 8)]
    assert not torch.allclose(torch.cat(parts, dim=2), autoencoder.encode(video), atol=1e-3)


def test_no_frame_depends_on_a_later_chunk() -> None:
    autoencoder, video = model(), torch.rand(1, 3, 24, 32, 32) * 2 - 1
    changed = video.clone()
    changed[:, :, 16:] = 0
    latents, latents_changed = autoencoder.encode(video), autoencoder.encode(changed)
    assert torch.equal(latents[:, :, :4], latents_changed[:, :, :4])
    assert not torch.allclose(latents[:, :, 4:], latents_changed[:, :, 4:])
    assert torch.equal(autoencoder.decode(latents)[:, :, :16], autoencoder.decode(latents_changed)[:, :, :16])


def test_latents_are_normalised_by_the_stored_statistics() -> None:
    autoencoder, video = model(), torch.rand(1, 3, 8, 32, 32) * 2 - 1
    mean, logvar = autoencoder.posterior(video)
    assert mean.shape == logvar.shape
    expected = (mean - autoencoder.latent_mean[:, None, None, None]) / autoencoder.latent_scale[:, None, None, None]
    assert torch.equal(autoencoder.encode(video), expected)
    assert torch.allclose(autoencoder.decode(expected), autoencoder.decode_z(mean), atol=1e-4)


def test_frequency_compensation_is_there_and_can_be_left_out() -> None:
    with_it, without = model(), model(has_frequency_compensation=False)
    names = {name.split(".")[1] for name, _ in with_it.named_parameters() if "compensation" in name}
    assert names == {"compensation", "compensation1", "compensation2", "compensation3"}
    assert not [name for name, _ in without.named_parameters() if "compensation" in name]
    video = torch.rand(1, 3, 8, 32, 32)
    assert without.decode(without.encode(video)).shape == video.shape


def test_every_parameter_learns() -> None:
    autoencoder = model().train()
    mean, logvar = autoencoder.posterior(torch.rand(2, 3, 16, 32, 32) * 2 - 1)
    (autoencoder.decode_z(mean).square().mean() + logvar.square().mean()).backward()
    dead = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize("shape", [(12, 32, 32), (8, 30, 32), (8, 32, 4), (0, 32, 32)])
def test_shapes_that_cannot_be_coded_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="frames must be a multiple of 8"):
        model().encode(torch.zeros(1, 3, *shape))


def test_odd_numbers_of_latent_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2 frames, got 3"):
        model().decode(torch.zeros(1, 4, 3, 4, 4))
