"""The rules of batches: what is accepted, what a client may see, what cancelling means."""

from dataclasses import dataclass

from server.batches.model import WINDOWS_S, BatchStatus, is_batch_id
from server.batches.repository import BatchRecord, BatchRepository, TooManyBatchesError
from server.errors import NotFoundError, NotReadyError, OverloadedError, RequestRefusedError
from server.files.model import is_file_id
from server.files.repository import FileRepository

__all__ = ["ENDPOINTS", "BatchOrder", "BatchPage", "BatchService"]

ENDPOINTS = ("/v1/videos",)
"""What the lines of a batch may ask for."""
_RETRY_MS = 10_000


@dataclass(frozen=True, kw_only=True)
class BatchOrder:
    """What a client asks for; types and lengths are right, values are not checked yet."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None


@dataclass(frozen=True)
class BatchPage:
    """A part of the list of batches."""

    batches: list[BatchRecord]
    has_more: bool


class BatchService:
    """Everything that the API does with batches.

    Args:
        max_active: Most batches of a tenant that may be unfinished.
    """

    def __init__(self, repository: BatchRepository, files: FileRepository, *, max_active: int) -> None:
        self._repository = repository
        self._files = files
        self._max_active = max_active

    def create(self, tenant: str, order: BatchOrder) -> BatchRecord:
        """Accept a batch: when this returns, it is on disk and will come to an end.

        Raises:
            RequestRefusedError: Names the field and what is allowed.
            OverloadedError: Too many batches of the tenant are unfinished.
        """
        if order.endpoint not in ENDPOINTS:
            raise _refused("endpoint", order.endpoint, ENDPOINTS)
        if order.completion_window not in WINDOWS_S:
            raise _refused("completion_window", order.completion_window, tuple(WINDOWS_S))
        file = self._files.get(tenant, order.input_file_id) if is_file_id(order.input_file_id) else None
        if file is None or file.purpose != "batch":
            if file is None:
                message = f"input_file_id: there is no file with the id {order.input_file_id[:80]!r}"
            else:
                message = f"input_file_id: the file {file.id} is for {file.purpose}; allowed: files for batch"
            raise RequestRefusedError(message, param="input_file_id", code="invalid_input_file_id")
        try:
            return self._repository.add(
                tenant=tenant,
                endpoint=order.endpoint,
                input_file_id=order.input_file_id,
                completion_window=order.completion_window,
                output_expires_after_s=order.output_expires_after_s,
                metadata=order.metadata,
                max_active=self._max_active,
            )
        except TooManyBatchesError:
            message = f"{self._max_active} batches are unfinished, no more can be taken now. Try again later."
            raise OverloadedError(message, code="too_many_batches", retry_after_ms=_RETRY_MS) from None

    def unfinished_clips(self) -> int:
        """Number of clips that all batches together are still to give."""
        return self._repository.unfinished_clips()

    def get(self, tenant: str, batch_id: str) -> BatchRecord:
        """The batch of that id.

        Raises:
            NotFoundError: The tenant has none.
        """
        batch = self._repository.get(tenant, batch_id) if is_batch_id(batch_id) else None
        if batch is None:
            raise _not_found(batch_id)
        return batch

    def list(self, tenant: str, *, limit: int, after: str | None) -> BatchPage:
        """A page of batches behind the batch ``after``, newest first.

        Raises:
            RequestRefusedError: ``after`` is no batch of the tenant.
        """
        page = None
        if after is None or is_batch_id(after):
            page = self._repository.page(tenant, limit=limit, after=after)
        if page is None:
            message = f"after: there is no batch with the id {(after or '')[:80]!r}."
            raise RequestRefusedError(message, param="after", code="invalid_cursor")
        return BatchPage(*page)

    def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Let a batch end: what is done stays, what waits or runs is stopped. Asking again changes nothing.

        Raises:
            NotFoundError: The tenant has none.
            NotReadyError: It is finished, or about to be.
        """
        batch = self._repository.request_cancel(tenant, batch_id) if is_batch_id(batch_id) else None
        if batch is None:
            raise _not_found(batch_id)
        if batch.status not in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
            message = f"The batch {batch_id} cannot be cancelled any more: it is {batch.status.value}."
            raise NotReadyError(message, code="batch_not_cancellable", param="batch_id")
        return batch


def _refused(param: str, given: str, allowed: tuple[str, ...]) -> RequestRefusedError:
    message = f"{param}: there is no {given[:80]!r}; allowed: {', '.join(allowed)}"
    return RequestRefusedError(message, param=param, code=f"invalid_{param}")


def _not_found(batch_id: str) -> NotFoundError:
    return NotFoundError(f"There is no batch with the id {batch_id[:80]!r}.", code="batch_not_found", param="batch_id")
