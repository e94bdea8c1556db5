"""Schemas: reached from nothing, the same as in the code, and never opened by older code."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.script import ScriptDirectory

from adapters.sql import schema
from adapters.sql.engines import migration_engine
from adapters.sql.errors import SchemaTooNewError
from adapters.sql.schema import SchemaState, drift, migrate, schema_state
from adapters.sql.store import SqlStore
from adapters.sql.tables import metadata
from core.model.ledger import LedgerKey, LedgerLine, Tally
from core.model.turn import TurnState, Usage
from core.ports.store import Transaction
from doubles import ManualClock
from own_postgres import Postgres


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


MIGRATE, SERVE, CLEANUP = ["migrate"], ["serve", "--listen", "127.0.0.1:0"], ["cleanup"]


def run(*commands: Sequence[str], url: str) -> list[tuple[int, str, str]]:
    """Runs commands, all at once; returns the exit code, the output and the errors of each."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "entrypoints.cli.main", *arguments],
            env={**os.environ, "VIDA_DATABASE_URL": url},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in commands
    ]
    written = [command.communicate(timeout=60) for command in running]
    return [(command.returncode, *texts) for command, texts in zip(running, written, strict=True)]


def refused(*commands: Sequence[str], url: str, saying: str = "") -> None:
    """Each of the commands ends with an explanation and does nothing."""
    for code, output, errors in run(*commands, url=url):
        assert (code, output) == (1, "")
        assert saying in errors
        assert "Traceback" not in errors
        assert "kanarienvogel" not in errors


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


def test_migrations_are_known_by_their_files(sqlite_url: str) -> None:
    engine = migration_engine(sqlite_url)
    with engine.connect() as connection:
        script = ScriptDirectory.from_config(schema._config(connection))
    engine.dispose()
    assert [known.revision for known in script.walk_revisions()] == schema._REVISIONS[::-1]


def test_alembic_stays_away_from_a_current_schema(sqlite_url: str) -> None:
    code = """
import sys
from adapters.sql.schema import migrate
migrate(sys.argv[1])
print("alembic" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", code, sqlite_url], check=True, stdout=subprocess.PIPE, text=True)
    assert said.stdout == "False\n"


def step(url: str, revision: str) -> None:
    """Brings a database up or down to a revision."""
    engine = migration_engine(url)
    with engine.begin() as connection:
        config = schema._config(connection)
        (command.downgrade if revision.startswith("-") else command.upgrade)(config, revision.removeprefix("-"))
    engine.dispose()


def insert(url: str, table: str, row: dict[str, Any]) -> None:
    """Adds a row behind the service's back."""
    values = ", ".join("TRUE" if v is True else "FALSE" if v is False else repr(v) for v in row.values())
    execute(url, f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})")


TIME = "2026-01-01 00:00:00.000000"
OLD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("users", {"id": "ada", "created_at": TIME}),
    (
        "agents",
        {
            "id": "career-v1",
            "slug": "career",
            "version": 1,
            "domain": "career",
            "definition": "{}",
            "created_at": TIME,
        },
    ),
    (
        "assistant_threads",
        {
            "id": "t",
            "user_id": "ada",
            "assistant_id": "career-v1",
            "domain": "career",
            "is_active": True,
            "metadata": "{}",
            "last_message_at": TIME,
            "created_at": TIME,
            "title": "",
            "message_count": 2,
        },
    ),
    *(
        (
            "turns",
            {
                "id": state,
                "thread_id": "t",
                "user_id": "ada",
                "agent_id": "career-v1",
                "caller": "local",
                "state": state,
                "attempt": 1,
                "epoch": 1,
                "owner": "me",
                "last_position": 1,
                "input_tokens": 0,
                "cached_input_tokens": 0,
                "output_tokens": 0,
                "reasoning_tokens": 0,
                "model": "m",
                "provider": "p",
                "accepted_at": TIME,
            },
        )
        for state in ("completed", "running")
    ),
    *(
        (
            "messages",
            {
                "id": role,
                "thread_id": "t",
                "turn_id": "completed",
                "number": number,
                "role": role,
                "content": "[]",
                "partial": False,
                "created_at": TIME,
            },
        )
        for number, role in enumerate(("user", "assistant"), 1)
    ),
]


