"""Messages for webhooks, made in the transaction of what they tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select

from server.jobs.database import database_now
from server.webhooks.model import KINDS, Delivery, Webhook, new_delivery_id

__all__ = ["Message", "put_out"]

_DELIVERY: Any = Delivery.__table__
_WEBHOOKS_OF = select(Webhook.__table__).where(Webhook.tenant.in_(bindparam("tenants", expanding=True)))
_SENT_AS = {"video.cancelled": "video.failed"}
"""Event of the log -> what it is sent as."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What happened, and whom it may concern."""

    tenant: str
    kind: str
    subject: str
    data: dict[str, Any]
    url: str | None = None
    """An address that came with the request for the object, besides the tenant's webhooks."""
    secret: str | None = None
    """That its messages are signed with."""


def put_out(connection: Connection, messages: Sequence[Message]) -> None:
    """Put messages into the outbox, one for each address that wants to hear of it."""
    wanted = [(message, _SENT_AS.get(message.kind, message.kind)) for message in messages]
    wanted = [(message, kind) for message, kind in wanted if kind in KINDS]
    if not wanted:
        return
    tenants = {message.tenant for message, _ in wanted}
    webhooks = connection.execute(_WEBHOOKS_OF, {"tenants": sorted(tenants)}).all()
    rows: list[dict[str, Any]] = []
    for message, kind in wanted:
        to: list[tuple[str | None, str, str | None]] = [
            (row.id, row.url, None) for row in webhooks if row.tenant == message.tenant and kind in row.kinds
        ]
        if message.url is not None:
            to.append((None, message.url, message.secret))
        rows += [
            {
                "id": new_delivery_id(),
                "tenant": message.tenant,
                "webhook_id": webhook_id,
                "url": url,
                "secret": secret,
                "kind": kind,
                "subject": message.subject,
                "data": message.data,
                "state": "pending",
                "attempts": 0,
            }
            for webhook_id, url, secret in to
        ]
    if rows:
        now = {"created_at": database_now(), "next_at": database_now()}
        connection.execute(insert(_DELIVERY).values(now), rows)
