"""Runs changes in one writer thread, in groups that share a commit, and queries in reader threads."""

import asyncio
import hashlib
import queue
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeVar

from sqlalchemy import exc, text

from adapters.sql.engines import (
    BEGIN_READING,
    BEGIN_WRITING,
    READERS,
    is_embedded,
    reader_engine,
    session_engine,
    writer_engine,
)
from adapters.sql.errors import FAULTS, StoreFaultError, collided, is_held, is_outage, translated
from adapters.sql.notifications import Listener, announce
from adapters.sql.session import Session
from adapters.sql.transaction import SqlTransaction
from adapters.sql.watchdog import Watchdog, line_of
from core.model.errors import StoreBusy, StoreUnavailable
from core.ports import store
from core.ports.store import Conflict, Transaction
from core.ports.system import Clock

T = TypeVar("T")

_MAX_GROUP = 256
_MAX_TRIES = 3
_LONGEST_GROUP = 0.05
"""Seconds after which a group is committed, whatever else waits: it holds what others may need."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.2
_HELD_TOO_LONG = 2.0
"""Seconds for which a change is tried again that needs what another process holds."""
_WORD = 0.01
"""Seconds after which others hear of a change at the latest: it is work for the server and for them."""
_PATIENCE = 12.0
"""Seconds to wait for a server's answer. It ends a statement by itself before that."""


