"""Logging: ids and reasons, never content."""

import asyncio
import json
import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from core.model.trail import Trail, trail
from entrypoints.settings import LogFormat, Settings

_log = logging.getLogger(__name__)

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


class PlainFormatter(logging.Formatter):
    """One line of text, with the ids of what it is about. Of an exception only types and places: its message may
    quote what a user wrote."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s%(left_out)s%(trail)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line. What another handler has made of its exception is not used."""
        record = logging.makeLogRecord(record.__dict__)
        record.exc_text = None
        left_out = _left_out(record)
        record.left_out = f" ({left_out} lines before this one were left out)" if left_out else ""
        record.trail = "".join(f" {name}={value}" for name, value in _ids(trail()))
        return super().format(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802 - the library's name
        """Types and places of an exception and its causes."""
        lines = []
        error = ei[1]
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            places = traceback.extract_tb(error.__traceback__)
            at = " < ".join(f"{place.filename}:{place.lineno} {place.name}" for place in reversed(places))
            lines.append(f"  {type(error).__module__}.{type(error).__qualname__} at {at}")
            error = error.__cause__ or error.__context__
        return "\n".join(lines)


class JsonFormatter(PlainFormatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        fields: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_ids(trail())),
        }
        if left_out := _left_out(record):
            fields["left_out"] = left_out
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


_OURS = ("core", "adapters", "entrypoints")
"""Whose lines are heard from the level that is set."""


_MOST = 20
_PERIOD = 60.0
"""Seconds in which a library's logger writes _MOST lines, no more."""


class Hearing:
    """Decides what is written.

    Below WARNING libraries quote requests, values and keys, and some set their own level: nothing less is heard
    of whoever is not ours. And what strangers send may have a library write lines, as many as they like: what is
    beyond the most is left out, and counted by the next line of that logger.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._written: dict[str, tuple[float, int]] = {}

    def __call__(self, record: logging.LogRecord) -> bool:
        """Whether a record is written."""
        if record.name.partition(".")[0] in _OURS:
            return True
        if record.levelno < logging.WARNING:
            return False
        with self._lock:
            now = self._clock()
            since, count = self._written.get(record.name, (-math.inf, 0))
            if now - since >= _PERIOD:
                record.left_out = max(0, count - _MOST)
                since, count = now, 0
            self._written[record.name] = (since, count + 1)
            return count < _MOST


def _left_out(record: logging.LogRecord) -> int:
    left_out: int = getattr(record, "left_out", 0)
    return left_out


def _ids(trail: Trail) -> list[tuple[str, str]]:
    ids = (
        ("request_id", trail.request_id),
        ("caller", trail.caller),
        ("turn_id", trail.turn_id),
        ("thread_id", trail.thread_id),
    )
    return [(name, value) for name, value in ids if value]


def log_loop_errors(loop: asyncio.AbstractEventLoop) -> None:
    """Has asyncio report an exception that nobody waits for as a record, not as text that quotes it."""

    def report(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        _log.error("event loop: %s", context.get("message", ""), exc_info=context.get("exception"))

    loop.set_exception_handler(report)


def set_up_logging(settings: Settings) -> None:
    """Sends log lines to stderr."""
    logging.raiseExceptions = False  # a record that can't be formatted would be printed with its arguments
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format is LogFormat.JSON else PlainFormatter())
    handler.addFilter(Hearing())
    level = logging.getLevelNamesMapping()[settings.log_level.value.upper()]
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
