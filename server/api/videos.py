"""/v1/videos: OpenAI's video contract."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse
from starlette.background import BackgroundTask

from server.api.dependencies import JobServiceDep, Services, ServicesDep, TenantDep
from server.api.downloads import PIECE_BYTES, is_known, send_object
from server.api.fields import (
    CreateVideoFields,
    EditVideoFields,
    ExtendVideoFields,
    RemixVideoFields,
    read_edit,
    read_extension,
    read_order,
    read_remix,
)
from server.api.openapi import error_responses, links, request_body
from server.api.schemas import DeletedVideo, VideoList, VideoObject
from server.conversion import ConversionError, Form, convert
from server.errors import NotFoundError, RequestRefusedError, UnavailableError
from server.jobs.repository import JobRecord
from server.storage import Variant

__all__ = ["router"]

router = APIRouter(prefix="/v1/videos", tags=["videos"])

_CONTENT_TYPES = ("multipart/form-data", "application/json")
_MEDIA_TYPES: dict[Variant | Form, tuple[str, str]] = {
    Variant.VIDEO: ("video/mp4", ".mp4"),
    Variant.THUMBNAIL: ("image/webp", ".thumbnail.webp"),
    Variant.SPRITESHEET: ("image/jpeg", ".spritesheet.jpg"),
    Variant.PROVENANCE: ("application/json", ".provenance.json"),
    Variant.LOSSLESS: ("video/x-matroska", ".lossless.mkv"),
    Form.PREVIEW: ("image/webp", ".preview.webp"),
    Form.DICOM: ("application/dicom", ".dcm"),
}
"""What is sent, stored or made of what is stored -> its type, and how the name of the download ends."""
_VARIANTS = [str(variant) for variant in _MEDIA_TYPES]
_MEDIA: dict[str, Any] = {media_type: {} for media_type, _ in _MEDIA_TYPES.values()}


_LINKS = links("video_id", "get_video", "delete_video", "remix_video", "get_content")


@router.post(
    "",
    openapi_extra=request_body(CreateVideoFields, *_CONTENT_TYPES),
    responses={**_LINKS, **error_responses(400, 413, 415, 429, 503)},
)
async def create_video(request: Request, services: ServicesDep, tenant: TenantDep) -> VideoObject:
    """Ask for a video. The answer comes at once; ask for the video by its id until it is completed."""
    order, source = await read_order(request)
    if source is None:
        return VideoObject.of(await run_in_threadpool(services.jobs.submit, tenant, order))
    return VideoObject.of(await run_in_threadpool(services.sources.begin_with, tenant, order, source))


@router.post(
    "/edits",
    openapi_extra=request_body(EditVideoFields, *_CONTENT_TYPES),
    responses={**_LINKS, **error_responses(400, 404, 409, 413, 415, 429, 503)},
)
async def edit_video(request: Request, services: ServicesDep, tenant: TenantDep) -> VideoObject:
    """Ask for a video made anew in part, with another label: the more, the nearer strength is to 1."""
    order, source, strength = await read_edit(request)
    edit = partial(services.sources.edit, tenant, order, source, strength=strength)
    return VideoObject.of(await run_in_threadpool(edit))


@router.post(
    "/extensions",
    openapi_extra=request_body(ExtendVideoFields, *_CONTENT_TYPES),
    responses={**_LINKS, **error_responses(400, 404, 409, 413, 415, 429, 503)},
)
async def extend_video(request: Request, services: ServicesDep, tenant: TenantDep) -> VideoObject:
    """Ask for a video that goes on where another ends. What comes is one video of both."""
    order, source = await read_extension(request)
    return VideoObject.of(await run_in_threadpool(services.sources.extend, tenant, order, source))


@router.post("/characters", include_in_schema=False)
async def refuse_characters(request: Request, services: ServicesDep) -> VideoObject:
    """A part of OpenAI's contract that the served checkpoints do not have, and it is said."""
    async for _ in request.stream():  # a client that still sends would not hear the answer
        pass
    models = ", ".join(services.catalogue.names)
    raise RequestRefusedError(
        f"characters: the served checkpoints ({models}) have no characters; to begin with a picture or video give "
        "input_reference to POST /v1/videos",
        param="video",
        code="characters_not_supported",
    )


@router.get("/characters/{character_id}", include_in_schema=False)
def get_character(character_id: str) -> VideoObject:
    """There are none."""
    raise NotFoundError(
        f"There is no character with the id {character_id[:80]!r}: the served checkpoints have no characters.",
        code="character_not_found",
        param="character_id",
    )


@router.get("", responses=error_responses(400, 503))
def list_videos(
    jobs: JobServiceDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most videos of this page.")] = 20,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last video of the page before.")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation; desc: newest first.")] = "desc",
) -> VideoList:
    """List videos, a page at a time."""
    page = jobs.list(tenant, limit=limit, after=after or None, newest_first=order == "desc")
    data = [VideoObject.of(job) for job in page.jobs]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.post(
    "/{video_id}/remix",
    openapi_extra=request_body(RemixVideoFields, *_CONTENT_TYPES),
    responses={**_LINKS, **error_responses(400, 404, 409, 413, 415, 429, 503)},
)
async def remix_video(video_id: str, request: Request, jobs: JobServiceDep, tenant: TenantDep) -> VideoObject:
    """Ask for a completed video again with another label: the same seed, size, length and settings."""
    prompt = await read_remix(request)
    return VideoObject.of(await run_in_threadpool(jobs.remix, tenant, video_id, prompt))


