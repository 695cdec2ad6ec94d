"""Clips that are made piece by piece: long ones, and those that are made from a picture or an earlier clip.

Each piece is encoded as it comes, so that memory does not grow with the length of the clip.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsora.manifest import Manifest
from medsora.provenance import clip_metadata
from medsora.request import GenerationRequest
from medsora.video_io import ffv1_writer, fragmented_mp4_writer, mp4_writer
from server.checkpoints import ServedCheckpoint
from server.jobs.repository import Claim, FinishedWork, JobRecord
from server.sources.model import SourceKind
from server.storage import Variant
from server.worker.publishing import write_checked, write_origin
from server.worker.runtime import WorkerRuntime
from server.worker.sources import load_source
from server.worker.stills import sheet_layout, write_spritesheet, write_thumbnail

if TYPE_CHECKING:
    from medsora.pipeline import Preview, VideoPipeline

__all__ = ["StillFrames", "is_made_at_once", "make_in_pieces", "make_pieces"]

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


def make_in_pieces(
    runtime: WorkerRuntime,
    claim: Claim,
    checkpoint: ServedCheckpoint,
    pipeline: "VideoPipeline",
    request: GenerationRequest,
    *,
    on_step: Callable[[int, int], None],
    check: Callable[[], None],
    preview: "Preview | None" = None,
) -> FinishedWork:
    """Sample, encode and store a clip piece by piece; meanwhile it can be followed.

    Args:
        on_step: Of the sampler, with the steps of all windows.
        check: Raises where the job is not to go on.
        preview: Of the sampler.
    """
    job = claim.job
    source, frames = None, None
    if job.source_id is not None:
        source = runtime.sources.get(job.source_id)
        frames = load_source(runtime.source_store, source, job)
        check()
    metadata = clip_metadata(
        request,
        model=checkpoint.name,
        model_sha256=checkpoint.sha256,
        source=None if source is None else {"kind": job.source_kind or "", "sha256": source.sha256},
    )
    stills = StillFrames(job.num_frames)
    keeps_lossless = runtime.settings.keep_lossless
    began = time.monotonic()
    made, encode_s = began, 0.0

    def write(path: Path) -> None:
        nonlocal made, encode_s
        options: dict[str, Any] = {"size": (job.width, job.height), "fps": job.fps, "metadata": metadata}
        lossless = runtime.store.partial_path(job.id, claim.token, Variant.LOSSLESS)
        with (
            runtime.store.grow_live(job.id, claim.token) as live,
            mp4_writer(path, **options) as encode,
            fragmented_mp4_writer(live.write, **options) as encode_live,
            ffv1_writer(lossless, **options) if keeps_lossless else nullcontext(_discard) as encode_lossless,
        ):
            for piece in make_pieces(pipeline, request, job, frames, on_step=on_step, preview=preview):
                piece_began = time.monotonic()
                encode_live(piece)
                live.flush()
                encode(piece)
                encode_lossless(piece)
                stills.add(piece)
                encode_s += time.monotonic() - piece_began
        check()
        made = time.monotonic()

    files: dict[Variant, Callable[[Path], None]] = {
        Variant.VIDEO: write,
        Variant.THUMBNAIL: lambda path: write_thumbnail(path, stills.thumbnail, metadata=metadata),
        Variant.SPRITESHEET: lambda path: write_spritesheet(path, stills.sheet, metadata=metadata),
    }
    if keeps_lossless:
        files[Variant.LOSSLESS] = lambda _: None  # it came with the video
    try:
        stored = write_checked(runtime, claim, files)
        write_origin(runtime, claim, metadata, stored)
    except BaseException:
        with suppress(OSError):  # the reaper removes what stays
            runtime.store.remove_attempt(job.id, claim.token)
        raise
    return FinishedWork(
        artifact=stored[Variant.VIDEO].name,
        size_bytes=stored[Variant.VIDEO].size_bytes,
        sha256=stored[Variant.VIDEO].sha256,
        thumbnail_sha256=stored[Variant.THUMBNAIL].sha256,
        spritesheet_sha256=stored[Variant.SPRITESHEET].sha256,
        sampling_s=made - began - encode_s,
        encode_s=encode_s,
        store_s=time.monotonic() - made,
    )


def _discard(frames: Frames) -> None:
    """In place of a writer."""


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
