"""All queries of the table of keys. What they say holds in every process at once: nothing is kept in memory."""

import enum
import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, exists, insert, null, select, update

from server.jobs.database import Database, database_now
from server.keys.model import ApiKey, Scope, new_secret, read_secret

__all__ = ["KeyRecord", "KeyRepository", "KeyState"]

_TABLE: Any = ApiKey.__table__
_ANY_KEY = select(exists().where(ApiKey.id.is_not(None)))  # put together once: every request asks
_NOBODY = hashlib.sha256(b"").hexdigest()


class KeyState(enum.StrEnum):
    """What has become of a key."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """A row of the table of keys, detached; times in Unix seconds of the database's clock."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    state: KeyState
    """By the database's clock."""


class KeyRepository:
    """Storage of keys. Safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, *, tenant: str, name: str, scopes: frozenset[Scope], expires_after_s: float | None = None
    ) -> tuple[KeyRecord, str]:
        """Make a key.

        Returns:
            The key's row, and the key: nobody can read it again.
        """
        secret = new_secret()
        values = {
            "id": secret.key_id,
            "tenant": tenant,
            "name": name,
            "sha256": _hash(secret.text),
            "scopes": sorted(scopes),
            "created_at": database_now(),
            "expires_at": null() if expires_after_s is None else database_now() + expires_after_s,
        }
        with self._database.write() as connection:
            connection.execute(insert(_TABLE).values(values))
            row = connection.execute(_query().where(ApiKey.id == secret.key_id)).one()
        return _record(row), secret.text

    def list(self, *, tenant: str | None = None) -> list[KeyRecord]:
        """All keys, oldest first, of one tenant or of all."""
        query = _query() if tenant is None else _query().where(ApiKey.tenant == tenant)
        with self._database.read() as connection:
            return [_record(row) for row in connection.execute(query.order_by(ApiKey.created_at, ApiKey.id))]

    def revoke(self, key_id: str) -> KeyRecord | None:
        """Let a key be good for nothing from now on; None when there is none of that id."""
        with self._database.write() as connection:
            statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            connection.execute(statement.values(revoked_at=database_now()))
            row = connection.execute(_query().where(ApiKey.id == key_id)).one_or_none()
        return None if row is None else _record(row)

    def any_exists(self) -> bool:
        """Whether a key was ever made, whatever became of it."""
        with self._database.read() as connection:
            return bool(connection.scalar(_ANY_KEY))

    def find(self, text: str) -> KeyRecord | None:
        """The row of this key, whatever became of it; None when it is not a key of ours."""
        secret = read_secret(text)
        row = None
        if secret is not None:
            with self._database.read() as connection:
                row = connection.execute(_query().where(ApiKey.id == secret.key_id)).one_or_none()
        # In constant time, also where nothing was found.
        is_it = hmac.compare_digest(_hash(text), _NOBODY if row is None else row.sha256)
        return _record(row) if row is not None and is_it else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _query() -> Any:
    state = case(
        (ApiKey.revoked_at.is_not(None), KeyState.REVOKED.value),
        (ApiKey.expires_at <= database_now(), KeyState.EXPIRED.value),
        else_=KeyState.ACTIVE.value,
    )
    return select(*_TABLE.c, state.label("state"))


def _record(row: Any) -> KeyRecord:
    values = dict(row._mapping)
    del values["sha256"]
    # A scope that this version does not know gives nothing.
    scopes = frozenset(Scope(name) for name in values["scopes"] if name in set(Scope))
    return KeyRecord(**{**values, "scopes": scopes, "state": KeyState(values["state"])})
