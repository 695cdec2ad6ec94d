"""Bodies of the answers. The first fields of each are OpenAI's contract, the others are ours."""

from typing import Literal

from pydantic import BaseModel, Field

from server.batches.model import BatchStatus
from server.batches.repository import BatchRecord
from server.checkpoints import ServedCheckpoint
from server.files.repository import FileRecord
from server.jobs.model import JobStatus
from server.jobs.repository import JobRecord
from server.sources.model import SourceKind

__all__ = [
    "BatchList",
    "BatchObject",
    "DeletedFile",
    "DeletedVideo",
    "ErrorEnvelope",
    "FileList",
    "FileObject",
    "ModelList",
    "ModelObject",
    "VideoList",
    "VideoObject",
]

_WIRE_STATUS: dict[JobStatus, Literal["queued", "in_progress", "completed", "failed"]] = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.SUCCEEDED: "completed",
    JobStatus.FAILED: "failed",
    # Clients that wait for completed or failed would wait for ever on a fifth word.
    JobStatus.CANCELED: "failed",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="Field of the request that is to blame.")
    code: str | None


class ErrorEnvelope(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


class VideoError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job and its video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Per cent; 100 only when the video can be downloaded.")
    created_at: int = Field(description="Unix seconds.")
    completed_at: int | None = Field(description="Unix seconds.")
    expires_at: int | None = Field(description="Unix seconds; null: kept until it is deleted.")
    prompt: str | None
    size: str = Field(description="Width and height in pixels.")
    seconds: str
    remixed_from_video_id: str | None
    error: VideoError | None
    label: str = Field(description="Label that the prompt was understood as.")
    seed: int
    num_frames: int
    fps: float = Field(description="Frames a second.")
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    priority: int = Field(description="Higher comes sooner among one's own videos that wait.")
    deterministic: bool = Field(description="Whether it is sampled alone, and so to the same bytes each time.")
    inference_time_s: float | None = Field(description="Seconds of the sampler and decoder, for the whole batch.")
    batch_size: int | None = Field(description="Videos that were sampled together with it, itself included.")
    sha256: str | None = Field(description="SHA-256 of the MP4 file.")
    source: Literal["reference", "edit", "extension"] | None = Field(
        description="What became of the picture or video that it was made from; null: from a label alone."
    )
    source_video_id: str | None = Field(description="The video that it was made from, where that was no upload.")

    @classmethod
    def of(cls, job: JobRecord) -> "VideoObject":
        """The wire form of a job."""
        progress = 0
        if job.status is JobStatus.SUCCEEDED:
            progress = 100
        elif job.status in (JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELED):
            progress = min(99, 100 * job.steps_done // job.num_inference_steps)
        error = None
        if job.error_code is not None:
            error = VideoError(code=job.error_code, message=job.error_message or job.error_code)
        return cls(
            id=job.id,
            model=job.model,
            status=_WIRE_STATUS[job.status],
            progress=progress,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            prompt=job.prompt,
            size=f"{job.width}x{job.height}",
            seconds=job.seconds,
            remixed_from_video_id=job.remixed_from,
            error=error,
            label=job.label,
            seed=job.seed,
            num_frames=job.num_frames,
            fps=job.fps,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            sampler=job.sampler,
            priority=job.priority,
            deterministic=job.deterministic,
            inference_time_s=job.sampling_s,
            batch_size=job.batch_size,
            sha256=job.sha256,
            source=None if job.source_kind is None else SourceKind(job.source_kind).value,
            source_video_id=job.source_video,
        )


class VideoList(BaseModel):
    """A page of videos; ask for the next one with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """Confirmation that a video is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Unix seconds.")
    expires_at: int | None = Field(description="Unix seconds; null: kept until it is deleted.")
    filename: str
    purpose: Literal["batch", "vision", "batch_output"]
    status: Literal["processed"] = "processed"
    sha256: str = Field(description="SHA-256 of the bytes.")

    @classmethod
    def of(cls, file: FileRecord) -> "FileObject":
        """The wire form of a file."""
        return cls.model_validate(
            {
                "id": file.id,
                "bytes": file.size_bytes,
                "created_at": int(file.created_at),
                "expires_at": _whole(file.expires_at),
                "filename": file.filename,
                "purpose": file.purpose,
                "sha256": file.sha256,
            }
        )


class FileList(BaseModel):
    """A page of files; ask for the next one with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """Confirmation that a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchProblem(BaseModel):
    """Why the file of a batch was refused."""

    code: str
    message: str
    param: str | None = Field(description="Key of the line that is to blame.")
    line: int | None = Field(description="Number of the line, from 1.")


class BatchProblems(BaseModel):
    """All that was found wrong with the file, up to a limit."""

    object: Literal["list"] = "list"
    data: list[BatchProblem]


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int = Field(description="Refused, failed, or not done in time.")


class BatchObject(BaseModel):
    """A batch. All times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: BatchStatus
    errors: BatchProblems | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int = Field(description="End of the completion window.")
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: BatchRecord) -> "BatchObject":
        """The wire form of a batch."""
        problems = batch.errors if batch.status is BatchStatus.FAILED else None
        return cls(
            id=batch.id,
            endpoint=batch.endpoint,
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            status=batch.status,
            errors=None if problems is None else BatchProblems(data=[BatchProblem(**one) for one in problems]),
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            created_at=int(batch.created_at),
            in_progress_at=_whole(batch.in_progress_at),
            expires_at=int(batch.expires_at),
            finalizing_at=_whole(batch.finalizing_at),
            completed_at=_whole(batch.completed_at),
            failed_at=_whole(batch.failed_at),
            expired_at=_whole(batch.expired_at) if batch.status is BatchStatus.EXPIRED else None,
            cancelling_at=_whole(batch.cancelling_at),
            cancelled_at=_whole(batch.cancelled_at),
            request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
            metadata=batch.metadata,
        )


class BatchList(BaseModel):
    """A page of batches; ask for the next one with ``after=<last_id>``."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


class Range(BaseModel):
    """Limits of a number, both included."""

    minimum: float
    default: float
    maximum: float


class WholeRange(BaseModel):
    """Limits of a whole number, both included."""

    minimum: int
    default: int
    maximum: int


class ModelLabel(BaseModel):
    """Something that can be asked for: put ``name`` or a synonym into ``prompt``."""

    name: str
    description: str
    synonyms: list[str]


class ModelShortcut(BaseModel):
    """What the sampler ``shortcut`` can do: few steps, which it was trained for."""

    num_inference_steps: list[int] = Field(description="These alone, the default first.")
    guidance_scale: float = Field(description="Built in; the only one that can be asked for with it.")


class ModelLimits(BaseModel):
    """What a model can do. Of each list the first is the default."""

    sizes: list[str] = Field(description="WIDTHxHEIGHT in pixels.")
    seconds: list[str]
    num_frames: list[int]
    fps: float
    num_inference_steps: WholeRange = Field(description="Of all samplers but shortcut.")
    guidance_scale: Range = Field(description="Of all samplers but shortcut.")
    samplers: list[str]
    shortcut: ModelShortcut | None = Field(description="Null where there is no such sampler.")
    clean_prefixes: bool = Field(description="Whether videos can begin with given frames, be extended, and be longer.")
    max_frames: int = Field(description="Frames of the longest video.")
    max_seconds: str


class ModelObject(BaseModel):
    """A checkpoint that this server offers."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds.")
    owned_by: str
    description: str
    modality: str = Field(description="DICOM modality, such as US.")
    intended_use: str
    licence: str
    sha256: str = Field(description="SHA-256 of the checkpoint's manifest, which holds the hashes of all its files.")
    is_default: bool
    labels: list[ModelLabel]
    limits: ModelLimits

    @classmethod
    def of(cls, checkpoint: ServedCheckpoint, *, is_default: bool) -> "ModelObject":
        """The wire form of a served checkpoint."""
        manifest, limits = checkpoint.manifest, checkpoint.manifest.limits
        steps, guidance = limits.num_inference_steps, limits.guidance_scale
        return cls(
            id=checkpoint.name,
            created=checkpoint.created,
            owned_by="medsora",
            description=manifest.description,
            modality=manifest.modality,
            intended_use=manifest.intended_use,
            licence=manifest.licence,
            sha256=checkpoint.sha256,
            is_default=is_default,
            labels=[
                ModelLabel(name=label.name, description=label.description, synonyms=list(label.synonyms))
                for label in manifest.labels
            ],
            limits=ModelLimits(
                sizes=[f"{width}x{height}" for width, height in limits.sizes],
                seconds=[manifest.seconds_for(num_frames) for num_frames in limits.num_frames],
                num_frames=list(limits.num_frames),
                fps=limits.fps,
                num_inference_steps=WholeRange(minimum=steps[0], default=steps[1], maximum=steps[2]),
                guidance_scale=Range(minimum=guidance[0], default=guidance[1], maximum=guidance[2]),
                samplers=list(limits.samplers),
                shortcut=(
                    ModelShortcut(
                        num_inference_steps=list(limits.shortcut_steps), guidance_scale=limits.shortcut_guidance
                    )
                    if limits.shortcut_steps
                    else None
                ),
                clean_prefixes=limits.clean_prefixes,
                max_frames=limits.longest,
                max_seconds=manifest.seconds_for(limits.longest),
            ),
        )


class ModelList(BaseModel):
    """All models, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
