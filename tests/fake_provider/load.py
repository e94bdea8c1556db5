"""Long replies for measuring: their deltas are bytes from a template, not objects."""

import asyncio
import math
import time
from collections.abc import Callable

from fake_provider.rendering import Rendering, as_bytes, usage
from fake_provider.script import Answer, Load, Text
from fake_provider.sending import Stream
from fake_provider.wire import Connection, Disconnected, Json

_BLOCK = 1000
_BACKLOG = 1 << 20
_NUMBER = 987_654_321
_STAMP = "12345678901234567890 "
_BUCKET = 1e-4
_BUCKETS = 50_000


class Lateness:
    """How much later than planned paced deltas were sent: a histogram in tenths of milliseconds, up to five
    seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (_BUCKETS + 1)
        self.deltas = 0
        self.worst = 0.0

    def note(self, seconds: float) -> None:
        """Counts one delta."""
        self.deltas += 1
        self._counts[min(int(seconds / _BUCKET), _BUCKETS)] += 1
        self.worst = max(self.worst, seconds)

    def percentile(self, share: float) -> float:
        """Seconds within which so large a share (0 to 1) was sent; 0 if nothing was."""
        wanted, seen = math.ceil(share * self.deltas), 0
        for place, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return (place + 1) * _BUCKET if self.deltas else 0.0
        return self.worst

    def as_json(self) -> Json:
        """The figures in milliseconds."""
        shares = {f"p{share}_ms": round(self.percentile(share / 100) * 1000, 1) for share in (50, 99)}
        return {"deltas": self.deltas, **shares, "worst_ms": round(self.worst * 1000, 1)}


class LoadStream:
    """The events of one such reply. `rendering` becomes final with the last of them."""

    def __init__(self, load: Load, rendering: Rendering) -> None:
        self._load = load
        self._rendering = rendering
        self._plain = Answer()
        events = rendering.events()
        cut = next(n for n, event in enumerate(events) if event["type"] == "response.output_text.done")
        self._head, self._tail = events[:cut], events[cut:]
        place = {name: events[cut][name] for name in ("item_id", "output_index", "content_index")}
        piece = _STAMP + load.piece if load.stamps else load.piece
        delta = {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        frame = as_bytes({**delta, "sequence_number": _NUMBER}, self._plain)
        self._before, _, self._after = frame.rpartition(b"%d" % _NUMBER)
        self._before_stamp, _, self._after_stamp = self._before.partition(_STAMP.encode())

    @classmethod
    def answer(cls) -> Answer:
        """What to render for it."""
        return Answer(output=(Text(text="", deltas=False),))

    async def send(self, connection: Connection, stream: Stream, lateness: Lateness) -> None:
        """Sends all of it. Raises Disconnected."""
        await connection.send(b"".join(as_bytes(event, self._plain) for event in self._head))
        stream.events += len(self._head)
        if self._load.pace is None:
            await self._flat_out(connection, stream)
            text = self._load.piece * self._load.deltas
        else:
            text = await _Paced(self, self._load, connection, stream, lateness).sent()
        await connection.send(self._end(text))
        await connection.end()

    def delta(self, number: int, stamp: int) -> bytes:
        """The `number`-th delta."""
        number += len(self._head)
        if self._load.stamps:
            return b"%b%020d %b%d%b" % (self._before_stamp, stamp, self._after_stamp, number, self._after)
        return b"%b%d%b" % (self._before, number, self._after)

    async def _flat_out(self, connection: Connection, stream: Stream) -> None:
        first, end = len(self._head), len(self._head) + self._load.deltas
        block = b"".join(b"%b\0%03d%b" % (self._before, number, self._after) for number in range(_BLOCK))
        while first < end:
            next_first = min(first - first % _BLOCK + _BLOCK, end)
            if first and next_first - first == _BLOCK:
                data = block.replace(b"\0", b"%d" % (first // _BLOCK))
            else:
                numbers = range(first, next_first)
                data = b"".join(b"%b%d%b" % (self._before, number, self._after) for number in numbers)
            await connection.send(data)
            if connection.is_closed:
                raise Disconnected
            stream.events += next_first - first
            stream.deltas += next_first - first
            first = next_first

    def _end(self, text: str) -> bytes:
        """The events behind the deltas."""
        done, part_done, item_done, completed = self._tail
        done["text"] = part_done["part"]["text"] = text
        self._rendering.output[-1]["content"][0]["text"] = text
        spent = usage(completed["response"]["usage"]["input_tokens"], self._load.deltas)
        completed["response"]["usage"] = self._rendering.response["usage"] = spent
        for event in (done, part_done, item_done, completed):
            event["sequence_number"] += self._load.deltas
        return b"".join(as_bytes(event, self._plain) for event in self._tail)


class _Paced:
    """Sends deltas on schedule: by timers, as a task for each stream costs too much."""

    def __init__(
        self, source: LoadStream, load: Load, connection: Connection, stream: Stream, lateness: Lateness
    ) -> None:
        assert load.pace is not None
        self._delta: Callable[[int, int], bytes] = source.delta
        self._load = load
        self._connection = connection
        self._stream = stream
        self._lateness = lateness
        self._interval = 1 / load.pace
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._due = self._loop.time()
        self._stamps: list[int] = []
        self._timer: asyncio.Handle = self._loop.call_soon(self._tick)

    async def sent(self) -> str:
        """Waits until all are sent; returns the text. Raises Disconnected."""
        try:
            await self._over
        finally:
            self._timer.cancel()
        if not self._load.stamps:
            return self._load.piece * self._load.deltas
        return "".join(f"{stamp:020d} {self._load.piece}" for stamp in self._stamps)

    def _tick(self) -> None:
        if self._connection.is_closed:
            self._over.set_exception(Disconnected())
            return
        now = self._loop.time()
        # A reader who is behind gets no more until it has caught up; that counts as late.
        while self._due <= now and self._stream.deltas < self._load.deltas and self._connection.backlog < _BACKLOG:
            stamp = time.monotonic_ns()
            if self._load.stamps:
                self._stamps.append(stamp)
            self._connection.send_now(self._delta(self._stream.deltas, stamp))
            self._lateness.note(now - self._due)
            self._stream.events += 1
            self._stream.deltas += 1
            self._due += self._interval
        if self._stream.deltas == self._load.deltas:
            self._over.set_result(None)
        else:
            self._timer = self._loop.call_at(self._due if self._due > now else now + self._interval, self._tick)