@dataclass(slots=True)
class _Job:
    change: Callable[[Transaction], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    result: Any = None
    error: BaseException | None = None
    again: bool = False
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


class SqlStore(store.Store):
    """The record on SQLite or PostgreSQL. One instance for each process and database."""

    def __init__(self, url: str, clock: Clock, *, patience: float = _PATIENCE) -> None:
        """`patience`: after so many seconds a server that does not answer counts as gone."""
        self._url = url
        self._name = secrets.token_hex(8)
        self._writer = writer_engine(url)
        self._readers = reader_engine(url)
        self._watchdog = Watchdog(patience)
        if not is_embedded(url):
            self._watchdog.watch(self._writer)
            self._watchdog.watch(self._readers)
        dialect = self._writer.dialect.name
        self._writing = SqlTransaction(Session(self._writer, BEGIN_WRITING[dialect], clock))
        self._reading = deque(
            SqlTransaction(Session(self._readers, BEGIN_READING[dialect], clock)) for _ in range(READERS)
        )
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, _Job]] = []
        self._numbers = count()
        self._thread = threading.Thread(target=self._write_groups, name="store-write", daemon=True)
        self._listeners: list[Listener] = []
        self._news: set[str] = set()
        self._due = 0.0
        self._held: set[str] = set()
        self._closed = False
        self._given_up = False
        self._thread.start()

    async def write(self, change: Callable[[Transaction], T]) -> T:
        if self._closed:
            raise StoreUnavailable
        loop = asyncio.get_running_loop()
        job = _Job(change, loop, loop.create_future())
        self._jobs.put(job)
        result: T = await job.future
        return result

    async def read(self, query: Callable[[Transaction], T]) -> T:
        if self._closed:
            raise StoreUnavailable
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, query)

    @asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[bool]:
        if name in self._held:
            yield False
            return
        self._held.add(name)
        try:
            if is_embedded(self._url):
                yield True  # one process owns the database: no other can hold it
                return
            loop = asyncio.get_running_loop()
            opening = loop.run_in_executor(self._threads, _LockSession, self._url, name, self._watchdog)
            try:
                session = await asyncio.shield(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(_close_when_open)
                raise
            try:
                yield session.held
            finally:
                await asyncio.shield(loop.run_in_executor(self._threads, session.close))
        finally:
            self._held.discard(name)

    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        if is_embedded(self._url) or self._closed:
            return False
        loop = asyncio.get_running_loop()

        def pass_on(turn_ids: frozenset[str]) -> None:
            with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
                loop.call_soon_threadsafe(heard, turn_ids)

        self._listeners.append(Listener(self._url, self._name, self._watchdog, pass_on))
        return True

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            await loop.run_in_executor(None, listener.close)
        await loop.run_in_executor(None, self._threads.shutdown)
        # The writer closes last: on SQLite the last connection to close checkpoints.
        for reading in self._reading:
            reading.session.close()
        self._readers.dispose()
        self._jobs.put(None)
        await loop.run_in_executor(None, self._thread.join)
        self._watchdog.close()

    def _read(self, query: Callable[[Transaction], T]) -> T:
        if self._given_up:
            raise StoreUnavailable
        reading = self._reading.pop()  # there is one for each thread
        try:
            return reading.session.transact(lambda: query(reading))
        except FAULTS as error:
            self._consider(error)
            raise translated(error) from error
        finally:
            self._reading.append(reading)

    def _consider(self, error: BaseException) -> None:
        """While it closes, it does not wait once more for a database that has not answered."""
        if self._closed and is_outage(error):
            self._given_up = True

    def _write_groups(self) -> None:
        last = False
        while not last and (job := self._next()) is not None:
            group = [job]
            while len(group) < _MAX_GROUP and not self._jobs.empty():
                if (more := self._jobs.get()) is None:
                    last = True
                    break
                group.append(more)
            self._run(group)
        while self._later:
            due, _, job = heappop(self._later)
            time.sleep(max(0.0, due - time.monotonic()))
            self._run([job])
        announce(self._writing.session, self._name, self._news)
        self._writing.session.close()
        self._writer.dispose()

    def _next(self) -> _Job | None:
        """Waits for a job: a new one, or one whose time has come to be tried again.

        Word of what has changed goes out meanwhile, where it is in nobody's way.
        """
        while True:
            now = time.monotonic()
            if self._news and self._due <= now:
                announce(self._writing.session, self._name, self._news)
                self._news.clear()
            if self._later and self._later[0][0] <= now:
                return heappop(self._later)[2]
            times = [self._later[0][0]] if self._later else []
            if self._news:
                times.append(self._due)
            try:
                return self._jobs.get(timeout=min(times) - now if times else None)
            except queue.Empty:
                continue

    def _run(self, group: list[_Job]) -> None:
        """Runs jobs to their answers.

        One that collided is run again, alone. One that needs what another process holds is tried again later:
        nothing waits for a lock, as everything behind would wait with it, and groups that wait for each other's
        locks would wait for ever.
        """
        while group:
            if self._given_up:
                for job in group:
                    job.error = StoreUnavailable()
                _tell(group)
                return
            done = self._attempt(group)
            tried, group = group[:done], group[done:]
            _tell([job for job in tried if not job.again])
            for job in [job for job in tried if job.again]:
                self._run_again(job)

    def _run_again(self, job: _Job) -> None:
        tries = 1
        while job.again and isinstance(job.error, Conflict) and tries < _MAX_TRIES:
            tries += 1
            self._attempt([job])
        now = time.monotonic()
        if isinstance(job.error, StoreBusy) and job.again and now - job.since < _HELD_TOO_LONG:
            due = now + job.pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret
            job.pause = min(_LONGEST_PAUSE, 2 * job.pause)
            heappush(self._later, (due, next(self._numbers), job))
        else:
            _tell([job])

    def _attempt(self, group: Sequence[_Job]) -> int:
        """Runs jobs in one transaction, as many as there is time for; returns how many."""
        try:
            done = self._writing.session.transact(lambda: self._run_all(group))
            if self._writing.session.is_server:
                self._due = self._due if self._news else time.monotonic() + _WORD
                self._news |= self._writing.session.changed
        except _RollbackError:
            return 1  # the job's own error stands
        except FAULTS as error:
            self._consider(error)
            for job in group:
                job.error, job.again = translated(error), collided(error) or is_held(error)
        except BaseException as error:  # noqa: BLE001 - the thread must outlive it, and every job be answered
            for job in group:
                job.error, job.again = StoreFaultError(type(error).__name__), False
        else:
            return done
        return len(group)

    def _run_all(self, group: Sequence[_Job]) -> int:
        begun = time.monotonic()
        for number, job in enumerate(group, start=1):
            job.again, job.error = False, None
            self._run_one(job, alone=len(group) == 1)
            if time.monotonic() - begun > _LONGEST_GROUP:
                return number
        return len(group)

    def _run_one(self, job: _Job, *, alone: bool) -> None:
        try:
            if alone:
                job.result = job.change(self._writing)
            else:
                with self._writing.session.nested():
                    job.result = job.change(self._writing)
        except FAULTS as error:
            if is_outage(error):
                raise  # takes the whole group down: nothing of it is committed
            job.error, job.again = translated(error), collided(error) or is_held(error)
        except BaseException as error:  # noqa: BLE001 - belongs to whoever submitted the change, not to this thread
            job.error = error
        if alone and job.error is not None:
            raise _RollbackError


class _RollbackError(Exception):
    """Leaves a transaction without committing."""


def _tell(jobs: Sequence[_Job]) -> None:
    """Answers jobs in their loops."""
    for loop in {job.loop for job in jobs}:
        if not loop.is_closed():
            loop.call_soon_threadsafe(_answer, [job for job in jobs if job.loop is loop])


def _answer(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job.answer()


class _LockSession:
    """A PostgreSQL session that holds an advisory lock, if it got it, for as long as it lives."""

    def __init__(self, url: str, name: str, watchdog: Watchdog) -> None:
        key = int.from_bytes(hashlib.sha256(f"vida-coach:{name}".encode()).digest()[:8], "big", signed=True)
        self._engine = session_engine(url)
        watchdog.watch(self._engine)
        self._key = {"key": key}
        try:
            self._connection = self._engine.connect()
            try:
                with line_of(self._connection):
                    lock = text("SELECT pg_try_advisory_lock(:key)")
                    self.held = bool(self._connection.execute(lock, self._key).scalar_one())
            except exc.SQLAlchemyError:
                self._connection.close()
                raise
        except exc.SQLAlchemyError as error:
            raise translated(error) from error

    def close(self) -> None:
        """Frees the lock, and ends the session: by itself, the server notices that some time later."""
        with suppress(*FAULTS):  # whatever is wrong with the session, the lock ends with it
            if self.held:
                with line_of(self._connection):
                    self._connection.execute(text("SELECT pg_advisory_unlock(:key)"), self._key)
        self._connection.close()


def _close_when_open(opening: "asyncio.Future[_LockSession]") -> None:
    """For whoever was cancelled while a session was opening."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
