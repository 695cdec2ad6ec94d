"""/v1/webhooks: addresses that hear of what happens, and the log of what was sent to them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StrictStr

from server.api.access import TenantDep
from server.api.dependencies import ServicesDep
from server.api.fields import check_fields, read_json_object
from server.api.openapi import error_responses, links, request_body
from server.webhooks.model import KINDS
from server.webhooks.repository import DeliveryRecord, WebhookRecord

__all__ = ["router"]

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

_EVENTS = {"items": {"type": "string", "enum": list(KINDS)}, "minItems": 1, "uniqueItems": True}


class CreateWebhookFields(BaseModel):
    """Fields of a new webhook."""

    model_config = ConfigDict(extra="forbid")

    url: StrictStr = Field(
        description="Where to send: http or https, a public host.",
        max_length=2000,
        examples=["https://example.com/hooks/medsora"],
    )
    events: list[StrictStr] | None = Field(
        None, description="What to send; left out: all there is.", json_schema_extra={"examples": [list(KINDS[:2])]}
    )


class ChangeWebhookFields(BaseModel):
    """What to change of a webhook; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    url: StrictStr | None = Field(
        None, description="Where to send.", max_length=2000, examples=["https://example.com/hooks/medsora"]
    )
    events: list[StrictStr] | None = Field(
        None, description="What to send.", json_schema_extra={"examples": [list(KINDS[:2])]}
    )


class WebhookObject(BaseModel):
    """An address, and what it hears of."""

    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    created_at: int = Field(description="Unix seconds.")
    secret: str | None = Field(None, description="whsec_...: told once, in the answer to the request that made it.")

    @classmethod
    def of(cls, webhook: WebhookRecord, *, with_secret: bool = False) -> "WebhookObject":
        """The wire form of a webhook."""
        return cls(
            id=webhook.id,
            url=webhook.url,
            events=webhook.kinds,
            created_at=int(webhook.created_at),
            secret=webhook.secret if with_secret else None,
        )


class WebhookList(BaseModel):
    """All webhooks, oldest first."""

    object: Literal["list"] = "list"
    data: list[WebhookObject]


class DeletedWebhook(BaseModel):
    """Confirmation that a webhook is gone."""

    id: str
    object: Literal["webhook.deleted"] = "webhook.deleted"
    deleted: Literal[True] = True


class DeliveryObject(BaseModel):
    """A message to a webhook, and what came of it."""

    id: str = Field(description="Its webhook-id, the same at every attempt.")
    object: Literal["webhook.delivery"] = "webhook.delivery"
    type: str
    subject: str = Field(description="Id of what it tells of.")
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    status_code: int | None = Field(description="Of the newest answer.")
    error: str | None = Field(description="Why the newest attempt came to nothing.")
    created_at: int = Field(description="Unix seconds.")
    attempted_at: int | None = Field(description="Unix seconds.")
    delivered_at: int | None = Field(description="Unix seconds.")
    next_attempt_at: int | None = Field(description="Unix seconds; null: none will be made.")

    @classmethod
    def of(cls, delivery: DeliveryRecord) -> "DeliveryObject":
        """The wire form of a delivery."""
        return cls(
            id=delivery.id,
            type=delivery.kind,
            subject=delivery.subject,
            status=delivery.state.value,
            attempts=delivery.attempts,
            status_code=delivery.status_code,
            error=delivery.problem,
            created_at=int(delivery.created_at),
            attempted_at=None if delivery.attempted_at is None else int(delivery.attempted_at),
            delivered_at=None if delivery.delivered_at is None else int(delivery.delivered_at),
            next_attempt_at=None if delivery.next_at is None else int(delivery.next_at),
        )


class DeliveryList(BaseModel):
    """A page of deliveries, newest first."""

    object: Literal["list"] = "list"
    data: list[DeliveryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


_LINKS = links("webhook_id", "get_webhook", "change_webhook", "delete_webhook", "list_deliveries")


@router.post(
    "",
    openapi_extra=request_body(CreateWebhookFields, "application/json"),
    responses={**_LINKS, **error_responses(400, 413, 415, 503)},
)
async def create_webhook(request: Request, services: ServicesDep, tenant: TenantDep) -> WebhookObject:
    """Have what happens sent to an address. The secret that messages are signed with is told this once."""
    fields = check_fields(CreateWebhookFields, await read_json_object(request))
    webhook = await run_in_threadpool(services.webhooks.create, tenant, url=fields.url, kinds=fields.events)
    return WebhookObject.of(webhook, with_secret=True)


@router.get("", responses=error_responses(503))
def list_webhooks(services: ServicesDep, tenant: TenantDep) -> WebhookList:
    """List webhooks."""
    return WebhookList(data=[WebhookObject.of(webhook) for webhook in services.webhooks.all_of(tenant)])


@router.get("/{webhook_id}", responses=error_responses(404, 503))
def get_webhook(webhook_id: str, services: ServicesDep, tenant: TenantDep) -> WebhookObject:
    """A webhook, without its secret."""
    return WebhookObject.of(services.webhooks.get(tenant, webhook_id))


@router.post(
    "/{webhook_id}",
    openapi_extra=request_body(ChangeWebhookFields, "application/json"),
    responses=error_responses(400, 404, 413, 415, 503),
)
async def change_webhook(webhook_id: str, request: Request, services: ServicesDep, tenant: TenantDep) -> WebhookObject:
    """Change the address or the events. What waits to be sent goes to the new address."""
    fields = check_fields(ChangeWebhookFields, await read_json_object(request))
    webhook = await run_in_threadpool(services.webhooks.change, tenant, webhook_id, url=fields.url, kinds=fields.events)
    return WebhookObject.of(webhook)


@router.delete("/{webhook_id}", responses=error_responses(404, 503))
def delete_webhook(webhook_id: str, services: ServicesDep, tenant: TenantDep) -> DeletedWebhook:
    """Remove a webhook and its log; what waits is not sent any more."""
    services.webhooks.delete(tenant, webhook_id)
    return DeletedWebhook(id=webhook_id)


@router.get("/{webhook_id}/deliveries", responses=error_responses(400, 404, 503))
def list_deliveries(
    webhook_id: str,
    services: ServicesDep,
    tenant: TenantDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most deliveries of this page.")] = 20,
    after: Annotated[
        str | None, Query(max_length=100, description="Id of the last delivery of the page before.")
    ] = None,
) -> DeliveryList:
    """What was sent to a webhook, or is to be, newest first."""
    page = services.webhooks.deliveries(tenant, webhook_id, limit=limit, after=after or None)
    data = [DeliveryObject.of(delivery) for delivery in page.deliveries]
    return DeliveryList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )
