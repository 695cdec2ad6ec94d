"""Signatures of the Standard Webhooks scheme (version 1, HMAC-SHA256), which OpenAI's client verifies."""

import base64
import binascii
import hashlib
import hmac
import secrets

from server.sealing import Sealer

__all__ = ["PREFIX", "is_secret", "new_secret", "open_secret", "seal_secret", "sign"]

PREFIX = "whsec_"
_LEAST_BYTES, _MOST_BYTES = 24, 64


def new_secret() -> str:
    """A secret that nobody can guess."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def is_secret(text: str) -> bool:
    """Whether it is ``whsec_`` and 24 to 64 bytes in base64."""
    if not text.startswith(PREFIX):
        return False
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        return False
    return _LEAST_BYTES <= len(key) <= _MOST_BYTES


def seal_secret(sealer: Sealer, secret: str) -> str:
    """A secret as it goes to the database: its bytes sealed, at most 200 characters.

    Raises:
        SettingsError, OSError: There is no key to seal with.
    """
    return sealer.seal(base64.b64decode(secret.removeprefix(PREFIX))).decode()


def open_secret(sealer: Sealer, kept: str) -> str:
    """The secret in clear.

    Raises:
        SealError: It was sealed with another key.
        SettingsError, OSError: There is no key to open it with.
    """
    if kept.startswith(PREFIX):  # from before secrets were sealed
        return kept
    return PREFIX + base64.b64encode(sealer.open(kept.encode())).decode()


def sign(secret: str, *, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers that go with a message.

    Args:
        secret: ``whsec_...``
        message_id: The same at every attempt.
        timestamp: Unix seconds of this attempt.
    """
    key = base64.b64decode(secret.removeprefix(PREFIX))
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }
