"""The record in a database: changes go to its one writer, queries to reader threads."""

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
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
from adapters.sql.errors import FAULTS, translated
from adapters.sql.notifications import Listener
from adapters.sql.session import Session
from adapters.sql.transaction import SqlTransaction
from adapters.sql.watchdog import Watchdog, line_of
from adapters.sql.writer import Job, LoopDesk, ThreadDesk, Writer
from core.model.errors import StoreUnavailable
from core.ports import store
from core.ports.store import Transaction
from core.ports.system import Clock
from core.ports.telemetry import UNMEASURED, Telemetry

T = TypeVar("T")

_PATIENCE = 12.0
"""Seconds to wait for a server's answer. It ends a statement by itself before that."""


class SqlStore(store.Store):
    """The record on SQLite or PostgreSQL. One instance for each process and database."""

    def __init__(
        self, url: str, clock: Clock, *, patience: float = _PATIENCE, telemetry: Telemetry = UNMEASURED
    ) -> None:
        """`patience`: after so many seconds a server that does not answer counts as gone."""
        self._url = url
        self._name = secrets.token_hex(8)
        self._engine = writer_engine(url)
        self._readers = reader_engine(url)
        self._watchdog = Watchdog(patience)
        if not is_embedded(url):
            self._watchdog.watch(self._engine)
            self._watchdog.watch(self._readers)
        dialect = self._engine.dialect.name
        self._writer = Writer(
            SqlTransaction(Session(self._engine, BEGIN_WRITING[dialect], clock)),
            ThreadDesk() if is_embedded(url) else LoopDesk(),
            self._name,
            telemetry,
        )
        self._reading = deque(
            SqlTransaction(Session(self._readers, BEGIN_READING[dialect], clock)) for _ in range(READERS)
        )
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._listeners: list[Listener] = []
        self._held: set[str] = set()
        self._closed = False

    async def write(self, change: Callable[[Transaction], T]) -> T:
        result: T = await self._submit(change)
        return result

    async def purge(self) -> bool:
        # Pages that are freed are overwritten (secure_delete); older versions of them lie in the write-ahead log.
        return not is_embedded(self._url) or bool(await self._submit(None))

    async def _submit(self, change: Callable[[Transaction], Any] | None) -> Any:
        if self._closed:
            raise StoreUnavailable
        loop = asyncio.get_running_loop()
        job = Job(change, loop, loop.create_future())
        self._writer.submit(job)
        return await job.future

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
        self._writer.closing()
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            await loop.run_in_executor(None, listener.close)
        await loop.run_in_executor(None, self._threads.shutdown)
        # The writer closes last: on SQLite the last connection to close checkpoints.
        for reading in self._reading:
            reading.session.close()
        self._readers.dispose()
        await self._writer.aclose()
        self._engine.dispose()
        self._watchdog.close()

    def _read(self, query: Callable[[Transaction], T]) -> T:
        if self._writer.given_up:
            raise StoreUnavailable
        reading = self._reading.pop()  # there is one for each thread
        try:
            return reading.session.transact(lambda: query(reading))
        except FAULTS as error:
            self._writer.consider(error)
            raise translated(error) from error
        finally:
            self._reading.append(reading)


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
