"""How a clip is cut into windows that are sampled one after the other, each going on from the one before. Torch-free.

The autoencoder codes whole chunks of 8 frames, and within a chunk every latent frame depends on all 8. So what is
known always ends with a chunk: a prefix of another length is filled up at its front with copies of its first frame,
which is what the autoencoder takes the past of a video to be. Filled up at its end it would tell the network of
frames that nobody gave. What was filled in is not shown.
"""

from dataclasses import dataclass

from medsora.geometry import CHUNK_FRAMES

__all__ = ["ClipPlan", "Window", "context_frames", "plan_clip"]


@dataclass(frozen=True)
class Window:
    """Frames ``begin`` to ``end`` (exclusive) of a clip, of which the first ``known`` are there already."""

    begin: int
    known: int
    end: int


@dataclass(frozen=True)
class ClipPlan:
    """What is sampled for a clip. Frames are counted with the fill, from its first one on."""

    fill: int
    """Copies of the first given frame before it."""
    shown: int
    """Frames of the clip, which begin after the fill."""
    known: int
    """Given frames, with the fill."""
    windows: tuple[Window, ...]

    @property
    def total(self) -> int:
        """Frames that are coded, with the fill and what is left over at the end."""
        return self.windows[-1].end


def context_frames(window: int) -> int:
    """Frames that a window goes on from: half of it, in whole chunks."""
    return max(CHUNK_FRAMES, window // 2 // CHUNK_FRAMES * CHUNK_FRAMES)


def plan_clip(num_frames: int, *, prefix_frames: int = 0, window: int) -> ClipPlan:
    """Cut a clip into windows of equal length: the last one begins sooner rather than being shorter.

    Args:
        num_frames: More than ``prefix_frames``.
        prefix_frames: Frames that are given.
        window: Most frames of a window, a multiple of 8; at least 16 where there is more than one.

    >>> [(w.begin, w.known, w.end) for w in plan_clip(32, window=16).windows]
    [(0, 0, 16), (8, 8, 24), (16, 8, 32)]
    >>> plan_clip(16, prefix_frames=1, window=16).fill
    7
    """
    fill = -prefix_frames % CHUNK_FRAMES
    known = fill + prefix_frames
    total = -(-(fill + num_frames) // CHUNK_FRAMES) * CHUNK_FRAMES
    size = min(window, total)
    windows, done = [], known
    while done < total:
        begin = max(0, min(done - context_frames(window), total - size))
        windows.append(Window(begin, done - begin, begin + size))
        done = begin + size
    return ClipPlan(fill, num_frames, known, tuple(windows))
