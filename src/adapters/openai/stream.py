"""From the bytes of a streamed answer to its events, decoding only those that matter."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import jiter

from adapters.openai.errors import ProviderFault
from core.model.turn import TurnReason

T = TypeVar("T")

MAX_EVENT_BYTES = 1 << 20
DRAIN_SECONDS = 0.5

MAX_ID = 1_024
"""Characters of a name. OpenAI's have some fifty; gateways wrap them, one in the other, into several hundred."""

_ID = re.compile(r"[A-Za-z0-9][!-~]*", re.ASCII)

_WANTED = frozenset(
    {
        b"response.created",
        b"response.output_text.delta",
        b"response.output_text.done",
        b"response.refusal.delta",
        b"response.refusal.done",
        b"response.output_item.added",
        b"response.output_item.done",
        b"response.completed",
        b"response.incomplete",
        b"response.failed",
    }
)


class SseSplitter:
    """Splits a stream of Server-Sent Events, however it is cut into chunks.

    Takes LF, CRLF and CR. Half an event at the end of the stream is no event. Where an event is longer than
    `max_event` bytes, `fault` is set (`OUTPUT_LIMIT`): what came before it is returned, what follows is not.
    """

    def __init__(self, max_event: int = MAX_EVENT_BYTES) -> None:
        self.fault: ProviderFault | None = None
        self._max_event = max_event
        self._buffer = bytearray()
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Takes the next bytes; returns the data of the events that they complete, comments left out.

        The data of an event whose name says that nobody wants it is b"".
        """
        if self.fault is not None:
            return []
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_line_feeds(chunk)
        buffer = self._buffer
        searched = max(len(buffer) - 1, 0)
        buffer += chunk
        end = buffer.rfind(b"\n\n", searched)
        blocks: list[bytes] = []
        if end >= 0:
            blocks = bytes(buffer[:end]).split(b"\n\n")
            del buffer[: end + 2]
        events: list[bytes] = []
        for block in blocks:
            if self._refuses(block):
                return events
            data = _data_of(block)
            if data is not None:
                events.append(data)
        self._refuses(buffer)
        return events

    def _with_line_feeds(self, chunk: bytes) -> bytes:
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _refuses(self, event: bytes | bytearray) -> bool:
        if len(event) <= self._max_event:
            return False
        self.fault = ProviderFault(TurnReason.OUTPUT_LIMIT)
        self._buffer.clear()
        return True


def _data_of(block: bytes) -> bytes | None:
    lines: list[bytes] = []
    for line in block.split(b"\n"):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line.startswith(b"event:"):
            name = line[6:].strip()
            if name.startswith(b"response.") and name not in _WANTED:
                return b""
    return b"\n".join(lines) if lines else None


def decoded(data: bytes) -> dict[str, Any] | None:
    """Reads the data of an event; None for what is no event of the API. Raises ProviderFault if malformed."""
    if not data or data == b"[DONE]":
        return None
    try:
        event = jiter.from_json(data)
    except ValueError:
        event = _read_leniently(data)
    if not isinstance(event, dict):
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
    return event


def _read_leniently(data: bytes) -> Any:
    """jiter refuses half a surrogate pair, which a delta may end with; the standard library lets it through."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL) from error


def identifier(value: object, most: int = MAX_ID) -> str | None:
    """A name that the provider has given to something; None for what can't be part of an address or of a row."""
    return value if isinstance(value, str) and len(value) <= most and _ID.fullmatch(value) else None


class TextCleaner:
    """Makes text fit to be stored: U+0000 and lone surrogates become U+FFFD, a pair cut in two is joined."""

    def __init__(self) -> None:
        self._half = ""

    def feed(self, text: str) -> str:
        """Cleans the next piece. Half a pair at its end is kept back until the other half can come."""
        if self._half:
            text, self._half = self._half + text, ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return clean(text)

    def flush(self) -> str:
        """What was kept back and stays alone."""
        half, self._half = self._half, ""
        return clean(half)


def clean(text: str) -> str:
    """Cleans a whole text."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@dataclass(frozen=True, slots=True)
class Silence:
    """How long a provider may be silent, in seconds: before its first event, between two events, and before the
    last one, once all items of its answer are done."""

    first_event: float
    idle: float
    last_event: float


class Watchdog:
    """Bounds the silence of a provider. Only events end a silence: comments and bytes don't.

    The time that the reader spends elsewhere between two waits is not counted. To be left when all is read: it has
    one timer, which is moved on when it strikes. A timer for each wait costs as much as what is waited for.
    """

    def __init__(self, silence: Silence) -> None:
        self._silence = silence
        self._left = silence.first_event
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._strikes_at = self._due = 0.0
        self._waiting: asyncio.Task[Any] | None = None
        self._struck = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def heard(self, *, all_said: bool = False) -> None:
        """An event came; `all_said`: and only the end can follow."""
        self._left = self._silence.last_event if all_said else self._silence.idle

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Waits within what is left of the silence. Raises TimeoutError."""
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self._due = self._loop.time() + self._left
        if self._timer is None or self._due < self._strikes_at:
            self._set_timer()
        self._waiting = task
        try:
            return await awaitable
        except asyncio.CancelledError as cancelled:
            if self._struck and task.cancelling() - 1 <= cancelled_before:
                raise TimeoutError from cancelled
            raise
        finally:
            self._waiting = None
            self._left = max(self._due - self._loop.time(), 0.0)
            if self._struck:
                self._struck = False
                task.uncancel()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._strikes_at = self._due
        self._timer = self._loop.call_at(self._due, self._strike)

    def _strike(self) -> None:
        self._timer = None
        if self._waiting is None:
            return
        if self._loop.time() < self._due:
            self._set_timer()
        else:
            self._struck = True
            self._waiting.cancel()


async def drain(chunks: AsyncIterator[bytes]) -> None:
    """Reads an answer to its end, so that its connection can be used again. Gives up where there is no end."""
    with suppress(Exception):  # the answer is whole: that its connection ends badly spoils nothing
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in chunks:
                pass
