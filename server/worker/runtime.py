"""What a sampling process keeps between jobs: the loaded models and its place in the table of workers."""

import gc
import itertools
import logging
import math
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy.exc import SQLAlchemyError

from medsora.config import SHORTCUT
from medsora.errors import BackendError, CheckpointError, MedsoraError
from medsora.geometry import CHUNK_FRAMES
from medsora.manifest import Manifest
from medsora.request import GenerationRequest, resolve_request
from server.checkpoints import Catalogue, ServedCheckpoint
from server.datasets.files import DatasetFiles
from server.datasets.repository import DatasetRepository
from server.errors import without_folders
from server.files.store import FileStore
from server.jobs.database import Database
from server.jobs.repository import JobRepository
from server.jobs.schema import migrate
from server.jobs.workers import WorkerRegistry
from server.objects import objects_of
from server.settings import Settings
from server.sources.repository import SourceRepository
from server.storage import ArtifactStore
from server.worker.batch_limits import BatchLimits, best_size
from server.worker.celery_app import STOP_SIGNAL
from server.worker.dataset_clips import DatasetClips
from server.worker.encoders import EncoderProcesses, Encoders, LocalEncoders, encoder_count
from server.worker.encoding import warm_up_encoder
from server.worker.signing import signer_of
from server.worker.storage_watch import StorageWatch

if TYPE_CHECKING:
    from medsora.pipeline import VideoPipeline

__all__ = ["WorkerRuntime"]

logger = logging.getLogger(__name__)
_SIZES = {"cpu": (1, 2, 4, 8), "cuda": (1, 4, 16, 64)}
"""Sizes of batches to choose from where the settings name none."""
_STARTING = "The worker is starting: it loads, compiles and warms up its models."


class _Interrupted(BaseException):
    """Ends a warm-up when this process is to stop. No Exception: compilers catch those."""


