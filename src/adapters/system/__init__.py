"""This machine's clock and identifiers."""

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


class Ids(system.Ids):
    """UUIDv7 after RFC 9562, method 1: a counter behind the milliseconds keeps them in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def new(self) -> str:
        with self._lock:
            self._last = max(self._last + 1, time.time_ns() // 1_000_000 << 12)
            stamp = self._last
        random = int.from_bytes(os.urandom(8), "big") >> 2
        return str(uuid.UUID(int=(stamp >> 12) << 80 | 7 << 76 | (stamp & 0xFFF) << 64 | 2 << 62 | random))