async def test_a_database_of_the_first_version_is_brought_along_with_its_data(empty_url: str) -> None:
    step(empty_url, "0001")
    for table, row in OLD_ROWS:
        insert(empty_url, table, row)
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []

    def look(tx: Transaction) -> None:
        (turn,) = tx.turns.unfinished("t")
        assert (turn.state, turn.claimed_at, turn.continuation) == (TurnState.RUNNING, turn.accepted_at, None)
        assert tx.turns.holder(turn.id).owner == "me"
        assert tx.turns.waiting_message(turn.id) is None
        ended = tx.turns.find("completed")
        assert ended is not None
        assert ended.claimed_at == ended.accepted_at
        question, reply = tx.messages.question_of(ended.id), tx.messages.reply_of(ended.id)
        assert question is not None
        assert reply is not None
        assert (question.index, reply.index) == (1, 2)

    store = SqlStore(empty_url, ManualClock())
    await store.read(look)
    await store.aclose()
    step(empty_url, "-0001")
    assert schema_state(empty_url) is SchemaState.OUTDATED
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []


def test_a_database_of_the_second_version_gets_a_place_for_attachments(empty_url: str) -> None:
    step(empty_url, "0002")
    assert any("attachments" in change for change in drift(empty_url))
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []
    step(empty_url, "-0002")
    assert any("attachments" in change for change in drift(empty_url))


async def test_a_database_of_the_third_version_gets_a_ledger_of_its_turns(empty_url: str) -> None:
    step(empty_url, "0003")
    rows = [row for row in OLD_ROWS if row[0] not in ("turns", "messages")]
    turn = next(row for table, row in OLD_ROWS if table == "turns")
    late = {**turn, "claimed_at": TIME, "finished_at": "2026-01-02 23:59:59.900000"}
    turns = [
        {**late, "id": "1", "input_tokens": 3, "output_tokens": 5, "state": "completed"},
        {**late, "id": "2", "input_tokens": 30, "cached_input_tokens": 7, "attempt": 2, "state": "completed"},
        {**late, "id": "3", "reasoning_tokens": 9, "state": "cancelled"},
        {**turn, "id": "4", "model": "", "state": "cancelled"},
        {**late, "id": "5", "input_tokens": 100, "state": "running"},
    ]
    for table, row in [*rows, *(("turns", row) for row in turns)]:
        insert(empty_url, table, row)
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []
    usage = Usage(input_tokens=33, cached_input_tokens=7, output_tokens=5, reasoning_tokens=9)
    store = SqlStore(empty_url, ManualClock())
    lines = await store.read(lambda tx: tx.ledger.of_user("ada", date.min, date.max, None, 9))
    assert list(lines) == [
        LedgerLine(
            LedgerKey("ada", date(2026, 1, 2), "career-v1", "m"), Tally(turns=3, unmetered_turns=2, usage=usage)
        ),
        LedgerLine(LedgerKey("ada", date(2026, 1, 1), "career-v1", ""), Tally(turns=1)),
    ]
    await store.aclose()
    step(empty_url, "-0003")
    assert any("usage" in change for change in drift(empty_url))
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []


async def test_what_providers_keep_moves_into_a_table_of_its_own(empty_url: str) -> None:
    step(empty_url, "0004")
    state = '{"provider": "openai", "response_id": "resp_1", "synced_to": 2, "retired": ["conv_0", "resp_0"]}'
    for table, row in (
        ("users", {"id": "ada", "created_at": "2026-01-01 00:00:00+00:00"}),
        *((table, row) for table, row in OLD_ROWS if table == "agents"),
    ):
        names, values = ", ".join(row), ", ".join(map(repr, row.values()))
        execute(empty_url, f"INSERT INTO {table} ({names}) VALUES ({values}) ON CONFLICT DO NOTHING")
    agent = next(row["id"] for table, row in OLD_ROWS if table == "agents")
    times = "'2026-01-01 00:00:00+00:00', '2026-01-01 00:00:00+00:00'"
    execute(
        empty_url,
        "INSERT INTO assistant_threads (id, user_id, thread_id, assistant_id, domain, is_active, metadata, title,"
        " message_count, provider_state, last_message_at, created_at)"
        f" VALUES ('t1', 'ada', 'conv_1', '{agent}', 'career', TRUE, '{{}}', '', 0, '{state}', {times})",
    )
    execute(
        empty_url,
        "INSERT INTO tombstones (thread_id, user_id, provider, copies, deleted_at)"
        " VALUES ('t0', 'ada', 'openai', '[\"conv_9\", \"resp_9\"]', '2026-01-01 00:00:00+00:00')",
    )
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []

    def look(tx: Transaction) -> None:
        state = tx.threads.provider_state("t1")
        assert state is not None
        assert state.refs == ("conv_1", "resp_1")
        assert tx.users.belongings("ada")[1] == 4
        assert {(copy.thread_id, copy.ref) for copy in tx.copies.claim("openai", 9, 60)} == {
            ("t0", "conv_9"),
            ("t0", "resp_9"),
        }
        grave = tx.threads.tombstone("t0")
        assert grave is not None
        assert grave.erasure_id == ""
        tx.threads.delete("t1", tx.now())
        refs = {copy.ref for copy in tx.copies.claim("openai", 9, 60)}
        assert refs == {"conv_0", "conv_1", "resp_0", "resp_1"}

    store = SqlStore(empty_url, ManualClock())
    await store.write(look)
    await store.aclose()
    step(empty_url, "-0004")
    assert migrate(empty_url) is SchemaState.OUTDATED
    assert drift(empty_url) == []


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


