"""Features of motion in a prepared cache: measured once, for every denoiser that is aligned with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from training.config import DataConfig, config_hash
from training.data.clips import ClipSet
from training.data.prepared import windows_of_clip
from training.flow_targets import FlowTargets, MeasurePairs, measure_windows, standardise
from training.prepare.arrays import add_arrays
from training.prepare.cache import ArrayRecord, Cache, CachedClip, open_cache

__all__ = ["cached_flow", "flow_key", "store_flow"]

NAME = "flow"
PLAIN, MIRRORED, PAIRS = "plain", "mirrored", "pairs"
Progress = Callable[[int, int, str], None]


def flow_key(network_sha256: str, grid: tuple[int, int], data: DataConfig) -> str:
    """Stands for a flow network, the grid its features are averaged to, and how windows are cut."""
    return config_hash({
        "network": network_sha256,
        "grid": list(grid),
        "num_frames": data.num_frames,
        "target_fps": data.target_fps,
        "step": data.window_step,
        "has_flips": data.has_flips,
    })  # fmt: skip


def store_flow(
    path: Path,
    measure: MeasurePairs,
    *,
    network_sha256: str,
    grid: tuple[int, int],
    data: DataConfig,
    device: torch.device,
    batch_size: int,
    progress: Progress = lambda done, total, name: None,
) -> ArrayRecord:
    """Measure the pairs of neighbouring frames of all training windows; does nothing when they are there.

    Args:
        path: Folder of the cache.
        measure: As :func:`training.alignment.motion_features` makes it.
        batch_size: Pairs at once.
    """
    dataset = open_cache(path).index.dataset

    def features(clip: CachedClip, frames: np.ndarray) -> dict[str, np.ndarray]:
        windows = windows_of_clip(clip, frames, dataset, data, device) if clip.split == "train" else None
        if windows is None:
            return {}
        made = measure_windows(windows, measure, has_flips=data.has_flips, is_standardised=False, batch_size=batch_size)
        count, values = len(windows), made.features.cpu().numpy()
        pairs = made.pairs[:count].cpu().numpy()
        halves = np.split(values, 2) if data.has_flips else [values]
        return {PAIRS: pairs, PLAIN: halves[0]} | ({MIRRORED: halves[1]} if data.has_flips else {})

    return add_arrays(
        path,
        NAME,
        features,
        key=flow_key(network_sha256, grid, data),
        about={"network_sha256": network_sha256, "grid": list(grid)},
        progress=progress,
    )


def cached_flow(
    cache: Cache, clips: ClipSet, *, network_sha256: str, grid: tuple[int, int], data: DataConfig, batch_size: int
) -> FlowTargets | None:
    """Targets of the training windows, standardised, if the cache has them.

    Args:
        clips: The training split of this cache.

    Raises:
        DataError: The cache has them, and they are damaged.
    """
    record = cache.find_arrays(NAME, flow_key(network_sha256, grid, data))
    if record is None:
        return None
    arrays = cache.read_arrays(record)
    counts = torch.bincount(clips.clips, minlength=len(clips.records)).tolist()
    parts: dict[str, list[torch.Tensor]] = {PAIRS: [], PLAIN: [], MIRRORED: []}
    offset = 0
    for clip, count in zip(clips.records, counts, strict=True):
        if not count:
            continue
        found = arrays.get(clip.file, {})
        if PAIRS not in found or len(found[PAIRS]) != count:
            return None  # of windows that were cut otherwise
        parts[PAIRS].append(torch.from_numpy(found[PAIRS]) + offset)
        for name in (PLAIN, MIRRORED) if data.has_flips else (PLAIN,):
            parts[name].append(torch.from_numpy(found[name]))
        offset += len(found[PLAIN])
    device = clips.frames.device
    features = torch.cat([*parts[PLAIN], *parts[MIRRORED]]).to(device)
    standardise(features, batch_size)
    pairs = torch.cat(parts[PAIRS]).to(device)
    return FlowTargets(features=features, pairs=torch.cat([pairs, pairs + offset]) if data.has_flips else pairs)
