"""One thread's way to the database: a connection that it keeps, and one transaction after another on it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, PoolProxiedConnection, func, select

from adapters.sql.errors import FAULTS
from adapters.sql.statement import Parameters, Statement
from adapters.sql.tables import UtcDateTime
from adapters.sql.watchdog import is_cut, line_of
from core.ports.system import Clock

_NO_PARAMETERS: Parameters = {}
_NOW = Statement(select(func.clock_timestamp(type_=UtcDateTime).label("now")))


class Session:
    """A connection: opened when it is needed, kept while it works, dropped when it does not. For one thread.

    `changed` takes the ids of turns that the transaction changes.
    """

    def __init__(self, engine: Engine, begin: str, clock: Clock) -> None:
        self.changed: set[str] = set()
        self.dialect = engine.dialect
        self.is_server = engine.dialect.name == "postgresql"
        self._engine = engine
        self._begin = begin
        self._clock = clock
        self._connection: PoolProxiedConnection | None = None
        self._driver: Any = None
        self._line: AbstractContextManager[None] = nullcontext()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that is committed at the end, or rolled back by an exception."""
        self.changed.clear()
        self._begin_transaction()
        try:
            yield
            with self._line:
                self.dialect.do_commit(self._driver)
        except BaseException as error:
            self._roll_back(error)
            raise

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Takes back what is done within it, and nothing else, if that fails."""
        self._execute("SAVEPOINT one")
        try:
            yield
        except BaseException:
            self._execute("ROLLBACK TO SAVEPOINT one")
            raise
        self._execute("RELEASE SAVEPOINT one")

    def close(self) -> None:
        """Frees the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def rows(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> list[Any]:
        """Runs a statement; returns its rows as named tuples."""
        form = statement.form(self.dialect, parameters)
        with self._line:
            return form.rows(self._driver.execute(form.sql, form.bind(parameters)))

    def row(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> Any:
        """Its one row, or None."""
        rows = self.rows(statement, parameters)
        return rows[0] if rows else None

    def run(self, statement: Statement, parameters: Parameters = _NO_PARAMETERS) -> int:
        """Runs a statement; returns how many rows it has changed."""
        form = statement.form(self.dialect, parameters)
        with self._line:
            count: int = self._driver.execute(form.sql, form.bind(parameters)).rowcount
            return count

    def run_for_each(self, statement: Statement, parameters: Sequence[Parameters]) -> int:
        """Runs a statement for each of several sets of parameters; returns how many rows it has changed."""
        if len(parameters) == 1:
            return self.run(statement, parameters[0])
        form = statement.form(self.dialect, parameters[0])
        with self._line:
            cursor = self._driver.cursor()
            cursor.executemany(form.sql, [form.bind(each) for each in parameters])
            count: int = cursor.rowcount
            return count

    def now(self) -> datetime:
        """PostgreSQL's clock; an embedded database has no other than this machine's."""
        if not self.is_server:
            return self._clock.now()
        now: datetime = self.row(_NOW).now
        return now

    def _execute(self, sql: str) -> None:
        with self._line:
            self._driver.execute(sql)

    def _begin_transaction(self) -> None:
        """Begins, on a new connection if need be.

        One that has been idle may have been closed by the server: BEGIN finds out before anything is lost by it.
        """
        if self._connection is not None:
            try:
                self._execute(self._begin)
            except FAULTS as error:
                gone = self._is_gone(error)
                if gone or self.is_server:
                    self._drop()
                if not gone or is_cut(self._line):
                    raise
            else:
                return
        self._connection = connection = self._engine.raw_connection()
        self._driver = connection.driver_connection
        self._line = line_of(connection)
        try:
            self._execute(self._begin)
        except BaseException:
            self._drop()
            raise

    def _roll_back(self, error: BaseException) -> None:
        """Leaves nothing of the transaction; a connection with which that is not certain is dropped."""
        if self._is_gone(error):
            self._drop()
            return
        try:
            with self._line:
                self.dialect.do_rollback(self._driver)
        except FAULTS:
            self._drop()

    def _is_gone(self, error: BaseException) -> bool:
        return isinstance(error, FAULTS) and self.dialect.is_disconnect(error, self._driver, None)  # type: ignore[arg-type]

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
