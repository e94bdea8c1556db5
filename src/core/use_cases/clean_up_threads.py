"""The admin command: expires idle threads, and erases forgotten ones, in small transactions, beside traffic.

A few go through the index, oldest first. A backlog goes place by place, in the order in which the store keeps its
threads, which costs a fraction of that for each. A change may move a thread to a place that the sweep has passed:
those go through the index at the end.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Generic, TypeVar

from core.model.agent import Domain
from core.model.errors import CleanupRunning, InvalidField, LegalHold
from core.ports.store import Store, Transaction
from core.ports.threads import ExpiredBatch, ThreadKey
from core.use_cases.erase_thread import erase_thread

T = TypeVar("T")

MAX_TTL_DAYS = 36_500
DEFAULT_BATCH = 1_000
MAX_BATCH = 10_000

BACKLOG = 10_000
"""Threads due from which on it pays to look at all there are. Of a million in SQLite it does from some 6,000."""
_STEP, _STEP_BESIDE_TURNS = 0.06, 0.02
"""Seconds that a transaction may take: others wait for it."""
_FEWEST_PLACES, _MOST_PLACES = 8, 256
"""At most so many: after places where nothing expires may come some where all does, which takes longer than a step
should. In PostgreSQL these are some 15,000 threads, and 0.14 s of its processor."""
_FEWEST_ERASED, _MOST_ERASED = 8, 256
"""Threads that are erased in a transaction: each may have many messages."""
_STRETCH = 4.0
"""How many times larger or smaller a step may be than the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleanup:
    """What to clean up. Threads whose newest message is older than `ttl_days` days expire; where it is older than
    `delete_after_days`, they are erased.

    With a `batch_size`, at most so many in a transaction; else as many as take little time.
    """

    ttl_days: int
    delete_after_days: int | None = None
    batch_size: int | None = None
    dry_run: bool = False
    domain: Domain | None = None

    def check(self) -> None:
        """Raises InvalidField."""
        if not 0 <= self.ttl_days <= MAX_TTL_DAYS:
            raise InvalidField("ttl_days", f"must be 0 to {MAX_TTL_DAYS}")
        least = max(1, self.ttl_days)  # what is erased has expired before
        if self.delete_after_days is not None and not least <= self.delete_after_days <= MAX_TTL_DAYS:
            raise InvalidField("delete_after_days", f"must be 1 to {MAX_TTL_DAYS}, and not less than ttl_days")
        if self.batch_size is not None and not 1 <= self.batch_size <= MAX_BATCH:
            raise InvalidField("batch_size", f"must be 1 to {MAX_BATCH}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanupReport:
    """What a cleanup did, or would do. `held` are threads that a legal hold keeps from being erased. `seconds` is
    the time that it took."""

    cutoff: datetime
    dry_run: bool
    expired: int
    deleted: int
    held: int
    batches: int
    seconds: float


Progress = Callable[[int, int], Awaitable[None]]
"""Told after every batch how many threads have expired in how many batches."""


class CleanUpThreads:
    """Makes idle threads INACTIVE, and erases forgotten ones. A thread with a turn that has not ended is never
    touched."""

    def __init__(self, store: Store, backlog: int = BACKLOG, *, erased: Callable[[], None] = lambda: None) -> None:
        """`backlog`: so many threads or more that are due go place by place. `erased` is told where something was
        erased."""
        self._store = store
        self._backlog = backlog
        self._erased = erased

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
                sweep = _Sweep(self._store, cleanup, cutoff, progress)
                await sweep.run(self._backlog)
                expired, batches = sweep.expired, sweep.batches
            retention = _Retention(self._store, cleanup, now)
            try:
                await retention.run()
            finally:
                if retention.deleted and not cleanup.dry_run:
                    self._erased()
        return CleanupReport(
            cutoff=cutoff,
            dry_run=cleanup.dry_run,
            expired=expired,
            deleted=retention.deleted,
            held=retention.held,
            batches=batches + retention.batches,
            seconds=round(time.monotonic() - begun, 3),
        )


class _Sweep:
    """A cleanup at work, and what it has done so far."""

    def __init__(self, store: Store, cleanup: Cleanup, cutoff: datetime, progress: Progress | None) -> None:
        self.expired = 0
        self.batches = 0
        self._store = store
        self._cleanup = cleanup
        self._cutoff = cutoff
        self._progress = progress

    async def run(self, backlog: int) -> None:
        """Makes INACTIVE all that is due."""
        if self._cleanup.batch_size is None and await self._due(backlog) == backlog:
            await self._place_by_place()
        if await self._due(1):
            await self._oldest_first(self._cleanup.batch_size or DEFAULT_BATCH)

    async def _due(self, limit: int) -> int:
        return await self._store.read(
            lambda tx: tx.threads.count_expired(self._cutoff, self._cleanup.domain, limit)
        )

    async def _place_by_place(self) -> None:
        places = await self._store.read(lambda tx: tx.threads.places())
        first, count = 0, _FEWEST_PLACES
        while first < places:
            step = await _take(self._store, partial(self._expire_places, first, count))
            await self._tell(step.done)
            first += count
            wanted = count * min(_STRETCH, max(1 / _STRETCH, step.allowed / step.seconds))
            count = round(min(_MOST_PLACES, max(_FEWEST_PLACES, wanted)))
            await step.rest()

    def _expire_places(self, first: int, count: int, tx: Transaction) -> int:
        return tx.threads.expire_places(self._cutoff, self._cleanup.domain, first, count)

    async def _oldest_first(self, limit: int) -> None:
        last: ThreadKey | None = None
        while True:
            step = await _take(self._store, partial(self._expire_oldest, last, limit))
            last = step.done.last
            if last is None:
                return
            await self._tell(step.done.expired)
            await step.rest()

    def _expire_oldest(self, after: ThreadKey | None, limit: int, tx: Transaction) -> ExpiredBatch:
        return tx.threads.expire(self._cutoff, self._cleanup.domain, after, limit)

    async def _tell(self, expired: int) -> None:
        self.expired, self.batches = self.expired + expired, self.batches + 1
        if self._progress is not None:
            await self._progress(self.expired, self.batches)


class _Retention:
    """Erases what nobody has used for so long, in the order of the ids, and counts."""

    def __init__(self, store: Store, cleanup: Cleanup, now: datetime) -> None:
        self.deleted = 0
        self.held = 0
        self.batches = 0
        self._store = store
        self._cleanup = cleanup
        self._now = now

    async def run(self) -> None:
        """Erases all that is due, or counts it."""
        days = self._cleanup.delete_after_days
        if days is None:
            return
        cutoff = self._now - timedelta(days=days)
        most = self._cleanup.batch_size or _MOST_ERASED
        after, size = "", min(most, _FEWEST_ERASED)
        while found := await self._store.read(partial(self._forgotten, cutoff, after)):
            after = found[-1][1]
            if self._cleanup.dry_run:
                held = await self._store.read(partial(_count_held, found))
                self.held, self.deleted = self.held + held, self.deleted + len(found) - held
                continue
            while found:
                some, found = found[:size], found[size:]
                step = await _take(self._store, partial(_erase_forgotten, some, cutoff))
                deleted, held = step.done
                self.deleted, self.held, self.batches = self.deleted + deleted, self.held + held, self.batches + 1
                wanted = size * min(_STRETCH, max(1 / _STRETCH, step.allowed / step.seconds))
                size = round(min(most, max(1, wanted)))
                await step.rest()

    def _forgotten(self, cutoff: datetime, after: str, tx: Transaction) -> Sequence[tuple[str, str]]:
        return tx.threads.forgotten(cutoff, self._cleanup.domain, after, DEFAULT_BATCH)


def _erase_forgotten(threads: Sequence[tuple[str, str]], cutoff: datetime, tx: Transaction) -> tuple[int, int]:
    """Erases threads that are as they were found. Returns how many, and how many are held."""
    erased = held = 0
    for user_id, thread_id in threads:
        thread = tx.threads.lock(user_id, thread_id)
        if thread is None or thread.last_message_at >= cutoff or tx.turns.unfinished(thread_id):
            continue  # somebody has come back to it meanwhile, or deleted it
        try:
            erased += erase_thread(tx, user_id, thread_id) is not None
        except LegalHold:
            held += 1
    return erased, held


def _count_held(threads: Sequence[tuple[str, str]], tx: Transaction) -> int:
    users = {user_id: tx.users.get(user_id) for user_id, _ in threads}
    held = {user_id for user_id, user in users.items() if user is not None and user.held_since is not None}
    return sum(user_id in held for user_id, _ in threads)


async def _take(store: Store, work: Callable[[Transaction], T]) -> "_Step[T]":
    """Works in a transaction of its own."""

    def change(tx: Transaction) -> tuple[float, bool, T]:
        return time.monotonic(), tx.turns.any_at_work(), work(tx)

    begun, busy, done = await store.write(change)
    return _Step(done, seconds=time.monotonic() - begun, busy=busy)


@dataclass(frozen=True, slots=True)
class _Step(Generic[T]):
    """A transaction: what it has done, from its begin to its commit, and whether it was beside turns at work."""

    done: T
    seconds: float
    busy: bool

    @property
    def allowed(self) -> float:
        """Seconds that it should have taken."""
        return _STEP_BESIDE_TURNS if self.busy else _STEP

    async def rest(self) -> None:
        """Beside turns, leaves the store to them for as long as it had it."""
        if self.busy:
            await asyncio.sleep(self.seconds)