def test_no_command_opens_a_newer_server_database(postgres_url: str) -> None:
    execute(postgres_url, NEWER)
    refused(MIGRATE, SERVE, CLEANUP, url=postgres_url, saying="newer")


@pytest.mark.parametrize("command", [MIGRATE, SERVE, CLEANUP], ids=str)
def test_no_command_opens_a_newer_file(sqlite_url: str, command: Sequence[str]) -> None:
    execute(sqlite_url, NEWER)
    refused(command, url=sqlite_url, saying="newer")  # one by one: a file has one owner


def test_an_outdated_server_database_is_refused_with_advice(postgres: Postgres) -> None:
    name = f"vida_outdated_{os.getpid()}"
    url = postgres.empty(name)
    try:
        refused(SERVE, CLEANUP, url=url, saying="vida-coach migrate")
        assert schema_state(url) is SchemaState.EMPTY  # not migrated by the way
        ((code, output, _),) = run(MIGRATE, url=url)
        assert (code, output) == (0, "")
        assert schema_state(url) is SchemaState.CURRENT
        ((_, _, errors),) = run(MIGRATE, url=url)
        assert "already up to date" in errors
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
    done = run(*[MIGRATE] * 4, url=empty_url)
    assert [code for code, _, _ in done] == [0, 0, 0, 0], done
    assert schema_state(empty_url) is SchemaState.CURRENT


@pytest.mark.parametrize("command", [MIGRATE, SERVE, CLEANUP], ids=str)
def test_a_file_that_is_no_database_is_explained(tmp_path: Path, command: Sequence[str]) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear Ada, this is no database. " * 100)
    refused(command, url=f"sqlite:///{file}")
    assert file.read_text().startswith("Dear Ada")


def test_a_server_that_does_not_answer_is_explained() -> None:
    url = "postgresql://ada:kanarienvogel@127.0.0.1:1/none"
    refused(MIGRATE, SERVE, CLEANUP, url=url, saying="does not answer")


def test_a_database_of_the_fifth_version_gets_its_active_threads_by_days(sqlite_url: str) -> None:
    """Of an index of an expression Alembic knows nothing: nothing else would miss it."""
    by_time, by_day = "ix_assistant_threads_active", "ix_assistant_threads_active_days"

    def indexes() -> set[str]:
        connection = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
        found = connection.execute(
            "SELECT name FROM sqlite_master WHERE tbl_name = 'assistant_threads'"
        ).fetchall()
        connection.close()
        return {name for (name,) in found} & {by_time, by_day}

    assert indexes() == {by_day}
    step(sqlite_url, "-0005")
    assert indexes() == {by_time}
    assert migrate(sqlite_url) is SchemaState.OUTDATED
    assert indexes() == {by_day}
    assert drift(sqlite_url) == []


def test_the_rows_of_a_log_lie_together_and_outlive_the_way_there(tmp_path: Path) -> None:
    """Of a table's kind Alembic knows nothing either."""
    file = tmp_path / "vida.db"
    url = f"sqlite:///{file}"
    rows = [("b", 1, 0, "[]"), ("a", 7, 3, '[["t","é"]]'), ("a", 3, 0, "[]")]

    def log() -> tuple[bool, list[tuple[Any, ...]]]:
        connection = sqlite3.connect(file)
        ((made,),) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'turn_log'")
        found = connection.execute("SELECT turn_id, position, start, events FROM turn_log").fetchall()
        connection.close()
        return made.rstrip().endswith("WITHOUT ROWID"), found

    step(url, "0003")
    turn = next(row for table, row in OLD_ROWS if table == "turns")
    turns = [("turns", {**turn, "id": turn_id, "state": "completed", "finished_at": TIME}) for turn_id in "ab"]
    for table, row in [*(each for each in OLD_ROWS if each[0] not in ("turns", "messages", "turn_log")), *turns]:
        insert(url, table, row)
    step(url, "0008")
    for each in rows:
        execute(url, f"INSERT INTO turn_log VALUES {each}")
    assert log() == (False, rows)
    assert migrate(url) is SchemaState.OUTDATED
    assert log() == (True, sorted(rows))
    assert drift(url) == []
    step(url, "-0008")
    assert log() == (False, sorted(rows))
