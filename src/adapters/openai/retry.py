"""How often, and after how long, a reply is asked for again."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable

from adapters.openai.breaker import Breaker
from adapters.openai.errors import ProviderFault, Remedy
from core.model.turn import TurnReason

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]

MAX_RETRIES = 2
MAX_WAIT = 20.0
"""Seconds. A provider that asks for more, or is down for longer, is taken as unavailable."""
LOCK_WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds, 10 at most in all. A conversation stays locked for a moment after a stream was cut."""
SHARE = 0.1
"""Retries per request of this process that are allowed in the long run."""
RESERVE = 10.0
"""Retries that are allowed at once."""

_BACKOFF = (0.5, 1.0)
_LOOK = 1.0
_SILENT = frozenset({TurnReason.PROVIDER_STALLED, TurnReason.PROVIDER_TIMEOUT})


class RetryBudget:
    """What all replies of this process may spend on trying again: in an outage retries don't multiply its load."""

    def __init__(self, share: float = SHARE, reserve: float = RESERVE) -> None:
        self._share = share
        self._reserve = reserve
        self._left = reserve

    def earn(self) -> None:
        """A reply is asked for, for the first time."""
        self._left = min(self._reserve, self._left + self._share)

    def spend(self) -> bool:
        """Takes a retry. False where there is none left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def loop_time() -> float:
    """Seconds by the clock of the running loop."""
    return asyncio.get_running_loop().time()


class Policy:
    """What the replies of a process have in common: time, chance, the retry budget and the breaker."""

    def __init__(self, sleep: Sleep, clock: Clock, chance: random.Random) -> None:
        self.sleep = sleep
        self.clock = clock
        self.chance = chance
        self.budget = RetryBudget()
        self.breaker = Breaker(clock)


class Patience:
    """What one reply may spend on trying again, until `deadline` by the policy's clock."""

    def __init__(self, policy: Policy, deadline: float = math.inf) -> None:
        self._policy = policy
        self._deadline = deadline
        self._requests = 0
        self._retries = 0
        self._locks = 0
        self._waited = 0.0

    async def admission(self) -> None:
        """Waits until the breaker lets a request through. Raises ProviderFault where that takes too long."""
        if not self._requests:
            self._policy.budget.earn()
        self._requests += 1
        while (left := self._policy.breaker.admit()) is not None:
            pause = self._jittered(min(left, _LOOK))
            if self._waited + pause > MAX_WAIT or not self._fits(pause):
                raise ProviderFault(TurnReason.PROVIDER_UNAVAILABLE)
            self._waited += pause
            await self._policy.sleep(pause)

    async def wait(self, fault: ProviderFault) -> bool:
        """Waits until a failed request for a reply may be repeated. False, at once, if that is of no use, too long
        or too much for the provider."""
        if fault.remedy is Remedy.WAIT:
            return await self._wait_for_lock()
        if fault.remedy not in (Remedy.RETRY, Remedy.LOOK) or self._retries >= MAX_RETRIES:
            return False
        pause = self._pause(fault)
        if pause is None or not self._policy.budget.spend():
            return False
        self._retries += 1
        await self._policy.sleep(pause)
        return True

    async def wait_to_look_again(self, fault: ProviderFault) -> bool:
        """The same for a request that only reads or stops: it costs the provider nothing to write, and may be
        repeated whatever has become of it. After a silence that is done once."""
        if fault.remedy not in (Remedy.RETRY, Remedy.LOOK) or self._retries >= MAX_RETRIES:
            return False
        pause = self._pause(fault)
        if pause is None:
            return False
        silent = fault.remedy is Remedy.LOOK and fault.reason in _SILENT
        self._retries += MAX_RETRIES if silent else 1
        await self._policy.sleep(pause)
        return True

    async def _wait_for_lock(self) -> bool:
        if self._locks == len(LOCK_WAITS):
            return False
        pause = self._jittered(LOCK_WAITS[self._locks])
        if not self._fits(pause):
            return False
        self._locks += 1
        await self._policy.sleep(pause)
        return True

    def _pause(self, fault: ProviderFault) -> float | None:
        """Seconds to wait; None where the provider asks for more than there is."""
        asked = fault.retry_after
        pause = self._jittered(_BACKOFF[self._retries]) if asked is None else asked
        return pause if pause <= MAX_WAIT and self._fits(pause) else None

    def _fits(self, pause: float) -> bool:
        return self._policy.clock() + pause < self._deadline

    def _jittered(self, seconds: float) -> float:
        return seconds * self._policy.chance.uniform(0.75, 1.25)
