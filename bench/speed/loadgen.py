"""The load generator, in a process of its own: opens streams, reads them, and says how they went.

It reads one Load as JSON from stdin, prints `live` once every stream has text, and its Outcome as JSON at the end.
It must not be what limits a run, so it also says how busy it was and how long it left data lying.
"""

from __future__ import annotations

import gc
import json
import math
import re
import select
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from speed.h2 import Broken, Calls
from speed.sse import Answer
from speed.upstream import MODEL, PIECE

LIVE = "live"
"""What it says when all streams are."""
CHAT = "/vidacoach.agents.v1.AgentService/Chat"
RESPONSES = "/v1/responses"
STREAMS_PER_CONNECTION = 100
_ONE = PIECE.encode()
_STAMPS = re.compile(rb"(\d{20}) ").findall
_EVENT_WITH_TEXT = re.compile(rb"\x0a[\x80-\xff]*[\x00-\x7f]\x08[\x80-\xff]*[\x00-\x7f]\x1a").match
"""ChatResponse.event (1), its position (1) and then text_delta (3). The finished event has all text again."""
_DELTA = b'response.output_text.delta"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to ask for. `protocol` is `grpc` or `sse`; every stream must bring `deltas` deltas, `pace` a second,
    with the time of their sending, or without it as fast as they come.

    Streams begin evenly within `ramp` seconds or, with `in_flight`, so many at a time. `threads` are pairs of a
    user and a thread to go on with, one for each stream; else each stream is a new user's.
    """

    address: str
    protocol: str
    streams: int
    deltas: int
    pace: float | None
    seconds: float
    name: str = "user"
    ramp: float = 0.0
    in_flight: int | None = None
    method: str = CHAT
    threads: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Milliseconds."""

    p50: float
    p99: float
    worst: float

    @classmethod
    def of(cls, nanoseconds: Sequence[int]) -> Spread | None:
        """None of nothing."""
        if not nanoseconds:
            return None
        ordered = sorted(nanoseconds)
        at = [ordered[math.ceil(share * len(ordered)) - 1] / 1e6 for share in (0.5, 0.99, 1.0)]
        return cls(p50=at[0], p99=at[1], worst=at[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How it went. `first_text` is from sending a request to the first text of its answer; `added` is how old
    deltas are when they arrive; `live` is how many streams were open at once; `turns` is their whole time.

    `busy` is the share of its core that the generator took, `lag` how long it left data lying while it read other,
    `stall` for how many seconds at a time it did not come to run at all.
    """

    completed: int
    failed: dict[str, int]
    deltas: int
    messages: int
    live: int
    wall: float
    first_text: Spread | None
    added: Spread | None
    turns: Spread | None
    busy: float
    lag: Spread | None
    stall: float

    @classmethod
    def read(cls, line: str) -> Outcome:
        """From what the process printed."""
        given: dict[str, Any] = json.loads(line)
        for name in ("first_text", "added", "turns", "lag"):
            given[name] = given[name] and Spread(**given[name])
        return cls(**given)


@dataclass(slots=True)
class Tally:
    """What all streams have in common."""

    load: Load
    open: int = 0
    over: int = 0
    live: int = 0
    spoken: int = 0
    completed: int = 0
    deltas: int = 0
    messages: int = 0
    arrived: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    first_text: array[int] = field(default_factory=lambda: array("q"))
    added: array[int] = field(default_factory=lambda: array("q"))
    turns: array[int] = field(default_factory=lambda: array("q"))


class Stream:
    """One stream, as it comes."""

    __slots__ = ("_began", "_count", "_first", "_tally")

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._began = self._first = self._count = 0

    def begin(self) -> None:
        """Notes the time."""
        self._tally.open += 1
        self._tally.live = max(self._tally.live, self._tally.open)
        self._began = time.monotonic_ns()

    def take(self, message: bytes, now: int) -> None:
        """Counts what is in it, if that is text."""
        tally = self._tally
        if not (_EVENT_WITH_TEXT(message) if tally.load.protocol == "grpc" else _DELTA in message):
            return
        if tally.load.pace is not None:
            stamps = _STAMPS(message)
            count = len(stamps)
            tally.added.extend([now - int(stamp) for stamp in stamps])
        else:
            count = message.count(_ONE)
        if not self._first:
            self._first = now
            tally.first_text.append(now - self._began)
            tally.spoken += 1
        self._count += count
        tally.arrived += count
        tally.messages += 1

    def end(self, problem: str | None) -> None:
        """Judges it."""
        tally = self._tally
        tally.open -= 1
        tally.over += 1
        tally.deltas += self._count
        if problem is None and self._count != tally.load.deltas:
            problem = f"{self._count} of {tally.load.deltas} deltas"
        if problem is not None:
            tally.failed[problem] += 1
            return
        tally.completed += 1
        tally.turns.append(time.monotonic_ns() - self._began)


class Generator:
    """Opens the streams when they are due, and reads them."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._tally = Tally(load)
        self._epoll = select.epoll()
        self._open: dict[int, Calls | Answer] = {}
        host, _, port = load.address.rpartition(":")
        self._address = (host, int(port))
        self._calls: list[Calls] = []
        self._busy = array("q")
        self._asked = 0

    def run(self) -> Outcome:
        """From the first request to the end of the last stream, or until the time is over."""
        if self._load.protocol == "grpc":
            at_once = self._load.in_flight or self._load.streams
            for _ in range(math.ceil(at_once / STREAMS_PER_CONNECTION)):
                calls = Calls(self._address, self._load.method, time.monotonic_ns)
                self._calls.append(calls)
                self._watch(calls)
        began, cpu = time.monotonic(), time.process_time()
        tally, stall = self._tally, 0.0
        before_live: int | None = None
        while_live: int | None = None
        while tally.over < self._load.streams and (passed := time.monotonic() - began) < self._load.seconds:
            wait = self._ask(passed)
            asleep = time.monotonic()
            events = self._epoll.poll(wait)
            woken = time.monotonic_ns()
            stall = max(stall, woken / 1e9 - asleep - wait)
            for number, _ in events:
                self._read(number)
            self._busy.append(time.monotonic_ns() - woken)
            if before_live is None and tally.spoken >= self._load.streams:
                before_live = tally.arrived
                print(LIVE, flush=True)
            if before_live is not None and while_live is None and tally.over:
                while_live = tally.arrived - before_live
                print(while_live, flush=True)
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        for connection in self._open.values():
            connection.socket.close()
        if unfinished := self._load.streams - tally.over:
            tally.failed["unfinished"] += unfinished
        if before_live is None:
            print("never live", flush=True)
        if while_live is None:
            print(0, flush=True)
        return Outcome(
            completed=tally.completed,
            failed=dict(tally.failed),
            deltas=tally.deltas,
            messages=tally.messages,
            live=tally.live,
            wall=wall,
            first_text=Spread.of(tally.first_text),
            added=Spread.of(tally.added),
            turns=Spread.of(tally.turns),
            busy=cpu / wall,
            lag=Spread.of(self._busy),
            stall=stall,
        )

    def _ask(self, passed: float) -> float:
        """Begins what is due; returns for how many seconds nothing more is."""
        load, tally = self._load, self._tally
        if load.in_flight is not None:
            while self._asked < load.streams and tally.open < load.in_flight:
                self._begin()
            return min(1.0, load.seconds)
        while self._asked < load.streams and load.ramp * self._asked / load.streams <= passed:
            self._begin()
        due = load.ramp * self._asked / load.streams if self._asked < load.streams else load.seconds
        return max(0.0, min(1.0, due - passed))

    def _begin(self) -> None:
        number, self._asked = self._asked, self._asked + 1
        stream = Stream(self._tally)
        try:
            if self._load.protocol == "grpc":
                calls = self._calls[number % len(self._calls)]
                calls.call(stream, self._chat(number))
            else:
                self._watch(Answer(self._address, RESPONSES, _RESPONSE, stream, time.monotonic_ns))
        except OSError as error:
            self._tally.over += 1
            self._tally.failed[type(error).__name__] += 1

    def _chat(self, number: int) -> bytes:
        user, thread = self._load.threads[number] if self._load.threads else (f"{self._load.name}-{number}", "")
        words = pb.ContentPart(text=f"{self._load.deltas} {self._load.pace or 0}")  # the null server heeds them
        request = api.ChatRequest(user_id=user, thread_id=thread, content=[words])
        return request.SerializeToString()

    def _watch(self, connection: Calls | Answer) -> None:
        number = connection.socket.fileno()
        self._open[number] = connection
        self._epoll.register(number, select.EPOLLIN)

    def _read(self, number: int) -> None:
        connection = self._open[number]
        try:
            connection.read()
        except Broken:
            self._epoll.unregister(number)
            del self._open[number]
            connection.socket.close()


_RESPONSE = json.dumps({"model": MODEL, "input": "Hello", "stream": True}).encode()


def main() -> None:
    """Runs one load after another, as they are asked for.

    Prints a line when all streams are live, one when the first of them ends, with how many deltas came in between,
    and one with the outcome.
    """
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(asdict(Generator(Load(**json.loads(line))).run())), flush=True)


if __name__ == "__main__":
    main()
