"""Requests that may be sent twice: what was answered to the first is answered to each further one.

A request with an ``Idempotency-Key`` has a row, made before it is worked on. Whatever makes an object notes it in that
row, in the transaction that makes the object (:func:`note_made`): so there is one object for a key, whatever dies in
between, and in however many processes the request arrives at once. Times are of the database's clock.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Double, Integer, LargeBinary, String, delete, func, select, update
from sqlalchemy.orm import Mapped, mapped_column

from server.errors import InProgressError
from server.jobs.database import Database, database_now, insert_if_absent
from server.jobs.model import Base
from server.sealing import Sealer, SealError

__all__ = [
    "MAX_KEY",
    "Answer",
    "Begun",
    "IdempotentRequest",
    "IdempotentRequests",
    "InProgress",
    "Made",
    "OtherRequest",
    "note_made",
    "working_on",
]

KEPT_S = 86_400.0
"""Seconds for which a key means its first request."""
LEASE_S = 60.0
"""Seconds after which a request that was not answered counts as lost with its process."""
MAX_KEY = 255
"""Characters of a key."""
_RETRY_MS = 500


class IdempotentRequest(Base):
    """A request that was sent with a key, and what came of it."""

    __tablename__ = "idempotent_requests"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    """Of what was asked; another under the same key is refused."""
    token: Mapped[str] = mapped_column(String(32))
    """Of the process that works on it."""
    lease_until: Mapped[float] = mapped_column(Double)
    object_id: Mapped[str | None] = mapped_column(String(64))
    """What was made, noted in the same transaction."""
    status_code: Mapped[int | None] = mapped_column(Integer)
    """Of the answer; None: there is none yet."""
    content_type: Mapped[str | None] = mapped_column(String(200))
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    """Sealed (``server/sealing.py``)."""
    created_at: Mapped[float] = mapped_column(Double, index=True)


@dataclass(frozen=True)
class Begun:
    """The right to work on a request: it is the first of its key, or those before came to nothing."""

    tenant: str
    key: str
    token: str


@dataclass(frozen=True)
class Answer:
    """What was answered to the first request."""

    status_code: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Made:
    """The first request has made this, and its process died before it could answer."""

    object_id: str


@dataclass(frozen=True)
class InProgress:
    """The first request is being worked on."""


@dataclass(frozen=True)
class OtherRequest:
    """The key was used for something else."""


Outcome = Begun | Answer | Made | InProgress | OtherRequest

_TABLE: Any = IdempotentRequest.__table__
_working_on: ContextVar[Begun | None] = ContextVar("idempotent request", default=None)


class IdempotentRequests:
    """Storage of requests with a key. Safe to use from several threads."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database, self._sealer = database, sealer

    def begin(self, tenant: str, key: str, fingerprint: str) -> Outcome:
        """What to do with a request; also forgets what is older than a day."""
        begun = Begun(tenant, key, secrets.token_hex(16))
        values = {
            "tenant": tenant,
            "key": key,
            "fingerprint": fingerprint,
            "token": begun.token,
            "lease_until": database_now() + LEASE_S,
            "created_at": database_now(),
        }
        query = select(_TABLE, (IdempotentRequest.lease_until > database_now()).label("is_held"))
        with self._database.write() as connection:
            connection.execute(delete(_TABLE).where(IdempotentRequest.created_at < database_now() - KEPT_S))
            if insert_if_absent(connection, _TABLE, values):
                return begun
            row = connection.execute(query.where(*_is(tenant, key)).with_for_update()).one()
            if row.fingerprint != fingerprint:
                return OtherRequest()
            if row.status_code is not None:
                try:
                    return Answer(row.status_code, row.content_type, self._sealer.open(row.body))
                except SealError:  # the keys are others now: what was made is told as it is, all else not again
                    return OtherRequest() if row.object_id is None else Made(row.object_id)
            if row.is_held:
                return InProgress()
            if row.object_id is not None:
                return Made(row.object_id)
            taken = {"token": begun.token, "lease_until": database_now() + LEASE_S}
            connection.execute(update(_TABLE).where(*_is(tenant, key)).values(taken))
        return begun

    def finish(self, begun: Begun, answer: Answer) -> None:
        """Keep the answer for those who ask again."""
        body = self._sealer.seal(answer.body)  # that of a new webhook tells its secret
        values = {"status_code": answer.status_code, "content_type": answer.content_type, "body": body}
        with self._database.write() as connection:
            connection.execute(update(_TABLE).where(*_held(begun)).values(values))

    def release(self, begun: Begun) -> None:
        """Let the request be sent again, as it was refused; what was made nevertheless stays noted."""
        with self._database.write() as connection:
            connection.execute(delete(_TABLE).where(*_held(begun), IdempotentRequest.object_id.is_(None)))
            connection.execute(update(_TABLE).where(*_held(begun)).values(lease_until=0.0))


@contextmanager
def working_on(begun: Begun) -> Iterator[None]:
    """While this lasts, what :func:`note_made` is told of belongs to the request."""
    token = _working_on.set(begun)
    try:
        yield
    finally:
        _working_on.reset(token)


def note_made(connection: Connection, object_id: str) -> None:
    """Note, in the transaction that makes an object, that the request at work has made it; without a key: nothing.

    Of several objects the first is what the request is answered with.

    Raises:
        InProgressError: The request was taken for lost, and another process works on it now: make nothing.
    """
    begun = _working_on.get()
    if begun is None:
        return
    statement = update(_TABLE).where(*_held(begun))
    noted = statement.values(object_id=func.coalesce(IdempotentRequest.object_id, object_id))
    if connection.execute(noted).rowcount != 1:
        raise in_progress(begun.key)


def in_progress(key: str) -> InProgressError:
    """The error for a key whose first request is not answered yet."""
    message = f"idempotency-key: the first request with the key {key[:80]!r} is being worked on. Try again."
    return InProgressError(message, code="idempotency_key_in_use", param="idempotency-key", retry_after_ms=_RETRY_MS)


def _is(tenant: str, key: str) -> tuple[Any, ...]:
    return (IdempotentRequest.tenant == tenant, IdempotentRequest.key == key)


def _held(begun: Begun) -> tuple[Any, ...]:
    return (*_is(begun.tenant, begun.key), IdempotentRequest.token == begun.token)
