"""Clips of datasets: filtered by what their frames show, and written as the dataset's format asks.

Called before a video is published. A clip that is dropped fails its job, with the reason; the dataset then makes
another with a further seed.
"""

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsora.clip_files import CLIP_FORMATS, ClipPart, frames_sha256, mean_motion, write_clip
from medsora.fingerprints import FingerprintSet, TrainingFingerprints, fingerprint
from server.datasets.files import DatasetFiles
from server.datasets.model import FORMATS
from server.datasets.repository import ClipOrder, DatasetRepository, FingerprintRow
from server.jobs.repository import Claim
from server.worker.marks import check_mark
from server.worker.signing import check_signature, sign_file

if TYPE_CHECKING:
    from c2pa import Signer

__all__ = ["ClipDroppedError", "DatasetClips"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

_PORTION = 1000
_KEPT_DATASETS = 4
"""Datasets whose fingerprints are kept in memory: a megabyte for 1,000 clips, so 110 MiB of a dataset of the largest
size."""


class ClipDroppedError(Exception):
    """A filter of the dataset does not let the clip pass."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ClipDroppedError"], tuple[str, str]]:  # encoder processes send it
        return type(self), (self.code, str(self))


class _Others:
    """The fingerprints of a dataset that were seen so far."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.marks = FingerprintSet()
        self.seen = 0
        """The place up to which they are here."""

    def add(self, rows: list[FingerprintRow]) -> None:
        self.marks.put([row.number for row in rows], [row.fingerprint for row in rows])
        self.seen = rows[-1].seq


class DatasetClips:
    """What a worker does for the datasets that its jobs are of. Safe to use from several threads.

    Args:
        signer: Of C2PA manifests, for the formats that have a place for them; None: there are none.
    """

    def __init__(self, datasets: DatasetRepository, files: DatasetFiles, *, signer: "Signer | None" = None) -> None:
        self._datasets, self._files, self._signer = datasets, files, signer
        self._lock = threading.Lock()
        self._training: dict[Path, TrainingFingerprints] = {}
        self._others: OrderedDict[int, _Others] = OrderedDict()

    def keep(
        self, order: ClipOrder, claim: Claim, frames: Frames, metadata: Mapping[str, str], *, checkpoint: Path
    ) -> None:
        """Filter a clip of a dataset and write its file.

        Args:
            order: Of the claimed job; see :meth:`DatasetRepository.orders_of`.
            frames: uint8 RGB ``(frames, height, width, 3)``.
            metadata: Of :func:`medsora.provenance.clip_metadata`.
            checkpoint: Folder of the checkpoint that made it.

        Raises:
            ClipDroppedError: A filter does not let it pass; says which and why.
            MedsoraError: It cannot be written in this format, or signed, or does not say that it is synthetic.
            OSError: The file cannot be written.
        """
        job = claim.job
        measures = self._measure(order, frames, checkpoint)
        mark = fingerprint(frames)
        least = order.filters["min_distance"]

        def compare(distance: float) -> None:
            if distance == float("inf"):
                return  # it is the first
            measures["distance"] = min(distance, measures.get("distance", distance))
            if distance < least:
                message = f"It is {distance:.3g} grey levels from another clip of the dataset; at least {least:g}"
                raise ClipDroppedError("dropped_duplicate", f"{message} are asked for.")

        def compare_late(rows: list[FingerprintRow]) -> None:
            late = FingerprintSet()
            late.put([row.number for row in rows], [row.fingerprint for row in rows])
            compare(late.nearest(mark, without=order.number))

        seen = 0 if least is None else self._look_at_others(order, mark, compare)

        def write(path: Path) -> list[ClipPart]:
            return self._write(order, claim, path, frames, metadata)

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
            self._datasets.add_payload(order, values, compare=None if least is None else compare_late, after=seen)
        except BaseException:
            self._files.remove(order.dataset_id, job.id, claim.token)
            raise

    def _write(
        self, order: ClipOrder, claim: Claim, path: Path, frames: Frames, metadata: Mapping[str, str]
    ) -> list[ClipPart]:
        """Write, sign and read back."""
        clip_format, fps, modality = FORMATS[order.format], claim.job.fps, order.modality
        ending = CLIP_FORMATS[clip_format]
        parts = write_clip(path, frames, clip_format=clip_format, fps=fps, metadata=metadata, modality=modality)
        # by whose name readers know what it is
        with tempfile.TemporaryDirectory(prefix="medsora-clip-") as folder:
            named = Path(folder) / f"clip{ending or '.png'}"
            named.symlink_to(path.absolute())
            check_mark(named)
            if self._signer is not None and clip_format == "mp4":
                sign_file(named, self._signer, title=f"Synthetic video {claim.job.id}")
                check_signature(named)
                signed = path.read_bytes()
                parts = [ClipPart.of(ending, signed, unsigned_sha256=parts[0].sha256)]
        return parts

    def _measure(self, order: ClipOrder, frames: Frames, checkpoint: Path) -> dict[str, float]:
        """What the filters ask of a clip by itself."""
        filters = order.filters
        measures = {"motion": mean_motion(frames)}
        least = filters["min_motion"]
        if least is not None and measures["motion"] < least:
            message = (
                f"Its pixels change by {measures['motion']:.3g} grey levels from frame to frame; at least {least:g}"
            )
            raise ClipDroppedError("dropped_motion", f"{message} are asked for.")
        most = filters["max_training_resemblance"]
        if most is not None:
            measures["training_resemblance"] = resemblance = self._training_marks(checkpoint).resemblance(frames)
            if resemblance > most:
                message = f"It resembles a training clip of the model by {resemblance:.4f}; at most {most:.4f}"
                raise ClipDroppedError("dropped_memorised", f"{message} is asked for.")
        return measures

    def _look_at_others(self, order: ClipOrder, mark: bytes, compare: Callable[[float], None]) -> int:
        """Compare with all clips that are there, each of which is read once; returns the place of the last."""
        with self._lock:
            others = self._others.setdefault(order.dataset_seq, _Others())
            self._others.move_to_end(order.dataset_seq)
            while len(self._others) > _KEPT_DATASETS:
                self._others.popitem(last=False)
        with others.lock:
            while rows := self._datasets.fingerprints(order.dataset_seq, after=others.seen, limit=_PORTION):
                others.add(rows)
            compare(others.marks.nearest(mark, without=order.number))
            return others.seen

    def _training_marks(self, checkpoint: Path) -> TrainingFingerprints:
        with self._lock:
            if checkpoint not in self._training:
                from medsora.checkpoint import load_fingerprints

                self._training[checkpoint] = TrainingFingerprints(load_fingerprints(checkpoint))
            return self._training[checkpoint]
