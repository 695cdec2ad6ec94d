"""Tables of keys, and what a key may be good for. A key itself is nowhere kept, only its hash."""

import enum
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import JSON, Double, String
from sqlalchemy.orm import Mapped, mapped_column

from server.jobs.model import Base

__all__ = ["ALL_SCOPES", "ApiKey", "Scope", "Secret", "is_tenant", "new_secret", "read_secret"]

_SECRET = re.compile(r"medsora_([0-9a-f]{16})_[0-9a-f]{64}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Scope(enum.StrEnum):
    """A part of the API."""

    VIDEOS_READ = "videos:read"
    """See videos, how far they are, and download them."""
    VIDEOS_WRITE = "videos:write"
    """Ask for videos, cancel and delete them."""
    BATCHES = "batches"
    """Files and batches, whole."""
    DATASETS = "datasets"
    """Datasets, whole."""
    WEBHOOKS = "webhooks"
    """Where events are sent to."""


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True)
class Secret:
    """A key as its owner has it."""

    key_id: str
    """The part by which it is found and told of: no secret."""
    text: str
    """All of it."""

    def __repr__(self) -> str:
        """Without the secret part: this may end in a log."""
        return f"Secret({self.key_id!r})"


def new_secret() -> Secret:
    """A new key of 256 random bits, with a prefix by which programs that look for leaked keys know it."""
    key_id = secrets.token_hex(8)
    return Secret(f"key_{key_id}", f"medsora_{key_id}_{secrets.token_hex(32)}")


def read_secret(text: str) -> Secret | None:
    """What could be a key; None: it cannot."""
    match = _SECRET.fullmatch(text)
    return None if match is None else Secret(f"key_{match[1]}", text)


def is_tenant(text: str) -> bool:
    """Whether a tenant may be called so."""
    return _TENANT.fullmatch(text) is not None


class ApiKey(Base):
    """A key: whose it is, what it is good for, and how to know it."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    """What its owner uses it for."""
    sha256: Mapped[str] = mapped_column(String(64))
    """Of the whole key: 256 random bits need no slow hash."""
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    revoked_at: Mapped[float | None] = mapped_column(Double)
