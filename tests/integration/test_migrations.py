"""Schemas: reached from nothing, the same as in the code, and never opened by older code."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from adapters.sql.errors import SchemaTooNewError
from adapters.sql.schema import SchemaState, drift, migrate, schema_state
from adapters.sql.tables import metadata
from conftest import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'new.db'}"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name = f"vida_empty_{os.getpid()}_{abs(hash(request.node.nodeid)):x}"
    yield postgres.empty(name)
    postgres.drop(name)


def run(*arguments: str, url: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command line."""
    return subprocess.run(
        [sys.executable, "-m", "entrypoints.cli.main", *arguments],
        env={**os.environ, "VIDA_DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def execute(url: str, statement: str) -> None:
    """Changes a database behind the service's back."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        with connection:
            connection.execute(statement)
        connection.close()
    else:
        with psycopg.connect(url, autocommit=True) as server:
            server.execute(statement.encode())


def test_an_empty_database_is_brought_to_the_code(empty_url: str) -> None:
    assert schema_state(empty_url) is SchemaState.EMPTY
    assert len(drift(empty_url)) >= len(metadata.tables)
    assert migrate(empty_url) is SchemaState.EMPTY
    assert schema_state(empty_url) is SchemaState.CURRENT
    assert drift(empty_url) == []
    assert migrate(empty_url) is SchemaState.CURRENT


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE turns ADD COLUMN extra INTEGER",
        "DROP INDEX uq_turns_one_at_work",
        "DROP TABLE goals",
    ],
)
def test_drift_is_seen(database_url: str, statement: str) -> None:
    assert drift(database_url) == []
    execute(database_url, statement)
    assert len(drift(database_url)) >= 1


NEWER = "UPDATE alembic_version SET version_num = 'from_the_future'"


def test_a_newer_database_is_refused_and_left_alone(database_url: str) -> None:
    execute(database_url, NEWER)
    assert schema_state(database_url) is SchemaState.NEWER
    with pytest.raises(SchemaTooNewError):
        migrate(database_url)
    assert schema_state(database_url) is SchemaState.NEWER


@pytest.mark.parametrize("command", [("migrate",), ("serve", "--listen", "127.0.0.1:0"), ("cleanup",)], ids=str)
def test_no_command_opens_a_newer_database(database_url: str, command: tuple[str, ...]) -> None:
    execute(database_url, NEWER)
    done = run(*command, url=database_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "newer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("serve", "--listen", "127.0.0.1:0"), ("cleanup",)], ids=str)
def test_an_outdated_server_database_is_refused_with_advice(postgres: Postgres, command: tuple[str, ...]) -> None:
    name = f"vida_outdated_{os.getpid()}"
    url = postgres.empty(name)
    try:
        done = run(*command, url=url)
        assert (done.returncode, done.stdout) == (1, "")
        assert "vida-coach migrate" in done.stderr
        assert "Traceback" not in done.stderr
        assert schema_state(url) is SchemaState.EMPTY  # not migrated by the way
        done = run("migrate", url=url)
        assert (done.returncode, done.stdout) == (0, "")
        assert schema_state(url) is SchemaState.CURRENT
        assert "already up to date" in run("migrate", url=url).stderr
    finally:
        postgres.drop(name)


def test_an_embedded_database_is_migrated_by_serve(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a folder' / 'x.db'}"
    with subprocess.Popen(
        [sys.executable, "-m", "entrypoints.cli.main", "serve", "--listen", "127.0.0.1:0"],
        env={**os.environ, "VIDA_DATABASE_URL": url},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on 127.0.0.1:")
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert schema_state(url) is SchemaState.CURRENT
    assert (tmp_path / "a folder" / "x.db").stat().st_mode & 0o777 == 0o600


def test_migrating_in_four_processes_at_once_is_safe(empty_url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        states = pool.map(migrate, [empty_url] * 4, chunksize=1)
    assert sorted(states) == [SchemaState.CURRENT] * 3 + [SchemaState.EMPTY]
    assert schema_state(empty_url) is SchemaState.CURRENT
    assert drift(empty_url) == []


def test_four_migrate_commands_at_once_all_succeed(empty_url: str) -> None:
    """As the command's help promises."""
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "entrypoints.cli.main", "migrate"],
            env={**os.environ, "VIDA_DATABASE_URL": empty_url},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    errors = [command.communicate(timeout=60)[1] for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0, 0], errors
    assert schema_state(empty_url) is SchemaState.CURRENT


@pytest.mark.parametrize("command", [("migrate",), ("serve", "--listen", "127.0.0.1:0"), ("cleanup",)], ids=str)
def test_a_file_that_is_no_database_is_explained(tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear Ada, this is no database. " * 100)
    done = run(*command, url=f"sqlite:///{file}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert file.read_text().startswith("Dear Ada")


@pytest.mark.parametrize("command", [("migrate",), ("serve", "--listen", "127.0.0.1:0"), ("cleanup",)], ids=str)
def test_a_server_that_does_not_answer_is_explained(command: tuple[str, ...]) -> None:
    done = run(*command, url="postgresql://ada:kanarienvogel@127.0.0.1:1/none")
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert "kanarienvogel" not in done.stderr
