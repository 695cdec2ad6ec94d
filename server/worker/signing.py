"""C2PA manifests: signed by the operator's certificate, they tell of any later change of a file.

Needs the package c2pa-python, where a certificate is set.
"""

import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medsora
from medsora.errors import VideoError
from medsora.provenance import DIGITAL_SOURCE_TYPE
from server.settings import Settings as ServerSettings
from server.settings import SettingsError

if TYPE_CHECKING:
    from c2pa import Signer

__all__ = ["check_signature", "sign_file", "signer_of"]

_SOURCE_TYPE = f"http://cv.iptc.org/newscodes/digitalsourcetype/{DIGITAL_SOURCE_TYPE}"
_CREATED = "c2pa.created"
_NO_THUMBNAIL = {"builder": {"thumbnail": {"enabled": False}}}
"""Else each picture would carry another of itself, many times its size."""


def signer_of(settings: ServerSettings) -> "Signer | None":
    """What files are signed with; None: no certificate is set.

    Raises:
        SettingsError: The certificate or key cannot be read or used, or the package c2pa-python is missing.
    """
    if settings.c2pa_certificate is None or settings.c2pa_private_key is None:
        return None
    return _load_signer(settings.c2pa_certificate, settings.c2pa_private_key, settings.c2pa_algorithm)


@lru_cache(maxsize=4)
def _load_signer(certificate: Path, private_key: Path, algorithm: str) -> "Signer":
    try:
        from c2pa import C2paError, C2paSignerInfo, C2paSigningAlg, Signer
    except ImportError:
        raise SettingsError("MEDSORA_C2PA_CERTIFICATE needs the package c2pa-python: install medsora[c2pa]") from None
    try:
        # No time stamp authority: nothing of a request leaves the machine.
        info = C2paSignerInfo(
            C2paSigningAlg[algorithm.upper()], certificate.read_bytes(), private_key.read_bytes(), None
        )
        return Signer.from_info(info)
    except OSError as error:
        raise SettingsError(f"MEDSORA_C2PA_*: {error.filename} cannot be read: {error.strerror}") from None
    except C2paError as error:
        raise SettingsError(f"MEDSORA_C2PA_*: certificate, key and algorithm cannot be used: {error}") from None


def sign_file(path: Path, signer: "Signer", *, title: str) -> None:
    """Put a C2PA manifest into a finished file.

    Raises:
        VideoError: It cannot be signed.
        OSError: There is no room for it.
    """
    from c2pa import Builder, C2paError, Context, Settings

    action = {
        "action": _CREATED,
        "digitalSourceType": _SOURCE_TYPE,
        "softwareAgent": {"name": "MedSora", "version": medsora.__version__},
    }
    manifest = {
        "claim_generator_info": [{"name": "MedSora Server", "version": medsora.__version__}],
        "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    # Not beside the file: what is left there after a crash would belong to nobody.
    with tempfile.TemporaryDirectory(prefix="medsora-sign-") as folder:
        signed = Path(folder) / path.name
        try:
            with Context(Settings.from_dict(_NO_THUMBNAIL)) as context, Builder(manifest, context) as builder:
                builder.sign_file(path, signed, signer)
        except C2paError as error:
            raise VideoError(f"{path.name}: cannot be signed: {error}") from error
        shutil.copyfile(signed, path)


def check_signature(path: Path) -> None:
    """Refuse a file whose manifest is missing or broken, or does not say that a model made it.

    Whether the certificate is of somebody who is trusted is for the reader to judge.

    Raises:
        VideoError: As above.
    """
    from c2pa import C2paError, Reader

    try:
        with Reader(path) as reader:
            state, manifest = reader.get_validation_state(), reader.get_active_manifest()
    except C2paError as error:
        raise VideoError(f"{path.name}: has no C2PA manifest that can be read: {error}") from error
    if state not in ("Valid", "Trusted"):
        raise VideoError(f"{path.name}: its C2PA manifest is {state}")
    if not any(
        action.get("action") == _CREATED and action.get("digitalSourceType") == _SOURCE_TYPE
        for action in _actions(manifest)
    ):
        raise VideoError(f"{path.name}: its C2PA manifest does not say that a model made it")


def _actions(manifest: Any) -> list[dict[str, Any]]:
    return [
        action
        for assertion in (manifest or {}).get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
