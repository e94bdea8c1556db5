"""The one writer of a process: runs changes in groups that share a commit."""

import asyncio
import logging
import queue
import random
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol

from adapters.sql.errors import FAULTS, StoreFaultError, collided, is_held, is_outage, named, translated
from adapters.sql.fiber import Fiber, rest
from adapters.sql.notifications import announce
from adapters.sql.transaction import SqlTransaction
from core.model.errors import StoreBusy, StoreUnavailable
from core.ports.store import Conflict, Transaction
from core.ports.telemetry import UNMEASURED, Telemetry

_log = logging.getLogger(__name__)

_MAX_GROUP = 256
_MAX_TRIES = 3
_LONGEST_GROUP = 0.05
"""Seconds after which a group is committed, whatever else waits: it holds what others may need."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_HELD_TOO_LONG = 2.0
"""Seconds for which a change is tried again that needs what another process holds."""
_WORD = 0.01
"""Seconds after which others hear of a change at the latest: it is work for the server and for them."""


@dataclass(slots=True)
class Job:
    """A change, and whoever waits for it. Without one, the write-ahead log is to be emptied."""

    change: Callable[[Transaction], Any] | None
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    result: Any = None
    error: BaseException | None = None
    again: bool = False
    hoped: bool = False
    since: float = field(default_factory=time.monotonic)
    pause: float = _FIRST_PAUSE

    def answer(self) -> None:
        """Tells the waiting coroutine, in its loop."""
        if self.future.cancelled():
            return
        if isinstance(self.error, StopIteration):  # a future takes any exception but this
            self.future.set_exception(RuntimeError("a change raised StopIteration"))
        elif self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Desk(Protocol):
    """Where jobs are handed in, and who carries the writer's work."""

    @abstractmethod
    def open(self, work: Callable[[], None]) -> None:
        """Begins with the work."""

    @abstractmethod
    def put(self, job: Job | None) -> None:
        """Hands a job in; None is the last."""

    @abstractmethod
    def get(self, seconds: float | None) -> Job | None:
        """The next job. Waits for it for so long, then raises queue.Empty."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether no job waits."""

    @abstractmethod
    def pause(self, seconds: float) -> None:
        """Waits."""

    @abstractmethod
    def tell(self, jobs: Sequence[Job]) -> None:
        """Answers jobs."""

    @abstractmethod
    async def closed(self) -> None:
        """Waits for the end of the work."""


