"""The rules of jobs: what is accepted, what a client may see, what cancelling and deleting mean."""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from medsora.errors import RequestError
from medsora.manifest import Manifest
from medsora.request import frames_for_seconds, no_clean_prefixes, random_seed, resolve_label, resolve_request
from server import logs
from server.checkpoints import Catalogue, ServedCheckpoint
from server.errors import (
    NotFoundError,
    NotReadyError,
    OverloadedError,
    QuotaExceededError,
    RequestRefusedError,
    UnavailableError,
)
from server.jobs.intake import QueueFullError, QuotaReachedError
from server.jobs.model import TERMINAL, JobStatus, is_job_id
from server.jobs.repository import JobRecord, JobRepository, Removal
from server.storage import ArtifactStore
from server.webhooks.service import check_request_webhook

__all__ = ["MAX_PROMPT_CHARACTERS", "JobPage", "JobService", "VideoOrder"]

MAX_PROMPT_CHARACTERS = 32_000
_QUEUE_FULL_RETRY_MS = 2000
_LEAST_POLL_MS, _DEFAULT_POLL_MS, _MOST_POLL_MS = 200, 1000, 5000
_PART_OF_LEFT, _PART_OF_AGE = 0.1, 0.1
"""Of what a job may still take, and of what it has taken so far, a client lets so much pass before it asks again: so it
hears of the end late by a tenth at most."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VideoOrder:
    """What a client asks for; None is the checkpoint's default. Types are right, values are not checked yet."""

    prompt: str
    model: str | None = None
    size: tuple[int, int] | None = None
    """(width, height) in pixels."""
    width: int | None = None
    height: int | None = None
    seconds: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    prefix_frames: int = 0
    """Given frames that the clip goes on from."""
    strength: float = 1.0
    """Below 1: of an edit."""
    source_field: str = "input_reference"
    """Field that the given frames come in, for messages."""
    webhook_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)
    priority: int | None = None
    deterministic: bool | None = None


@dataclass(frozen=True)
class JobPage:
    """A part of the list of jobs."""

    jobs: list[JobRecord]
    has_more: bool


