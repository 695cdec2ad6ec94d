"""How a file of a clip comes to be one that can be asked for: written, signed where that is wanted, and read back."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import medsora
from medsora.errors import VideoError
from medsora.video_io import probe_video
from server.jobs.repository import Claim
from server.settings import Settings
from server.storage import ArtifactInfo, ArtifactStore, StorageFullError, Variant
from server.worker.dataset_clips import DatasetClips
from server.worker.marks import check_mark
from server.worker.signing import check_signature, sign_file, signer_of
from server.worker.stills import read_size

__all__ = ["MADE_OF_FRAMES", "Stores", "write_checked", "write_origin"]

MADE_OF_FRAMES = (Variant.VIDEO, Variant.THUMBNAIL, Variant.SPRITESHEET)
_SIGNED = frozenset(MADE_OF_FRAMES)
"""There are no C2PA manifests in Matroska and JSON."""


class Stores(Protocol):
    """Where files of clips go."""

    @property
    def settings(self) -> Settings:
        """With what they are signed."""

    @property
    def store(self) -> ArtifactStore:
        """Videos, and what is made of them."""

    @property
    def dataset_clips(self) -> DatasetClips:
        """Files of clips of datasets."""


def write_checked(
    stores: Stores, claim: Claim, files: Mapping[Variant, Callable[[Path], None]]
) -> dict[Variant, ArtifactInfo]:
    """Write files of a clip, and read them back before they are published: whole, and saying that they are synthetic.

    Args:
        files: Of each variant what writes it.
    """
    job = claim.job
    signer = signer_of(stores.settings) if _SIGNED & set(files) else None

    def write_signed(variant: Variant, path: Path) -> None:
        files[variant](path)
        if signer is not None and variant in _SIGNED:
            sign_file(path, signer, title=f"Synthetic {variant.value} {job.id}")

    def check(variant: Variant, path: Path) -> None:
        info = None
        if variant in (Variant.THUMBNAIL, Variant.SPRITESHEET):
            read_size(path)
        elif variant in (Variant.VIDEO, Variant.LOSSLESS):
            info = probe_video(path)
            if (info.num_frames, info.height, info.width) != (job.num_frames, job.height, job.width):
                raise VideoError(f"the file holds {info.num_frames} frames of {info.width}x{info.height}")
        check_mark(path, info)
        if signer is not None and variant in _SIGNED:
            check_signature(path)

    try:
        return stores.store.write_all(
            job.id,
            claim.token,
            {variant: (partial(write_signed, variant), partial(check, variant)) for variant in files},
        )
    except VideoError as error:
        # Some writers notice a full disk only by a file that is cut off.
        if stores.store.free_bytes() < job.num_frames * job.height * job.width * 3:
            raise StorageFullError("no room for the video") from error
        raise


def write_origin(
    stores: Stores, claim: Claim, metadata: Mapping[str, str], stored: Mapping[Variant, ArtifactInfo]
) -> None:
    """Write beside the files what made them: what their marks say, and their hashes. No prompt: it may be private.

    Args:
        metadata: Of :func:`medsora.provenance.clip_metadata`.
        stored: The files.
    """
    origin = {
        **json.loads(metadata["comment"]),
        "note": metadata["description"],
        "not_for_diagnosis": True,
        "job_id": claim.job.id,
        "server_version": medsora.__version__,
        "has_c2pa_manifest": signer_of(stores.settings) is not None,
        "files": {
            variant.value: {"sha256": info.sha256, "size_bytes": info.size_bytes} for variant, info in stored.items()
        },
    }
    text = json.dumps(origin, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text)

    write_checked(stores, claim, {Variant.PROVENANCE: write})
