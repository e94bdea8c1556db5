"""The pulse: looks, every second, at what has a size at any time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from adapters.telemetry.instruments import Instruments
from core.ports.telemetry import Vitals

PERIOD = 1.0
"""Seconds between two looks."""


class Pulse:
    """Takes the vitals, in the loop whose lag it measures.

    A collector reads what was seen last, in a thread of its own: it never looks at what the loop is changing.
    """

    def __init__(self, instruments: Instruments, vitals: Callable[[], Vitals]) -> None:
        self._instruments = instruments
        self._vitals = vitals
        self._refusing = False

    @asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Looks at once, every second, and for the last time when left."""
        self._look()
        task = asyncio.create_task(self._beat(), name="pulse")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._look()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            self._instruments.loop_lag.record(max(0.0, loop.time() - due))
            self._look()

    def _look(self) -> None:
        vitals = self._vitals()
        self._instruments.running.set(vitals.running)
        self._instruments.followers.set(vitals.followers)
        self._instruments.lag.set(vitals.lag)
        self._instruments.refusing.set(int(vitals.refusing))
        self._instruments.outages.add(int(vitals.refusing and not self._refusing))
        self._refusing = vitals.refusing
