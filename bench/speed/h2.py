"""gRPC over HTTP/2 without encryption, just enough to read many streams at little cost: a load generator's client.

It slows the server down in nothing: windows are as large as they get. It offers no dynamic header table, so that
headers come as plain literals.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import NoReturn, Protocol

from http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    message,
    request_headers,
    settings,
)

_LARGEST = 2**31 - 1
_FIRST_WINDOW = 65_535
_REFILL = 1 << 28
_READ = 1 << 18
_STATUS = b"grpc-status"
_OWN_SETTINGS = settings(header_table_size=0, enable_push=0, initial_window_size=_LARGEST)

Now = Callable[[], int]


class Broken(Exception):
    """The connection is of no use any more."""


class Reader(Protocol):
    """One call, as its answer comes."""

    def begin(self) -> None:
        """The request is on its way."""

    def take(self, message: bytes, now: int) -> None:
        """A message has come; the time is in nanoseconds of CLOCK_MONOTONIC."""

    def end(self, problem: str | None) -> None:
        """The call is over: None if its status is OK."""


class Calls:
    """One connection to a gRPC server, and the calls of one method on it."""

    def __init__(self, address: tuple[str, int], method: str, now: Now) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._now = now
        self._block = request_headers(f"{address[0]}:{address[1]}", method)
        self._next = 1
        self._readers: dict[int, Reader] = {}
        self._parts: dict[int, bytes] = {}
        self._rest = b""
        self._taken = 0
        window = frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", _LARGEST - _FIRST_WINDOW))
        self.socket.sendall(PREFACE + _OWN_SETTINGS + window)

    def call(self, reader: Reader, request: bytes) -> None:
        """Begins a call. The request is small: it fits into the server's first window."""
        stream, self._next = self._next, self._next + 2
        self._readers[stream] = reader
        body = frame(DATA, END_STREAM, stream, message(request))
        data = frame(HEADERS, END_HEADERS, stream, self._block) + body
        reader.begin()
        self.socket.sendall(data)

    def read(self) -> None:
        """Takes what has come. Raises Broken, after every open call has ended."""
        try:
            data = self.socket.recv(_READ)
        except OSError as error:
            self._break(type(error).__name__)
        if not data:
            self._break("hung up")
        now = self._now()
        if self._rest:
            data = self._rest + data
        at, size = 0, len(data)
        while size - at >= 9:
            high, low, kind, flags, stream = HEAD.unpack_from(data, at)
            end = at + 9 + (high << 8 | low)
            if end > size:
                break
            if kind == DATA:
                self._data(stream, flags, data[at + 9 : end], now)
            else:
                self._other(kind, flags, stream, data[at + 9 : end])
            at = end
        self._rest = data[at:]
        self._taken += at
        if self._taken > _REFILL:
            self.socket.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._taken)))
            self._taken = 0

    def _data(self, stream: int, flags: int, data: bytes, now: int) -> None:
        if flags & PADDED:
            self._break("sent padding, which this client does not know")
        reader = self._readers.get(stream)
        if reader is None:
            return
        if stream in self._parts:
            data = self._parts.pop(stream) + data
        at, size = 0, len(data)
        while size - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > size:
                break
            reader.take(data[at + 5 : end], now)
            at = end
        if at < size:
            self._parts[stream] = data[at:]

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS and flags & END_STREAM:
            self._end(stream, _problem(payload) if flags & END_HEADERS else "trailers in pieces")
        elif kind == RST_STREAM:
            self._end(stream, f"reset {int.from_bytes(payload, 'big')}")
        elif kind == SETTINGS and not flags & ACK:
            self.socket.sendall(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY and not self._readers:
            self._break("sent away")

    def _end(self, stream: int, problem: str | None) -> None:
        reader = self._readers.pop(stream, None)
        if reader is not None:
            reader.end("the last message was cut off" if self._parts.pop(stream, b"") else problem)

    def _break(self, problem: str) -> NoReturn:
        for stream in list(self._readers):
            self._end(stream, problem)
        raise Broken(problem)


def _problem(trailers: bytes) -> str | None:
    """What the trailers say of the call; None if its status is OK."""
    at = trailers.find(_STATUS)
    if at < 0:
        return "no status that could be read"
    at += len(_STATUS)
    status = trailers[at + 1 : at + 1 + trailers[at]].decode("ascii", "replace")
    return None if status == "0" else f"status {status}"
