"""/v1/datasets: many labelled clips as one object, and one download of what is done."""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from medsora.request import random_seed
from server.api.dependencies import ServicesDep, TenantDep
from server.api.downloads import is_known
from server.api.fields import Real, Whole, check_fields, is_storable, parse_size, read_json_object
from server.api.openapi import error_responses, links, request_body
from server.api.ranges import check_range, describe_part, part_of
from server.datasets.archive import CONTAINERS, Archive
from server.datasets.model import FORMATS, MAX_CLIPS, ClipState, DatasetStatus
from server.datasets.repository import ClipRecord, DatasetRecord
from server.datasets.service import DatasetOrder, DatasetService
from server.errors import RequestRefusedError
from server.jobs.service import VideoOrder

__all__ = ["router"]

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

MAX_NAME = 200
_Count = Annotated[Whole, Field(ge=1, le=MAX_CLIPS)]
_Distance = Annotated[Real, Field(gt=0, le=255)]


class FilterFields(BaseModel):
    """Clips that are dropped and made up for with further seeds. Motion and distance are in grey levels, 0 to 255."""

    model_config = ConfigDict(extra="forbid")

    min_motion: _Distance | None = Field(
        None, description="Least mean absolute change of a pixel from one frame to the next."
    )
    min_distance: _Distance | None = Field(
        None,
        description="Least root mean square distance to every other clip of the dataset, between small grey pictures "
        "(4 moments of 16x16 pixels): drops duplicates.",
    )
    drop_memorised: bool = Field(
        False,
        description="Whether to drop clips that resemble a training clip more than max_training_resemblance. Only for "
        "models that come with fingerprints of their training clips.",
    )
    max_training_resemblance: Annotated[Real, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Most correlation with any training clip, above 0 and below 1; left out: what the model was "
        "calibrated for. Goes with drop_memorised.",
    )
    max_tries: Annotated[Whole, Field(ge=1, le=20)] = Field(
        4, description="Most tries a clip, failures included; after them it is missing."
    )


class CreateDatasetFields(BaseModel):
    """Fields of a new dataset."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr = Field(min_length=1, max_length=MAX_NAME, description="Shown in its card.")
    labels: dict[StrictStr, _Count] = Field(
        description=f"Names or synonyms of the model's labels -> number of clips; up to {MAX_CLIPS} in all.",
        json_schema_extra={"minProperties": 1},
    )
    model: StrictStr | None = Field(None, min_length=1, description="Left out: the server's default.")
    format: StrictStr = Field("videofolder", description="Of the archive.", json_schema_extra={"enum": list(FORMATS)})
    splits: dict[StrictStr, Real] | None = Field(
        None,
        description="Names -> ratios, within each label; left out: all is train.",
        json_schema_extra={"minProperties": 1, "maxProperties": 10},
    )
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] | None = Field(
        None, description="The seeds of all clips are derived from it; left out: drawn and told."
    )
    size: StrictStr | None = Field(None, description="Width and height in pixels, such as 128x128.")
    num_frames: Whole | None = Field(None, description="Frames of each clip.")
    fps: Real | None = Field(None, description="Frames a second; only the model's own rate is possible.")
    num_inference_steps: Whole | None = Field(None, description="Steps of the sampler.")
    guidance_scale: Real | None = Field(None, description="Strength of classifier-free guidance; 1 is none.")
    sampler: StrictStr | None = Field(None, description="Name of the sampler.")
    deterministic: bool = Field(
        True,
        description="Whether each clip is sampled alone, so that it can be made again to the bit. Several at once are "
        "faster on a GPU, and may differ in how numbers are rounded.",
    )
    filters: FilterFields | None = Field(None, description="Left out: nothing is dropped.")


class ClipCounts(BaseModel):
    """Numbers of clips by state."""

    total: int
    pending: int = Field(description="Without a job at the moment.")
    queued: int
    running: int
    done: int
    missing: int = Field(description="No try came to a good end, or the dataset or video was cancelled.")


class DatasetLabel(BaseModel):
    """A label of a dataset."""

    name: str
    counts: ClipCounts


class DatasetSettings(BaseModel):
    """What all clips have in common."""

    size: str
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    deterministic: bool


class DatasetObject(BaseModel):
    """A dataset. All times are Unix seconds."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    status: DatasetStatus
    progress: int = Field(ge=0, le=100, description="Share of the clips that are done or missing, in percent.")
    model: str
    model_sha256: str
    format: str
    seed: int
    counts: ClipCounts
    labels: list[DatasetLabel]
    splits: dict[str, float]
    settings: DatasetSettings
    filters: FilterFields
    dropped: dict[str, int] = Field(description="Tries that came to nothing, by reason.")
    shortfall: int = Field(description="Clips that are missing for good.")
    created_at: int
    ended_at: int | None

    @classmethod
    def of(cls, dataset: DatasetRecord, service: DatasetService) -> "DatasetObject":
        """The wire form of a dataset."""
        found = service.counts(dataset)
        labels = [
            DatasetLabel(name=label["name"], counts=_counts(label["count"], counted, dataset))
            for label, counted in zip(dataset.labels, found, strict=True)
        ]
        sums = {name: sum(getattr(label.counts, name) for label in labels) for name in ClipCounts.model_fields}
        settings = dataset.settings
        return cls(
            id=dataset.id,
            name=dataset.name,
            status=dataset.status,
            progress=100 * (sums["done"] + sums["missing"]) // dataset.total,
            model=dataset.model,
            model_sha256=dataset.model_sha256,
            format=dataset.format,
            seed=dataset.seed,
            counts=ClipCounts(**sums),
            labels=labels,
            splits={split["name"]: split["ratio"] for split in dataset.splits},
            settings=DatasetSettings(
                size=f"{settings['width']}x{settings['height']}",
                num_frames=settings["num_frames"],
                fps=settings["fps"],
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=settings["guidance_scale"],
                sampler=settings["sampler"],
                deterministic=settings["deterministic"],
            ),
            filters=FilterFields(**dataset.filters),
            dropped=service.drop_counts(dataset) if dataset.dropped else {},
            shortfall=sums["missing"],
            created_at=int(dataset.created_at),
            ended_at=None if dataset.ended_at is None else int(dataset.ended_at),
        )


