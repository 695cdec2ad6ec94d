"""All queries of webhooks and of the outbox. Each method is one transaction; the database's clock alone is compared."""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, delete, func, insert, or_, select, update

from server.idempotency import note_made
from server.jobs.database import Database, database_now, lock_rows
from server.measures import Measure, Observation, add_observations
from server.sealing import Sealer, SealError
from server.settings import SettingsError
from server.webhooks.model import Delivery, DeliveryState, Webhook, new_webhook_id
from server.webhooks.signature import new_secret, open_secret, seal_secret

__all__ = [
    "AT_ONCE_A_URL",
    "DELIVERIES",
    "DeliveryRecord",
    "DueDelivery",
    "TooManyWebhooksError",
    "WebhookRecord",
    "WebhookRepository",
]

logger = logging.getLogger(__name__)
_WEBHOOK: Any = Webhook.__table__
_DELIVERY: Any = Delivery.__table__
AT_ONCE_A_URL = 4
"""Attempts at one address that are claimed at once: one that hangs must not hold up the others."""
DELIVERIES = Measure(
    name="medsora_webhook_deliveries",
    about="Attempts at delivering a message to a webhook: delivered, tried_again later, or given_up for good.",
    labels=("result",),
)
_LOST = "the server was stopped during the last attempt"


class TooManyWebhooksError(Exception):
    """A tenant has as many as it may have."""


@dataclass(frozen=True, kw_only=True)
class WebhookRecord:
    """A row, detached; see :class:`server.webhooks.model.Webhook`."""

    seq: int
    id: str
    tenant: str
    url: str
    kinds: list[str]
    secret: str = field(repr=False)
    """Sealed, but of one that was just made."""
    created_at: float


@dataclass(frozen=True, kw_only=True)
class DeliveryRecord:
    """A row, detached; see :class:`server.webhooks.model.Delivery`."""

    seq: int
    id: str
    tenant: str
    webhook_id: str | None
    url: str
    secret: str | None = field(repr=False)
    kind: str
    subject: str
    data: dict[str, Any]
    state: DeliveryState
    attempts: int
    next_at: float | None
    status_code: int | None
    problem: str | None
    created_at: float
    attempted_at: float | None
    delivered_at: float | None


@dataclass(frozen=True, kw_only=True)
class DueDelivery:
    """A claimed attempt: it is the claimer's until ``lease_s`` are over."""

    delivery: DeliveryRecord
    secret: str | None = field(repr=False)
    """In clear; None: it cannot be opened with the keys that there are."""

    @property
    def body(self) -> bytes:
        """What is sent: the same bytes at every attempt."""
        one = self.delivery
        event = {
            "id": one.id.replace("msg_", "evt_", 1),
            "object": "event",
            "created_at": int(one.created_at),
            "type": one.kind,
            "data": one.data,
        }
        return json.dumps(event, separators=(",", ":")).encode()


