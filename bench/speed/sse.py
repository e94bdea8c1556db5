"""Server-sent events over HTTP/1.1, just enough to read many of them at little cost: a load generator's client."""

from __future__ import annotations

import socket
from typing import NoReturn

from speed.h2 import Broken, Now, Reader

_READ = 1 << 18
_HEAD_END = b"\r\n\r\n"


class Answer:
    """One request on a connection of its own, and the events of its answer."""

    def __init__(self, address: tuple[str, int], path: str, body: bytes, reader: Reader, now: Now) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = reader
        self._now = now
        self._bytes = b""
        self._event = b""
        self._in_body = False
        head = (
            f"POST {path} HTTP/1.1\r\nhost: {address[0]}\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer none\r\naccept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        reader.begin()
        self.socket.sendall(head.encode("ascii") + body)

    def read(self) -> None:
        """Takes what has come. Raises Broken once the answer is over, well or not."""
        try:
            data = self.socket.recv(_READ)
        except OSError as error:
            self._break(type(error).__name__)
        if not data:
            self._break("hung up")
        now = self._now()
        self._bytes += data
        if not self._in_body and not self._take_head():
            return
        self._take_chunks(now)

    def _take_head(self) -> bool:
        head, found, rest = self._bytes.partition(_HEAD_END)
        if not found:
            return False
        status = head.split(b" ", 2)[1].decode("ascii", "replace")
        if status != "200":
            self._break(f"HTTP {status}")
        if b"chunked" not in head.lower():
            self._break("an answer without chunks, which this client does not know")
        self._bytes, self._in_body = rest, True
        return True

    def _take_chunks(self, now: int) -> None:
        data, at = self._bytes, 0
        while (line := data.find(b"\r\n", at)) >= 0:
            size = int(data[at:line], 16)
            end = line + 2 + size
            if end + 2 > len(data):
                break
            if not size:
                self._break(None)
            self._take(data[line + 2 : end], now)
            at = end + 2
        self._bytes = data[at:]

    def _take(self, chunk: bytes, now: int) -> None:
        *events, self._event = (self._event + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._reader.take(event, now)

    def _break(self, problem: str | None) -> NoReturn:
        self._reader.end(problem)
        raise Broken(problem)
