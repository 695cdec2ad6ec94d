"""/v1/events and /v1/videos/{id}/events: what happens, as server-sent events.

A stream says at once what is kept behind the place that the client has reached (Last-Event-ID), then what happens. It
survives proxies that buffer or that cut off silent connections, and ends when nothing more can happen.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from server.api.access import TenantDep
from server.api.dependencies import Services, ServicesDep
from server.api.openapi import error_responses
from server.errors import OverloadedError, RequestRefusedError
from server.events.follower import Subscription, TooManyStreamsError, Update
from server.events.jobs import LAST_KINDS, PREVIEW, state_of
from server.jobs.model import TERMINAL
from server.jobs.repository import JobRecord

__all__ = ["router"]

router = APIRouter(tags=["events"])

_PAGE = 500
_RETRY_MS = 1000
_HEADERS = {
    "cache-control": "no-cache, no-transform",  # a proxy that compresses would wait for more
    "x-accel-buffering": "no",  # nginx hands on what it has
}
_DESCRIPTION: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "Events: `id` is the place in the log, `event` the kind, `data` JSON.",
    },
    204: {"description": "The client has heard all that will ever happen: it need not come back."},
}

PreviewQuery = Annotated[
    bool, Query(alias="preview", description="Also send pictures of the running estimate (video.preview).")
]
PlaceQuery = Annotated[
    str | None,
    Query(
        alias="last_event_id",
        max_length=20,
        description="As the header Last-Event-ID, for clients that cannot send it: the last event that was heard.",
    ),
]
PlaceHeader = Annotated[str | None, Header(alias="last-event-id", max_length=20)]


@router.get(
    "/v1/videos/{video_id}/events",
    response_class=Response,
    responses={**_DESCRIPTION, **error_responses(400, 404, 429, 503)},
)
async def follow_video(
    video_id: str,
    services: ServicesDep,
    tenant: TenantDep,
    place: PlaceQuery = None,
    last_event_id: PlaceHeader = None,
    preview: PreviewQuery = False,
) -> Response:
    """Follow a video until it is finished: its place in the queue, its progress, and its end.

    Without Last-Event-ID it begins with all that is known of the video.
    """
    reached = _place(last_event_id, place)
    await run_in_threadpool(services.jobs.get, tenant, video_id)
    stream = await _subscribe(services, tenant=tenant, subject=video_id, previews=preview)
    try:
        # asked again, now that nothing can be missed
        job = await run_in_threadpool(services.jobs.get, tenant, video_id)
        if reached is not None and job.status in TERMINAL:
            behind = await run_in_threadpool(services.events.after, reached, limit=1, subject=video_id)
            if not behind:
                services.follower.unsubscribe(stream)
                return Response(status_code=204)
    except BaseException:
        services.follower.unsubscribe(stream)
        raise
    return _EventStream(services, stream, reached=reached or 0, job=job)


@router.get("/v1/events", response_class=Response, responses={**_DESCRIPTION, **error_responses(400, 429, 503)})
async def follow_all(
    services: ServicesDep,
    tenant: TenantDep,
    place: PlaceQuery = None,
    last_event_id: PlaceHeader = None,
    preview: PreviewQuery = False,
) -> Response:
    """Follow everything that happens to one's videos, batches and datasets.

    Without Last-Event-ID it begins now; with 0, with all that is kept.
    """
    reached = _place(last_event_id, place)
    stream = await _subscribe(services, tenant=tenant, subject=None, previews=preview)
    return _EventStream(services, stream, reached=reached, job=None)


def _place(header: str | None, query: str | None) -> int | None:
    """Place that the client has reached; a header, which comes with every return, wins over the address."""
    text = header if header else query
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        message = f"last_event_id: must be the id of an event, a whole number from 0 on, got {text!r}"
        raise RequestRefusedError(message, param="last_event_id", code="invalid_last_event_id")
    return int(text)


async def _subscribe(services: Services, *, tenant: str, subject: str | None, previews: bool) -> Subscription:
    try:
        return await services.follower.subscribe(tenant=tenant, subject=subject, previews=previews)
    except TooManyStreamsError as error:
        message = f"{error}; ask for the video itself, or try again later."
        raise OverloadedError(message, code="too_many_streams", retry_after_ms=5000) from None


class _EventStream(Response):
    """Sends a subscription, and closes it whatever happens.

    Args:
        reached: Place behind which to begin; None: now.
        job: The only object that is followed, as it was found after the subscription.
    """

    def __init__(self, services: Services, stream: Subscription, *, reached: int | None, job: JobRecord | None) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._services, self._stream = services, stream
        self._reached, self._job = reached, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it until it ends or the client is gone."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with anyio.create_task_group() as tasks:

                async def leave_with_client() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(leave_with_client)
                async for chunk in self._chunks():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                tasks.cancel_scope.cancel()
        finally:
            self._services.follower.unsubscribe(self._stream)

    async def _chunks(self) -> AsyncIterator[bytes]:
        # something at once: the client, and what is between, see that the stream is there
        yield f"retry: {_RETRY_MS}\n\n".encode()
        async for update in self._updates():
            yield b": alive\n\n" if update is None else _encoded(update)

    async def _updates(self) -> AsyncIterator[Update | None]:
        """What is kept, then what happens; None after a silence."""
        stream, reached = self._stream, self._reached
        while reached is not None:
            page = await run_in_threadpool(
                self._services.events.after,
                reached,
                limit=_PAGE,
                subject=stream.subject,
                tenant=stream.tenant if stream.subject is None else None,
            )
            for event in page:
                reached = event.seq
                if stream.previews or event.kind != PREVIEW:
                    yield Update.of(event)
                if stream.subject is not None and event.kind in LAST_KINDS:
                    return
            if len(page) < _PAGE:
                break
        if self._job is not None and self._job.status in TERMINAL:
            # Its last event is not kept any more.
            kind, data = state_of(self._job)
            yield Update(seq=None, kind=kind, subject=self._job.id, data=data)
            return
        while True:
            try:
                async with asyncio.timeout(self._services.settings.events_heartbeat_s):
                    update = await stream.pending.get()
            except TimeoutError:
                yield None
                continue
            if update is None:
                return
            if update.seq is not None:
                if reached is not None and update.seq <= reached:
                    continue  # it was among what is kept
                reached = update.seq
            yield update
            if stream.subject is not None and update.kind in LAST_KINDS:
                return


def _encoded(update: Update) -> bytes:
    body = {"object": "event", "type": update.kind, "created_at": update.created_at, "data": update.data}
    place = "" if update.seq is None else f"id: {update.seq}\n"
    return f"{place}event: {update.kind}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()
