"""Logging: ids and reasons, never content."""

import asyncio
import json
import logging
import sys
import traceback
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
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s%(trail)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line. What another handler has made of its exception is not used."""
        record = logging.makeLogRecord(record.__dict__)
        record.exc_text = None
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
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_ids(trail())),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


_OURS = ("core", "adapters", "entrypoints")
"""Whose lines are heard from the level that is set."""


def _is_heard(record: logging.LogRecord) -> bool:
    """Below WARNING libraries quote requests, values and keys, and some set their own level: nothing less is heard
    of whoever is not ours."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in _OURS


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
    handler.addFilter(_is_heard)
    level = logging.getLevelNamesMapping()[settings.log_level.value.upper()]
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
