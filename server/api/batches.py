"""/v1/batches: OpenAI's batch contract, for lines of POST /v1/videos."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from server.api.dependencies import ServicesDep, TenantDep
from server.api.fields import check_fields, is_storable, read_json_object
from server.api.files import ExpiresAfter
from server.api.openapi import error_responses, links, request_body
from server.api.schemas import BatchList, BatchObject
from server.batches.model import WINDOWS_S
from server.batches.service import ENDPOINTS, BatchOrder
from server.errors import RequestRefusedError

__all__ = ["router"]

router = APIRouter(prefix="/v1/batches", tags=["batches"])

MAX_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512


class CreateBatchFields(BaseModel):
    """Fields of a new batch."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: StrictStr = Field(
        description="Id of an uploaded file for batch: one JSON object a line, with custom_id, method, url and body."
    )
    endpoint: StrictStr = Field(description="What every line asks for.", json_schema_extra={"enum": list(ENDPOINTS)})
    completion_window: StrictStr = Field(
        description="Time within which the batch must be done; what is not by then is given up.",
        json_schema_extra={"enum": list(WINDOWS_S)},
    )
    metadata: dict[StrictStr, StrictStr] | None = Field(
        None,
        description=f"Up to {MAX_PAIRS} pairs of text, kept with the batch: keys of 1 to {MAX_KEY} characters, "
        f"values of up to {MAX_VALUE}.",
        json_schema_extra={"maxProperties": MAX_PAIRS},
    )
    output_expires_after: ExpiresAfter | None = Field(
        None, description="When the output and the error file go by themselves; left out: they are kept."
    )


@router.post(
    "",
    openapi_extra=request_body(CreateBatchFields, "application/json"),
    responses={**links("batch_id", "get_batch", "cancel_batch"), **error_responses(400, 413, 415, 429, 503)},
)
async def create_batch(request: Request, services: ServicesDep, tenant: TenantDep) -> BatchObject:
    """Work off the lines of an uploaded file while the server has time for them."""
    fields = check_fields(CreateBatchFields, await read_json_object(request))
    expires_after = fields.output_expires_after
    order = BatchOrder(
        input_file_id=fields.input_file_id,
        endpoint=fields.endpoint,
        completion_window=fields.completion_window,
        metadata=_check_metadata(fields.metadata),
        output_expires_after_s=None if expires_after is None else expires_after.seconds,
    )
    return BatchObject.of(await run_in_threadpool(services.batches.create, tenant, order))


@router.get("", responses=error_responses(400, 503))
def list_batches(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most batches of this page.")] = 20,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last batch of the page before.")] = None,
) -> BatchList:
    """List batches, newest first, a page at a time."""
    page = services.batches.list(tenant, limit=limit, after=after or None)
    data = [BatchObject.of(batch) for batch in page.batches]
    return BatchList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{batch_id}", responses=error_responses(404, 503))
def get_batch(batch_id: str, services: ServicesDep, tenant: TenantDep) -> BatchObject:
    """How far a batch is."""
    return BatchObject.of(services.batches.get(tenant, batch_id))


@router.post("/{batch_id}/cancel", responses=error_responses(404, 409, 503))
def cancel_batch(batch_id: str, services: ServicesDep, tenant: TenantDep) -> BatchObject:
    """Stop a batch. What is done stays; its files tell what came of every line."""
    return BatchObject.of(services.batches.cancel(tenant, batch_id))


def _check_metadata(pairs: dict[str, str] | None) -> dict[str, str] | None:
    if pairs is None:
        return None
    if len(pairs) > MAX_PAIRS:
        raise _refused(f"has {len(pairs)} pairs; allowed: {MAX_PAIRS}")
    for key, value in pairs.items():
        if not (1 <= len(key) <= MAX_KEY and is_storable(key)):
            raise _refused(f"has a key of {len(key)} characters; allowed: 1 to {MAX_KEY} that are text")
        if not (len(value) <= MAX_VALUE and is_storable(value)):
            raise _refused(f"{key!r} has {len(value)} characters; allowed: up to {MAX_VALUE} that are text")
    return pairs


def _refused(message: str) -> RequestRefusedError:
    return RequestRefusedError(f"metadata: {message}", param="metadata", code="invalid_metadata")
