"""What follows an erasure, in the background of every process: the store's files, the provider, and what others
have left.

Copies at a provider are worked off one by one. Whoever takes some is given them for a time; nobody has to be told
if that process dies. Nothing is given up: what fails is tried again, less and less often, and can be seen. So can
what is at a provider that this process can't reach: it waits for one that can.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Awaitable, Callable

from core.model.erasure import Copy
from core.model.errors import StoreUnavailable
from core.ports.provider_copies import CopyStays, ProviderCopies
from core.ports.store import Store
from core.ports.telemetry import UNMEASURED, Telemetry
from core.use_cases.erase_user import EraseUser
from core.use_cases.patience import patiently

_log = logging.getLogger(__name__)

_PERIOD = 5.0
"""Seconds between two looks at what is due, and for which one works off copies."""
_AT_ONCE = 8
"""Copies that are worked on at the same time."""
_TAKEN_FOR = 120.0
"""Seconds for which a process is given a copy."""
_LONGEST = 100.0
"""Seconds that one try may take: a conversation of many items goes on where the last one stopped."""
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 3_600.0
_LONGEST_ASKED = 86_400.0
"""Seconds for which a provider may put a try off: nothing is kept for years because it says so."""
_COUNTED_EVERY = 60.0
"""Seconds between two counts of what is left."""
_SHORTEST_PAUSE = 1.0
"""Seconds between two looks that were asked for: many deletions share what follows them."""


class FinishErasures:
    """Works off what erasures leave to be done, from `start` to `stop`.

    `copies` are the provider's; `wanted` is set by whoever erases something.
    """

    def __init__(
        self,
        *,
        store: Store,
        copies: ProviderCopies,
        erase_user: EraseUser,
        wanted: asyncio.Event,
        telemetry: Telemetry = UNMEASURED,
    ) -> None:
        self._store = store
        self._copies = copies
        self._erase_user = erase_user
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._wanted = wanted
        self._telemetry = telemetry
        self._to_purge = False
        self._count_at = -math.inf
        self._told = {copies.provider}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins, with what an earlier process may have left."""
        self._wanted.set()
        self._task = asyncio.create_task(self._work(), name="finish-erasures")

    async def stop(self) -> None:
        """Stops. What was under way is taken up again by whoever comes next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        steps: tuple[Callable[[], Awaitable[bool | None]], ...] = (
            self._purge,
            self._erase_user.go_on,
            self._erase_copies,
            self._count,
        )
        while True:
            self._to_purge |= self._wanted.is_set()
            self._wanted.clear()
            soon = False
            for step in steps:
                try:
                    soon = bool(await step()) or soon
                except StoreUnavailable:
                    _log.debug("the store does not answer")
                    soon = True
                    break
                except Exception:  # noqa: BLE001 - whatever it is, the others are done, and the next look is made
                    _log.exception("erasures can't be finished")
            await asyncio.sleep(_SHORTEST_PAUSE)
            if not soon:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PERIOD):
                        await self._wanted.wait()

    async def _purge(self) -> bool:
        """Has the store's files purged where something was erased. Returns whether somebody still reads what was
        there before."""
        if self._to_purge:
            self._to_purge = not await self._store.purge()
        return self._to_purge

    async def _erase_copies(self) -> bool:
        """Erases what is due at the provider, for a while: what else is to be done must not wait for all of it.
        Returns whether there may be more. What others have taken comes up again if they fail."""
        provider = self._copies.provider
        loop = asyncio.get_running_loop()
        end = loop.time() + _PERIOD
        while await self._store.read(lambda tx: tx.copies.any_due(provider)):
            taken = await self._store.write(lambda tx: tx.copies.claim(provider, _AT_ONCE, _TAKEN_FOR))
            if not taken:
                break
            async with asyncio.TaskGroup() as group:
                for copy in taken:
                    group.create_task(self._erase(copy), name=f"erase-{copy.ref}")
            if loop.time() >= end:
                return True
        return False

    async def _count(self) -> None:
        """Now and then tells how much is left; of a provider that is not ours, aloud when it is first met."""
        now = asyncio.get_running_loop().time()
        if now < self._count_at:
            return
        left = await self._store.read(lambda tx: tx.copies.count_left())
        for provider in left.keys() - self._told:
            _log.warning(
                "%d objects of erased threads are at %s, which this process can't reach: they wait for one that "
                "is given its key",
                left[provider],
                provider,
            )
        self._told |= left.keys()
        for provider in self._told:
            self._telemetry.copies_left(provider, left.get(provider, 0), reached=provider == self._copies.provider)
        self._count_at = now + _COUNTED_EVERY

    async def _erase(self, copy: Copy) -> None:
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(copy.tries - 1, 20))
        try:
            async with asyncio.timeout(_LONGEST):
                await self._copies.erase(copy.ref)
        except TimeoutError:
            reason = "took too long"
        except CopyStays as stays:
            reason = stays.reason
            asked = min(stays.retry_after or 0.0, _LONGEST_ASKED)
            wait = _LONGEST_WAIT if stays.refused else max(wait, asked)
        except Exception as error:  # noqa: BLE001 - one that breaks must not keep the others from being erased
            _log.error("copy %s of thread %s can't be erased", copy.ref, copy.thread_id, exc_info=error)
            reason = type(error).__name__
        else:
            await patiently(lambda: self._store.write(lambda tx: tx.copies.erased(copy)))
            return
        _log.warning("copy %s of thread %s is still there: %s", copy.ref, copy.thread_id, reason)
        seconds = wait * self._random.uniform(0.75, 1.25)
        await patiently(lambda: self._store.write(lambda tx: tx.copies.stays(copy, reason, seconds)))
