"""The rules of webhooks: what is accepted, and what a client may see."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from server.errors import NotFoundError, RequestRefusedError
from server.webhooks.addresses import RefusedAddressError, check_url
from server.webhooks.model import KINDS, is_webhook_id
from server.webhooks.repository import DeliveryRecord, TooManyWebhooksError, WebhookRecord, WebhookRepository
from server.webhooks.signature import is_secret

__all__ = ["DeliveryPage", "WebhookService", "check_request_webhook"]

MOST_WEBHOOKS = 20


@dataclass(frozen=True)
class DeliveryPage:
    """A part of the log of deliveries."""

    deliveries: list[DeliveryRecord]
    has_more: bool


class WebhookService:
    """Everything that the API does with webhooks.

    Args:
        private_hosts: Hosts that may have a private address.
    """

    def __init__(self, repository: WebhookRepository, *, private_hosts: Collection[str]) -> None:
        self._repository = repository
        self._private_hosts = private_hosts

    def create(self, tenant: str, *, url: str, kinds: list[str] | None) -> WebhookRecord:
        """Add a webhook. Its secret is told this once.

        Raises:
            RequestRefusedError: Names the field and what is allowed.
        """
        _check(url, self._private_hosts)
        try:
            return self._repository.add(tenant, url=url, kinds=_checked(kinds), most=MOST_WEBHOOKS)
        except TooManyWebhooksError:
            message = f"There are {MOST_WEBHOOKS} webhooks, no more are possible: delete or change one."
            raise RequestRefusedError(message, code="too_many_webhooks") from None

    def get(self, tenant: str, webhook_id: str) -> WebhookRecord:
        """The webhook of that id.

        Raises:
            NotFoundError: The tenant has none.
        """
        webhook = self._repository.get(tenant, webhook_id) if is_webhook_id(webhook_id) else None
        if webhook is None:
            raise _not_found(webhook_id)
        return webhook

    def all_of(self, tenant: str) -> list[WebhookRecord]:
        """All of them, oldest first."""
        return self._repository.all_of(tenant)

    def change(self, tenant: str, webhook_id: str, *, url: str | None, kinds: list[str] | None) -> WebhookRecord:
        """Change what is given; what waits goes to the new address.

        Raises:
            RequestRefusedError, NotFoundError: As above.
        """
        values: dict[str, Any] = {}
        if url is not None:
            _check(url, self._private_hosts)
            values["url"] = url
        if kinds is not None:
            values["kinds"] = _checked(kinds)
        webhook = self.get(tenant, webhook_id)
        changed = self._repository.change(tenant, webhook_id, values) if values else webhook
        if changed is None:
            raise _not_found(webhook_id)
        return changed

    def delete(self, tenant: str, webhook_id: str) -> None:
        """Remove one with its deliveries; what waits is not sent any more.

        Raises:
            NotFoundError: The tenant has none.
        """
        if not (is_webhook_id(webhook_id) and self._repository.remove(tenant, webhook_id)):
            raise _not_found(webhook_id)

    def deliveries(self, tenant: str, webhook_id: str, *, limit: int, after: str | None) -> DeliveryPage:
        """A page of the log, newest first.

        Raises:
            NotFoundError: The tenant has no such webhook.
            RequestRefusedError: ``after`` is no delivery of it.
        """
        self.get(tenant, webhook_id)
        page = self._repository.deliveries(tenant, webhook_id, limit=limit, after=after)
        if page is None:
            message = f"after: there is no delivery with the id {(after or '')[:80]!r}."
            raise RequestRefusedError(message, param="after", code="invalid_cursor")
        return DeliveryPage(*page)


def check_request_webhook(url: str | None, secret: str | None, *, private_hosts: Collection[str]) -> None:
    """Check the address that comes with a request, and what its messages are signed with.

    Raises:
        RequestRefusedError: Names the field and what is allowed.
    """
    if url is None and secret is None:
        return
    if url is None:
        raise _refused("webhook_url", "webhook_url: is required with webhook_secret")
    _check(url, private_hosts, param="webhook_url")
    if secret is None or not is_secret(secret):
        given = "is required with webhook_url" if secret is None else "is no such secret"
        raise _refused("webhook_secret", f"webhook_secret: {given}: whsec_ and 24 to 64 random bytes in base64")


def _check(url: str, private_hosts: Collection[str], param: str = "url") -> None:
    try:
        check_url(url, private_hosts=private_hosts)
    except RefusedAddressError as error:
        raise _refused(param, f"{param}: {error}; allowed: https:// or http:// and a public host") from None


def _checked(kinds: list[str] | None) -> list[str]:
    if kinds is None:
        return list(KINDS)
    if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS):
        raise _refused("events", f"events: must be different names, at least one; allowed: {', '.join(KINDS)}")
    return kinds


def _refused(param: str, message: str) -> RequestRefusedError:
    return RequestRefusedError(message, param=param, code=f"invalid_{param}")


def _not_found(webhook_id: str) -> NotFoundError:
    message = f"There is no webhook with the id {webhook_id[:80]!r}."
    return NotFoundError(message, code="webhook_not_found", param="webhook_id")
