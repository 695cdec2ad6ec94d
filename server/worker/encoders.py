"""Who encodes and stores clips: processes of their own, so that the sampler shares its interpreter with nobody.

A Python thread that encodes makes the sampler wait for the interpreter's lock at each of its thousands of calls. An
encoder process has two lanes, each a connection and a thread, so that while one clip waits for the disk the other is
encoded; there is one for each core, since its threads share an interpreter and hardly fill more than one. Frames go
through the connections; nothing is shared, so nothing is left over when a process dies. Where none can be started, the
sampling process encodes.
"""

import logging
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from server.child_processes import child_command, child_environment
from server.settings import Settings
from server.worker.encoding import EncodingOrder, StoredClip, encode_and_store
from server.worker.publishing import Stores

__all__ = ["LANES", "EncoderLostError", "EncoderProcesses", "Encoders", "LocalEncoders", "encoder_count"]

Frames = np.ndarray[Any, np.dtype[np.uint8]]

LANES = 2
"""Clips that one process has in hand at once: while one waits for the disk or the bucket, the other is encoded."""
_CLIPS_OF_A_PROCESS = 10_000
"""After so many it is replaced, whatever the libraries that it calls have not given back."""
_CLIP_LIMIT_S = 300.0
_START_LIMIT_S = 120.0
_PAUSE_S = 60.0
"""After a process that could not be started."""
_STOP_LIMIT_S = 5.0
_MOST_PROCESSES = 32

logger = logging.getLogger(__name__)


class EncoderLostError(Exception):
    """The process that encoded a clip has ended, and nobody knows why."""


class Encoders(Protocol):
    """Makes the files of several clips at once."""

    @property
    def lanes(self) -> int:
        """How many."""

    def wait_until_ready(self) -> None:
        """Wait until clips can be encoded without delay."""

    def run(self, order: EncodingOrder, frames: Frames) -> StoredClip:
        """Make the files of a clip; called by as many threads as there are lanes.

        Args:
            frames: uint8 RGB ``(frames, height, width, 3)``.

        Raises:
            EncoderLostError: The process that did it has ended. Files of the attempt may be left.
            Exception: As :func:`server.worker.encoding.encode_and_store`.
        """

    def close(self) -> None:
        """Let nothing run on."""


class LocalEncoders:
    """Encodes in the threads that ask for it."""

    lanes = 4

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    def wait_until_ready(self) -> None:
        """It is."""

    def run(self, order: EncodingOrder, frames: Frames) -> StoredClip:
        """See :class:`Encoders`."""
        return encode_and_store(self._stores, order, frames)

    def close(self) -> None:
        """Nothing is to be done."""


