"""Hands the events of the log to the streams of one API process.

One task a process looks at the log, whatever the number of streams, and only while there are any. A stream is a bounded
queue: one whose client does not keep up is ended, and the client comes back with the place that it has reached.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError

from server.events.jobs import PREVIEW, QUEUED, state_of
from server.events.log import EventLog, EventRecord
from server.jobs.repository import JobRepository

__all__ = ["Follower", "Subscription", "TooManyStreamsError", "Update"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 500
_MOST_PENDING = 1000
_PLACES_EVERY_S = 1.0
_MOST_PLACES = 1000
PREVIEWS_FOR_S = 10.0
_PREVIEWS_EVERY_S = 3.0
_STOPPING_S = 5.0


class TooManyStreamsError(Exception):
    """As many streams are open as may be."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """Something to send: an event of the log, or (without a place) a state that is true now and kept nowhere."""

    seq: int | None
    kind: str
    subject: str
    data: dict[str, Any]
    created_at: float | None = None

    @classmethod
    def of(cls, event: EventRecord) -> "Update":
        """That of an event."""
        return cls(seq=event.seq, kind=event.kind, subject=event.subject, data=event.data, created_at=event.created_at)


@dataclass(eq=False, kw_only=True)
class Subscription:
    """What one stream wants to hear: all of one object, or all of one tenant."""

    tenant: str
    subject: str | None
    previews: bool
    pending: "asyncio.Queue[Update | None]" = field(default_factory=lambda: asyncio.Queue(_MOST_PENDING + 1))
    """What is to be sent; None: the stream ends here."""
    places: dict[str, int] = field(default_factory=dict)
    """Places in the queue that were told, by job."""

    def wants(self, event: EventRecord) -> bool:
        """Whether it wants to hear this."""
        is_meant = event.tenant == self.tenant if self.subject is None else event.subject == self.subject
        return is_meant and (self.previews or event.kind != PREVIEW)

    def put(self, update: Update) -> bool:
        """Hand something to the stream; False when it does not keep up."""
        if self.pending.qsize() >= _MOST_PENDING:
            return False
        self.pending.put_nowait(update)
        return True


class Follower:
    """All streams of one process. Used in its event loop alone.

    Args:
        interval_s: Seconds between two looks.
        max_streams: Streams that may be open at once.
    """

    def __init__(self, log: EventLog, jobs: JobRepository, *, interval_s: float, max_streams: int) -> None:
        self._log, self._jobs = log, jobs
        self._interval_s, self._max_streams = interval_s, max_streams
        self._streams: set[Subscription] = set()
        self._by_subject: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._by_tenant: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._at = 0
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closing = asyncio.Event()

    def __len__(self) -> int:
        """Number of open streams."""
        return len(self._streams)

    async def subscribe(self, *, tenant: str, subject: str | None, previews: bool) -> Subscription:
        """Open a stream. Whatever is committed after this is handed to it; close it with :meth:`unsubscribe`.

        Raises:
            TooManyStreamsError: As many are open as may be.
        """
        if len(self._streams) >= self._max_streams:
            raise TooManyStreamsError(f"{self._max_streams} streams of events are open, no more can be now")
        stream = Subscription(tenant=tenant, subject=subject, previews=previews)
        if self._closing.is_set():
            stream.pending.put_nowait(None)
            return stream
        async with self._starting:
            if self._task is None or self._task.done():
                self._at = await to_thread.run_sync(self._log.end)
                self._task = asyncio.create_task(self._run(), name="events")
            self._streams.add(stream)
            self._group(stream).add(stream)
        if self._closing.is_set():  # in the meantime
            stream.pending.put_nowait(None)
        elif previews:
            await self._ask(self._want_previews, [stream])
        return stream

    def unsubscribe(self, stream: Subscription) -> None:
        """Close a stream; nothing of it is kept."""
        self._streams.discard(stream)
        groups, key = self._key(stream)
        groups[key].discard(stream)
        if not groups[key]:
            del groups[key]

    def close(self) -> None:
        """End every stream, now and later: the process stops."""
        self._closing.set()
        for stream in self._streams:
            with suppress(asyncio.QueueFull):
                stream.pending.put_nowait(None)

    async def stop(self) -> None:
        """As :meth:`close`, and look at the log no more.

        A look that is under way is waited for, some seconds at most: a thread has it, and with it a connection to the
        database, which the caller is about to close.
        """
        self.close()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_STOPPING_S)
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def _key(self, stream: Subscription) -> tuple[defaultdict[str, set[Subscription]], str]:
        return (self._by_tenant, stream.tenant) if stream.subject is None else (self._by_subject, stream.subject)

    def _group(self, stream: Subscription) -> set[Subscription]:
        groups, key = self._key(stream)
        return groups[key]

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        places_at = previews_at = loop.time()
        while self._streams and not self._closing.is_set():
            await self._ask(self._hand_out)
            if loop.time() >= places_at:
                places_at = loop.time() + _PLACES_EVERY_S
                await self._ask(self._tell_places)
            if loop.time() >= previews_at:
                previews_at = loop.time() + _PREVIEWS_EVERY_S
                await self._ask(self._want_previews, [stream for stream in self._streams if stream.previews])
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._interval_s)

    async def _ask(self, part: Callable[..., Any], *arguments: Any) -> None:
        try:
            await part(*arguments)
        except SQLAlchemyError as error:
            logger.warning("events: the database does not answer: %s", type(error).__name__)

    async def _hand_out(self) -> None:
        while True:
            events = await to_thread.run_sync(lambda: self._log.after(self._at, limit=_MOST_AT_ONCE))
            for event in events:
                self._at = event.seq
                streams = self._by_subject.get(event.subject, set()) | self._by_tenant.get(event.tenant, set())
                for stream in streams:
                    if stream.wants(event):
                        self._put(stream, Update.of(event))
            if len(events) < _MOST_AT_ONCE:
                return

    async def _tell_places(self) -> None:
        """Tell each stream where in the queue its jobs are, where that has changed."""
        job_ids, tenants = list(self._by_subject), list(self._by_tenant)
        if not job_ids and not tenants:
            return
        waiting = await to_thread.run_sync(lambda: self._jobs.queue_places(job_ids, tenants, limit=_MOST_PLACES))
        told: dict[Subscription, dict[str, int]] = {}
        for job, place in waiting:
            for stream in self._by_subject.get(job.id, set()) | self._by_tenant.get(job.tenant, set()):
                told.setdefault(stream, {})[job.id] = place
                if stream.places.get(job.id) != place:
                    _, data = state_of(job)
                    data["queue_position"] = place
                    self._put(stream, Update(seq=None, kind=QUEUED, subject=job.id, data=data))
        for stream in self._streams:
            stream.places = told.get(stream, {})

    async def _want_previews(self, streams: list[Subscription]) -> None:
        job_ids = {stream.subject for stream in streams if stream.subject is not None}
        tenants = {stream.tenant for stream in streams if stream.subject is None}
        if job_ids or tenants:
            await to_thread.run_sync(lambda: self._jobs.want_previews(job_ids, tenants, for_s=PREVIEWS_FOR_S))

    def _put(self, stream: Subscription, update: Update) -> None:
        if not stream.put(update):
            logger.info("a stream of events is ended: its client does not keep up")
            self.unsubscribe(stream)
            stream.pending.put_nowait(None)  # there is one place more than updates may take
