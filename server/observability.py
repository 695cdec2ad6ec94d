"""What every request gets: an id, a limit on its body, a measurement, and an answer even if the code fails.

Plain ASGI, so that streamed answers stay streamed.
"""

import logging
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, tracing
from server.errors import TooLargeError, error_body
from server.jobs.database import Database
from server.jobs.model import is_job_id
from server.measures import Measure, Sums, add_sums

__all__ = ["HTTP_SECONDS", "RATE_HEADERS", "HttpMetrics", "RequestMiddleware"]

RATE_HEADERS = "medsora.rate_headers"
"""Key of the list in a request's scope whose pairs become headers of the answer, whatever that is."""

logger = logging.getLogger(__name__)

FLUSH_INTERVAL_S = 5.0
HTTP_SECONDS = Measure(
    name="medsora_http_request_seconds",
    about="Seconds from the first byte of a request to the last of its answer.",
    labels=("method", "route", "status"),
    edges=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0),
)


class HttpMetrics:
    """Durations of requests, by method, route template and status; never by id.

    They are gathered here, and moved to the database by :meth:`flush` and every few seconds by a thread: so every API
    process tells the sum over all of them, and a process that is killed takes no more than those seconds with it.
    """

    def __init__(self, *, interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._gathered: dict[tuple[str, tuple[str, ...]], Sums] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._database: Database | None = None

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        with self._lock:
            sums = self._gathered.setdefault((HTTP_SECONDS.name, (method, route, str(status))), Sums())
            sums.add(HTTP_SECONDS.le(seconds), 1, seconds)

    def start(self, database: Database) -> None:
        """Begin to move what is gathered to this database."""
        self._database = database
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="measures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Move the rest and end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()
        self._database = None

    def flush(self) -> None:
        """Move what is gathered to the database now. Where that fails it is kept for the next time."""
        with self._flushing:
            with self._lock:
                moved, self._gathered = self._gathered, {}
            if not moved or self._database is None:
                return self._put_back(moved)
            try:
                with self._database.write(is_durable=False) as connection:
                    add_sums(connection, moved)
            except SQLAlchemyError as error:
                logger.warning("durations of requests are written later: %s", type(error).__name__)
                self._put_back(moved)

    def _put_back(self, moved: dict[tuple[str, tuple[str, ...]], Sums]) -> None:
        with self._lock:
            for key, sums in moved.items():
                kept = self._gathered.setdefault(key, Sums())
                for le, count in sums.counts.items():
                    kept.add(le, count, sums.totals[le])

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.flush()


class RequestMiddleware:
    """Outermost layer of the application.

    Args:
        max_body_bytes: Larger request bodies are refused with 413, while they are being received.
        body_limits: Path -> its own limit, in place of ``max_body_bytes``.
    """

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int, metrics: HttpMetrics, body_limits: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_limits = dict(body_limits or {})
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with (
            logs.bound(request_id=request_id),
            tracing.request_span(headers, **{"medsora.request_id": request_id}) as span,
        ):
            logs.note(trace_id=tracing.trace_id(tracing.traceparent()))
            await self._serve(scope, receive, send, request_id, span)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, request_id: str, span: tracing.RequestSpan
    ) -> None:
        started = time.perf_counter()
        status = 500
        has_started = False
        received = 0
        rate_headers: list[tuple[bytes, bytes]] = []
        scope[RATE_HEADERS] = rate_headers
        limit = self._body_limits.get(scope["path"], self._max_body_bytes)

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(limit)
            return message

        async def tagged_send(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                tags = [(b"x-request-id", request_id.encode()), *rate_headers]
                message["headers"] = [*message.get("headers", ()), *tags]
            await send(message)

        try:
            declared = _content_length(scope)
            if declared is not None and declared > limit:
                await _json(413, _too_large(limit).body())(scope, receive, tagged_send)
            else:
                await self._app(scope, limited_receive, tagged_send)
        except ClientDisconnect:
            status = 499  # as nginx counts it: nobody is there to be answered, and the server did nothing wrong
            logger.info("the client went away: %s", scope["method"])
        except Exception:
            logger.exception("the request failed: %s", scope["method"])
            if has_started:
                raise  # the answer is cut off, which the client can see
            message = f"The server failed to handle the request. Report the request id {request_id}."
            body = error_body(message, kind="server_error", code="internal_error")
            # OpenAI's client would try again: the bug would still be there, and perhaps a job that was accepted.
            await _json(500, body, {"x-should-retry": "false"})(scope, receive, tagged_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.perf_counter() - started
            self._metrics.observe(method, route, status, seconds)
            span.answered(method, route, status)
            video_id = scope.get("path_params", {}).get("video_id", "")
            if is_job_id(video_id):
                logs.note(job_id=video_id)
            # Whoever waits for a video asks again and again.
            level = logging.DEBUG if method in ("GET", "HEAD") and status < 400 else logging.INFO
            about = {"method": method, "route": route, "status": status, "duration_s": round(seconds, 6)}
            logger.log(level, "answered", extra=about)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"The request body has more than {limit} bytes.", code="body_too_large")


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return None


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> JSONResponse:
    if status == 413:
        headers = {"connection": "close"}  # the rest of the body is not read
    return JSONResponse(body, status_code=status, headers=headers)
