"""How often, and after how long, a reply is asked for again."""

import random
from collections.abc import Awaitable, Callable

from adapters.openai.errors import ProviderFault, Remedy

Sleep = Callable[[float], Awaitable[None]]

MAX_RETRIES = 2
MAX_RETRY_AFTER = 20.0
"""Seconds. A provider that asks for more is taken as unavailable."""
LOCK_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds. A conversation stays locked for a moment after a stream was cut."""

_BACKOFF = (0.5, 1.0)


class Patience:
    """What one reply may spend on trying again."""

    def __init__(self, sleep: Sleep) -> None:
        self._sleep = sleep
        self._retries = 0
        self._locks = 0

    async def wait(self, fault: ProviderFault) -> bool:
        """Waits as long as the fault asks for. False, at once, if trying again is of no use."""
        if fault.remedy is Remedy.RETRY and self._retries < MAX_RETRIES:
            pause = fault.retry_after
            if pause is None:
                pause = _jittered(_BACKOFF[self._retries])
            elif pause > MAX_RETRY_AFTER:
                return False
            self._retries += 1
        elif fault.remedy is Remedy.WAIT and self._locks < len(LOCK_WAITS):
            pause = _jittered(LOCK_WAITS[self._locks])
            self._locks += 1
        else:
            return False
        await self._sleep(pause)
        return True


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load, guards nothing
