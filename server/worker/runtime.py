"""What a sampling process keeps between jobs: the loaded models and its place in the table of workers."""

import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from medsora.errors import BackendError, CheckpointError
from medsora.request import resolve_request
from server.checkpoints import Catalogue, ServedCheckpoint
from server.errors import without_folders
from server.jobs.database import Database, migrate
from server.jobs.repository import JobRepository
from server.jobs.workers import WorkerRegistry
from server.settings import Settings
from server.storage import ArtifactStore

if TYPE_CHECKING:
    import numpy as np

    from medsora.pipeline import VideoPipeline

__all__ = ["STOP_SIGNAL", "WorkerRuntime"]

STOP_SIGNAL = signal.SIGUSR2
"""Sent by the worker to its sampling processes when it begins to stop."""

logger = logging.getLogger(__name__)


class WorkerRuntime:
    """State of one sampling process. Made once, before its first job."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        # First of all: what comes before it is not heard.
        signal.signal(STOP_SIGNAL, lambda *_: self.stopping.set())
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.database = Database(settings.database_address)
        migrate(self.database)
        self.repository = JobRepository(self.database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        self.store = ArtifactStore(settings.artifacts_dir)
        self._registry = WorkerRegistry(self.database, heartbeat_s=settings.worker_heartbeat_s)
        self._pipelines: dict[str, tuple[ServedCheckpoint, VideoPipeline]] = {}
        self._problem: str | None = None
        self._device = settings.device
        self._ended = threading.Event()
        self._life = threading.Thread(target=self._report_life, name="life", daemon=True)

    def start(self) -> None:
        """Load and warm up all models, then report to the table of workers.

        A checkpoint that cannot be loaded is reported too, and tried again when a job needs it. When this process is
        to stop, it loads no further ones.
        """
        problems = []
        for name in self.settings.checkpoints:
            if self.stopping.is_set():
                break
            try:
                checkpoint = Catalogue.load([name]).default
                self._load(checkpoint)
            except (CheckpointError, BackendError) as error:
                logger.error("model %s cannot be loaded: %s", name, error)
                problems.append(without_folders(str(error)))
        self._problem = " ".join(problems) or None
        self._report_once()
        self._life.start()

    def close(self) -> None:
        """Leave the table of workers."""
        self._ended.set()
        try:
            self._registry.sign_off(self.worker_id)
        except SQLAlchemyError:
            logger.debug("could not sign off", exc_info=True)
        self.database.close()

    def pipeline(self, model: str) -> "tuple[ServedCheckpoint, VideoPipeline]":
        """The loaded model of that name.

        Raises:
            CheckpointError: It is not served here, or cannot be loaded.
            BackendError: The device or back end of the settings is not available.
        """
        if model not in self._pipelines:
            checkpoint = Catalogue.load(self.settings.checkpoints).get(model)
            if checkpoint is None:
                raise CheckpointError(f"model {model!r} is not served by this worker")
            self._load(checkpoint)
            self._problem = None
        return self._pipelines[model]

    def _load(self, checkpoint: ServedCheckpoint) -> None:
        import torch

        from medsora.pipeline import VideoPipeline

        settings = self.settings
        if settings.worker_processes > 1:
            # Each process would otherwise start a thread for every core.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.worker_processes))
        began = time.monotonic()
        pipeline = VideoPipeline.from_checkpoint(
            checkpoint.directory, device=settings.device, dtype=settings.dtype, backend=settings.backend
        )
        self._device = str(pipeline.device)
        if settings.warm_up and not self.stopping.is_set():
            manifest = pipeline.manifest
            least = manifest.limits.num_inference_steps[0]
            request = resolve_request(manifest, label=manifest.labels[0].name, seed=0, num_inference_steps=least)
            self._warm_up_encoder(pipeline([request])[0], manifest.limits.fps)
        self._pipelines[checkpoint.name] = (checkpoint, pipeline)
        logger.info("model %s is loaded on %s after %.1f s", checkpoint.name, self._device, time.monotonic() - began)

    @staticmethod
    def _warm_up_encoder(frames: "np.ndarray[Any, np.dtype[np.uint8]]", fps: float) -> None:
        """Load the encoder now: it takes 0.1 s, which the first job would wait for."""
        from medsora.video_io import write_mp4

        with tempfile.TemporaryDirectory(prefix="medsora-warm-up-") as folder:
            write_mp4(Path(folder) / "clip.mp4", frames, fps=fps)

    def _report_life(self) -> None:
        while not self._ended.wait(self.settings.worker_heartbeat_s):
            self._report_once()

    def _report_once(self) -> None:
        try:
            self._registry.report(
                self.worker_id,
                models=tuple(self._pipelines),
                device=self._device,
                rss_bytes=_resident_bytes(),
                problem=self._problem,
            )
        except SQLAlchemyError as error:
            logger.warning("no sign of life could be written: %s", error)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