class EncoderProcesses:
    """Encoder processes. They end when this object is closed, or its process dies.

    Args:
        count: Processes, at least 1. One that is lost is replaced.
        otherwise: Encodes while none can be started.
        clip_limit_s: Seconds for which a process may neither take a clip nor answer; then it is ended.
        clips_of_a_process: After which it is replaced.
    """

    def __init__(
        self,
        settings: Settings,
        count: int,
        *,
        otherwise: Encoders,
        clip_limit_s: float = _CLIP_LIMIT_S,
        clips_of_a_process: int = _CLIPS_OF_A_PROCESS,
    ) -> None:
        self._otherwise = otherwise
        self.lanes = count * LANES
        self._places = [_Place(settings, clips_of_a_process, clip_limit_s) for _ in range(count)]
        self._free: queue.Queue[tuple[_Place, int]] = queue.Queue()
        for number in range(LANES):  # one lane of each after the other, so that all have work before any has more
            for place in self._places:
                self._free.put((place, number))

    def wait_until_ready(self) -> None:
        """Wait until all have started, or cannot be."""
        for place in self._places:
            for number in range(LANES):
                process = place.take(number)
                if process is not None:
                    place.give_back(process)

    def run(self, order: EncodingOrder, frames: Frames) -> StoredClip:
        """See :class:`Encoders`."""
        place, number = self._free.get()
        try:
            process = place.take(number)
            if process is None:
                return self._otherwise.run(order, frames)
            try:
                answer = process.lanes[number].ask(order, frames)
            except Exception as error:  # what is still in the connection nobody knows
                place.lose(process)
                raise EncoderLostError("the process that encoded it is lost") from error
            finally:
                place.give_back(process)
        finally:
            self._free.put((place, number))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End them; what they have in hand is not finished."""
        processes = [place.process for place in self._places if place.process is not None]
        for process in processes:
            process.hang_up()
        for process in processes:
            process.end()


class _Place:
    """Where one process after the other serves: the next comes when one is lost, or has served for long."""

    def __init__(self, settings: Settings, clips_of_a_process: int, clip_limit_s: float) -> None:
        self._settings, self._clips_of_a_process = settings, clips_of_a_process
        self._clip_limit_s = clip_limit_s
        self._changing = threading.Lock()
        self._not_before = 0.0
        self.process = self._start()

    def take(self, number: int) -> "_Process | None":
        """The process, with one more clip in hand; waits until that lane of it is ready. None: there is none now."""
        with self._changing:
            before = self.process
            if before is not None and (before.has_ended() or before.taken >= self._clips_of_a_process):
                if before.has_ended():
                    logger.error("encoder process %d is lost (%s)", before.pid, before.status)
                self.process = None
            if self.process is None:
                self.process = self._start()
            process = self.process
            if process is not None:
                process.in_hand += 1
                process.taken += 1
            is_over = before is not None and before is not process and before.in_hand == 0
        if before is not None and is_over:
            before.end()
        if process is None or process.lanes[number].is_ready():
            return process
        self.lose(process)
        self.give_back(process)
        return None

    def lose(self, process: "_Process") -> None:
        """End a process at once; whoever waits for one of its lanes is told."""
        process.kill()
        with self._changing:
            if self.process is not process:
                return  # another of its lanes has told
            self.process = None
            if process.has_served:
                logger.error("encoder process %d is lost (%s); it is replaced", process.pid, process.status)
            else:
                self._pause(process.status)

    def give_back(self, process: "_Process") -> None:
        """A clip less in hand."""
        with self._changing:
            process.in_hand -= 1
            is_over = process is not self.process and process.in_hand == 0
        if is_over:
            process.end()

    def _start(self) -> "_Process | None":
        if time.monotonic() < self._not_before:
            return None
        try:
            return _Process(self._settings, self._clip_limit_s)
        except OSError as error:  # no memory, or no more processes or descriptors
            self._pause(str(error))
            return None

    def _pause(self, why: str) -> None:
        self._not_before = time.monotonic() + _PAUSE_S
        logger.error(
            "an encoder process cannot be started (%s): the sampling process encodes in its place, "
            "and it is tried again in %g s",
            why,
            _PAUSE_S,
        )


class _Process:
    def __init__(self, settings: Settings, clip_limit_s: float) -> None:
        self.in_hand = self.taken = 0
        pairs = [Pipe() for _ in range(LANES)]
        try:
            for ours, _ in pairs:
                _limit_waiting(ours, clip_limit_s)
            numbers = [theirs.fileno() for _, theirs in pairs]
            self._process = subprocess.Popen(
                child_command("server.worker.encoder", *map(str, numbers)),
                # numpy's own threads would only be in the way of the lanes, of which there are enough
                env={**child_environment(settings), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=numbers,
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        self.pid = self._process.pid
        self.lanes = [_Lane(self, ours, clip_limit_s) for ours, _ in pairs]

    @property
    def status(self) -> str:
        return f"exit status {self._process.returncode}"

    @property
    def has_served(self) -> bool:
        return any(lane.has_greeted for lane in self.lanes)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def hang_up(self) -> None:
        """Tell it to end. Nobody may be waiting for a lane."""
        for lane in self.lanes:
            lane.close()

    def end(self) -> None:
        self.hang_up()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()


def _limit_waiting(connection: Connection, limit_s: float) -> None:
    """Let a send that waits for so long, or a receipt that has begun, raise BlockingIOError."""
    seconds, rest = divmod(limit_s, 1.0)
    limit = struct.pack("@ll", int(seconds), int(1e6 * rest))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, limit)


class _Lane:
    """A connection to a process, and one clip at a time."""

    def __init__(self, process: _Process, connection: Connection, limit_s: float) -> None:
        self._process, self._connection, self._limit_s = process, connection, limit_s
        self.has_greeted = False

    def is_ready(self) -> bool:
        """Wait for the greeting, for a while."""
        try:
            if not self.has_greeted and self._connection.poll(_START_LIMIT_S):
                self._connection.recv()
                self.has_greeted = True
        except (OSError, EOFError):
            return False
        return self.has_greeted

    def ask(self, order: EncodingOrder, frames: Frames) -> StoredClip | Exception:
        """Send a clip, and wait for what came of it. A process that is silent for too long is killed.

        Raises:
            OSError, EOFError: The process has ended.
        """
        content = np.ascontiguousarray(frames).data.cast("B")
        with suppress(BlockingIOError):
            self._connection.send((order, frames.shape))
            self._connection.send_bytes(content)
            if self._connection.poll(self._limit_s):
                answer: StoredClip | Exception = self._connection.recv()
                return answer
        logger.error("encoder process %d has not answered for %g s", self._process.pid, self._limit_s)
        self._process.kill()
        raise TimeoutError(f"no answer for {self._limit_s:g} s")

    def close(self) -> None:
        with suppress(OSError):
            self._connection.close()


def encoder_count(settings: Settings) -> int:
    """Encoder processes of one sampling process; 0: its own threads encode."""
    if settings.encoder_processes is not None:
        return settings.encoder_processes
    cores = len(os.sched_getaffinity(0)) // settings.worker_processes
    return max(1, min(_MOST_PROCESSES, cores))
