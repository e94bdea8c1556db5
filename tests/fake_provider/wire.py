"""Just enough HTTP/1.1 for a provider: requests with a length, answers with a length or in chunks."""

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

Json = dict[str, Any]

_NO_LINGER = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came. `headers` have lower-case names; `body` is None where there is none, and where it is
    not an object in JSON, which `garbled` says."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Json | None
    garbled: bool = False


class Disconnected(Exception):
    """The client is gone."""


class Connection:
    """One client connection. `idle` between an answer and the next request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.idle = True

    async def read_request(self) -> Request:
        """The next request. Raises Disconnected."""
        self.idle = True
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            self.idle = False
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ", 2)
            headers = {}
            for line in filter(None, lines):
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            data = await self._reader.readexactly(int(headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, OSError) as error:
            raise Disconnected from error
        url = urlsplit(target)
        body, garbled = _body(data)
        return Request(method, unquote(url.path), _query(url.query), headers, body, garbled)

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
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def send_now(self, data: bytes) -> None:
        """Sends one chunk without waiting for a reader who is behind: mind `backlog`."""
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    @property
    def backlog(self) -> int:
        """Bytes that wait for the reader here."""
        return self._writer.transport.get_write_buffer_size()

    @property
    def is_closed(self) -> bool:
        """Whether nothing that is sent arrives any more."""
        return self._writer.transport.is_closing() or self._reader.at_eof()

    async def end(self) -> None:
        """Ends an answer in chunks. Raises Disconnected if the client left before."""
        if self._reader.at_eof():
            raise Disconnected
        await self._write(b"0\r\n\r\n")

    def reset(self) -> None:
        """Closes the connection without a farewell: the client is told of a reset."""
        sock = self._writer.get_extra_info("socket")
        if sock is not None and not self._writer.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
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
        known = status in HTTPStatus.__members__.values()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase if known else 'Status'}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise Disconnected from error


def _body(data: bytes) -> tuple[Json | None, bool]:
    if not data:
        return None, False
    try:
        body = json.loads(data)
    except ValueError:
        return None, True
    return (body, False) if isinstance(body, dict) else (None, True)


def _query(query: str) -> Mapping[str, str]:
    """The parameters; those that are lists, as `include[]`, are joined by commas."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(query):
        found[name] = f"{found[name]},{value}" if name in found else value
    return found
