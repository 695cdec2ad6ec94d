"""From frames to the stored files of a clip: encoded, marked, signed, read back, hashed, brought to the disk.

Knows no model and no job table, and loads neither torch nor Celery: encoder processes run it, too (``encoders.py``).
"""

import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsora.video_io import write_ffv1, write_mp4
from server.datasets.repository import ClipOrder
from server.jobs.repository import Claim
from server.storage import ArtifactInfo, Variant
from server.worker.publishing import MADE_OF_FRAMES, Stores, write_checked, write_origin
from server.worker.stills import write_spritesheet, write_thumbnail

__all__ = ["EncodingOrder", "StoredClip", "encode_and_store", "warm_up_encoder"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class EncodingOrder:
    """What is to become of the frames of a clip."""

    claim: Claim
    metadata: Mapping[str, str]
    """Of :func:`medsora.provenance.clip_metadata`."""
    checkpoint: Path
    """Folder of the checkpoint that made it."""
    dataset: ClipOrder | None
    """What its dataset asks for, if it is of one."""


@dataclass(frozen=True, kw_only=True)
class StoredClip:
    """The files of a clip, and the seconds that they took."""

    files: dict[Variant, ArtifactInfo]
    encode_s: float
    store_s: float


def encode_and_store(stores: Stores, order: EncodingOrder, frames: Frames) -> StoredClip:
    """Write all files of a clip; its dataset's, too, if it is of one.

    Args:
        frames: uint8 RGB ``(frames, height, width, 3)``.

    Raises:
        ClipDroppedError: A filter of the dataset does not let the clip pass.
        StorageFullError: No room.
        StorageUnavailableError: The bucket cannot be reached.
        SQLAlchemyError: What its dataset has cannot be read or written.
        MedsoraError: It cannot be encoded, or a file is not what it should be. In each case no file is left.
    """
    claim, metadata = order.claim, order.metadata
    began = time.monotonic()
    encode_s = 0.0

    def write(variant: Variant, path: Path) -> None:
        nonlocal encode_s
        write_began = time.monotonic()
        if variant is Variant.VIDEO:
            write_mp4(path, frames, fps=claim.job.fps, metadata=metadata)
        elif variant is Variant.LOSSLESS:
            write_ffv1(path, frames, fps=claim.job.fps, metadata=metadata)
        elif variant is Variant.THUMBNAIL:
            write_thumbnail(path, frames, metadata=metadata)
        else:
            write_spritesheet(path, frames, metadata=metadata)
        encode_s += time.monotonic() - write_began

    try:
        variants = list(MADE_OF_FRAMES)
        if order.dataset is not None:
            stores.dataset_clips.keep(order.dataset, claim, frames, metadata, checkpoint=order.checkpoint)
        elif stores.settings.keep_lossless:  # datasets have formats of their own, exact ones too
            variants.append(Variant.LOSSLESS)
        stored = write_checked(stores, claim, {variant: partial(write, variant) for variant in variants})
        write_origin(stores, claim, metadata, stored)
    except Exception:
        with suppress(OSError):  # the reaper removes what stays
            stores.store.remove_attempt(claim.job.id, claim.token)
        raise
    return StoredClip(files=stored, encode_s=encode_s, store_s=time.monotonic() - began - encode_s)


def warm_up_encoder() -> None:
    """Load the encoder: it takes 0.1 s."""
    black = np.zeros((16, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="medsora-warm-up-") as folder:
        write_mp4(Path(folder) / "clip.mp4", black, fps=8.0)
