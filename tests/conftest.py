"""What every suite may use: clean settings, an own PostgreSQL, stores of every kind."""

import logging
import os
import platform
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from adapters.memory.store import MemoryStore
from adapters.sql.schema import migrate
from adapters.sql.store import SqlStore
from core.ports.store import Store
from doubles import ManualClock
from entrypoints.observability import _OURS
from own_postgres import OwnPostgres, Postgres, Spares, templated


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and nothing is written outside its folder."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "VIDA_", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    """What a command sets up in this process ends with its test: others look at what is logged as well."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, _OURS)]
    levels = [logger.level for logger in loggers]
    handlers, told = root.handlers[:], logging.raiseExceptions
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    logging.raiseExceptions = told


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL from a wheel, or the server of VIDA_TEST_POSTGRES_URL. It outlives every test: those that crash
    the server have another one."""
    if given := os.environ.get("VIDA_TEST_POSTGRES_URL"):
        yield templated(given)
        return
    server = OwnPostgres(durable=False)
    try:
        yield server.databases
    finally:
        server.close()


@pytest.fixture(scope="session")
def spares(postgres: Postgres) -> Iterator[Spares]:
    """Databases of the PostgreSQL server, made ahead."""
    spares = Spares(postgres)
    yield spares
    spares.close()


@pytest.fixture
def postgres_url(spares: Spares) -> Iterator[str]:
    """A database of its own for each test."""
    with spares.one() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file that others are copied from."""
    file = tmp_path_factory.mktemp("template") / "record.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A migrated file of its own for each test."""
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'record.db')}"


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
