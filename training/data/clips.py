"""Decoded clips as one uint8 tensor on the training device, and windows gathered from it by index.

Eleven thousand frames of 128x128 are 0.55 GB: they fit on any GPU, so there is no loader process and no
host-to-device copy in the training loop.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medsora.errors import VideoError
from medsora.video_io import read_video
from training.data.manifest import ClipRecord, condition_indices
from training.data.windows import stride_for, window_starts
from training.errors import DataError

__all__ = ["ClipSet", "clip_set", "index_batches", "load_clips", "sampling_weights"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipSet:
    """Frames of several clips, and every window that may be cut from them."""

    records: tuple[ClipRecord, ...]
    num_frames: int
    """Frames of a window."""
    frames: Tensor
    """(all frames, height, width, 3) uint8, clip after clip."""
    starts: Tensor
    """(windows,) int64: index into ``frames`` of each window's first frame."""
    strides: Tensor
    """(windows,) int64."""
    clips: Tensor
    """(windows,) int64: index into ``records``."""
    conditions: Tensor
    """(windows, conditions) int64: class indices."""

    def __len__(self) -> int:
        return int(self.starts.shape[0])

    def describe(self, index: int) -> str:
        """Name a window: ``clip.mp4 frames 30 to 60 by 2`` (counted from 0, both ends included)."""
        clip, stride = int(self.clips[index]), int(self.strides[index])
        first = int(self.starts[index]) - sum(record.frames for record in self.records[:clip])
        last = first + stride * (self.num_frames - 1)
        return f"{self.records[clip].file} frames {first} to {last}" + (f" by {stride}" if stride > 1 else "")

    def gather(self, indices: Tensor, flips: Tensor) -> Tensor:
        """Cut windows out of the frames.

        Args:
            indices: (b,) int64, which windows.
            flips: (b,) bool, which of them are mirrored left to right. Never top to bottom: depth in an
                ultrasound image runs downwards.

        Returns:
            (b, f, h, w, 3) uint8.
        """
        offsets = torch.arange(self.num_frames, device=self.frames.device)
        windows = self.frames[self.starts[indices, None] + self.strides[indices, None] * offsets]
        return torch.where(flips[:, None, None, None, None], windows.flip(3), windows)


def index_batches(count: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """0 to ``count - 1`` in order, as int64 tensors of ``batch_size`` (the last may be shorter)."""
    for start in range(0, count, batch_size):
        yield torch.arange(start, min(start + batch_size, count), device=device)


def load_clips(
    records: Sequence[ClipRecord],
    *,
    root: Path,
    num_frames: int,
    height: int,
    width: int,
    target_fps: float,
    condition_columns: Sequence[str],
    condition_names: Sequence[Sequence[str]],
    step: int = 1,
    device: torch.device | str = "cpu",
) -> ClipSet:
    """Decode clips and list their windows.

    Args:
        root: Folder that the records' ``file`` is relative to.
        step: Distance between the starts of windows of one scene, in frames of the clip.

    Raises:
        DataError: A file is missing, not decodable, of another size or length than the table says, or no
            clip is long enough for one window.
    """
    with ThreadPoolExecutor() as pool:  # decoding runs outside of the interpreter's lock
        all_frames = list(pool.map(lambda record: _decode(record, root, height, width), records))
    return clip_set(
        records,
        np.concatenate(all_frames),
        num_frames=num_frames,
        target_fps=target_fps,
        condition_columns=condition_columns,
        condition_names=condition_names,
        step=step,
        device=device,
    )


def clip_set(
    records: Sequence[ClipRecord],
    frames: np.ndarray,
    *,
    num_frames: int,
    target_fps: float,
    condition_columns: Sequence[str],
    condition_names: Sequence[Sequence[str]],
    step: int = 1,
    device: torch.device | str = "cpu",
) -> ClipSet:
    """Put decoded clips on the device and list their windows.

    Args:
        frames: uint8 (frames, height, width, 3) of all clips, one after another.
        step: As in :func:`load_clips`.

    Raises:
        DataError: No clip is long enough for one window.
    """
    starts: list[int] = []
    strides: list[int] = []
    clips: list[int] = []
    conditions: list[tuple[int, ...]] = []
    offset = 0
    for index, record in enumerate(records):
        stride = stride_for(record.fps, target_fps)
        found = window_starts(record.frames, cuts=record.cuts, num_frames=num_frames, stride=stride, step=step)
        condition = condition_indices(record, columns=condition_columns, names=condition_names)
        starts += [offset + start for start in found]
        strides += [stride] * len(found)
        clips += [index] * len(found)
        conditions += [condition] * len(found)
        offset += record.frames
    if not starts:
        raise DataError(f"none of the {len(records)} clips has {num_frames} frames at {target_fps:g} frames/s")
    return ClipSet(
        records=tuple(records),
        num_frames=num_frames,
        frames=torch.from_numpy(frames).to(device),
        starts=torch.tensor(starts, device=device),
        strides=torch.tensor(strides, device=device),
        clips=torch.tensor(clips, device=device),
        conditions=torch.tensor(conditions, device=device).reshape(len(starts), -1),
    )


def _decode(record: ClipRecord, root: Path, height: int, width: int) -> np.ndarray:
    path = root / record.file
    try:
        frames, _ = read_video(path)
    except (VideoError, OSError) as error:
        raise DataError(f"{record.file} cannot be decoded: {error}") from error
    if frames.shape[1:] != (height, width, 3):
        raise DataError(
            f"{record.file} is {frames.shape[2]}x{frames.shape[1]} pixels, the recipe wants {width}x{height}"
        )
    if len(frames) != record.frames:
        raise DataError(f"{record.file} has {len(frames)} frames, the table says {record.frames}")
    return frames


def sampling_weights(conditions: Tensor, exponent: float) -> Tensor:
    """Weight of each window so that a condition with n windows is drawn in proportion to ``n ** exponent``.

    Args:
        conditions: (windows, conditions) class indices.
        exponent: 1 draws every window alike, 0 every condition alike.

    Returns:
        (windows,) float32 that sums to 1.
    """
    _, member, counts = torch.unique(conditions, dim=0, return_inverse=True, return_counts=True)
    weights = counts.to(torch.float64).pow(exponent - 1.0)[member]
    normed: Tensor = (weights / weights.sum()).to(torch.float32)
    return normed
