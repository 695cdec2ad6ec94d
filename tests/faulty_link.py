"""A TCP link that can be made slow, cut, or dead without a word, between clients and a server on loopback."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["FaultyLink"]


class FaultyLink:
    """Hands bytes on between whoever connects to ``port`` and ``127.0.0.1:target``, by a thread of its own.

    Attributes:
        port: Where it listens.
        delay_s: Seconds by which each piece is held up, either way.
        cut_after: Bytes of answers after which a connection is reset; None: never.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.delay_s = 0.0
        self.cut_after: int | None = None
        self._open: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._frozen: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._thread.start()
        self.listen()

    def listen(self) -> None:
        """Take connections (again)."""
        self._call(self._listen())

    def refuse(self) -> None:
        """Reset all connections and take no more."""
        self._call(self._refuse())

    def freeze(self) -> int:
        """Let nothing through on the connections that there are, and never close them; new ones work. Their number."""
        return self._call(self._freeze())

    def close(self) -> None:
        """Reset everything, frozen connections too."""
        self._call(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        assert self._server is not None
        self._server.close()
        for pair in list(self._open):
            for writer in pair:
                _reset(writer)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _freeze(self) -> int:
        number = 0
        for pair in self._open:
            if pair[0] not in self._frozen:
                self._frozen.update(pair)
                number += 1
        return number

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # of a server of asyncio nobody waits for this task
        finally:
            _reset(writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            return
        pair = (writer, far_writer)
        self._open.add(pair)
        answered = 0

        def count(size: int) -> bool:
            nonlocal answered
            answered += size
            return self.cut_after is not None and answered > self.cut_after

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hand_on(reader, far_writer, lambda _: False))
                group.create_task(self._hand_on(far_reader, writer, count))
        except* (OSError, EOFError):
            pass
        finally:
            self._open.discard(pair)
            _reset(far_writer)

    async def _hand_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_cut: Callable[[int], bool]
    ) -> None:
        while True:
            piece = await reader.read(65536)
            while writer in self._frozen:  # also the end of a connection is not told
                await asyncio.sleep(3600)
            if not piece:
                raise EOFError
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if is_cut(len(piece)):
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with a RST."""
    found: socket.socket | None = writer.get_extra_info("socket")
    if found is not None and found.fileno() != -1:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
