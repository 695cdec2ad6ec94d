"""Many clients of the server at once, each a thread with a connection of its own, as light as Python allows.

They share the machine with the server: what they use themselves is measured too.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Clients"]

RUN_TIMEOUT_S = 3600
_IDLE_S = 3.0
"""A connection that was silent for so long is not used again: the server may be about to close it."""


class Clients:
    """Threads that ask for clips, and poll as the answers tell them, until all are made.

    Args:
        host: Name or address, and port.
        body_of: Of the number of a clip, from 0, the fields of its request.
        clips: In all.
        clients: Threads.
        outstanding: Clips that a client waits for at a time.
    """

    def __init__(
        self, host: str, body_of: Callable[[int], dict[str, Any]], *, clips: int, clients: int, outstanding: int
    ) -> None:
        self._host, self._body_of = host, body_of
        self._clips, self._clients, self._outstanding = clips, clients, outstanding
        self._lock = threading.Lock()
        self._asked = 0
        self.latencies: list[float] = []
        """Seconds from the request for a clip to the answer that says completed, as its client sees it."""
        self.polls = 0
        self.refusals = 0
        """Answers that asked to come again later, as clients do: 429 and 503."""
        self.problems: list[str] = []

    def run(self) -> None:
        """Let them ask; returns when all clips are made.

        Raises:
            SystemExit: A client failed.
        """
        threads = [threading.Thread(target=self._run_client) for _ in range(self._clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(RUN_TIMEOUT_S)
        if self.problems:
            raise SystemExit(f"{len(self.problems)} clients failed; the first: {self.problems[0]}")

    def _next(self) -> int | None:
        with self._lock:
            if self._asked == self._clips or self.problems:
                return None
            self._asked += 1
            return self._asked - 1

    def _run_client(self) -> None:
        try:
            self._ask_for_clips(_Connection(self._host))
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")

    def _ask_for_clips(self, connection: _Connection) -> None:
        waiting: list[tuple[str, float]] = []
        while True:
            while len(waiting) < self._outstanding:
                number = self._next()
                if number is None:
                    break
                began = time.perf_counter()
                _, video = self._ask(connection, "POST", "/v1/videos", self._body_of(number))
                waiting.append((video["id"], began))
            if not waiting:
                return
            # the oldest first: once it is done, the others are about to be
            while True:
                poll_after_ms, video = self._ask(connection, "GET", f"/v1/videos/{waiting[0][0]}")
                self.polls += 1
                if video["status"] in ("completed", "failed"):
                    break
                time.sleep(poll_after_ms / 1000)
            if video["status"] == "failed":
                raise RuntimeError(str(video["error"]))
            self.latencies.append(time.perf_counter() - waiting.pop(0)[1])

    def _ask(self, connection: _Connection, *request: Any) -> tuple[int, dict[str, Any]]:
        while True:
            try:
                return connection.ask(*request)
            except _ComeAgain:
                self.refusals += 1
                time.sleep(1.0)


class _ComeAgain(Exception):  # noqa: N818 - no error
    pass


class _Connection:
    def __init__(self, host: str) -> None:
        self._http = http.client.HTTPConnection(host, timeout=60)
        self._used_at = 0.0

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Milliseconds after which to ask again, and the answer."""
        if time.monotonic() - self._used_at > _IDLE_S:
            self._http.close()
        content = None if body is None else json.dumps(body).encode()
        self._http.request(method, path, content, {"content-type": "application/json"} if body else {})
        answer = self._http.getresponse()
        text = answer.read()
        self._used_at = time.monotonic()
        if answer.status in (429, 503):
            raise _ComeAgain
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return int(answer.getheader("openai-poll-after-ms", "0")), json.loads(text)
