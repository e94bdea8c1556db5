"""What a session asks of a database's driver, and SQLite's answer."""

import sqlite3
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

Values = Sequence[Any]
Column = tuple[str, Any]
"""A name, and what the driver says of the type."""


class Driver(Protocol):
    """One connection's statements, in their order. For one thread.

    A statement whose result nobody asks for may be held back until somebody asks for one behind it: its error
    comes then, and nothing behind it has been done. After an error there is nothing to do but to roll back.
    """

    answered: bool
    """Whether the database has answered anything since the transaction was begun."""

    @abstractmethod
    def begin(self, sql: str) -> None:
        """Begins a transaction with this statement."""

    @abstractmethod
    def run(self, sql: str, values: Values = ()) -> None:
        """Runs a statement."""

    @abstractmethod
    def count(self, sql: str, *values: Values) -> int:
        """Runs a statement with each of these values; returns how many rows it has changed."""

    @abstractmethod
    def rows(self, sql: str, values: Values = ()) -> Sequence[Sequence[Any]]:
        """Runs a statement; returns its rows."""

    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """The columns of the rows that were last returned."""

    @abstractmethod
    def settle(self) -> None:
        """Waits until everything so far has been done."""

    @abstractmethod
    def tell(self, sql: str, values: Values = ()) -> None:
        """Runs a statement behind a transaction, on its own. Nobody waits for it or hears what became of it."""

    @abstractmethod
    def roll_back_to(self, savepoint: str) -> None:
        """Takes back what was done since the savepoint; the transaction goes on."""

    @abstractmethod
    def commit(self) -> None:
        """Ends the transaction. Everything in it has been done, durably, when this returns."""

    @abstractmethod
    def rollback(self) -> None:
        """Ends the transaction, if there is one, without a trace."""


class Embedded(Driver):
    """SQLite: there is nothing to wait for."""

    answered = True

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._cursor = connection.cursor()

    def begin(self, sql: str) -> None:
        self._cursor.execute(sql)

    def run(self, sql: str, values: Values = ()) -> None:
        self._cursor.execute(sql, values)

    def count(self, sql: str, *values: Values) -> int:
        return self._cursor.executemany(sql, values).rowcount

    def rows(self, sql: str, values: Values = ()) -> Sequence[Sequence[Any]]:
        return self._cursor.execute(sql, values).fetchall()

    def columns(self) -> Sequence[Column]:
        return [(column[0], None) for column in self._cursor.description]

    def settle(self) -> None:
        """Everything has been done."""

    def tell(self, sql: str, values: Values = ()) -> None:
        self._cursor.execute(sql, values)

    def roll_back_to(self, savepoint: str) -> None:
        self._cursor.execute(f"ROLLBACK TO SAVEPOINT {savepoint}")

    def commit(self) -> None:
        self._connection.commit()

    def rollback(self) -> None:
        self._connection.rollback()
