"""Pictures of the running estimate, for jobs that somebody looks at. None is made that nobody asked for."""

import io
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from medsora.provenance import SYNTHETIC_NOTE
from server.jobs.repository import Claim, JobRepository

__all__ = ["PreviewWriter"]

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_MOST_PIXELS = 256
_LEAST_STEPS = 4
"""From one picture to the next: where steps are slow, most of them are not made slower still."""
_IMAGE_DESCRIPTION = 0x010E  # Exif

logger = logging.getLogger(__name__)


class PreviewWriter:
    """Previews of jobs that are sampled together.

    Args:
        claims: One for each request of the pipeline's call, in order.
        interval_s: Least seconds between two pictures, and between two looks whether somebody wants one; 0: never.
    """

    def __init__(self, repository: JobRepository, claims: Sequence[Claim], *, interval_s: float) -> None:
        self._repository, self._claims = repository, claims
        self._interval_s = interval_s
        self._next_look = 0.0  # of the steady clock
        self._next_step = 0
        self._step = 0
        self._wanted: list[bool] = []

    def wanted(self) -> bool:
        """Whether to make pictures in the step that begins now; asked once a step."""
        self._step += 1
        now = time.monotonic()
        if self._interval_s == 0 or now < self._next_look or self._step < self._next_step:
            return False
        self._next_look, self._next_step = now + self._interval_s, self._step + _LEAST_STEPS
        try:
            wanted = self._repository.previews_wanted([claim.job.id for claim in self._claims])
        except SQLAlchemyError:
            return False  # the next renewal of the lease finds out what is wrong
        self._wanted = [claim.job.id in wanted for claim in self._claims]
        return any(self._wanted)

    def show(self, first: int, pictures: Sequence[Picture]) -> None:
        """Tell those who look at a job what it will look like."""
        for number, picture in enumerate(pictures, start=first):
            if not self._wanted[number]:
                continue
            claim = self._claims[number]
            try:
                self._repository.show_preview(claim.job.id, claim.token, _webp(picture), steps_done=self._step)
            except SQLAlchemyError as error:
                logger.warning("a preview of %s could not be shown: %s", claim.job.id, type(error).__name__)


def _webp(picture: Picture) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))  # keeps the proportions, never enlarges
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = SYNTHETIC_NOTE
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=60, method=2, exif=exif)
    return file.getvalue()