class JobService:
    """Everything that the API does with jobs. Nobody but its tenant sees a job.

    Args:
        publish: Told the id of every accepted job; must return at once and never fail.
        max_queued: Most jobs that may wait.
        min_free_bytes: Free disk space below which no job is accepted.
        seal: Makes of a webhook's secret what goes to the database.
        private_hosts: Hosts with private addresses that webhooks may lead to.
    """

    def __init__(
        self,
        repository: JobRepository,
        catalogue: Catalogue,
        store: ArtifactStore,
        *,
        publish: Callable[[str], None],
        max_queued: int,
        min_free_bytes: int,
        seal: Callable[[str], str],
        private_hosts: Collection[str] = (),
    ) -> None:
        self._repository = repository
        self._catalogue = catalogue
        self._store = store
        self._publish = publish
        self._max_queued = max_queued
        self._min_free_bytes = min_free_bytes
        self._seal = seal
        self._private_hosts = private_hosts

    def submit(self, tenant: str, order: VideoOrder) -> JobRecord:
        """Accept a job: when this returns, the job is on disk and will come to an end.

        Raises:
            RequestRefusedError: A field that the checkpoint cannot honour; names it and what is allowed.
            OverloadedError: Too many jobs wait.
            QuotaExceededError: The tenant may have no more today, or must not let more wait.
            UnavailableError: Too little room on the disk.
        """
        return self.accept(self.resolve(tenant, order))

    def resolve(self, tenant: str, order: VideoOrder) -> dict[str, Any]:
        """The columns of the job that would be made of an order. Nothing is accepted yet.

        Raises:
            RequestRefusedError: A field that the checkpoint cannot honour; names it and what is allowed.
        """
        check_request_webhook(order.webhook_url, order.webhook_secret, private_hosts=self._private_hosts)
        return {
            **_resolve(self._find_checkpoint(order.model), order),
            "tenant": tenant,
            "webhook_url": order.webhook_url,
            "webhook_secret": None if order.webhook_secret is None else self._seal(order.webhook_secret),
        }

    def remix(self, tenant: str, job_id: str, prompt: str) -> JobRecord:
        """Accept a job that differs from a completed one in its label alone: same model, seed and settings.

        Raises:
            NotFoundError: The tenant has no such job (any more).
            NotReadyError: It is not completed.
            ServiceError: As :meth:`submit`; a changed set of models may not allow what was allowed then.
        """
        source = self.get_completed(tenant, job_id)
        order = VideoOrder(
            prompt=prompt,
            model=source.model,
            size=(source.width, source.height),
            num_frames=source.num_frames,
            fps=source.fps,
            seed=source.seed,
            num_inference_steps=source.num_inference_steps,
            guidance_scale=source.guidance_scale,
            sampler=source.sampler,
            prefix_frames=source.prefix_frames,
            strength=source.strength,
            deterministic=source.deterministic,
        )
        same = {name: getattr(source, name) for name in ("source_kind", "source_id", "source_video")}
        return self.accept({**self.resolve(tenant, order), **same, "remixed_from": source.id})

    def manifest(self, model: str | None) -> Manifest:
        """What the model of that name, or the default one, says of itself.

        Raises:
            RequestRefusedError: There is none.
        """
        return self._find_checkpoint(model).manifest

    def accept(self, values: dict[str, Any]) -> JobRecord:
        """Accept the job of columns that were resolved; see :meth:`submit`."""
        if self._store.free_bytes() < self._min_free_bytes:
            raise UnavailableError(
                "There is too little free disk space to take more jobs.", code="storage_full", retry_after_ms=10_000
            )
        try:
            job = self._repository.add(values, max_queued=self._max_queued)
        except QueueFullError:
            message = f"{self._max_queued} jobs are waiting, no more can be taken now. Try again later."
            raise OverloadedError(message, code="queue_full", retry_after_ms=_QUEUE_FULL_RETRY_MS) from None
        except QuotaReachedError as error:
            quota = error.quota
            raise QuotaExceededError(
                quota.message, code="quota_exceeded", retry_after_s=quota.retry_after_s, is_soon=quota.is_soon
            ) from None
        logs.note(job_id=job.id)
        self._publish(job.id)
        return job

    def get(self, tenant: str, job_id: str) -> JobRecord:
        """The job of that id.

        Raises:
            NotFoundError: The tenant has none (any more).
        """
        job = self._repository.get(job_id, tenant=tenant) if is_job_id(job_id) else None
        if job is None:
            raise _not_found(job_id)
        return job

    def get_completed(self, tenant: str, job_id: str) -> JobRecord:
        """The job of that id, whose video is there.

        Raises:
            NotFoundError: The tenant has no such job (any more).
            NotReadyError: It is not completed, or never will be.
        """
        job = self.get(tenant, job_id)
        if job.status is not JobStatus.SUCCEEDED:
            code = "video_failed" if job.status in TERMINAL else "video_not_ready"
            raise NotReadyError(f"The video {job_id} has no content: it is {job.status.value}.", code=code)
        return job

    def look(self, tenant: str, job_id: str) -> tuple[JobRecord, int]:
        """The job of that id, and the milliseconds after which it is worth asking again.

        Raises:
            NotFoundError: The tenant has none (any more).
        """
        job = self.get(tenant, job_id)
        return job, self._poll_after_ms(job)

    def _poll_after_ms(self, job: JobRecord) -> int:
        if job.status in TERMINAL:
            return _LEAST_POLL_MS
        outlook = self._repository.outlook(job)
        if outlook.left_s is None:
            return _DEFAULT_POLL_MS
        worth_ms = 1000 * max(_PART_OF_LEFT * outlook.left_s, _PART_OF_AGE * outlook.age_s)
        return round(min(max(worth_ms, _LEAST_POLL_MS), _MOST_POLL_MS))

    def list(self, tenant: str, *, limit: int, after: str | None, newest_first: bool) -> JobPage:
        """A page of jobs behind the job ``after``.

        Raises:
            RequestRefusedError: ``after`` is no job of the tenant.
        """
        page = self._repository.page(tenant=tenant, limit=limit, after=after, newest_first=newest_first)
        if page is None:
            message = f"after: there is no video with the id {(after or '')[:80]!r}."
            raise RequestRefusedError(message, param="after", code="invalid_cursor")
        return JobPage(*page)

    def cancel(self, tenant: str, job_id: str) -> None:
        """Cancel a job that waits or runs; a running one stops within one sampling step.

        Nothing happens to a finished job: it stays finished.

        Raises:
            NotFoundError: The tenant has no such job.
        """
        self.get(tenant, job_id)
        self._repository.request_cancel(job_id, tenant=tenant)

    def delete(self, tenant: str, job_id: str) -> None:
        """Remove a job and its file; one that waits or runs is cancelled first. It is gone at once.

        Raises:
            NotFoundError: The tenant has no such job.
        """
        removal = self._repository.request_removal(job_id, tenant=tenant) if is_job_id(job_id) else Removal.MISSING
        if removal is Removal.MISSING:
            raise _not_found(job_id)
        if removal is Removal.READY:
            # After a crash between these lines the reaper does the rest. Of a running job it does all.
            self._store.remove_attempts(job_id)
            self._repository.forget([job_id])

    def _find_checkpoint(self, model: str | None) -> ServedCheckpoint:
        if model is None:
            return self._catalogue.default
        checkpoint = self._catalogue.get(model)
        if checkpoint is None:
            known = ", ".join(self._catalogue.names)
            message = f"model: there is no model {model[:80]!r}; allowed: {known}"
            raise RequestRefusedError(message, param="model", code="model_not_found")
        return checkpoint


