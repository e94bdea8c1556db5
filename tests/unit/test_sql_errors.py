"""What a database's errors mean: to whoever asked, to those beside them, and to the connection."""

import sqlite3

import psycopg
import pytest
from psycopg import errors as server
from sqlalchemy import exc

from adapters.sql.errors import (
    FAULTS,
    StoreFaultError,
    collided,
    is_held,
    is_outage,
    is_over,
    named,
    translated,
)
from core.model.errors import StoreBusy, StoreUnavailable
from core.ports.store import Conflict

WORDS = "what a user wrote"
QUESTIONS = {"outage": is_outage, "over": is_over, "held": is_held, "collided": collided}
MEANINGS: list[tuple[type[Exception], type[Exception], set[str]]] = [
    (sqlite3.OperationalError, StoreUnavailable, {"outage"}),
    (sqlite3.InterfaceError, StoreUnavailable, {"outage"}),
    (sqlite3.IntegrityError, Conflict, {"collided"}),
    (sqlite3.DataError, StoreFaultError, set()),
    (sqlite3.DatabaseError, StoreFaultError, set()),
    (psycopg.OperationalError, StoreUnavailable, {"outage"}),
    (psycopg.InterfaceError, StoreUnavailable, {"outage"}),
    (server.AdminShutdown, StoreUnavailable, {"outage"}),
    (server.DiskFull, StoreUnavailable, {"outage"}),
    (server.TooManyConnections, StoreUnavailable, {"outage"}),
    (server.ReadOnlySqlTransaction, StoreUnavailable, {"outage", "over"}),
    (server.IdleInTransactionSessionTimeout, StoreUnavailable, {"outage", "over"}),
    (server.lookup("25P04"), StoreUnavailable, {"outage", "over"}),
    (server.FeatureNotSupported, StoreUnavailable, {"outage", "over"}),
    (server.LockNotAvailable, StoreBusy, {"held"}),
    (server.DeadlockDetected, StoreBusy, {"held"}),
    (server.SerializationFailure, StoreBusy, {"collided"}),
    (server.QueryCanceled, StoreBusy, set()),
    (server.UniqueViolation, Conflict, {"collided"}),
    (server.ForeignKeyViolation, Conflict, {"collided"}),
    (server.DivisionByZero, Conflict, {"collided"}),
    (server.StringDataRightTruncation, StoreFaultError, set()),
    (server.UndefinedTable, StoreFaultError, set()),
    (server.InFailedSqlTransaction, StoreFaultError, set()),
]


@pytest.mark.parametrize(
    ("kind", "becomes", "facts"), MEANINGS, ids=[f"{kind.__module__}.{kind.__name__}" for kind, _, _ in MEANINGS]
)
def test_what_an_error_means_whoever_says_it(
    kind: type[Exception], becomes: type[Exception], facts: set[str]
) -> None:
    said = kind(WORDS)
    for error in (said, exc.DBAPIError("SELECT 1", {}, said)):
        assert isinstance(error, FAULTS)
        assert {name for name, asked in QUESTIONS.items() if asked(error)} == facts
        assert type(translated(error)) is becomes
        assert WORDS not in str(translated(error))
        assert WORDS not in named(error)


def test_a_pool_without_a_free_connection_is_an_outage() -> None:
    assert is_outage(exc.TimeoutError())
    assert isinstance(translated(exc.TimeoutError()), StoreUnavailable)


def test_an_error_is_named_by_its_code() -> None:
    with pytest.raises(sqlite3.OperationalError) as malformed:
        sqlite3.connect(":memory:").execute(WORDS)
    assert named(malformed.value) == "SQLITE_ERROR"
    assert named(server.DiskFull(WORDS)) == "53100"
    assert named(psycopg.OperationalError(WORDS)) == "OperationalError"
    assert named(None) == ""
