"""Latents of a prepared cache's windows, made once for all runs on one autoencoder and kept in the cache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from medsora.models.autoencoder import VideoAutoencoder
from training.config import DataConfig, config_hash
from training.data.clips import ClipSet
from training.data.latents import LatentSet, encode_windows
from training.data.prepared import require_size, windows_of_clip
from training.prepare.arrays import add_arrays
from training.prepare.cache import ArrayRecord, Cache, CachedClip, open_cache

__all__ = ["cached_latents", "latents_key", "store_latents"]

NAME = "latents"
PLAIN, MIRRORED = "plain", "mirrored"
Progress = Callable[[int, int, str], None]


def latents_key(autoencoder_sha256: str, data: DataConfig) -> str:
    """Stands for an autoencoder and for how windows are cut."""
    return config_hash({
        "autoencoder": autoencoder_sha256,
        "num_frames": data.num_frames,
        "target_fps": data.target_fps,
        "steps": [data.window_step, data.test_window_step],
        "has_flips": data.has_flips,
    })  # fmt: skip


def store_latents(
    path: Path,
    autoencoder: VideoAutoencoder,
    *,
    autoencoder_sha256: str,
    data: DataConfig,
    device: torch.device,
    batch_size: int,
    progress: Progress = lambda done, total, name: None,
) -> ArrayRecord:
    """Encode every window of a cache; does nothing when they are there.

    Args:
        path: Folder of the cache.
        autoencoder: On ``device``, in evaluation mode, with its latent statistics set.
        data: How windows are cut; mirrored ones are made of the training split, where ``has_flips``.
    """
    cache = open_cache(path)
    require_size(cache, data)

    def encode(clip: CachedClip, frames: np.ndarray) -> dict[str, np.ndarray]:
        windows = windows_of_clip(clip, frames, cache.index.dataset, data, device)
        if windows is None:
            return {}
        has_flips = data.has_flips and clip.split == "train"
        made = encode_windows(autoencoder, windows, has_flips=has_flips, batch_size=batch_size).latents.cpu().numpy()
        parts = {PLAIN: made[: len(windows)]}
        return parts | {MIRRORED: made[len(windows) :]} if has_flips else parts

    return add_arrays(
        path,
        NAME,
        encode,
        key=latents_key(autoencoder_sha256, data),
        about={"autoencoder_sha256": autoencoder_sha256},
        progress=progress,
    )


def cached_latents(
    cache: Cache, clips: ClipSet, *, autoencoder_sha256: str, data: DataConfig, has_flips: bool
) -> LatentSet | None:
    """Latents of the windows of ``clips``, mirrored ones after the others, if the cache has them.

    Args:
        clips: A split of this cache.

    Raises:
        DataError: The cache has them, and they are damaged.
    """
    record = cache.find_arrays(NAME, latents_key(autoencoder_sha256, data))
    if record is None:
        return None
    arrays = cache.read_arrays(record)
    counts = torch.bincount(clips.clips, minlength=len(clips.records)).tolist()
    found = []
    for part in (PLAIN, MIRRORED) if has_flips else (PLAIN,):
        for clip, count in zip(clips.records, counts, strict=True):
            if count:
                latents = arrays.get(clip.file, {}).get(part)
                if latents is None or len(latents) != count:
                    return None  # of windows that were cut otherwise
                found.append(torch.from_numpy(latents))
    conditions = torch.cat([clips.conditions] * (1 + has_flips))
    return LatentSet(latents=torch.cat(found).to(clips.frames.device), conditions=conditions)
