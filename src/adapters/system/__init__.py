"""This machine's clock and identifiers."""

import io
import os
import threading
import time
import uuid
from datetime import UTC, datetime

from core.ports import system


class Clock(system.Clock):
    """The machine's wall clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


_RANDOM = 8
"""Bytes of chance in an identifier."""


class Ids(system.Ids):
    """UUIDv7 after RFC 9562, method 1: a counter behind the milliseconds keeps them in order.

    Chance is drawn for 512 at a time. Each draw hands the interpreter to another thread, if one waits for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._drawn = io.BytesIO()

    def new(self) -> str:
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1_000_000 << 12)
            stamp = self._last
            drawn = self._drawn.read(_RANDOM)
            if not drawn:
                self._drawn = io.BytesIO(os.urandom(512 * _RANDOM))
                drawn = self._drawn.read(_RANDOM)
        random = int.from_bytes(drawn, "big") >> 2
        return str(uuid.UUID(int=(stamp >> 12) << 80 | 7 << 76 | (stamp & 0xFFF) << 64 | 2 << 62 | random))
