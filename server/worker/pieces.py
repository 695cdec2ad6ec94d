"""Clips that are made piece by piece: long ones, and those that are made from a picture or an earlier clip.

Each piece is encoded as it comes, so that memory does not grow with the length of the clip.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medsora.manifest import Manifest
from medsora.request import GenerationRequest
from server.jobs.repository import JobRecord
from server.sources.model import SourceKind
from server.worker.stills import sheet_layout

if TYPE_CHECKING:
    from medsora.pipeline import Preview, VideoPipeline

__all__ = ["StillFrames", "is_made_at_once", "make_pieces"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]


def is_made_at_once(job: JobRecord, manifest: Manifest) -> bool:
    """Whether a job is one window from noise alone: those can be sampled together with others."""
    return job.source_id is None and job.num_frames <= manifest.limits.window


def make_pieces(
    pipeline: "VideoPipeline",
    request: GenerationRequest,
    job: JobRecord,
    source: Frames | None,
    *,
    on_step: Callable[[int, int], None],
    preview: "Preview | None" = None,
) -> Iterator[Frames]:
    """The next frames of the clip of a job, again and again until it is whole.

    Args:
        request: For all of the clip.
        source: Frames that it is made from.
        on_step, preview: Of the sampler.
    """
    if job.source_kind != SourceKind.EXTENSION:
        for (piece,) in pipeline.stream(
            [request], sources=None if source is None else [source], on_step=on_step, preview=preview
        ):
            yield piece
        return
    assert source is not None  # an extension has one
    yield source
    known = job.prefix_frames
    added = replace(request, num_frames=job.num_frames - len(source) + known)
    for (piece,) in pipeline.stream([added], sources=[source[-known:]], on_step=on_step, preview=preview):
        # the last frames of the source come again, as the model sees them
        yield piece[known:]
        known = max(0, known - len(piece))


class StillFrames:
    """Collects of a clip that goes by the frames that its pictures show.

    Args:
        num_frames: Of the whole clip.
    """

    def __init__(self, num_frames: int) -> None:
        shown, _, _ = sheet_layout(num_frames)
        self._sheet, self._middle = shown, num_frames // 2
        self._wanted = {*shown, self._middle}
        self._frames: dict[int, Any] = {}
        self._seen = 0

    def add(self, piece: Frames) -> None:
        """See the next frames."""
        for number in self._wanted.intersection(range(self._seen, self._seen + len(piece))):
            self._frames[number] = piece[number - self._seen].copy()
        self._seen += len(piece)

    @property
    def thumbnail(self) -> Frames:
        """The middle frame, as a clip of one."""
        return np.stack([self._frames[self._middle]])

    @property
    def sheet(self) -> Frames:
        """The frames of the sheet."""
        return np.stack([self._frames[number] for number in self._sheet])
