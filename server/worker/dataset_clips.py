"""Clips of datasets: filtered by what their frames show, and written as the dataset's format asks.

Called before a video is published. A clip that is dropped fails its job, with the reason; the dataset then makes
another with a further seed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medsora.clip_files import (
    FINGERPRINT_BYTES,
    ClipPart,
    fingerprint,
    fingerprint_distances,
    frames_sha256,
    mean_motion,
    write_clip,
)
from server.datasets.files import DatasetFiles
from server.datasets.model import FORMATS
from server.datasets.repository import ClipOrder, DatasetRepository
from server.jobs.repository import Claim

__all__ = ["ClipDroppedError", "DatasetClips"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]


class ClipDroppedError(Exception):
    """A filter of the dataset does not let the clip pass."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DatasetClips:
    """What a worker does for the datasets that its jobs are of."""

    def __init__(self, datasets: DatasetRepository, files: DatasetFiles) -> None:
        self._datasets, self._files = datasets, files
        self._training: dict[Path, Frames] = {}

    def keep(self, claim: Claim, frames: Frames, metadata: Mapping[str, str], *, checkpoint: Path) -> None:
        """Filter a clip and write its file, if its job is of a dataset; else nothing.

        Args:
            frames: uint8 RGB ``(frames, height, width, 3)``.
            metadata: Of :func:`medsora.provenance.clip_metadata`.
            checkpoint: Folder of the checkpoint that made it.

        Raises:
            ClipDroppedError: A filter does not let it pass; says which and why.
            MedsoraError: It cannot be written in this format.
            OSError: The file cannot be written.
        """
        job = claim.job
        order = self._datasets.order_of(job.id)
        if order is None:
            return
        measures, mark = self._measure(order, frames, checkpoint)

        def write(path: Path) -> list[ClipPart]:
            clip_format = FORMATS[order.format]
            return write_clip(
                path, frames, clip_format=clip_format, fps=job.fps, metadata=metadata, modality=order.modality
            )

        least = order.filters["min_distance"]

        def compare(others: list[bytes]) -> None:
            distance = float(fingerprint_distances(mark, _stacked(b"".join(others))).min())
            measures["distance"] = min(distance, measures.get("distance", distance))
            if distance < least:
                message = f"It is {distance:.3g} grey levels from another clip of the dataset; at least {least:g}"
                raise ClipDroppedError("dropped_duplicate", f"{message} are asked for.")

        parts = self._files.write(order.dataset_id, job.id, claim.token, write)
        values = {
            "job_id": job.id,
            "attempt": claim.token,
            "size_bytes": sum(part.size_bytes for part in parts),
            "parts": [part.to_json() for part in parts],
            "frames_sha256": frames_sha256(frames),
            "measures": measures,
            "fingerprint": mark,
        }
        try:
            self._datasets.add_payload(order, values, compare=None if least is None else compare)
        except BaseException:
            self._files.remove(order.dataset_id, job.id, claim.token)
            raise

    def _measure(self, order: ClipOrder, frames: Frames, checkpoint: Path) -> tuple[dict[str, float], bytes]:
        """What the filters ask of a clip by itself."""
        filters = order.filters
        measures = {"motion": mean_motion(frames)}
        least = filters["min_motion"]
        if least is not None and measures["motion"] < least:
            message = (
                f"Its pixels change by {measures['motion']:.3g} grey levels from frame to frame; at least {least:g}"
            )
            raise ClipDroppedError("dropped_motion", f"{message} are asked for.")
        mark = fingerprint(frames)
        least = filters["min_training_distance"]
        if least is not None:
            distance = float(fingerprint_distances(mark, self._training_marks(checkpoint)).min())
            measures["training_distance"] = distance
            if distance < least:
                message = f"It is {distance:.3g} grey levels from a training clip of the model; at least {least:g}"
                raise ClipDroppedError("dropped_memorised", f"{message} are asked for.")
        return measures, mark

    def _training_marks(self, checkpoint: Path) -> Frames:
        if checkpoint not in self._training:
            from medsora.checkpoint import load_fingerprints

            self._training[checkpoint] = _stacked(load_fingerprints(checkpoint))
        return self._training[checkpoint]


def _stacked(marks: bytes) -> Frames:
    return np.frombuffer(marks, np.uint8).reshape(-1, FINGERPRINT_BYTES)
