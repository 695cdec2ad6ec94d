"""Secrets that must be had in clear again, sealed before they go to the database.

Whoever signs a webhook needs its secret as it is, so a hash will not do. Who has the database alone (a copy, a backup,
a query that was let in) has no secret: the key lies apart, in the settings or in a file of the data folder.
"""

import base64
import logging
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from medsora.files import sync
from server.settings import Settings, SettingsError, is_sealing_key

__all__ = ["FILE_NAME", "SealError", "Sealer", "new_key"]

logger = logging.getLogger(__name__)
FILE_NAME = "secrets.key"
_SEALED = b"gAAAA"
"""How all begins that Fernet (version 0x80, and a time of this century) makes; no secret or answer does."""


class SealError(Exception):
    """It was sealed with a key that is not among ours, or altered."""


class Sealer:
    """Seals and opens with the keys of this server, which are read or made when first needed. Safe in several threads.

    Args:
        settings: ``secrets_keys``, else the file ``secrets.key`` in ``data_dir``.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = Lock()
        self._keys: MultiFernet | None = None

    def load(self) -> None:
        """Read or make the keys now: what is wrong with them is told at the start of a process.

        Raises:
            SettingsError: The file with the keys is damaged.
            OSError: It cannot be read or made.
        """
        self._loaded()

    def seal(self, content: bytes) -> bytes:
        """ASCII that tells nothing of it but its length.

        Raises:
            SettingsError, OSError: As :meth:`load`.
        """
        return self._loaded().encrypt(content)

    def open(self, sealed: bytes) -> bytes:
        """What was sealed; what was kept before anything was sealed comes as it is.

        Raises:
            SealError: It was sealed with another key, or altered.
            SettingsError, OSError: As :meth:`load`.
        """
        if not sealed.startswith(_SEALED):
            return sealed
        try:
            return self._loaded().decrypt(sealed)
        except InvalidToken:
            raise SealError("sealed with another key than MEDSORA_SECRETS_KEYS or secrets.key, or altered") from None

    def _loaded(self) -> MultiFernet:
        with self._lock:
            if self._keys is None:
                given = self._settings.secrets_keys
                keys = [one.get_secret_value() for one in given] or _read_or_make(self._settings.data_dir / FILE_NAME)
                self._keys = MultiFernet([Fernet(key) for key in keys])
            return self._keys


def new_key() -> str:
    """256 random bits in URL-safe base64."""
    return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()


def _read_or_make(path: Path) -> Sequence[str]:
    """Of several processes that make it at once one wins, and all read what it wrote."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE_NAME}.")  # for its owner alone
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(new_key() + "\n")
            sync(Path(partial))
            try:
                os.link(partial, path)
            except FileExistsError:
                pass
            else:
                logger.info(
                    "made the key that secrets in the database are sealed with: %s; keep a copy of it", FILE_NAME
                )
        finally:
            Path(partial).unlink()
        sync(path.parent)
    if path.stat().st_mode & 0o077:
        logger.warning("%s can be read by others than its owner; chmod 600 it", FILE_NAME)
    keys = path.read_text().split()
    if not keys or not all(map(is_sealing_key, keys)):
        raise SettingsError(f"{FILE_NAME}: must hold keys of 32 random bytes in URL-safe base64, one a line")
    return keys
