"""A TCP relay to put between a client and a server, whose connections break, hang and stutter on demand."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Relay:
    """Passes connections on to a server at ``host`` and ``port``; an asynchronous context manager.

    It lives in the event loop that enters it, so what uses it must not block that loop.

    :param piece: pass bytes on to the client in pieces of at most this many.
    :param delay: seconds to wait before each piece.
    """

    def __init__(self, host: str, port: int, *, piece: int = 1 << 16, delay: float = 0.0) -> None:
        self.address = "127.0.0.1"
        self.port = 0
        self.received = bytearray()
        """All that clients have sent."""
        self.hang_up_next = False
        """Break the connection that sends something next, without passing that on; once."""
        self._target = (host, port)
        self._piece = piece
        self._delay = delay
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.refuse()

    async def accept(self) -> None:
        """Take connections (again), at the same port."""
        if self._server is None:
            self._server = await asyncio.start_server(self._relay, self.address, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Break all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.cut()

    async def cut(self) -> None:
        """Break all connections; new ones are taken."""
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def hang(self) -> None:
        """Take connections, and pass nothing on."""
        self._flowing.clear()

    def flow(self) -> None:
        """Go on after :meth:`hang`."""
        self._flowing.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        onward: asyncio.StreamWriter | None = None
        try:
            back, onward = await asyncio.open_connection(*self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, onward, 1 << 16, self.received))
                group.create_task(self._pass_on(back, writer, self._piece, None))
        except* (OSError, asyncio.CancelledError, _Ended):
            pass  # broken at either end, or cut: for the other end it breaks, too
        finally:
            self._connections.discard(connection)
            for end in (writer, onward):
                if end is not None:
                    end.transport.abort()
                    with contextlib.suppress(OSError):
                        await end.wait_closed()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, piece: int, log: bytearray | None
    ) -> None:
        while data := await reader.read(piece):
            await self._flowing.wait()
            if log is None:
                await asyncio.sleep(self._delay)
            if log is not None:
                if self.hang_up_next:
                    self.hang_up_next = False
                    break
                log += data
            writer.write(data)
            await writer.drain()
        raise _Ended


class _Ended(Exception):
    """One end has closed the connection."""
