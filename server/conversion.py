"""Forms of a finished video that are not stored: made by a child process when somebody asks for them.

DICOM would take thirty times the room of the MP4, an animated WebP three times the time of its encoding, and few are
ever asked for. The child has bounds on memory and time, and the API process loads no decoder.
"""

import enum
import logging
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from server.children import plain_environment
from server.settings import Settings

__all__ = ["LIMIT_BYTES", "LIMIT_S", "ConversionError", "Form", "convert"]

logger = logging.getLogger(__name__)

LIMIT_S = 120
"""Seconds that a conversion may take."""
LIMIT_BYTES = 4 * 2**30
"""Address space of a child."""
_children = threading.BoundedSemaphore(2)
"""Children of this process that run at once: others wait."""
_SIGNING = ("c2pa_certificate", "c2pa_private_key", "c2pa_algorithm")


class Form(enum.StrEnum):
    """What can be made of a stored video."""

    PREVIEW = "preview"
    """Animated WebP that loops."""
    DICOM = "dicom"
    """Multi-frame True Color Secondary Capture, exact to the bit."""


class ConversionError(Exception):
    """The video could not be converted; the log says why."""


def convert(form: Form, source: Path, *, modality: str, settings: Settings) -> IO[bytes]:
    """Make another form of a video; returns it as an open file without a name, to be closed by the caller.

    Args:
        source: The stored video: FFV1, or for a preview also MP4.
        modality: DICOM modality, such as ``US``.
        settings: What files are signed with.

    Raises:
        ConversionError: It took too long or too much memory, or the stored video is damaged.
    """
    environment = plain_environment("TMPDIR")
    for name, value in settings.environment().items():
        if name.removeprefix("MEDSORA_").lower() in _SIGNING:
            environment[name] = value
    target = tempfile.TemporaryFile()  # noqa: SIM115 - handed on
    try:
        with _children:
            done = subprocess.run(
                [sys.executable, "-m", "server.worker.conversion", form.value, str(source), modality],
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=subprocess.PIPE,
                env=environment,
                timeout=LIMIT_S,
                check=False,
            )
        if done.returncode != 0:
            logger.error("%s cannot be made of %s: %s", form, source.name, done.stderr.decode(errors="replace")[-2000:])
            raise ConversionError(f"The {form} of this video cannot be made.")
    except subprocess.TimeoutExpired:
        target.close()
        raise ConversionError(f"The {form} of this video takes more than {LIMIT_S} s to make.") from None
    except BaseException:
        target.close()
        raise
    return target
