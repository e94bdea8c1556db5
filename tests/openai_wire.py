"""A wire to the fake provider in memory: real HTTP, a real connection pool, and time that a test may simulate."""

import asyncio
from typing import Any, cast

import aiohttp
from openai import AsyncOpenAI

from adapters.openai.client import make_client
from fake_provider import FakeProvider

URL = "http://provider.test/v1"
READ = 1 << 18
"""Bytes that are read at once at most, as by asyncio from a socket."""


class _End(asyncio.Transport):
    """One end of a connection. What is written arrives at the other end at once, or when that reads on."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.peer: _End | None = None
        self.closed = False
        self._paused = False
        self._unread: list[bytes | Exception | None] = []

    def write(self, data: Any) -> None:
        if self.closed:
            raise ConnectionResetError
        if self.peer is None or self.peer.closed:
            self._close(None)  # who writes on finds out, as with a socket
        else:
            self.peer.take(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            asyncio.get_running_loop().call_soon(self._read)

    def close(self) -> None:
        self._close(None)

    def abort(self) -> None:
        self._close(ConnectionResetError())

    def take(self, data: bytes | Exception | None) -> None:
        """What comes from the other end: bytes, its end, or a reset."""
        if isinstance(data, bytes):
            self._unread += [data[start : start + READ] for start in range(0, len(data), READ)]
        else:
            self._unread.append(data)
        self._read()

    def _read(self) -> None:
        while self._unread and not self._paused and not self.closed:
            match self._unread.pop(0):
                case bytes() as data:
                    self.protocol.data_received(data)
                case None:
                    if not self.protocol.eof_received():
                        self._close(None)
                case reset:
                    self._lost(reset)

    def _close(self, error: Exception | None) -> None:
        if not self.closed:
            self._lost(None)
            if self.peer is not None and not self.peer.closed:
                self.peer.take(error)

    def _lost(self, error: Exception | None) -> None:
        self.closed = True
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, error)


class _Connector(aiohttp.BaseConnector):
    def __init__(self, wire: "Wire") -> None:
        super().__init__(limit=0)
        self._wire = wire

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> Any:
        match self._wire.refusals.pop(0) if self._wire.refusals else "":
            case "refused":
                raise aiohttp.ClientConnectorError(req.connection_key, ConnectionRefusedError())
            case "mute":
                await asyncio.Event().wait()
        protocol = self._factory()
        protocol.connection_made(self._wire.connect(protocol))
        return protocol


class Wire:
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

    def connect(self, protocol: asyncio.Protocol) -> asyncio.Transport:
        """Makes a connection and returns our end of it."""
        reader = asyncio.StreamReader()
        answering = asyncio.StreamReaderProtocol(reader)
        ours, theirs = _End(protocol), _End(answering)
        ours.peer, theirs.peer = theirs, ours
        writer = asyncio.StreamWriter(theirs, answering, reader, asyncio.get_running_loop())
        task = asyncio.create_task(self._provider.accept(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._ends.append(ours)
        return ours

    async def hang_up(self) -> None:
        """Ends all connections, as the provider's end does."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def wired(provider: FakeProvider, max_connections: int = 5) -> tuple[AsyncOpenAI, Wire]:
    """The client as the adapter makes it, on a wire of its own."""
    wire = Wire(provider)
    made = make_client("", URL, max_connections)
    cast("Any", made._client)._transport._connector = lambda: _Connector(wire)
    return made, wire
