"""Who encodes and stores clips: processes of their own, so that the sampler shares its interpreter with nobody.

A Python thread that encodes makes the sampler wait for the interpreter's lock at each of its thousands of calls. An
encoder process has a few lanes, each a connection and a thread, so that while one clip waits for the disk others are
encoded. Frames go through the connections; nothing is shared, so nothing is left over when a process dies.
"""

import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medsora.errors import BackendError
from server.settings import Settings
from server.worker.encoding import ClipOrder, StoredClip, encode_and_store
from server.worker.publishing import Stores

__all__ = ["LANES", "EncoderLostError", "EncoderProcesses", "Encoders", "LocalEncoders", "encoder_count"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

LANES = 4
"""Clips that one process has in hand at once: most of the time of each it waits for the disk."""
_START_LIMIT_S = 120.0
_STOP_LIMIT_S = 5.0
_CORES_OF_AN_ENCODER = 3
_MOST_PROCESSES = 6

logger = logging.getLogger(__name__)


class EncoderLostError(Exception):
    """The process that encoded a clip has ended, and nobody knows why."""


class Encoders(Protocol):
    """Makes the files of several clips at once."""

    @property
    def lanes(self) -> int:
        """How many."""

    def run(self, order: ClipOrder, frames: Frames) -> StoredClip:
        """Make the files of a clip; called by as many threads as there are lanes.

        Raises:
            EncoderLostError: The process that did it has ended.
            Exception: As :func:`server.worker.encoding.encode_and_store`.
        """

    def close(self) -> None:
        """Let nothing run on."""


class LocalEncoders:
    """Encodes in the threads that ask for it."""

    def __init__(self, stores: Stores, *, lanes: int = LANES) -> None:
        self._stores = stores
        self.lanes = lanes

    def run(self, order: ClipOrder, frames: Frames) -> StoredClip:
        """See :class:`Encoders`."""
        return encode_and_store(self._stores, order, frames)

    def close(self) -> None:
        """Nothing is to be done."""


class EncoderProcesses:
    """Encoder processes. They end when this object is closed, or its process dies.

    Args:
        count: Processes, at least 1. One that is lost is replaced.
    """

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings = settings
        self.lanes = count * LANES
        self._free: queue.Queue[_Lane] = queue.Queue()
        self._starting = threading.Lock()
        self._processes = [_Process(settings) for _ in range(count)]
        # one lane of each after the other, so that all have work before any has more
        for lane in itertools.chain.from_iterable(zip(*(one.lanes for one in self._processes), strict=True)):
            self._free.put(lane)

    def wait_until_ready(self) -> None:
        """Wait until all have started.

        Raises:
            BackendError: One did not.
        """
        for process in list(self._processes):
            if not process.is_ready():
                raise BackendError("an encoder process cannot be started; the log says why")

    def run(self, order: ClipOrder, frames: Frames) -> StoredClip:
        """See :class:`Encoders`."""
        lane = self._free.get()
        try:
            if lane.process.has_ended():  # while nobody asked
                lane = self._replaced(lane)
            try:
                answer = lane.ask(order, frames)
            except (OSError, EOFError) as error:
                lane = self._replaced(lane)
                raise EncoderLostError("the process that encoded it is lost") from error
        finally:
            self._free.put(lane)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End them; what they have in hand is not finished."""
        for process in self._processes:
            process.close()

    def _replaced(self, lost: "_Lane") -> "_Lane":
        """The lane of the same number of a new process, which all lanes of the lost one share."""
        with self._starting:
            if lost.process.successor is None:
                lost.process.kill()
                logger.error("encoder process %d is lost (%s); it is replaced", lost.process.pid, lost.process.status)
                lost.process.successor = _Process(self._settings)
                self._processes[self._processes.index(lost.process)] = lost.process.successor
            return lost.process.successor.lanes[lost.number]


class _Process:
    def __init__(self, settings: Settings) -> None:
        self.successor: _Process | None = None
        ours, theirs = zip(*(Pipe() for _ in range(LANES)), strict=True)
        here = str(Path(__file__).resolve().parent.parent.parent)
        path = os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH")) if part)
        numbers = [connection.fileno() for connection in theirs]
        # -P keeps the current folder out of its path: it may hold another package called `server`.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.worker.encoder", *map(str, numbers)],
            env={**os.environ, **settings.environment(), "PYTHONPATH": path},
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
        )
        for connection in theirs:
            connection.close()
        self.pid = self._process.pid
        self.lanes = [_Lane(self, number, connection) for number, connection in enumerate(ours)]

    @property
    def status(self) -> str:
        return f"exit status {self._process.returncode}"

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def is_ready(self) -> bool:
        try:
            return all(lane.is_ready() for lane in self.lanes)
        except (OSError, EOFError):
            return False

    def kill(self) -> None:
        """End it at once; whoever waits for one of its lanes is told."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it. Nobody may be waiting for a lane."""
        for lane in self.lanes:
            lane.close()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()


class _Lane:
    """A connection to a process, and one clip at a time."""

    def __init__(self, process: _Process, number: int, connection: Connection) -> None:
        self.process, self.number = process, number
        self._connection = connection
        self._is_ready = False

    def is_ready(self) -> bool:
        """Wait for the greeting, for a while."""
        if not self._is_ready and self._connection.poll(_START_LIMIT_S):
            self._connection.recv()
            self._is_ready = True
        return self._is_ready

    def ask(self, order: ClipOrder, frames: Frames) -> StoredClip | Exception:
        if not self.is_ready():
            raise EOFError("the encoder process does not start")
        self._connection.send((order, frames.shape))
        self._connection.send_bytes(np.ascontiguousarray(frames).data.cast("B"))
        answer: StoredClip | Exception = self._connection.recv()
        return answer

    def close(self) -> None:
        with suppress(OSError):
            self._connection.close()


def encoder_count(settings: Settings) -> int:
    """Encoder processes of one sampling process; 0: its own threads encode."""
    if settings.encoder_processes is not None:
        return settings.encoder_processes
    cores = (os.cpu_count() or 1) // settings.worker_processes
    return max(1, min(_MOST_PROCESSES, cores // _CORES_OF_AN_ENCODER))
