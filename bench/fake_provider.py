"""How fast the provider of the tests is: a benchmark against it measures the service only while it is faster."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BODY = json.dumps({"model": "gpt-6-luna", "input": "Hello", "stream": True}).encode()
HEAD = b"POST /v1/responses HTTP/1.1\r\nhost: loopback\r\ncontent-length: %d\r\n\r\n"
DELTA = b"event: response.output_text.delta\n"
STAMPED = b'"delta": "'
STAMP_SIZE = 20
END = b"\r\n0\r\n\r\n"
READ = 1 << 20

DESCRIPTION = """\
Measure the provider of the tests (tests/fake_provider), in a process of its own on 127.0.0.1, with plain sockets.

flat out: deltas of text per second that arrive on one stream. The aim is 500,000.
paced:    many streams of 25 deltas a second. A stream's schedule begins with its first delta; late is what arrives
          after its time. The provider says the same of its own sending, so the difference is the reader's.
"""


@contextlib.contextmanager
def provider(*arguments: str) -> Iterator[tuple[str, int]]:
    """A provider of its own; where it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "fake_provider", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            host, _, port = (
                process.stdout.readline().strip().removeprefix("http://").removesuffix("/v1").partition(":")
            )
            yield host, int(port)
        finally:
            process.terminate()


def counts(address: tuple[str, int]) -> dict[str, Any]:
    """What the provider says of itself."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/__fake__/") as answer:
        return dict(json.load(answer))


def ask(address: tuple[str, int]) -> socket.socket:
    """Asks for a reply."""
    connection = socket.create_connection(address)
    connection.sendall(HEAD % len(BODY) + BODY)
    return connection


def flat_out(address: tuple[str, int], deltas: int) -> tuple[float, float]:
    """Deltas per second, and bytes per second, of one reply from its first byte to its last delta."""
    with ask(address) as connection:
        buffer, seen, size, rest = bytearray(READ), 0, 0, b""
        first = last = 0.0
        while not rest.endswith(END):
            count = connection.recv_into(buffer)
            if not count:
                raise SystemExit("the provider hung up")
            data = rest + buffer[:count]
            first = first or time.perf_counter()
            if seen < deltas:
                size += count
                seen += data.count(DELTA)
                last = time.perf_counter()
            rest = bytes(data[-len(DELTA) + 1 :])
    if seen != deltas:
        raise SystemExit(f"{seen} of {deltas} deltas arrived")
    return deltas / (last - first), size / (last - first)


class Reader:
    """One paced stream, as it arrives."""

    def __init__(self, address: tuple[str, int], interval: int) -> None:
        self.connection = ask(address)
        self.connection.setblocking(False)
        self.late: list[int] = []
        self.is_over = False
        self._interval = interval
        self._start = 0
        self._rest = b""

    def read(self) -> None:
        """Takes what is there; notes how many nanoseconds each delta is late."""
        data = self.connection.recv(READ)
        now = time.monotonic_ns()
        if not data:
            raise SystemExit("the provider hung up")
        data = self._rest + data
        place = data.find(STAMPED)
        while 0 <= place <= len(data) - len(STAMPED) - STAMP_SIZE:
            place += len(STAMPED)
            if not self._start:
                self._start = int(data[place : place + STAMP_SIZE])
            self.late.append(now - self._start - len(self.late) * self._interval)
            data = data[place:]
            place = data.find(STAMPED)
        self._rest = data[-2 * len(STAMPED) - STAMP_SIZE :] if place < 0 else data[place:]
        self.is_over = data.endswith(END)


def paced(address: tuple[str, int], streams: int, pace: float, ramp: float) -> list[int]:
    """How late all deltas of all streams came, in nanoseconds, sorted. The streams begin within `ramp` seconds."""
    selector = selectors.DefaultSelector()
    late: list[int] = []
    begin, opened, over = time.monotonic(), 0, 0
    while over < streams:
        while opened < streams and time.monotonic() - begin >= ramp * opened / streams:
            reader = Reader(address, int(1e9 / pace))
            selector.register(reader.connection, selectors.EVENT_READ, reader)
            opened += 1
        for key, _ in selector.select(0.001 if opened < streams else 10):
            reader = key.data
            reader.read()
            if reader.is_over:
                selector.unregister(reader.connection)
                reader.connection.close()
                late += reader.late
                over += 1
    return sorted(late)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--deltas", type=int, default=1_000_000, help="of a reply that is sent flat out (%(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="replies that are sent flat out (%(default)s)")
    parser.add_argument("--streams", type=int, default=2000, help="that are paced (%(default)s)")
    parser.add_argument("--pace", type=float, default=25, help="deltas per second of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="how long each lasts (%(default)s)")
    parser.add_argument("--ramp", type=float, default=8, help="seconds within which they begin (%(default)s)")
    args = parser.parse_args()

    with provider("--flat-out", "--deltas", str(args.deltas)) as address:
        before = counts(address)
        runs = sorted(flat_out(address, args.deltas) for _ in range(args.repeat))
        after = counts(address)
    cpu = (after["cpu_seconds"] - before["cpu_seconds"]) / (args.deltas * args.repeat)
    rate, size = runs[len(runs) // 2]
    print(f"flat out: {rate:,.0f} deltas/s, {size / 1e6:,.0f} MB/s, the median of {args.repeat} replies")
    print(f"  it takes       {cpu * 1e6:.2f} µs of the provider's CPU per delta, all told")

    deltas = int(args.pace * args.seconds)
    with provider("--pace", str(args.pace), "--deltas", str(deltas), "--stamps") as address:
        before = counts(address)
        late = [value / 1e6 for value in paced(address, args.streams, args.pace, args.ramp)]
        after = counts(address)
    if len(late) != args.streams * deltas:
        raise SystemExit(f"{len(late)} of {args.streams * deltas} deltas arrived")
    print(f"paced: {args.streams:,} streams of {args.pace:g} deltas/s for {args.seconds:g} s")
    p50, p99 = (late[int(len(late) * share)] for share in (0.5, 0.99))
    sent = after["lateness"]
    cpu = after["cpu_seconds"] - before["cpu_seconds"]
    print(f"  arrived late   p50 {p50:.1f} ms, p99 {p99:.1f} ms, worst {late[-1]:.1f} ms")
    print(f"  sent late      p50 {sent['p50_ms']} ms, p99 {sent['p99_ms']} ms, worst {sent['worst_ms']} ms")
    print(f"  it takes       {cpu / len(late) * 1e6:.1f} µs of the provider's CPU per delta, all told")


if __name__ == "__main__":
    main()
