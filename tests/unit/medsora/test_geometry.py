"""The arithmetic between video and latents."""

import pytest

from medsora.geometry import is_valid_video_shape, latent_shape


@pytest.mark.parametrize(
    ("video", "latents"), [((16, 128, 128), (4, 16, 16)), ((8, 64, 96), (2, 8, 12)), ((64, 256, 256), (16, 32, 32))]
)
def test_latent_shape(video: tuple[int, int, int], latents: tuple[int, int, int]) -> None:
    assert latent_shape(*video) == latents


@pytest.mark.parametrize("video", [(12, 128, 128), (16, 100, 128), (16, 128, 4), (0, 8, 8), (-8, 8, 8)])
def test_other_shapes_are_refused_with_the_rule(video: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="frames must be a multiple of 8, height and width of 8"):
        latent_shape(*video)


def test_patches_must_fit_too() -> None:
    assert is_valid_video_shape(16, 40, 40)
    assert not is_valid_video_shape(16, 40, 40, patch_size=2)
