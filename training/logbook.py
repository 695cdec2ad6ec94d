"""What a run writes down of itself: ``log.jsonl`` for programs, TensorBoard events (with videos) for people."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from medsora.jsonconfig import to_json

__all__ = ["LOG", "Logbook", "encode_gif"]

LOG = "log.jsonl"
EVENTS = "tensorboard"
FLUSH_S = 30
"""A killed process loses the curves of the last so many seconds at most; ``log.jsonl`` loses nothing."""


class Logbook:
    """Appends to ``log.jsonl`` and ``tensorboard/`` in a run's folder.

    What an earlier leg wrote of steps after ``step`` is taken out: those steps are about to be done again.

    Args:
        directory: Of the run; None (in all processes but the first) writes nothing.
        step: Steps done at the beginning of this leg.
    """

    def __init__(self, directory: Path | None, *, step: int) -> None:
        self._log = None if directory is None else directory / LOG
        self._events: SummaryWriter | None = None
        if directory is not None:
            _cut_log(directory / LOG, step)
            self._events = SummaryWriter(str(directory / EVENTS), purge_step=step + 1, flush_secs=FLUSH_S)

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *error: object) -> None:
        if self._events is not None:
            self._events.close()

    def write(self, step: int, seconds: float, entry: Mapping[str, Any]) -> None:
        """One line of ``log.jsonl``."""
        if self._log is not None:
            line = {"step": step, "seconds": round(seconds, 1), **entry}
            with self._log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(to_json(line)) + "\n")

    def plot(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """A point of each curve ``kind/name``."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def show(self, step: int, videos: Mapping[str, np.ndarray], *, fps: float) -> None:
        """Videos, each (f, h, w, 3) uint8, as moving images ``videos/name``.

        TensorBoard's own way to log a video needs a package that needs ffmpeg; its pages play GIFs as they are.
        """
        if self._events is None:
            return
        for name, frames in videos.items():
            image = Summary.Image(
                height=frames.shape[1],
                width=frames.shape[2],
                colorspace=3,
                encoded_image_string=encode_gif(frames, fps),
            )
            summary = Summary(value=[Summary.Value(tag=f"videos/{name}", image=image)])
            self._events._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """An endless GIF of (f, h, w, 3) uint8 frames; its clock counts hundredths of a second."""
    images = [Image.fromarray(frame).quantize(256) for frame in frames]
    stream = io.BytesIO()
    images[0].save(
        stream, format="GIF", save_all=True, append_images=images[1:], duration=max(20, round(1000 / fps)), loop=0
    )
    return stream.getvalue()


def _cut_log(path: Path, step: int) -> None:
    """Drop lines of later steps, and the rest of a line that a killed process did not finish."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