class WebhookRepository:
    """Storage of webhooks and deliveries. Safe to use from several threads."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database, self._sealer = database, sealer

    # -- clients ---------------------------------------------------------------------------------------------

    def add(self, tenant: str, *, url: str, kinds: list[str], most: int) -> WebhookRecord:
        """Insert one, with a new secret, which the answer alone tells.

        Raises:
            TooManyWebhooksError: The tenant has ``most`` already.
        """
        secret = new_secret()
        sealed = seal_secret(self._sealer, secret)
        with self._database.write() as connection:
            count = connection.scalar(select(func.count()).where(Webhook.tenant == tenant)) or 0
            if count >= most:
                raise TooManyWebhooksError
            values = {"id": new_webhook_id(), "tenant": tenant, "url": url, "kinds": kinds, "secret": sealed}
            statement = insert(_WEBHOOK).values(created_at=database_now(), **values).returning(*_WEBHOOK.c)
            row = connection.execute(statement).one()
            note_made(connection, row.id)
        return WebhookRecord(**{**row._mapping, "secret": secret})

    def get(self, tenant: str, webhook_id: str) -> WebhookRecord | None:
        """The tenant's webhook of that id."""
        query = select(_WEBHOOK).where(Webhook.id == webhook_id, Webhook.tenant == tenant)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else WebhookRecord(**row._mapping)

    def all_of(self, tenant: str) -> list[WebhookRecord]:
        """All of a tenant's webhooks, oldest first."""
        query = select(_WEBHOOK).where(Webhook.tenant == tenant).order_by(Webhook.seq)
        with self._database.read() as connection:
            return [WebhookRecord(**row._mapping) for row in connection.execute(query)]

    def change(self, tenant: str, webhook_id: str, values: dict[str, Any]) -> WebhookRecord | None:
        """Change the address or the kinds; what waits goes to the new address. None: there is none."""
        it = (Webhook.id == webhook_id, Webhook.tenant == tenant)
        with self._database.write() as connection:
            row = connection.execute(update(_WEBHOOK).where(*it).values(values).returning(*_WEBHOOK.c)).one_or_none()
            if row is not None and "url" in values:
                waiting = (Delivery.webhook_id == webhook_id, Delivery.state == DeliveryState.PENDING)
                connection.execute(update(Delivery).where(*waiting).values(url=values["url"]))
        return None if row is None else WebhookRecord(**row._mapping)

    def remove(self, tenant: str, webhook_id: str) -> bool:
        """Remove one with all its deliveries, sent or not. False: there is none."""
        it = (Webhook.id == webhook_id, Webhook.tenant == tenant)
        with self._database.write() as connection:
            if connection.execute(delete(Webhook).where(*it)).rowcount == 0:
                return False
            connection.execute(delete(Delivery).where(Delivery.webhook_id == webhook_id))
        return True

    def deliveries(
        self, tenant: str, webhook_id: str, *, limit: int, after: str | None
    ) -> tuple[list[DeliveryRecord], bool] | None:
        """Deliveries behind the cursor, newest first, and whether there are more; None: the cursor is none."""
        query = select(_DELIVERY).where(Delivery.webhook_id == webhook_id, Delivery.tenant == tenant)
        with self._database.read() as connection:
            if after is not None:
                cursor = connection.scalar(
                    select(Delivery.seq).where(Delivery.id == after, Delivery.webhook_id == webhook_id)
                )
                if cursor is None:
                    return None
                query = query.where(Delivery.seq < cursor)
            rows = connection.execute(query.order_by(Delivery.seq.desc()).limit(limit + 1)).all()
        return [_delivery(row) for row in rows[:limit]], len(rows) > limit

    # -- senders ---------------------------------------------------------------------------------------------

    def claim_due(
        self, *, limit: int, lease_s: float, max_attempts: int, busy: Collection[str] = ()
    ) -> list[DueDelivery]:
        """Take deliveries whose time has come; the attempt is counted before it is made.

        Args:
            max_attempts: Deliveries whose last attempt was lost are given up.
            busy: Addresses to leave out.
            lease_s: Seconds after which an attempt without an end counts as lost.
        """
        place = func.row_number().over(partition_by=Delivery.url, order_by=Delivery.seq).label("place")
        due = (
            select(Delivery.seq, place)
            .where(Delivery.state == DeliveryState.PENDING, Delivery.next_at <= database_now())
            .where(Delivery.url.not_in(busy))
            .subquery()
        )
        chosen = select(due.c.seq).where(due.c.place <= AT_ONCE_A_URL).order_by(due.c.seq).limit(limit)
        lost = (
            Delivery.state == DeliveryState.PENDING,
            Delivery.next_at <= database_now(),
            Delivery.attempts >= max_attempts,
        )
        given_up = {"state": DeliveryState.FAILED.value, "next_at": None, "problem": _LOST, "secret": None}
        with self._database.write() as connection:
            # what another sender is at, to take it or to settle it, is left to that one
            seqs = lock_rows(connection, select(Delivery.seq).where(*lost).order_by(Delivery.seq), skip_locked=True)
            number = connection.execute(update(Delivery).where(Delivery.seq.in_(seqs)).values(given_up)).rowcount
            add_observations(connection, [Observation(DELIVERIES, ("given_up",))] * number)
            waits = (Delivery.state == DeliveryState.PENDING, Delivery.next_at <= database_now())
            taken = select(Delivery.seq).where(Delivery.seq.in_(chosen), *waits).order_by(Delivery.seq)
            statement = (
                update(_DELIVERY)
                .where(Delivery.seq.in_(lock_rows(connection, taken, skip_locked=True)))
                .values(
                    attempts=Delivery.attempts + 1,
                    next_at=database_now() + lease_s,
                    attempted_at=database_now(),
                )
                .returning(*_DELIVERY.c)
            )
            rows = connection.execute(statement).all()
            webhook_ids = {row.webhook_id for row in rows if row.webhook_id is not None}
            query = select(Webhook.id, Webhook.secret).where(Webhook.id.in_(webhook_ids))
            secrets = {row.id: row.secret for row in connection.execute(query)}
        claimed = []
        for row in rows:
            secret = row.secret if row.webhook_id is None else secrets.get(row.webhook_id)
            if secret is not None:  # else the webhook has just been removed, and its deliveries with it
                claimed.append(DueDelivery(delivery=_delivery(row), secret=self._opened(secret)))
        return claimed

    def _opened(self, kept: str) -> str | None:
        try:
            return open_secret(self._sealer, kept)
        except (SealError, SettingsError, OSError) as error:
            logger.warning("the secret of a webhook cannot be opened: %s", error)
            return None

    def settle(
        self,
        due: DueDelivery,
        *,
        status_code: int | None,
        problem: str | None,
        retry_after_s: float | None,
    ) -> bool:
        """Write down what came of an attempt. False: it counts as lost, and another is at work.

        Args:
            problem: None: it was delivered.
            retry_after_s: When to try again; None: never.
        """
        values: dict[str, Any] = {"status_code": status_code, "problem": problem, "next_at": None}
        if problem is None:
            values |= {"state": DeliveryState.DELIVERED.value, "delivered_at": database_now(), "secret": None}
        elif retry_after_s is None:
            values |= {"state": DeliveryState.FAILED.value, "secret": None}
        else:
            values["next_at"] = database_now() + retry_after_s
        it = (
            Delivery.seq == due.delivery.seq,
            Delivery.state == DeliveryState.PENDING,
            Delivery.attempts == due.delivery.attempts,
        )
        result = "delivered" if problem is None else "given_up" if retry_after_s is None else "tried_again"
        with self._database.write() as connection:
            is_settled = connection.execute(update(Delivery).where(*it).values(values)).rowcount == 1
            if is_settled:
                add_observations(connection, [Observation(DELIVERIES, (result,))])
        return is_settled

    def counts(self) -> dict[str, int]:
        """Deliveries that are kept, by state."""
        query = select(Delivery.state, func.count()).group_by(Delivery.state)
        with self._database.read() as connection:
            return {row.state: row[1] for row in connection.execute(query)}

    def sweep(self, *, kept_s: float) -> int:
        """Remove deliveries that ended long ago, and those that nobody could sign any more; returns how many."""
        old = and_(Delivery.state != DeliveryState.PENDING, Delivery.created_at < database_now() - kept_s)
        orphaned = and_(Delivery.webhook_id.is_not(None), Delivery.webhook_id.not_in(select(Webhook.id)))
        with self._database.write() as connection:
            return connection.execute(delete(Delivery).where(or_(old, orphaned))).rowcount


def _delivery(row: Any) -> DeliveryRecord:
    return DeliveryRecord(**{**row._mapping, "state": DeliveryState(row.state)})
