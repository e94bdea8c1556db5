"""Runs changes in one writer thread, in groups that share a commit, and queries in reader threads."""

import asyncio
import hashlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, exc, text

from adapters.sql.engines import READERS, is_embedded, lock_engine, reader_engine, writer_engine
from adapters.sql.repositories import SqlTransaction
from core.model.errors import StoreUnavailable
from core.ports import store
from core.ports.store import Conflict, Transaction
from core.ports.system import Clock

T = TypeVar("T")

_MAX_GROUP = 256
_MAX_TRIES = 3
_OUT_OF_TIME = frozenset({"55P03", "57014"})
"""A lock or a statement that took too long: one change's trouble, not its group's."""
_READ_ONLY = "25006"
"""What a PostgreSQL says that is a standby, or has just become one."""


class StoreFaultError(Exception):
    """The database refused a statement. Names the kind of refusal only: its text may hold what a user wrote."""


@dataclass(slots=True)
class _Job:
    change: Callable[[Transaction], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    result: Any = None
    error: BaseException | None = None
    again: bool = False

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

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._writer = writer_engine(url)
        self._readers = reader_engine(url)
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_groups, name="store-write", daemon=True)
        self._held: set[str] = set()
        self._closed = False
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
            opening = loop.run_in_executor(self._threads, _LockSession, self._url, name)
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

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._threads.shutdown)
        # The writer closes last: on SQLite the last connection to close checkpoints.
        self._readers.dispose()
        self._jobs.put(None)
        await loop.run_in_executor(None, self._thread.join)

    def _read(self, query: Callable[[Transaction], T]) -> T:
        try:
            with self._readers.connect() as connection, connection.begin():
                return query(SqlTransaction(connection, self._clock))
        except exc.SQLAlchemyError as error:
            raise _translated(error) from error

    def _write_groups(self) -> None:
        while (job := self._jobs.get()) is not None:
            group = [job]
            last = False
            while len(group) < _MAX_GROUP and not self._jobs.empty():
                if (more := self._jobs.get()) is None:
                    last = True
                    break
                group.append(more)
            self._run(group)
            if last:
                break
        self._writer.dispose()

    def _run(self, group: list[_Job]) -> None:
        """Runs a group to its answers. A change that collided is run again, alone."""
        self._attempt(group)
        _tell([job for job in group if not job.again])
        for job in [job for job in group if job.again]:
            tries = 1
            while job.again and tries < _MAX_TRIES:
                job.again, job.error = False, None
                tries += 1
                self._attempt([job])
            _tell([job])

    def _attempt(self, group: Sequence[_Job]) -> None:
        try:
            with self._writer.connect() as connection, connection.begin():
                transaction = SqlTransaction(connection, self._clock)
                for job in group:
                    self._run_one(connection, transaction, job, alone=len(group) == 1)
        except _RollbackError:
            return  # the job's own error stands
        except exc.SQLAlchemyError as error:
            for job in group:
                job.error, job.again = _translated(error), _collided(error)
        except BaseException as error:  # noqa: BLE001 - the thread must outlive it, and every job be answered
            for job in group:
                job.error, job.again = StoreFaultError(type(error).__name__), False

    def _run_one(self, connection: Connection, transaction: SqlTransaction, job: _Job, *, alone: bool) -> None:
        try:
            if alone:
                job.result = job.change(transaction)
            else:
                with connection.begin_nested():
                    job.result = job.change(transaction)
        except exc.SQLAlchemyError as error:
            if _is_outage(error) and not _collided(error) and _sqlstate(error) not in _OUT_OF_TIME:
                raise  # takes the whole group down: nothing of it is committed
            job.error, job.again = _translated(error), _collided(error)
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

    def __init__(self, url: str, name: str) -> None:
        key = int.from_bytes(hashlib.sha256(f"vida-coach:{name}".encode()).digest()[:8], "big", signed=True)
        self._engine = lock_engine(url)
        try:
            self._connection = self._engine.connect()
            lock = text("SELECT pg_try_advisory_lock(:key)")
            self.held = bool(self._connection.execute(lock, {"key": key}).scalar_one())
        except exc.SQLAlchemyError as error:
            self._engine.dispose()
            raise _translated(error) from error

    def close(self) -> None:
        """Ends the session, and with it the lock."""
        self._connection.close()
        self._engine.dispose()


def _close_when_open(opening: "asyncio.Future[_LockSession]") -> None:
    """For whoever was cancelled while a session was opening."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _is_outage(error: exc.SQLAlchemyError) -> bool:
    if isinstance(error, exc.TimeoutError):
        return True
    if _sqlstate(error) == _READ_ONLY:
        return True
    return isinstance(error, exc.OperationalError | exc.InterfaceError) or (
        isinstance(error, exc.DBAPIError) and error.connection_invalidated
    )


def _collided(error: exc.SQLAlchemyError) -> bool:
    """Whether another process was faster: unique violation, deadlock, serialization failure."""
    if isinstance(error, exc.IntegrityError):
        return True
    return _sqlstate(error) in {"40001", "40P01"}


def _sqlstate(error: exc.SQLAlchemyError) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def _translated(error: exc.SQLAlchemyError) -> Exception:
    if _is_outage(error):
        return StoreUnavailable()
    if isinstance(error, exc.IntegrityError):
        return Conflict()
    return StoreFaultError(type(getattr(error, "orig", None) or error).__name__)