@router.get("/{video_id}", responses=error_responses(404, 503))
async def get_video(video_id: str, jobs: JobServiceDep, tenant: TenantDep, response: Response) -> VideoObject:
    """How far a video is. One that failed is answered with 200 and status failed."""
    job, poll_after_ms = await run_in_threadpool(jobs.look, tenant, video_id)
    # OpenAI's client keeps the first value for all of its polling.
    response.headers["openai-poll-after-ms"] = str(poll_after_ms)
    return VideoObject.of(job)


@router.delete("/{video_id}", responses=error_responses(404, 503))
def delete_video(video_id: str, jobs: JobServiceDep, tenant: TenantDep) -> DeletedVideo:
    """Remove a video and its files; one that is not finished is cancelled."""
    jobs.delete(tenant, video_id)
    return DeletedVideo(id=video_id)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {
            "content": _MEDIA,
            "description": "MP4, FFV1 or DICOM; WebP of the middle frame or animated; JPEG of all frames; or JSON of "
            "what made them.",
        },
        206: {"content": _MEDIA, "description": "The asked-for bytes of it."},
        304: {"description": "The file is the one that the client has."},
        307: {"description": "It is at another address for a while, where the server keeps files in a bucket."},
        **error_responses(400, 404, 409, 416, 503),
    },
)
def get_content(
    video_id: str,
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    variant: Annotated[
        str,
        Query(
            description="What to download: video (MP4), lossless (FFV1 in Matroska), dicom (multi-frame), preview "
            "(animated WebP), thumbnail (WebP), spritesheet (JPEG) or provenance (JSON).",
            json_schema_extra={"enum": _VARIANTS},
        ),
    ] = "video",
) -> Response:
    """Download the video in one of its forms, or what is made of it. All but preview and dicom also in parts.

    The sheet shows up to 64 frames, evenly spaced, row by row from the top left, in as few columns as make it at
    least as many tiles wide as high; the preview shows the same frames. lossless and dicom are exact to the bit; a
    server may be set to keep no exact copy, and of clips of datasets there is none: ask for those in the dataset's
    format.
    """
    if variant not in _VARIANTS:
        message = f"variant: there is no {variant[:80]!r}; allowed: {', '.join(_VARIANTS)}"
        raise RequestRefusedError(message, param="variant", code="invalid_variant")
    job = services.jobs.get_completed(tenant, video_id)
    form = Form(variant) if variant in list(Form) else None
    stored = Variant(variant) if form is None else (Variant.LOSSLESS if form is Form.DICOM else Variant.VIDEO)
    sha256 = _sha256(job, stored)
    if job.artifact is None or sha256 is None:
        message = f"variant: video {video_id} was made by a version of this server that made no {variant}"
        raise NotFoundError(f"{message}; remix it, or download variant=video", code="content_missing", param="variant")
    key = services.store.key(job.artifact, stored)
    etag = f'"{sha256}"' if form is None else f'"{sha256}-{form}"'
    media_type, ending = _MEDIA_TYPES[stored if form is None else form]
    filename = f"{video_id}{ending}"
    try:
        if form is None:
            objects = services.store.objects
            return send_object(request, objects, key, etag=etag, media_type=media_type, filename=filename)
        headers = {"etag": etag, "cache-control": "private, no-cache"}
        services.store.objects.size(key)  # raises where there is none
        if is_known(request, etag):
            return Response(status_code=304, headers=headers)
        with services.store.objects.local(key) as path:
            return _converted(services, job, path, form, headers, filename)
    except FileNotFoundError:
        raise _missing(video_id, stored, variant) from None


def _missing(video_id: str, stored: Variant, variant: str) -> NotFoundError:
    message = f"The {stored} file of video {video_id} is missing on the server."
    if stored is Variant.LOSSLESS:
        message = (
            f"variant: no exact copy of video {video_id} was kept, from which {variant} could be had: the server is "
            "set so (MEDSORA_KEEP_LOSSLESS), or was older, or it is a clip of a dataset; download variant=video"
        )
        return NotFoundError(message, code="content_missing", param="variant")
    return NotFoundError(message, code="content_missing", param="video_id")


def _converted(
    services: Services, job: JobRecord, path: Path, form: Form, headers: dict[str, str], filename: str
) -> Response:
    """A form of a video that is made now."""
    checkpoint = services.catalogue.get(job.model)
    modality = "OT" if checkpoint is None else checkpoint.manifest.modality  # DICOM's word for other
    try:
        file = convert(form, path, modality=modality, settings=services.settings)
    except ConversionError as error:
        raise UnavailableError(f"{error} Download variant=video.", code="conversion_failed") from None
    headers = {
        **headers,
        "accept-ranges": "none",
        "content-length": str(file.seek(0, 2)),
        "content-disposition": f'attachment; filename="{filename}"',
    }
    file.seek(0)
    pieces = iter(lambda: file.read(PIECE_BYTES), b"")
    closing = BackgroundTask(file.close)
    return StreamingResponse(pieces, headers=headers, media_type=_MEDIA_TYPES[form][0], background=closing)


def _sha256(job: JobRecord, variant: Variant) -> str | None:
    if variant is Variant.THUMBNAIL:
        return job.thumbnail_sha256
    if variant is Variant.SPRITESHEET:
        return job.spritesheet_sha256
    if variant is Variant.PROVENANCE and job.sha256 is not None:
        return f"{job.sha256}-provenance"  # it is written once, with the video, whose hash it holds
    if variant is Variant.LOSSLESS and job.sha256 is not None:
        return f"{job.sha256}-lossless"  # likewise
    return job.sha256
