"""How often, and after how long, a reply is asked for again."""

import random
from collections.abc import Awaitable, Callable

from adapters.openai.errors import ProviderFault, Remedy
from core.model.turn import TurnReason

Sleep = Callable[[float], Awaitable[None]]

MAX_RETRIES = 2
MAX_RETRY_AFTER = 20.0
"""Seconds. A provider that asks for more is taken as unavailable."""
LOCK_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds. A conversation stays locked for a moment after a stream was cut."""

_BACKOFF = (0.5, 1.0)
_SILENT = frozenset({TurnReason.PROVIDER_STALLED, TurnReason.PROVIDER_TIMEOUT})
_LOST = _SILENT | {TurnReason.PROVIDER_TRUNCATED, TurnReason.PROVIDER_UNAVAILABLE}


class Patience:
    """What one reply may spend on trying again."""

    def __init__(self, sleep: Sleep) -> None:
        self._sleep = sleep
        self._retries = 0
        self._locks = 0

    async def wait(self, fault: ProviderFault, *, harmless: bool = False) -> bool:
        """Waits as long as the fault asks for. False, at once, if trying again is of no use.

        `harmless` says that the request may be repeated whatever has become of it. After a silence that is done
        once.
        """
        again = fault.remedy is Remedy.RETRY or (harmless and fault.reason in _LOST)
        if again and self._retries < MAX_RETRIES:
            pause = fault.retry_after
            if pause is None:
                pause = _jittered(_BACKOFF[self._retries])
            elif pause > MAX_RETRY_AFTER:
                return False
            silent = fault.remedy is Remedy.NONE and fault.reason in _SILENT
            self._retries += MAX_RETRIES if silent else 1
        elif fault.remedy is Remedy.WAIT and self._locks < len(LOCK_WAITS):
            pause = _jittered(LOCK_WAITS[self._locks])
            self._locks += 1
        else:
            return False
        await self._sleep(pause)
        return True


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, guards nothing
