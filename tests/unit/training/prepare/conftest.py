"""Small moving pictures, and writers for the files that the published layouts are made of."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsora.video_io import write_mp4

Texture = Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def texture() -> Texture:
    """Makes clips: smooth noise that drifts sideways, (frames, height, width, 3) uint8; each seed another scene."""

    def make(seed: int, frames: int = 20, height: int = 48, width: int = 64, *, grey: bool = False) -> np.ndarray:
        rng = np.random.default_rng(seed)
        field = rng.uniform(0, 255, (height // 10 + 2, (width + frames) // 10 + 2, 3)).astype(np.uint8)
        big = np.asarray(Image.fromarray(field).resize((width + frames, height), Image.Resampling.BICUBIC))
        clip = np.stack([big[:, index : index + width] for index in range(frames)])
        return np.repeat(clip[..., :1], 3, axis=-1) if grey else clip

    return make


@pytest.fixture(scope="session")
def put_video(texture: Texture) -> Callable[..., Path]:
    """Writes an MP4 with the texture of a seed."""

    def put(path: Path, seed: int, frames: int = 20, *, fps: float = 16.0, **size: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, texture(seed, frames, **size), fps=fps, crf=10)
        return path

    return put


@pytest.fixture(scope="session")
def put_frames(texture: Texture) -> Callable[..., Path]:
    """Writes a folder of PNG files, called by a pattern such as ``{:06d}.png``."""

    def put(folder: Path, seed: int, numbers: range | list[int], pattern: str = "{:06d}.png", **size: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        clip = texture(seed, max(numbers) + 1, **size)
        for number in numbers:
            Image.fromarray(clip[number]).save(folder / pattern.format(number))
        return folder

    return put
