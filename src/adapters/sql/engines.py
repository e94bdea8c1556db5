"""Engines: how the two databases are opened."""

import json
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.pool import NullPool, QueuePool

from adapters.sql.errors import UnreadableDatabaseError

READERS = 4
BUSY_TIMEOUT = 5000
"""Milliseconds for which SQLite waits for a lock."""
BEGIN_WRITING = {"sqlite": "BEGIN IMMEDIATE", "postgresql": "BEGIN ISOLATION LEVEL READ COMMITTED"}
BEGIN_READING = {"sqlite": "BEGIN", "postgresql": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"}
_HEADER = b"SQLite format 3\0"
SESSION_SETTINGS = {
    "statement_timeout": "10000",
    "lock_timeout": "5",
    "timezone": "UTC",
    "idle_in_transaction_session_timeout": "15000",
    "synchronous_commit": "on",
}
"""Of PostgreSQL sessions that write and read; times in milliseconds."""
_POOL_TIMEOUT = 5.0
_CONNECT_TIMEOUT = 5
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def is_embedded(url: str | URL) -> bool:
    """Whether the database is a file that one process owns."""
    return make_url(url).get_backend_name() == "sqlite"


def database_file(url: str | URL) -> Path:
    """The file of an embedded database."""
    database = make_url(url).database
    if not database or database == ":memory:":
        raise ValueError("an embedded database needs a file")
    return Path(database)


def require_database(file: Path) -> None:
    """Raises UnreadableDatabaseError for a file with something else in it, before anything of it is touched."""
    if file.exists():
        with file.open("rb") as content:
            if content.read(len(_HEADER)) not in (_HEADER, b""):
                raise UnreadableDatabaseError


def writer_engine(url: str | URL) -> Engine:
    """An engine for the one connection that writes: commits durably before it says so."""
    url = make_url(url)
    if not is_embedded(url):
        return _postgresql(url, pool_size=1)
    file = database_file(url)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.touch(mode=0o600)
    return _sqlite(
        url,
        BEGIN_WRITING["sqlite"],
        [
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "PRAGMA foreign_keys=ON",
            "PRAGMA secure_delete=ON",
            # What a savepoint may take back would else be copied into files elsewhere, users' words with it.
            "PRAGMA temp_store=MEMORY",
        ],
        pool_size=1,
    )


def reader_engine(url: str | URL) -> Engine:
    """An engine for connections that only read, each transaction on one consistent state.

    On SQLite they neither write nor checkpoint: before 3.51.3 only a WAL with one writing and checkpointing
    connection is safe from losing commits (sqlite.org/wal.html#walresetbug).
    """
    url = make_url(url)
    if not is_embedded(url):
        return _postgresql(url, pool_size=READERS)
    return _sqlite(
        url, BEGIN_READING["sqlite"], ["PRAGMA query_only=ON", "PRAGMA wal_autocheckpoint=0"], pool_size=READERS
    )


def session_engine(url: str | URL) -> Engine:
    """An engine for PostgreSQL sessions that live long: to hold advisory locks, to hear notifications."""
    return create_engine(
        _driver(make_url(url)),
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,
        poolclass=NullPool,
        connect_args={"connect_timeout": _CONNECT_TIMEOUT, **_KEEPALIVES},
    )


def migration_engine(url: str | URL) -> Engine:
    """An engine for schema changes: no limit on how long a statement may take."""
    if is_embedded(url):
        return writer_engine(url)
    timeout = {"connect_timeout": _CONNECT_TIMEOUT}
    return create_engine(_driver(make_url(url)), hide_parameters=True, connect_args=timeout)


def _sqlite(url: URL, begin: str, pragmas: list[str], pool_size: int) -> Engine:
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_POOL_TIMEOUT,
        hide_parameters=True,
        json_serializer=_dumps,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        for pragma in [f"PRAGMA busy_timeout={BUSY_TIMEOUT}", *pragmas]:
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgresql(url: URL, pool_size: int) -> Engine:
    return create_engine(
        _driver(url),
        isolation_level="AUTOCOMMIT",  # whoever wants a transaction begins it; the driver does not
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_POOL_TIMEOUT,
        hide_parameters=True,
        json_serializer=_dumps,
        paramstyle="numeric_dollar",  # the server's own: sessions pass the driver's cursors by
        connect_args={
            "connect_timeout": _CONNECT_TIMEOUT,
            **_KEEPALIVES,
            "tcp_user_timeout": 10_000,
            "options": " ".join(f"-c {name}={value}" for name, value in SESSION_SETTINGS.items()),
        },
    )


def _driver(url: URL) -> URL:
    """The URL with its driver, and for no standby, where even what is read may be from before."""
    return url.set(drivername="postgresql+psycopg", query={"target_session_attrs": "primary", **url.query})