class WorkerRuntime:
    """State of one sampling process. Made once, before its first job."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        """Nothing more is begun."""
        self.giving_up = threading.Event()
        """What is not done is handed back."""
        self._give_up_at = math.inf
        """On the steady clock."""
        self._may_interrupt = False
        # First of all: what comes before it is not heard.
        signal.signal(STOP_SIGNAL, self._on_stop_signal)
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.database = Database(settings.database_address)
        migrate(self.database)
        self.repository = JobRepository(self.database, lease_s=settings.lease_s, max_attempts=settings.max_attempts)
        self.store = ArtifactStore(objects_of(settings, "artifacts"))
        self.storage = StorageWatch(self.store.objects)
        self.sources = SourceRepository(self.database)
        self.source_store = FileStore(objects_of(settings, "sources"))
        self.datasets = DatasetRepository(self.database, lease_s=settings.lease_s)
        self.dataset_clips = DatasetClips(
            self.datasets, DatasetFiles(objects_of(settings, "datasets")), signer=signer_of(settings)
        )
        self.encoders: Encoders = LocalEncoders(self)
        self._registry = WorkerRegistry(self.database, heartbeat_s=settings.worker_heartbeat_s)
        self._pipelines: dict[str, tuple[ServedCheckpoint, VideoPipeline]] = {}
        self._warm_up_s: dict[str, dict[str, float]] = {}
        self._problem: str | None = _STARTING
        self._device = settings.device
        self.limits = BatchLimits(max(settings.batch_sizes or _SIZES["cpu"]))
        self.batch_s: dict[Hashable, float] = {}
        """Seconds that the last batch of each kind took to be sampled and decoded."""
        self.busy_at = -math.inf
        """On the steady clock: when several jobs that are alike last waited together."""
        self._ended = threading.Event()
        self._start_by = math.inf
        """On the steady clock: when this process gives its start up."""
        self._report_lock = threading.Lock()
        self._life = threading.Thread(target=self._report_life, name="life", daemon=True)

    def start(self) -> None:
        """Load and warm up all models, which may take minutes; the table of workers tells so meanwhile.

        A checkpoint that cannot be loaded is reported too, and tried again when a job needs it. When this process is
        to stop, it breaks off.
        """
        self._start_by = time.monotonic() + self.settings.worker_start_limit_s
        self._report_once()
        self._life.start()
        if count := encoder_count(self.settings):
            self.encoders = EncoderProcesses(self.settings, count, otherwise=self.encoders)  # they start meanwhile
        problems = []
        for name in self.settings.checkpoints:
            if self.stopping.is_set():
                break
            try:
                self._load(Catalogue.load([name]).default, self.settings.compiled)
            except MedsoraError as error:
                logger.error("model %s cannot be loaded: %s", name, error)
                problems.append(without_folders(str(error)))
            except Exception as error:  # no memory for it, most often
                logger.exception("model %s cannot be loaded", name)
                problems.append(f"{without_folders(name)} cannot be loaded: {type(error).__name__}.")
        if not self.stopping.is_set():
            self.encoders.wait_until_ready()
        self._start_by = math.inf
        if self.stopping.is_set():
            return
        self._warn_of_memory()
        self._problem = " ".join(problems) or None
        self._report_once()

    def close(self) -> None:
        """End the encoders, and leave the table of workers."""
        self._ended.set()
        self.encoders.close()
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
            self._load(checkpoint, self.settings.compiled)
            self._problem = None
        return self._pipelines[model]

    def window(self, model: str) -> int:
        """Frames that a loaded model samples at once, and so the length up to which its clips share batches."""
        loaded = self._pipelines.get(model)
        return 0 if loaded is None else loaded[0].manifest.limits.window

    def _load(self, checkpoint: ServedCheckpoint, compiled: str) -> None:
        import torch

        from medsora.pipeline import VideoPipeline, device_named

        settings = self.settings
        sizes = settings.batch_sizes or _SIZES[device_named(settings.device).type]
        if settings.worker_processes > 1:
            # Each process would otherwise start a thread for every core.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.worker_processes))
        began = time.monotonic()
        pipeline = VideoPipeline.from_checkpoint(
            checkpoint.directory,
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
            compiled=compiled,
            batch_sizes=sizes,
        )
        self.limits.set_best(checkpoint.name, max(sizes))
        self._device = str(pipeline.device)
        how = f"on {self._device} ({'compiled' if pipeline.is_compiled else 'not compiled'})"
        logger.info("model %s is loaded %s after %.1f s", checkpoint.name, how, time.monotonic() - began)
        try:
            self._warm_up(checkpoint.name, pipeline)
        except BackendError as error:
            if not (compiled == "auto" and pipeline.is_compiled):
                raise
            logger.warning("%s. It goes on without being compiled, which is slower", error)
        else:
            self._pipelines[checkpoint.name] = (checkpoint, pipeline)
            return
        del pipeline
        gc.collect()  # it refers to itself
        torch.cuda.empty_cache()
        self._load(checkpoint, "off")

    def _warm_up(self, name: str, pipeline: "VideoPipeline") -> None:
        """Do now what the first jobs would wait for; broken off when this process is to stop.

        Raises:
            BackendError: The device or the compiler failed, for example for want of memory.
            MedsoraError: The model did.
        """
        settings = self.settings
        if not settings.warm_up or self.stopping.is_set():
            return
        if pipeline.is_compiled:
            logger.info("model %s is being compiled, which takes minutes when it is new", name)
        requests = _requests_to_warm_up(pipeline.manifest, all_shapes=settings.warm_up_shapes == "all")
        try:
            try:
                self._may_interrupt = True
                seconds = pipeline.warm_up(requests)
                warm_up_encoder()
                if not settings.batch_sizes:
                    self._choose_batch_size(name, pipeline, requests[0])
            finally:
                self._may_interrupt = False
        except (Exception, _Interrupted) as error:  # compilers and drivers raise classes of every kind
            if self.stopping.is_set():
                logger.info("the warm-up of model %s is broken off: this process stops", name)
                return
            if isinstance(error, (MedsoraError, SoftTimeLimitExceeded)):
                raise
            logger.exception("the warm-up of model %s failed", name)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if pipeline.is_compiled:
                sizes = ",".join(map(str, pipeline.batch_sizes))
                reason += (
                    f"; fewer or smaller MEDSORA_BATCH_SIZES (now {sizes}) need less memory, "
                    "MEDSORA_COMPILED=off needs no compiler"
                )
            raise BackendError(f"{name} could not be warmed up: {reason}") from error
        self._warm_up_s = {**self._warm_up_s, name: {str(size): passed for size, passed in seconds.items()}}
        times = ", ".join(f"{passed:.1f} s at batch {size}" for size, passed in seconds.items())
        logger.info("model %s is warmed up: %s", name, times)

    def _choose_batch_size(self, name: str, pipeline: "VideoPipeline", request: GenerationRequest) -> None:
        """Measure which of the sizes pays, with few steps."""
        few_steps = replace(request, num_inference_steps=2)

        def seconds_of(size: int) -> float:
            measured = []
            for _ in range(2):
                began = time.perf_counter()
                pipeline([few_steps] * size)
                measured.append(time.perf_counter() - began)
            return min(measured)

        best = best_size(pipeline.batch_sizes, seconds_of)
        self.limits.set_best(name, best)
        logger.info("model %s is sampled in batches of up to %d", name, best)

    def _on_stop_signal(self, *_: object) -> None:
        # It comes again and again until this process has ended.
        now = time.monotonic()
        if not self.stopping.is_set():
            self._give_up_at = now + self.settings.drain_s
            self.stopping.set()
        if now >= self._give_up_at:
            self.giving_up.set()
        if self._may_interrupt:
            self._may_interrupt = False  # once: the signal comes again and again
            raise _Interrupted

    def _warn_of_memory(self) -> None:
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # what the pool looks at, too
        limit_mib = self.settings.worker_max_memory_mib
        if peak_mib > limit_mib:
            logger.warning(
                "this process has taken %d MiB to start, more than MEDSORA_WORKER_MAX_MEMORY_MIB (%d): "
                "it will be replaced, and the next one warmed up, after every job",
                peak_mib,
                limit_mib,
            )

    def _report_life(self) -> None:
        while not self._ended.wait(self.settings.worker_heartbeat_s):
            if time.monotonic() > self._start_by:
                limit_s = self.settings.worker_start_limit_s
                logger.error("not started within MEDSORA_WORKER_START_LIMIT_S (%d), this process ends", limit_s)
                logging.shutdown()
                os._exit(70)
            self._report_once()

    def _report_once(self) -> None:
        with self._report_lock:  # else the thread could write what is no longer true
            try:
                self._registry.report(
                    self.worker_id,
                    models=tuple(self._pipelines),
                    device=self._device,
                    rss_bytes=_resident_bytes(),
                    problem=self._problem,
                    warm_up_s=self._warm_up_s,
                    gpu_peak_bytes=_gpu_peak_bytes() if self._pipelines and self._device.startswith("cuda") else None,
                )
            except SQLAlchemyError as error:
                logger.warning("no sign of life could be written: %s", error)


def _requests_to_warm_up(manifest: Manifest, *, all_shapes: bool) -> list[GenerationRequest]:
    """What is asked for by default; or one request of everything that is compiled or recorded apart."""
    request = resolve_request(manifest, label=manifest.labels[0].name, seed=0)
    if not all_shapes:
        return [request]
    limits = manifest.limits
    low, _, high = limits.guidance_scale
    settings = [
        (sampler, scale)
        for sampler in limits.samplers
        # without guidance, where that is allowed, and with it, at any scale; or that which is built in
        for scale in ([limits.shortcut_guidance] if sampler == SHORTCUT else sorted({low, high}))
    ]
    # a clip of two windows: what goes on from known frames is recorded apart, whatever they are
    longer = limits.window + CHUNK_FRAMES
    lengths = (*limits.num_frames, longer) if limits.can_make(longer) else limits.num_frames
    return [
        replace(request, width=width, height=height, num_frames=num_frames, guidance_scale=scale, sampler=sampler)
        for (width, height), num_frames, (sampler, scale) in itertools.product(limits.sizes, lengths, settings)
    ]


def _gpu_peak_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
