"""The arithmetic between video and latents; nothing else may spell out these factors. Torch-free."""

__all__ = [
    "CHUNK_FRAMES",
    "SPATIAL_STRIDE",
    "TEMPORAL_STRIDE",
    "is_valid_video_shape",
    "latent_shape",
]

SPATIAL_STRIDE = 8
TEMPORAL_STRIDE = 4
CHUNK_FRAMES = 8
"""Video frames of a chunk: two latent frames, which frequency compensation of type A stacks."""


def is_valid_video_shape(num_frames: int, height: int, width: int, *, patch_size: int = 1) -> bool:
    """Whether a video of this shape can be coded, and its latents cut into patches.

    >>> is_valid_video_shape(16, 128, 128), is_valid_video_shape(12, 128, 128)
    (True, False)
    """
    step = SPATIAL_STRIDE * patch_size
    return num_frames > 0 < height and width > 0 and num_frames % CHUNK_FRAMES == height % step == width % step == 0


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(frames, height, width) of the latents of a video.

    >>> latent_shape(16, 128, 128)
    (4, 16, 16)

    Raises:
        ValueError: Frames are no multiple of 8, or height or width none of 8.
    """
    if not is_valid_video_shape(num_frames, height, width):
        raise ValueError(
            f"frames must be a multiple of {CHUNK_FRAMES}, height and width of {SPATIAL_STRIDE}; "
            f"got {num_frames}, {height}, {width}"
        )
    return num_frames // TEMPORAL_STRIDE, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