class DatasetList(BaseModel):
    """A page of datasets; ask for the next one with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[DatasetObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ClipObject(BaseModel):
    """A clip of a dataset."""

    object: Literal["dataset.clip"] = "dataset.clip"
    number: int
    label: str
    split: str
    state: ClipState
    tries: int
    seed: int = Field(description="Of the newest try.")
    video_id: str | None = Field(description="Of the newest try.")
    size_bytes: int | None
    frames_sha256: str | None
    measures: dict[str, float] | None = Field(description="What filters look at.")
    reason: str | None = Field(description="Why it is missing.")

    @classmethod
    def of(cls, dataset: DatasetRecord, clip: ClipRecord) -> "ClipObject":
        """The wire form of a clip."""
        return cls(
            number=clip.number,
            label=dataset.labels[clip.label]["name"],
            split=dataset.splits[clip.split]["name"],
            state=clip.state,
            tries=clip.tries,
            seed=clip.seed,
            video_id=clip.job_id,
            size_bytes=clip.size_bytes,
            frames_sha256=clip.frames_sha256,
            measures=clip.measures,
            reason=clip.reason,
        )


class ClipList(BaseModel):
    """A page of clips; ask for the next one with ``after=<number of the last>``."""

    object: Literal["list"] = "list"
    data: list[ClipObject]
    has_more: bool


class DeletedDataset(BaseModel):
    """A dataset that is gone."""

    id: str
    object: Literal["dataset.deleted"] = "dataset.deleted"
    deleted: Literal[True] = True


@router.post(
    "",
    openapi_extra=request_body(CreateDatasetFields, "application/json"),
    responses={
        **links("dataset_id", "get_dataset", "cancel_dataset", "delete_dataset", "list_dataset_clips"),
        **error_responses(400, 413, 415, 429, 503),
    },
)
async def create_dataset(request: Request, services: ServicesDep, tenant: TenantDep) -> DatasetObject:
    """Make many labelled clips while the server has time for them."""
    fields = check_fields(CreateDatasetFields, await read_json_object(request))
    order = _order(fields)

    def create() -> DatasetObject:
        return DatasetObject.of(services.datasets.create(tenant, order), services.datasets)

    return await run_in_threadpool(create)


@router.get("", responses=error_responses(400, 503))
def list_datasets(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most datasets of this page.")] = 20,
    after: Annotated[
        str | None, Query(max_length=100, description="Id of the last dataset of the page before.")
    ] = None,
) -> DatasetList:
    """List datasets, newest first, a page at a time."""
    page = services.datasets.page(tenant, limit=limit, after=after or None)
    data = [DatasetObject.of(dataset, services.datasets) for dataset in page.datasets]
    return DatasetList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{dataset_id}", responses=error_responses(404, 503))
def get_dataset(dataset_id: str, services: ServicesDep, tenant: TenantDep) -> DatasetObject:
    """How far a dataset is."""
    return DatasetObject.of(services.datasets.get(tenant, dataset_id), services.datasets)


@router.get("/{dataset_id}/clips", responses=error_responses(400, 404, 503))
def list_dataset_clips(
    dataset_id: str,
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most clips of this page.")] = 100,
    after: Annotated[int, Query(ge=-1, le=MAX_CLIPS, description="Number of the last clip of the page before.")] = -1,
) -> ClipList:
    """List the clips that have had a job, by number, a page at a time."""
    dataset = services.datasets.get(tenant, dataset_id)
    clips, has_more = services.datasets.clips(dataset, limit=limit, after=after)
    return ClipList(data=[ClipObject.of(dataset, clip) for clip in clips], has_more=has_more)


@router.post("/{dataset_id}/cancel", responses=error_responses(404, 409, 503))
def cancel_dataset(dataset_id: str, services: ServicesDep, tenant: TenantDep) -> DatasetObject:
    """Stop a dataset. What is done stays, and can be downloaded."""
    return DatasetObject.of(services.datasets.cancel(tenant, dataset_id), services.datasets)


@router.delete("/{dataset_id}", responses=error_responses(404, 503))
def delete_dataset(dataset_id: str, services: ServicesDep, tenant: TenantDep) -> DeletedDataset:
    """Remove a dataset and its videos; one that is being made is stopped."""
    services.datasets.delete(tenant, dataset_id)
    return DeletedDataset(id=dataset_id)


@router.get(
    "/{dataset_id}/content",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The archive.",
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in CONTAINERS.values()},
        },
        206: {"description": "The part of the archive that was asked for."},
        304: {"description": "The client's copy is still good."},
        **error_responses(400, 404, 409, 416, 503),
    },
)
def download_dataset(
    dataset_id: str,
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    container: Annotated[
        str,
        Query(alias="format", description="Of the archive.", json_schema_extra={"enum": list(CONTAINERS)}),
    ] = "zip",
) -> Response:
    """Download what is done, as one archive, whole or from any byte on. Nothing of it is compressed."""
    if container not in CONTAINERS:
        message = f"format: there is no {container[:80]!r}; allowed: {', '.join(CONTAINERS)}"
        raise RequestRefusedError(message, param="format", code="invalid_format")
    dataset = services.datasets.get(tenant, dataset_id)
    archive = services.datasets.archive(dataset, container)
    size = archive.size()
    # What is in it is told by what was done and dropped at one moment; the size guards against changes of code.
    state = f"{dataset.id} {dataset.done} {dataset.dropped} {dataset.missing} {dataset.status} {container} {size}"
    etag = f'"{hashlib.sha256(state.encode()).hexdigest()[:32]}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "content-disposition": f'attachment; filename="{dataset.id}.{container}"',
    }
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    check_range(request, size)
    begin, end = part_of(request, size, etag)
    status, of_part = describe_part(begin, end, size)
    return StreamingResponse(
        _send(archive, begin, end), status_code=status, headers=headers | of_part, media_type=CONTAINERS[container]
    )


def _send(archive: Archive, begin: int, end: int) -> Iterator[bytes]:
    """Small pieces gathered into larger ones: each costs a change of threads."""
    gathered: list[bytes] = []
    size = 0
    for chunk in archive.read(begin, end):
        gathered.append(chunk)
        size += len(chunk)
        if size >= 128 * 1024:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def _order(fields: CreateDatasetFields) -> DatasetOrder:
    if not (fields.name.strip() and is_storable(fields.name) and fields.name.isprintable()):
        raise RequestRefusedError("name: must be a line of text", param="name", code="invalid_name")
    filters = fields.filters or FilterFields()  # type: ignore[call-arg]
    video = VideoOrder(
        prompt="",
        model=fields.model,
        size=parse_size(fields.size),
        num_frames=fields.num_frames,
        fps=fields.fps,
        num_inference_steps=fields.num_inference_steps,
        guidance_scale=fields.guidance_scale,
        sampler=fields.sampler,
        deterministic=fields.deterministic,
    )
    return DatasetOrder(
        name=fields.name,
        labels=fields.labels,
        splits={"train": 1.0} if fields.splits is None else fields.splits,
        format=fields.format,
        seed=random_seed() if fields.seed is None else fields.seed,
        video=video,
        filters=filters.model_dump(exclude={"max_tries"}),
        max_tries=filters.max_tries,
    )


def _counts(total: int, found: dict[str, Any], dataset: DatasetRecord) -> ClipCounts:
    done, missing = found.get("done", 0), found.get("missing", 0)
    queued, running = found.get("queued", 0), found.get("running", 0) + found.get("settling", 0)
    if dataset.status is DatasetStatus.CANCELLED:
        missing = total - done
    pending = total - done - missing - queued - running
    return ClipCounts(total=total, pending=pending, queued=queued, running=running, done=done, missing=missing)
