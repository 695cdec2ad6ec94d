"""Which frames make a training window: stride from the frame rate, never across a cut. Torch-free."""

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["stride_for", "window_starts"]


def stride_for(fps: float, target_fps: float) -> int:
    """Step in frames that brings a clip nearest to the target rate: ``max(1, round(fps / target_fps))``.

    >>> stride_for(25.0, 8.0), stride_for(39.0, 8.0), stride_for(6.0, 8.0)
    (3, 5, 1)
    """
    return max(1, round(fps / target_fps))


def window_starts(
    num_clip_frames: int, *, cuts: Sequence[int], num_frames: int, stride: int, step: int = 1
) -> list[int]:
    """First frames of all windows of a clip that lie in one scene.

    Args:
        cuts: Frame indices at which a new scene begins.
        num_frames: Frames of a window, taken every ``stride`` frames of the clip.
        step: Distance between starts, counted from the first frame of each scene. 1 gives every window.

    Returns:
        Rising starts; empty when no scene is long enough.

    >>> window_starts(10, cuts=[6], num_frames=3, stride=2)
    [0, 1]
    """
    span = (num_frames - 1) * stride + 1
    edges = [0, *cuts, num_clip_frames]
    return [start for begin, end in pairwise(edges) for start in range(begin, end - span + 1, step)]
