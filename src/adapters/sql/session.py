"""One thread's way to the database: a connection that it keeps, and one transaction after another on it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import Engine, PoolProxiedConnection, func, select

from adapters.sql.driver import Driver, Embedded
from adapters.sql.engines import BUSY_TIMEOUT
from adapters.sql.errors import FAULTS, is_outage, is_over
from adapters.sql.fiber import apart
from adapters.sql.pipeline import Pipeline
from adapters.sql.statement import Parameters, Statement
from adapters.sql.tables import UtcDateTime
from adapters.sql.watchdog import is_cut, line_of
from core.ports.system import Clock

T = TypeVar("T")

_NO_PARAMETERS: Parameters = {}
_PATIENCE_WITH_READERS = 20
"""Milliseconds for which the writer waits for readers to be done."""
_QUICK = 0.05
"""Seconds within which an answer has to come that says what time it is."""
_KNOWN_FOR = 10.0
"""Seconds for which two clocks are taken to go alike."""
_NOW = Statement(select(func.clock_timestamp(type_=UtcDateTime).label("now")))


class Session:
    """A connection: opened when it is needed, kept while it works, dropped when it does not. For one thread.

    `changed` takes the ids of turns that the transaction changes. A change may count on what is almost always so
    where the session is `hopeful`, and says that it has by `hoped`: if it fails it is run again without hope.
    """

    def __init__(self, engine: Engine, begin: str, clock: Clock) -> None:
        self.changed: set[str] = set()
        self.hopeful = self.hoped = False
        self.dialect = engine.dialect
        self.is_server = engine.dialect.name == "postgresql"
        self._engine = engine
        self._begin = begin
        self._clock = clock
        self._connection: PoolProxiedConnection | None = None
        self._driver: Driver
        self._line: AbstractContextManager[None] = nullcontext()
        self._seen: tuple[datetime, float] | None = None
        """What the server's clock said, and when that was on this machine's."""

    def transact(self, work: Callable[[], T]) -> T:
        """Does some work in a transaction that is committed at the end, or rolled back by an exception.

        The work may be done twice: where the connection turns out to be lost before anything was answered.
        """
        kept = self._begin_transaction()
        try:
            return self._finish(work)
        except FAULTS:
            # One that has been idle may have been closed by the server. Nothing was done on it.
            if not kept or self._connection is not None or self._driver.answered or is_cut(self._line):
                raise
        self._begin_transaction()
        return self._finish(work)

    def truncate(self) -> bool:
        """Brings all of SQLite's write-ahead log into the database and empties it: what was deleted is in neither
        then. False where a reader is in the way."""
        self.transact(lambda: None)  # makes sure of the connection
        self._driver.run(f"PRAGMA busy_timeout={_PATIENCE_WITH_READERS}")
        try:
            ((busy, *_),) = self._driver.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._driver.run(f"PRAGMA busy_timeout={BUSY_TIMEOUT}")
        return not busy

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Takes back what is done within it, and nothing else, if that fails."""
        self._driver.run("SAVEPOINT one")
        try:
            yield
            self._driver.run("RELEASE SAVEPOINT one")
            self._driver.settle()
        except BaseException as error:
            try:
                self._driver.roll_back_to("one")
            except FAULTS:  # the transaction is gone as a whole
                if not is_outage(error):  # which says best itself what has happened
                    raise
            raise

    def close(self) -> None:
        """Frees the connection."""
        connection = self._connection
        if connection is not None:
            with suppress(*FAULTS):
                self._driver.settle()
            self._connection = None
            connection.close()

    def rows(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> list[Any]:
        """Runs a statement; returns its rows as named tuples."""
        form = statement.form(self.dialect, parameters)
        found = self._driver.rows(form.sql, form.bind(parameters))
        return form.rows(found, self._driver.columns)

    def row(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> Any:
        """Its one row, or None."""
        rows = self.rows(statement, parameters)
        return rows[0] if rows else None

    def run(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> None:
        """Runs a statement. If it fails, then at the latest what is asked for next, or the commit, says so."""
        form = statement.form(self.dialect, parameters)
        self._driver.run(form.sql, form.bind(parameters))

    def count(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> int:
        """Runs a statement; returns how many rows it has changed."""
        form = statement.form(self.dialect, parameters)
        return self._driver.count(form.sql, form.bind(parameters))

    def count_each(self, statement: Statement, parameters: Sequence[Parameters]) -> int:
        """Runs a statement for each of several sets of parameters; returns how many rows it has changed."""
        form = statement.form(self.dialect, parameters[0])
        return self._driver.count(form.sql, *map(form.bind, parameters))

    def tell(self, statement: Statement, parameters: Parameters) -> None:
        """Runs a statement behind a transaction; nobody waits for it or hears what became of it."""
        form = statement.form(self.dialect, parameters)
        with suppress(*FAULTS):
            self._driver.tell(form.sql, form.bind(parameters))

    def now(self) -> datetime:
        """PostgreSQL's clock; an embedded database has no other than this machine's."""
        if not self.is_server:
            return self._clock.now()
        asked = time.monotonic()
        now: datetime = self.row(_NOW).now
        answered = time.monotonic()
        self._seen = (now, answered) if answered - asked < _QUICK else None
        return now

    def about_now(self) -> datetime:
        """The same, as far as it is known without asking: at most _QUICK behind."""
        if self._seen is not None:
            then, since = self._seen[0], time.monotonic() - self._seen[1]
            if since < _KNOWN_FOR:
                return then + timedelta(seconds=since)
        return self.now()

    def _finish(self, work: Callable[[], T]) -> T:
        try:
            result = work()
            self.dialect.do_commit(self._driver)  # type: ignore[arg-type] # a connection, as far as this is concerned
        except BaseException as error:
            self._roll_back(error)
            raise
        return result

    def _begin_transaction(self) -> bool:
        """Begins, on a new connection if need be. Returns whether it is one that was kept."""
        self.changed.clear()
        if self._connection is not None:
            try:
                self._driver.begin(self._begin)
            except FAULTS as error:
                gone = self._is_gone(error)
                if gone or self.is_server:
                    self._drop()
                if not gone or is_cut(self._line):
                    raise
            else:
                return True
        self._connection = connection = apart(self._engine.raw_connection)
        driver: Any = connection.driver_connection
        self._line = line_of(connection)
        try:
            self._driver = Pipeline(driver, self._line) if self.is_server else Embedded(driver)
            self._driver.begin(self._begin)
        except BaseException:
            self._drop()
            raise
        return False

    def _roll_back(self, error: BaseException) -> None:
        """Leaves nothing of the transaction; a connection with which that is not certain is dropped."""
        if self._is_gone(error):
            self._drop()
            return
        try:
            self.dialect.do_rollback(self._driver)  # type: ignore[arg-type] # as above
        except FAULTS:
            self._drop()

    def _is_gone(self, error: BaseException) -> bool:
        if self._connection is None or not isinstance(error, FAULTS):
            return False
        if is_over(error):
            return True
        return self.dialect.is_disconnect(error, self._connection.driver_connection, None)  # type: ignore[arg-type]

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
