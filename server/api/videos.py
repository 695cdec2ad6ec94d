"""/v1/videos: OpenAI's video contract."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from server.api.dependencies import JobServiceDep, ServicesDep
from server.api.fields import CreateVideoFields, read_order
from server.api.schemas import DeletedVideo, ErrorEnvelope, VideoList, VideoObject
from server.errors import NotFoundError, NotReadyError, RangeError, RequestRefusedError
from server.jobs.model import JobStatus

__all__ = ["router"]

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_CONTENT_TYPES = ("multipart/form-data", "application/json")
_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": CreateVideoFields.model_json_schema()} for kind in _CONTENT_TYPES},
    }
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorEnvelope} for status in statuses}


@router.post("", openapi_extra=_CREATE_BODY, responses=_errors(400, 413, 415, 429, 503))
async def create_video(request: Request, jobs: JobServiceDep) -> VideoObject:
    """Ask for a video. The answer comes at once; ask for the video by its id until it is completed."""
    order = await read_order(request)
    return VideoObject.of(await run_in_threadpool(jobs.submit, order))


@router.get("", responses=_errors(400, 503))
def list_videos(
    jobs: JobServiceDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most videos of this page.")] = 20,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last video of the page before.")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation; desc: newest first.")] = "desc",
) -> VideoList:
    """List videos, a page at a time."""
    page = jobs.list(limit=limit, after=after or None, newest_first=order == "desc")
    data = [VideoObject.of(job) for job in page.jobs]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{video_id}", responses=_errors(404, 503))
def get_video(video_id: str, jobs: JobServiceDep, response: Response) -> VideoObject:
    """How far a video is. One that failed is answered with 200 and status failed."""
    job = jobs.get(video_id)
    # OpenAI's client keeps the first value for all of its polling.
    response.headers["openai-poll-after-ms"] = str(jobs.poll_after_ms(job))
    return VideoObject.of(job)


@router.delete("/{video_id}", responses=_errors(404, 503))
def delete_video(video_id: str, jobs: JobServiceDep) -> DeletedVideo:
    """Remove a video and its file; one that is not finished is cancelled."""
    jobs.delete(video_id)
    return DeletedVideo(id=video_id)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": {}}, "description": "The MP4 file."},
        206: {"content": {"video/mp4": {}}, "description": "The asked-for bytes of it."},
        304: {"description": "The file is the one that the client has."},
        **_errors(400, 404, 409, 416, 503),
    },
)
def get_content(
    video_id: str,
    request: Request,
    services: ServicesDep,
    variant: Annotated[str, Query(description="What to download; only video.", max_length=80)] = "video",
) -> Response:
    """Download the MP4 file, whole or a range of its bytes."""
    if variant != "video":
        message = f"variant: {variant!r} is not made by this server; allowed: video"
        raise RequestRefusedError(message, param="variant", code="invalid_variant")
    job = services.jobs.get(video_id)
    if job.status is not JobStatus.SUCCEEDED or job.artifact is None:
        code = "video_not_ready" if job.status in (JobStatus.QUEUED, JobStatus.RUNNING) else "video_failed"
        raise NotReadyError(f"The video {video_id} has no content: it is {job.status.value}.", code=code)
    path = services.store.path(job.artifact)
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise NotFoundError(
            f"The file of video {video_id} is missing on the server.", code="content_missing", param="video_id"
        ) from None
    etag = f'"{job.sha256}"'
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    _check_range(request, stat.st_size)
    return FileResponse(path, stat_result=stat, media_type="video/mp4", filename=f"{video_id}.mp4", headers=headers)


def _check_range(request: Request, size: int) -> None:
    """Leave one satisfiable range to ``FileResponse``, refuse one that is not, and overlook all else.

    A server may overlook any Range header; several ranges at once have only ever been used to attack.
    """
    text = request.headers.get("range")
    if text is None:
        return
    unit, _, spec = text.partition("=")
    first, dash, last = (part.strip() for part in spec.partition("-"))
    numbers = [part for part in (first, last) if part]
    is_usable = (
        unit.strip().lower() == "bytes"
        and dash == "-"
        and bool(numbers)
        and all(part.isascii() and part.isdigit() and len(part) < 19 for part in numbers)
        and not (first and last and int(first) > int(last))
    )
    if not is_usable:
        request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    elif (first and int(first) >= size) or (not first and int(last) == 0):
        raise RangeError(
            f"range: {text[:80]!r} lies outside of the file, which has {size} bytes.",
            param="range",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}"},
        )