def _resolve(checkpoint: ServedCheckpoint, order: VideoOrder) -> dict[str, Any]:
    """Columns of a job for this order."""
    manifest = checkpoint.manifest
    if not order.prompt.strip():
        raise RequestRefusedError("prompt: must not be empty.", param="prompt", code="invalid_prompt")
    if len(order.prompt) > MAX_PROMPT_CHARACTERS:
        message = f"prompt: has {len(order.prompt)} characters; allowed: 1 to {MAX_PROMPT_CHARACTERS}"
        raise RequestRefusedError(message, param="prompt", code="invalid_prompt")
    try:
        label = resolve_label(manifest, order.prompt)
        width, height = _size(order)
        request = resolve_request(
            manifest,
            label=label.name,
            seed=random_seed() if order.seed is None else order.seed,
            num_frames=_frames(manifest, order),
            width=width,
            height=height,
            num_inference_steps=order.num_inference_steps,
            guidance_scale=order.guidance_scale,
            sampler=order.sampler,
            prefix_frames=order.prefix_frames,
            strength=order.strength,
        )
    except RequestError as error:
        raise _refusal(error, order, manifest) from None
    return {
        "model": checkpoint.name,
        "prompt": order.prompt,
        "label": request.label,
        "seed": request.seed,
        "num_frames": request.num_frames,
        "width": request.width,
        "height": request.height,
        "fps": manifest.limits.fps,
        "seconds": manifest.seconds_for(request.num_frames),
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "sampler": request.sampler,
        "prefix_frames": request.prefix_frames,
        "strength": request.strength,
        "priority": order.priority or 0,
        "deterministic": order.deterministic or False,
    }


def _size(order: VideoOrder) -> tuple[int | None, int | None]:
    if order.size is None:
        return order.width, order.height
    for name, given, meant in (("width", order.width, order.size[0]), ("height", order.height, order.size[1])):
        if given is not None and given != meant:
            raise RequestError(name, f"{given} contradicts size {order.size[0]}x{order.size[1]}", [meant])
    return order.size


def _frames(manifest: Manifest, order: VideoOrder) -> int | None:
    fps = manifest.limits.fps
    if order.fps is not None and order.fps != fps:
        raise RequestError("fps", f"{manifest.name} cannot make {order.fps:g} frames a second", [f"{fps:g}"])
    if order.seconds is None:
        return order.num_frames
    frames = frames_for_seconds(manifest, order.seconds)
    if order.num_frames is not None and order.num_frames != frames:
        raise RequestError("num_frames", f"{order.num_frames} contradicts seconds {order.seconds[:40]}", [frames])
    return frames


def _refusal(error: RequestError, order: VideoOrder, manifest: Manifest) -> RequestRefusedError:
    """The error in the client's words: a label is asked for by the prompt, a size may come as two numbers."""
    param, message = error.field, error.message
    if param == "label":
        param, message = "prompt", "prompt" + message.removeprefix("label")
    elif param == "prefix_frames":
        param = order.source_field
        if not manifest.limits.clean_prefixes:
            message = f"{param}: {no_clean_prefixes(manifest)}"
            return RequestRefusedError(message, param=param, code=f"{param}_not_supported")
        message = param + message.removeprefix("prefix_frames")
    elif param == "size" and order.size is None:
        param = "width" if order.width is not None else "height"
    return RequestRefusedError(message, param=param, code=f"invalid_{param}")


def _not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"There is no video with the id {job_id[:80]!r}.", code="video_not_found", param="video_id")