class ThreadDesk(Desk):
    """A thread carries the work: for a database whose driver blocks."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def open(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="store-write", daemon=True)
        self._thread.start()

    def put(self, job: Job | None) -> None:
        self._jobs.put(job)

    def get(self, seconds: float | None) -> Job | None:
        return self._jobs.get(timeout=seconds)

    def is_empty(self) -> bool:
        return self._jobs.empty()

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def tell(self, jobs: Sequence[Job]) -> None:
        for loop in {job.loop for job in jobs}:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_answer, [job for job in jobs if job.loop is loop])

    async def closed(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)


class LoopDesk(Desk):
    """The event loop carries the work, and whoever hands a job in begins with it. For one thread."""

    def __init__(self) -> None:
        self._jobs: deque[Job | None] = deque()
        self._rests = False
        self._end: asyncio.Future[None] | None = None

    def open(self, work: Callable[[], None]) -> None:
        def to_the_end() -> None:
            work()
            if self._end is not None:
                self._end.set_result(None)

        self._fiber = Fiber(to_the_end)
        self._fiber.resume()

    def put(self, job: Job | None) -> None:
        self._jobs.append(job)
        if self._rests:
            self._fiber.resume()

    def get(self, seconds: float | None) -> Job | None:
        if not self._jobs:
            self._rests = True
            rest(seconds)
            self._rests = False
        if not self._jobs:
            raise queue.Empty
        return self._jobs.popleft()

    def is_empty(self) -> bool:
        return not self._jobs

    def pause(self, seconds: float) -> None:
        rest(seconds)

    def tell(self, jobs: Sequence[Job]) -> None:
        _answer(jobs)

    async def closed(self) -> None:
        if not self._fiber.is_over:
            self._end = asyncio.get_running_loop().create_future()
            await self._end


class Writer:
    """Runs jobs one group after another until the last one. `name` is under which others hear of its changes."""

    def __init__(
        self, transaction: SqlTransaction, desk: Desk, name: str, telemetry: Telemetry = UNMEASURED
    ) -> None:
        self._telemetry = telemetry
        self._transaction = transaction
        self._session = transaction.session
        self._desk = desk
        self._name = name
        self._later: list[tuple[float, int, Job]] = []
        self._numbers = count()
        self._news: set[str] = set()
        self._due = 0.0
        self._closing = False
        self._away = False  # told once, however long it lasts
        self.given_up = False
        """Whether it waits no more for a database that does not answer."""
        desk.open(self._work)

    def submit(self, job: Job) -> None:
        """Takes a job on."""
        self._desk.put(job)

    def closing(self) -> None:
        """From now on one outage is enough."""
        self._closing = True

    async def aclose(self) -> None:
        """Finishes what was submitted, and frees its connection."""
        self._desk.put(None)
        await self._desk.closed()

    def consider(self, error: BaseException) -> None:
        """While it closes, it does not wait once more for a database that has not answered."""
        if self._closing and is_outage(error):
            self.given_up = True

    def _work(self) -> None:
        last = False
        while not last and (job := self._next()) is not None:
            group = [job]
            while len(group) < _MAX_GROUP and not self._desk.is_empty():
                if (more := self._desk.get(None)) is None:
                    last = True
                    break
                group.append(more)
            self._run([job for job in group if job.change is not None])
            self._truncate([job for job in group if job.change is None])
        while self._later:
            due, _, job = heappop(self._later)
            self._desk.pause(max(0.0, due - time.monotonic()))
            self._run([job])
        announce(self._session, self._name, self._news)
        self._session.close()

    def _next(self) -> Job | None:
        """Waits for a job: a new one, or one whose time has come to be tried again.

        Word of what has changed goes out meanwhile, where it is in nobody's way.
        """
        while True:
            now = time.monotonic()
            if self._news and self._due <= now:
                announce(self._session, self._name, self._news)
                self._news.clear()
            if self._later and self._later[0][0] <= now:
                return heappop(self._later)[2]
            times = [self._later[0][0]] if self._later else []
            if self._news:
                times.append(self._due)
            try:
                return self._desk.get(min(times) - now if times else None)
            except queue.Empty:
                continue

    def _run(self, group: list[Job]) -> None:
        """Runs jobs to their answers.

        One that collided, or hoped in vain, is run again, alone. One that needs what another process holds is
        tried again later: nothing waits for a lock, as everything behind would wait with it, and groups that wait
        for each other's locks would wait for ever.
        """
        while group:
            if self.given_up:
                for job in group:
                    job.error = StoreUnavailable()
                self._desk.tell(group)
                return
            done = self._attempt(group)
            tried, group = group[:done], group[done:]
            self._desk.tell([job for job in tried if not job.again])
            for job in [job for job in tried if job.again]:
                self._run_again(job)

    def _truncate(self, jobs: Sequence[Job]) -> None:
        """Empties the write-ahead log, once for all who have asked."""
        if not jobs:
            return
        try:
            result, error = self._session.truncate(), None
        except FAULTS as fault:
            self.consider(fault)
            result, error = False, translated(fault)
        for job in jobs:
            job.result, job.error = result, error
        self._desk.tell(jobs)

    def _run_again(self, job: Job) -> None:
        tries = 1
        while job.again and (job.hoped or isinstance(job.error, Conflict)) and tries < _MAX_TRIES:
            tries += 1
            self._attempt([job], hopeful=False)
        now = time.monotonic()
        if isinstance(job.error, StoreBusy) and job.again and now - job.since < _HELD_TOO_LONG:
            due = now + job.pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
            job.pause = min(_LONGEST_PAUSE, 2 * job.pause)
            heappush(self._later, (due, next(self._numbers), job))
        else:
            self._desk.tell([job])

    def _attempt(self, group: Sequence[Job], *, hopeful: bool = True) -> int:
        """Runs jobs in one transaction, as many as there is time for; returns how many."""
        self._session.hopeful = hopeful
        begun = self._telemetry.time()
        try:
            done = self._session.transact(lambda: self._run_all(group))
            if self._session.is_server:
                self._due = self._due if self._news else time.monotonic() + _WORD
                self._news |= self._session.changed
        except _RollbackError:
            return 1  # the job's own error stands
        except FAULTS as error:
            self.consider(error)
            if is_outage(error) and not self._away:
                self._away = True
                _log.warning("the database does not answer, or can't do its work: %s", named(error))
            for job in group:
                job.error, job.again = translated(error), collided(error) or is_held(error)
        except BaseException as error:  # noqa: BLE001 - the writer must outlive it, and every job be answered
            for job in group:
                job.error, job.again = StoreFaultError(type(error).__name__), False
        else:
            if self._away:
                self._away = False
                _log.warning("the database does its work again")
            self._telemetry.committed(done, self._telemetry.time() - begun)
            return done
        return len(group)

    def _run_all(self, group: Sequence[Job]) -> int:
        begun = time.monotonic()
        for number, job in enumerate(group, start=1):
            job.again, job.error = False, None
            self._run_one(job, bare=number == 1 and (len(group) == 1 or not self._session.is_server))
            if time.monotonic() - begun > _LONGEST_GROUP:
                return number
        return len(group)

    def _run_one(self, job: Job, *, bare: bool) -> None:
        """Runs a job. `bare`: without a savepoint, as there is nothing to keep if it fails.

        SQLite copies every page that is changed behind a savepoint, into a file if there are many. PostgreSQL's
        makes sure that a change behind which others come has hidden no error.
        """
        assert job.change is not None
        self._session.hoped = False
        try:
            if bare:
                job.result = job.change(self._transaction)
            else:
                with self._session.nested():
                    job.result = job.change(self._transaction)
        except FAULTS as error:
            if is_outage(error):
                raise  # takes the whole group down: nothing of it is committed
            job.error, job.again = translated(error), collided(error) or is_held(error)
        except BaseException as error:  # noqa: BLE001 - belongs to whoever submitted the change, not to the writer
            job.error, job.again = error, self._session.hoped and isinstance(error, Conflict)
        finally:
            job.hoped = self._session.hoped
        if bare and job.error is not None:
            raise _RollbackError


class _RollbackError(Exception):
    """Leaves a transaction without committing."""


def _answer(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.answer()
