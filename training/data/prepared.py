"""Clips of a prepared cache as a :class:`~training.data.clips.ClipSet`, just as from a table of clips."""

import numpy as np
import torch

from medsora.config import ModelConfig
from training.config import DataConfig
from training.data.clips import ClipSet, clip_set
from training.data.manifest import ClipRecord, select_clips
from training.data.windows import stride_for, window_starts
from training.errors import DataError
from training.prepare.cache import Cache, CachedClip

__all__ = ["load_prepared", "record_of", "require_size", "windows_of_clip"]


def record_of(clip: CachedClip, dataset: str) -> ClipRecord:
    """A cached clip as a row of a table."""
    return ClipRecord(
        file=clip.name,
        dataset=dataset,
        label=clip.conditions.get("label") or next(iter(clip.conditions.values())),
        probe=clip.conditions.get("probe", ""),
        split=clip.split,
        group=clip.group,
        frames=clip.frames,
        fps=clip.fps,
        cuts=clip.cuts,
        licence=clip.licence,
        source=clip.source,
        attribution=clip.attribution,
        labels=clip.conditions,
    )


def require_size(cache: Cache, data: DataConfig) -> None:
    """Refuse a cache whose frames are of another size than the recipe's.

    Raises:
        DataError: They are.
    """
    index = cache.index
    if (index.width, index.height) != (data.width, data.height):
        raise DataError(
            f"{cache.path} holds frames of {index.width}x{index.height} pixels, the recipe wants "
            f"{data.width}x{data.height}"
        )


def load_prepared(
    cache: Cache, data: DataConfig, model: ModelConfig, split: str, *, device: torch.device, step: int | None = None
) -> ClipSet:
    """Read one split of a cache, checking every shard by its hash.

    Args:
        step: Distance between window starts; default the recipe's for that split.

    Raises:
        DataError: The cache has another frame size or data set than the recipe, or is damaged.
    """
    index = cache.index
    require_size(cache, data)
    records = select_clips(
        [record_of(clip, index.dataset) for clip in index.clips],
        dataset=data.dataset,
        split=split,
        excluded_labels=data.excluded_labels,
    )
    names = {record.file for record in records}
    frames = np.empty((sum(record.frames for record in records), index.height, index.width, 3), dtype=np.uint8)
    offset = 0
    for _, part in cache.iterate(tuple(clip for clip in index.clips if clip.name in names)):
        frames[offset : offset + len(part)] = part
        offset += len(part)
    return clip_set(
        records,
        frames,
        num_frames=data.num_frames,
        target_fps=data.target_fps,
        condition_columns=tuple(data.condition_columns.values()),
        condition_names=tuple(model.condition_names.values()),
        step=data.step_of(split) if step is None else step,
        device=device,
    )


def windows_of_clip(
    clip: CachedClip, frames: np.ndarray, dataset: str, data: DataConfig, device: torch.device
) -> ClipSet | None:
    """All windows that training cuts from one clip, or None where it is too short. Conditions are of no meaning."""
    step = data.step_of(clip.split)
    stride = stride_for(clip.fps, data.target_fps)
    if not window_starts(clip.frames, cuts=clip.cuts, num_frames=data.num_frames, stride=stride, step=step):
        return None
    name, value = next(iter(clip.conditions.items()))
    return clip_set(
        [record_of(clip, dataset)],
        frames,
        num_frames=data.num_frames,
        target_fps=data.target_fps,
        condition_columns=(name,),
        condition_names=((value,),),
        step=step,
        device=device,
    )
