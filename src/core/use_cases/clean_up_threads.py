"""The admin command: expires idle threads in batches, beside traffic."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from core.model.agent import Domain
from core.model.errors import CleanupRunning, InvalidField
from core.ports.store import Store, Transaction
from core.ports.threads import ExpiredBatch, ThreadKey

MAX_TTL_DAYS = 36_500
DEFAULT_BATCH = 1_000
MAX_BATCH = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """What to clean up. Threads whose newest message is older than `ttl_days` days expire."""

    ttl_days: int
    batch_size: int = DEFAULT_BATCH
    dry_run: bool = False
    domain: Domain | None = None

    def check(self) -> None:
        """Raises InvalidField."""
        if not 0 <= self.ttl_days <= MAX_TTL_DAYS:
            raise InvalidField("ttl_days", f"must be 0 to {MAX_TTL_DAYS}")
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise InvalidField("batch_size", f"must be 1 to {MAX_BATCH}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """What a cleanup did, or would do. `seconds` is the time that it took."""

    cutoff: datetime
    dry_run: bool
    expired: int
    deleted: int
    batches: int
    seconds: float


Progress = Callable[[int, int], Awaitable[None]]
"""Told after every batch how many threads have expired in how many batches."""


class CleanUpThreads:
    """Makes idle threads INACTIVE. A thread with a turn that has not ended is never touched."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def __call__(self, cleanup: Cleanup, progress: Progress | None = None) -> CleanupReport:
        """Runs a cleanup to its end. Cancelled, it stops after the batch at hand; run again, it goes on.

        Raises InvalidField, and CleanupRunning where another is at work on the database.
        """
        cleanup.check()
        begun = time.monotonic()
        async with self._store.exclusive("cleanup") as held:
            if not held:
                raise CleanupRunning
            now = await self._store.read(lambda tx: tx.now())
            cutoff = now - timedelta(days=cleanup.ttl_days)
            expired = batches = 0
            if cleanup.dry_run:
                expired = await self._store.read(lambda tx: tx.threads.count_expired(cutoff, cleanup.domain))
            else:
                last: ThreadKey | None = None
                while True:
                    batch = await self._store.write(partial(_expire, cleanup, cutoff, last))
                    if batch.last is None:
                        break
                    expired, batches, last = expired + batch.expired, batches + 1, batch.last
                    if progress is not None:
                        await progress(expired, batches)
        return CleanupReport(
            cutoff=cutoff,
            dry_run=cleanup.dry_run,
            expired=expired,
            deleted=0,
            batches=batches,
            seconds=round(time.monotonic() - begun, 3),
        )


def _expire(cleanup: Cleanup, cutoff: datetime, after: ThreadKey | None, tx: Transaction) -> ExpiredBatch:
    return tx.threads.expire(cutoff, cleanup.domain, after, cleanup.batch_size)
