"""A wire to the fake provider in memory: real HTTP, a real connection pool, and time that a test may simulate."""

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest.mock import patch

import httpcore2
from openai import AsyncOpenAI

from adapters.openai.client import make_client
from fake_provider import FakeProvider

URL = "http://provider.test/v1"


class _End(asyncio.Transport):
    """One end of a connection. What is written arrives at the other end at once."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = asyncio.StreamReader()
        self.protocol = asyncio.StreamReaderProtocol(self.reader)
        self.peer: _End | None = None
        self.closed = False

    def write(self, data: Any) -> None:
        if self.closed:
            raise ConnectionResetError
        if self.peer is None or self.peer.closed:
            self._close(None)  # who writes on finds out, as with a socket
        else:
            self.peer.reader.feed_data(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self._close(None)

    def abort(self) -> None:
        self._close(ConnectionResetError())

    def _close(self, error: Exception | None) -> None:
        if self.closed:
            return
        self.closed = True
        self.protocol.connection_lost(None)
        if self.peer is None or self.peer.closed:
            return
        if error is None:
            self.peer.reader.feed_eof()
        else:
            self.peer.reader.set_exception(error)


class _Stream(httpcore2.AsyncNetworkStream):
    def __init__(self, end: _End) -> None:
        self._end = end

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self._end.reader.read(max_bytes)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout from error
        except OSError as error:
            raise httpcore2.ReadError from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._end.write(buffer)
        except OSError as error:
            raise httpcore2.WriteError from error

    async def aclose(self) -> None:
        self._end.close()

    def get_extra_info(self, info: str) -> Any:
        return self._end.reader.at_eof() or bool(self._end.reader.exception()) if info == "is_readable" else None


class Wire(httpcore2.AsyncNetworkBackend):
    """Connects to `provider`. `refusals` befall the next connections: "refused", or "mute" where no one answers.

    `open` counts the connections that are open.
    """

    def __init__(self, provider: FakeProvider) -> None:
        self.refusals: list[str] = []
        self._provider = provider
        self._ends: list[_End] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> int:
        return sum(not end.closed for end in self._ends)

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        match self.refusals.pop(0) if self.refusals else "":
            case "refused":
                raise httpcore2.ConnectError
            case "mute":
                assert timeout is not None
                await asyncio.sleep(timeout)
                raise httpcore2.ConnectTimeout
        ours, theirs = _End(), _End()
        ours.peer, theirs.peer = theirs, ours
        writer = asyncio.StreamWriter(theirs, theirs.protocol, theirs.reader, asyncio.get_running_loop())
        task = asyncio.create_task(self._provider.accept(theirs.reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._ends.append(ours)
        return _Stream(ours)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def hang_up(self) -> None:
        """Ends all connections, as the provider's end does."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def wired(provider: FakeProvider, max_connections: int = 5) -> tuple[AsyncOpenAI, Wire]:
    """The client as the adapter makes it, on a wire of its own."""
    wire = Wire(provider)
    pool = partial(httpcore2.AsyncConnectionPool, network_backend=wire)
    with patch.object(httpcore2, "AsyncConnectionPool", pool):
        return make_client("", URL, max_connections), wire
