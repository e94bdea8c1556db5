"""Just enough HTTP/1.1 for a provider: requests with a length, answers with a length or in chunks."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came. `headers` have lower-case names; `body` is None where there is none."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Json | None


class Disconnected(Exception):
    """The client is gone."""


class Connection:
    """One client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read_request(self) -> Request:
        """The next request. Raises Disconnected."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ", 2)
            headers = {}
            for line in filter(None, lines):
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Disconnected from error
        url = urlsplit(target)
        return Request(method, url.path, dict(parse_qsl(url.query)), headers, json.loads(body) if body else None)

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Sends a whole answer."""
        self._head(status, {"content-type": "application/json", "content-length": str(len(body)), **headers})
        await self._write(body)

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Begins an answer in chunks."""
        fixed = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
        self._head(200, {**fixed, **headers})
        await self._write(b"")

    async def send(self, data: bytes) -> None:
        """Sends one chunk."""
        await self._write(b"%x\r\n%s\r\n" % (len(data), data))

    async def end(self) -> None:
        """Ends an answer in chunks. Raises Disconnected if the client left before."""
        if self._reader.at_eof():
            raise Disconnected
        await self._write(b"0\r\n\r\n")

    def reset(self) -> None:
        """Closes the connection without a farewell."""
        self._writer.transport.abort()

    async def wait_for(self, event: asyncio.Event) -> None:
        """Waits for an event. Raises Disconnected if the client leaves before."""
        waiting = asyncio.ensure_future(event.wait())
        leaving = asyncio.ensure_future(self._reader.read(1))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Disconnected
        finally:
            waiting.cancel()
            leaving.cancel()
            await asyncio.gather(waiting, leaving, return_exceptions=True)

    async def close(self) -> None:
        """Closes the connection."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} Status", *(f"{name}: {value}" for name, value in headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise Disconnected from error
