"""GET /v1/videos/{id}/stream: a video as fragmented MP4 that plays while it is still being made.

A worker that makes a video in pieces writes fragments to a file that grows; any API process follows it. When the worker
dies and another one begins anew, the stream goes on in the new file once that has the very bytes that were sent: the
same seed gives the same bytes on the same machine. Where it does not, the stream is cut off; it is never mixed.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from typing import BinaryIO

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from server.api.access import TenantDep
from server.api.dependencies import ServicesDep
from server.api.downloads import send_object
from server.api.openapi import error_responses
from server.errors import NotFoundError, NotReadyError
from server.jobs.model import TERMINAL, JobStatus
from server.jobs.repository import JobRecord
from server.jobs.service import JobService
from server.storage import ArtifactStore

__all__ = ["LiveStream", "StreamBrokenError", "router"]

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_PIECE_BYTES = 256 * 1024
_HEADERS = {"cache-control": "no-store, no-transform", "x-accel-buffering": "no"}


class StreamBrokenError(Exception):
    """The rest of a stream cannot be had: it is cut off, so that nobody takes it for whole."""


class LiveStream:
    """The bytes of a video that is being made, in order, whoever makes it.

    Args:
        interval_s: Between two looks.
    """

    def __init__(self, jobs: JobService, store: ArtifactStore, tenant: str, job_id: str, *, interval_s: float) -> None:
        self._jobs, self._store, self._tenant, self._job_id = jobs, store, tenant, job_id
        self._interval_s = interval_s
        self._file: BinaryIO | None = None
        self._attempt = 0
        self._is_same = True
        """Whether the open file is known to begin with what was sent."""
        self._sent = 0
        self._hash = hashlib.sha256()
        self.job: JobRecord | None = None
        """As it was last seen."""

    def look(self) -> bytes | None:
        """The next bytes, empty when there are none yet, None when there will be none.

        Raises:
            NotFoundError: The video is gone.
            StreamBrokenError: It has failed, or what another worker makes of it differs.
        """
        self.job = job = self._jobs.get(self._tenant, self._job_id)  # before the file: what is done then is whole
        if job.status in TERMINAL and job.status is not JobStatus.SUCCEEDED:
            raise StreamBrokenError(f"{job.id} is {job.status.value}")
        if job.status is not JobStatus.QUEUED and job.attempt != self._attempt:
            self._open(job.attempt)
        try:
            piece = self._read()
        except FileNotFoundError as error:  # of a bucket it can be swept away under one's eyes
            raise StreamBrokenError(f"what was made of {job.id} is gone") from error
        if piece or job.status is not JobStatus.SUCCEEDED:
            return piece
        if self._attempt != job.attempt or not self._is_same:
            raise StreamBrokenError(f"what was sent of {job.id} is not how it begins now")
        return None

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    async def pieces(self, first: bytes) -> AsyncIterator[bytes]:
        """All bytes from the first ones on, as they come."""
        try:
            piece: bytes | None = first
            while piece is not None:
                if piece:
                    yield piece
                else:
                    await asyncio.sleep(self._interval_s)
                piece = await run_in_threadpool(self.look)
        finally:
            self.close()

    def _open(self, attempt: int) -> None:
        """Turn to the file of another attempt, as soon as it is there."""
        try:
            file = self._store.follow_live(self._job_id, attempt)
        except FileNotFoundError:
            return
        self.close()
        self._file, self._attempt, self._is_same = file, attempt, False

    def _read(self) -> bytes:
        if self._file is None:
            return b""
        if not self._is_same:
            self._file.seek(0, 2)
            if self._file.tell() < self._sent:
                return b""
            self._file.seek(0)
            again = hashlib.sha256()
            left = self._sent
            while left:
                piece = self._file.read(min(left, _PIECE_BYTES))
                again.update(piece)
                left -= len(piece)
            if again.digest() != self._hash.digest():
                raise StreamBrokenError(f"attempt {self._attempt} at {self._job_id} gives other bytes")
            self._is_same = True
        self._file.seek(self._sent)
        piece = self._file.read(_PIECE_BYTES)
        self._hash.update(piece)
        self._sent += len(piece)
        return piece


@router.get(
    "/{video_id}/stream",
    response_class=Response,
    responses={
        200: {"content": {"video/mp4": {}}, "description": "Fragments as they are made; the finished file afterwards."},
        206: {"content": {"video/mp4": {}}, "description": "The asked-for bytes of a finished file."},
        **error_responses(404, 409, 416, 503),
    },
)
async def stream_video(video_id: str, request: Request, services: ServicesDep, tenant: TenantDep) -> Response:
    """Watch a video while it is being made.

    A video that is made in pieces (a long one, or one from a picture or video) comes as fragmented MP4 from its first
    frames on; any other one, and one that is finished, as its file. The answer begins when there is something to send.
    A stream that is cut off was not whole: the video failed, was deleted, or was made anew and came out different.
    """
    settings = services.settings
    has_begun = False
    stream = LiveStream(services.jobs, services.store, tenant, video_id, interval_s=settings.stream_interval_s)
    deadline = time.monotonic() + settings.stream_wait_s
    try:
        while True:
            job = await run_in_threadpool(services.jobs.get, tenant, video_id)
            if job.status is JobStatus.SUCCEEDED:
                return await run_in_threadpool(_finished, request, services.store, job)
            if job.status in TERMINAL:
                raise NotReadyError(
                    f"The video {video_id} has no content: it is {job.status.value}.", code="video_failed"
                )
            try:
                first = await run_in_threadpool(stream.look)
            except StreamBrokenError:
                continue  # it has just ended: the next look says how
            if first:
                has_begun = True
                return StreamingResponse(stream.pieces(first), media_type="video/mp4", headers=_HEADERS)
            if time.monotonic() > deadline:
                message = f"The video {video_id} has nothing to show yet: it is {job.status.value}. Ask again."
                raise NotReadyError(message, code="video_not_ready")
            if await request.is_disconnected():
                return Response(status_code=499)
            await asyncio.sleep(settings.stream_interval_s)
    finally:
        if not has_begun:
            stream.close()


def _finished(request: Request, store: ArtifactStore, job: JobRecord) -> Response:
    assert job.artifact is not None
    key = store.key(job.artifact)
    try:
        return send_object(request, store.objects, key, etag=f'"{job.sha256}"', media_type="video/mp4")
    except FileNotFoundError:
        raise NotFoundError(
            f"The file of video {job.id} is missing on the server.", code="content_missing", param="video_id"
        ) from None
