"""The header ``Idempotency-Key`` on every POST under /v1, whatever it is about.

Plain ASGI around the routes. The body is received whole (on disk, where it is large) and known by its fields, so that
the boundaries of a form, or the order and spacing of JSON, do not matter.
"""

import asyncio
import hashlib
import json
import logging
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any
from urllib.parse import parse_qsl

from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.handlers import answer_of
from server.errors import RequestRefusedError, ReusedKeyError, ServiceError, UnavailableError
from server.idempotency import (
    MAX_KEY,
    Answer,
    Begun,
    IdempotentRequests,
    InProgress,
    Made,
    OtherRequest,
    in_progress,
    working_on,
)

__all__ = ["IdempotencyMiddleware", "fingerprint"]

logger = logging.getLogger(__name__)

MAX_KEPT_BODY = 2**20
_IN_MEMORY = 2**20
_PIECE = 256 * 1024
_WAITS_S = (0.05, 0.1, 0.2, 0.4)
"""How long to wait for the first request's answer, before saying that there is none yet."""


class IdempotencyMiddleware:
    """Inside of ``RequestMiddleware``, around everything else."""

    def __init__(self, app: ASGIApp, *, spool_dir: Path) -> None:
        self._app = app
        self._spool_dir = spool_dir

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        keys = headers.getlist("idempotency-key")
        if not keys:
            await self._app(scope, receive, send)
            return
        services = scope["app"].state.services
        try:
            caller = await run_in_threadpool(services.access.admit, scope)
            key = _check_key(keys)
            with SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(self._spool_dir)) as body:
                await _receive_all(receive, body)
                known_by = await run_in_threadpool(fingerprint, scope, headers, body)
                requests: IdempotentRequests = services.idempotent_requests
                outcome = await run_in_threadpool(requests.begin, caller.tenant, key, known_by)
                for pause_s in _WAITS_S:
                    if not isinstance(outcome, InProgress):
                        break
                    await asyncio.sleep(pause_s)
                    outcome = await run_in_threadpool(requests.begin, caller.tenant, key, known_by)
                if isinstance(outcome, Begun):
                    await self._work(outcome, requests, scope, _replay(body, receive), send)
                    return
        except ServiceError as error:
            await answer_of(error)(scope, receive, send)
            return
        except SQLAlchemyError as error:
            logger.error("the database failed: %s", error)
            problem = UnavailableError("The job database is not available now.", code="database_unavailable")
            await answer_of(problem)(scope, receive, send)
            return
        if isinstance(outcome, Answer):
            kept = {"idempotent-replayed": "true", "content-type": outcome.content_type}
            await Response(outcome.body, outcome.status_code, kept)(scope, receive, send)
        elif isinstance(outcome, Made):
            await self._show(outcome, scope, receive, send)
        elif isinstance(outcome, OtherRequest):
            message = f"idempotency-key: {key[:80]!r} was used for another request; take a new key for a new request"
            reused = ReusedKeyError(message, code="idempotency_key_reused", param="idempotency-key")
            await answer_of(reused)(scope, receive, send)
        else:
            await answer_of(in_progress(key))(scope, receive, send)

    async def _work(
        self, begun: Begun, requests: IdempotentRequests, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let the routes answer, and keep the answer before anybody sees it."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        try:
            with working_on(begun):
                await self._app(scope, receive, keep)
            answer = _answer(messages)
            if answer is None:
                await run_in_threadpool(requests.release, begun)
            else:
                await run_in_threadpool(requests.finish, begun, answer)
        except SQLAlchemyError as error:
            # What was made is noted: who asks again is shown it once the lease is over.
            logger.error("an answer could not be kept: %s", error)
        except Exception:
            await run_in_threadpool(requests.release, begun)
            raise
        for message in messages:
            await send(message)

    async def _show(self, made: Made, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the object as it is now."""
        collection = "/".join(scope["path"].split("/")[:3])
        path = f"{collection}/{made.object_id}"
        shown = {**scope, "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b""}

        async def mark(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"idempotent-replayed", b"true")]
            await send(message)

        await self._app(shown, receive, mark)


def _check_key(keys: list[str]) -> str:
    key = keys[0]
    if len(keys) > 1 or not 1 <= len(key) <= MAX_KEY or not all("!" <= character <= "~" for character in key):
        message = f"idempotency-key: must be given once, as 1 to {MAX_KEY} visible ASCII characters without blanks"
        raise RequestRefusedError(message, param="idempotency-key", code="invalid_idempotency_key")
    return key


async def _receive_all(receive: Receive, body: IO[bytes]) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        try:
            body.write(message.get("body", b""))
        except OSError:
            problem = "There is too little free disk space to take the request."
            raise UnavailableError(problem, code="storage_full", retry_after_ms=10_000) from None
        if not message.get("more_body", False):
            return


def _replay(body: IO[bytes], receive: Receive) -> Receive:
    """The body once more, from its start."""
    body.seek(0)
    is_over = False

    async def replay() -> Message:
        nonlocal is_over
        if is_over:
            return await receive()
        piece = body.read(_PIECE)
        is_over = not piece
        return {"type": "http.request", "body": piece, "more_body": bool(piece)}

    return replay


def _answer(messages: list[Message]) -> Answer | None:
    """The answer to keep; None where nothing was made, or what was is too large to keep."""
    start = next(message for message in messages if message["type"] == "http.response.start")
    body = b"".join(message.get("body", b"") for message in messages if message["type"] == "http.response.body")
    if not 200 <= start["status"] < 300 or len(body) > MAX_KEPT_BODY:
        return None
    content_type = Headers(raw=start["headers"]).get("content-type", "application/json")
    return Answer(start["status"], content_type, body)


def fingerprint(scope: Scope, headers: Headers, body: IO[bytes]) -> str:
    """SHA-256 of what a request asks for: method, path, query, and the fields of its body."""
    body.seek(0)
    kind, options = parse_options_header(headers.get("content-type", ""))
    fields: Any
    if kind == b"multipart/form-data" and options.get(b"boundary"):
        fields = _parts(body, options[b"boundary"])
    elif kind == b"application/json":
        fields = _json(body)
    elif kind == b"application/x-www-form-urlencoded":
        pairs = parse_qsl(body.read().decode("latin-1"), keep_blank_values=True, encoding="utf-8", errors="replace")
        fields = sorted(pairs, key=lambda pair: pair[0])
    else:
        fields = _digest(body)
    query = sorted(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
    asked = [scope["method"], scope["path"], query, kind.decode("latin-1"), fields]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _digest(body: IO[bytes]) -> str:
    """SHA-256 of all of it."""
    body.seek(0)
    digest = hashlib.sha256()
    while piece := body.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _json(body: IO[bytes]) -> str:
    """JSON with the names of each object in order; one that is given twice stays so."""
    try:
        return json.dumps(json.loads(body.read(), object_pairs_hook=_sorted))
    except (ValueError, RecursionError):  # the route will say what is wrong with it
        return _digest(body)


def _sorted(pairs: list[tuple[str, Any]]) -> Any:
    return {"object": sorted(pairs, key=lambda pair: pair[0])}


def _parts(body: IO[bytes], boundary: bytes) -> Any:
    """Parts of a form by name, each as its headers and the hash of its content, whatever the boundary is."""
    parts: list[tuple[str, dict[str, str], str]] = []
    headers: dict[str, str] = {}
    name, value = bytearray(), bytearray()
    content = hashlib.sha256()

    def on_part_begin() -> None:
        nonlocal content
        headers.clear()
        content = hashlib.sha256()

    def on_header_end() -> None:
        headers[name.decode("latin-1").lower()] = value.decode("latin-1")
        name.clear()
        value.clear()

    def on_part_end() -> None:
        parts.append((headers.get("content-disposition", ""), dict(headers), content.hexdigest()))

    callbacks: Any = {
        "on_part_begin": on_part_begin,
        "on_header_field": lambda data, start, end: name.extend(data[start:end]),
        "on_header_value": lambda data, start, end: value.extend(data[start:end]),
        "on_header_end": on_header_end,
        "on_part_data": lambda data, start, end: content.update(data[start:end]),
        "on_part_end": on_part_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)
        while piece := body.read(_PIECE):
            parser.write(piece)
    except FormParserError:  # the route will say what is wrong with it
        return _digest(body)
    return sorted(parts, key=lambda part: part[0])
