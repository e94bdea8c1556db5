"""Why calls are refused, in the log: however many there are, in few lines."""

import asyncio
import logging
from contextvars import Context

_log = logging.getLogger(__name__)

PERIOD = 60.0
"""Seconds for which those that are like one another share a line."""
_MOST = 1_000
"""Kinds that are told apart."""
_ANY_OTHER = "other reasons"


class Refusals:
    """Writes a line for the first refusal of a kind, and one after each PERIOD for all that followed it.

    A kind is a reason with the caller in it, of whatever method. What is counted is as exact as the calls.
    """

    def __init__(self) -> None:
        self._more: dict[str, int] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def note(self, method: str, why: str) -> None:
        """A call was refused."""
        kind = why if why in self._more or len(self._more) < _MOST else _ANY_OTHER
        if kind in self._more:
            self._more[kind] += 1
            return
        _log.info("%s refused: %s", method, why)
        self._wait(kind)

    def close(self) -> None:
        """Writes what is left to be told."""
        for kind in list(self._more):
            self._timers.pop(kind).cancel()
            self._tell(kind)

    def _wait(self, kind: str) -> None:
        self._more[kind] = 0
        # Apart from the call that happened to be the first: the line is not about it.
        self._timers[kind] = asyncio.get_running_loop().call_later(PERIOD, self._over, kind, context=Context())

    def _over(self, kind: str) -> None:
        if self._tell(kind):
            self._wait(kind)
        else:
            del self._timers[kind]

    def _tell(self, kind: str) -> bool:
        more = self._more.pop(kind)
        if more:
            _log.info("refused %d times more within %d s: %s", more, PERIOD, kind)
        return bool(more)
