"""One process owns an embedded database: by a lock that dies with it, and one connection that writes."""

import asyncio
import os
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import exc, text

from adapters.sql import engines
from adapters.sql.engines import reader_engine, writer_engine
from adapters.sql.store import SqlStore
from core.model.errors import CoreError, Draining, StoreUnavailable
from doubles import ManualClock
from entrypoints import ownership
from entrypoints.cli.main import main
from entrypoints.grpc_api.errors import refuse
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import (
    AdminServiceServicer,
    add_AdminServiceServicer_to_server,
)
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.ownership import DatabaseOwnedError, Ownership, socket_path
from harness import DEADLINE, message, served

SERVE = [sys.executable, "-m", "entrypoints.cli.main", "serve", "--listen", "127.0.0.1:0"]


@contextmanager
def serving(database: Path) -> Iterator["subprocess.Popen[str]"]:
    """A real server that owns a database, SERVING."""
    environment = {**os.environ, "VIDA_DATABASE_URL": f"sqlite:///{database}"}
    with subprocess.Popen(
        SERVE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("listening on ")
            yield server
        finally:
            server.kill()


def second(database: Path, seconds: float = 30) -> "subprocess.CompletedProcess[str]":
    """Another server on the same database."""
    environment = {**os.environ, "VIDA_DATABASE_URL": f"sqlite:///{database}"}
    return subprocess.run(SERVE, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


def healthy(database: Path) -> bool:
    """Whether the owner answers on its socket."""
    with grpc.insecure_channel(f"unix:{socket_path(database)}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_second_server_is_told_who_owns_the_database(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    with serving(database) as server:
        done = second(database)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"`vida-coach serve` (process {server.pid})" in done.stderr
        assert "Traceback" not in done.stderr
        assert healthy(database)  # the first one is none the worse for it


def test_a_server_has_all_the_files_that_it_may_have(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1_000), hard))
    try:
        with serving(tmp_path / "x.db") as server:
            assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_second_signal_cuts_a_drain_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0.01")
    database = tmp_path / "x.db"
    with serving(database) as server, grpc.insecure_channel(f"unix:{socket_path(database)}") as channel:
        events = AgentServiceStub(channel).Chat(message("I want a new job"), timeout=DEADLINE)
        while not next(events).event.HasField("text_delta"):
            """What comes before the text."""
        server.send_signal(signal.SIGTERM)
        assert server.stderr is not None
        assert any("stopping: running turns have" in line for line in server.stderr)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(DEADLINE) == 0


@pytest.mark.parametrize(("files", "fits"), [(1_200, True), (1_199, False)])
def test_a_bound_on_turns_that_needs_more_files_than_there_may_be_is_refused(
    tmp_path: Path, files: int, fits: bool
) -> None:
    line = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *SERVE]
    environment = {**os.environ, "VIDA_DATABASE_URL": f"sqlite:///{tmp_path / 'x.db'}", "VIDA_MAX_TURNS": "500"}
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        told = server.stdout.readline()
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert told.startswith("listening on ") is fits
    if not fits:
        assert server.returncode == 2
        assert "set VIDA_MAX_TURNS to at most 499" in errors


@pytest.mark.parametrize("setting", ["VIDA_LISTEN", "VIDA_HEALTH_LISTEN"])
def test_a_port_in_use_is_named_and_nothing_is_left(tmp_path: Path, setting: str) -> None:
    database = tmp_path / "x.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        addresses = {"VIDA_LISTEN": "127.0.0.1:0", "VIDA_HEALTH_LISTEN": "127.0.0.1:0", setting: address}
        environment = {**os.environ, "VIDA_DATABASE_URL": f"sqlite:///{database}", **addresses}
        done = subprocess.run(SERVE[:-2], env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert address in line
    assert setting in line
    assert not socket_path(database).exists()


@pytest.mark.parametrize("name", ["folder", "file/x.db"])
def test_a_file_that_can_not_be_used_is_named_with_its_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    database = tmp_path / name
    done = second(database)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert str(database) in line
    assert "VIDA_DATABASE_URL" in line


async def test_an_outage_is_told_once_and_so_is_its_end(
    sqlite_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 1)
    store = SqlStore(sqlite_url, clock)
    try:
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(3):
                with pytest.raises(StoreUnavailable):
                    await store.write(lambda tx: tx.users.ensure("ada", tx.about_now()))
        await store.write(lambda tx: tx.users.ensure("ada", tx.about_now()))
    finally:
        await store.aclose()
    told = [record.getMessage() for record in caplog.records if record.name == "adapters.sql.writer"]
    assert [line.rpartition(" ")[2] for line in told] == ["SQLITE_BUSY", "again"]


def test_kill_9_frees_the_database_at_once(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    with serving(database) as server:
        server.send_signal(signal.SIGKILL)
        server.wait(10)
        assert socket_path(database).exists()  # left lying about
        with serving(database):
            assert healthy(database)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A folder with a short name, as a user's own for sockets has."""
    with tempfile.TemporaryDirectory(prefix="vida-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("length", [0, 60, 120], ids=["short", "long", "longer than a socket's name may be"])
def test_the_socket_is_its_users_alone(
    tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch, runtime: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    database = tmp_path / ("d" * length) / "x.db"
    with serving(database) as server:
        path = socket_path(database)
        found = path.lstat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert len(os.fsencode(path)) <= 107
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0 or path.parent in {runtime, database.parent}
        assert healthy(database)
        for name in ("x.db", "x.db.lock", "x.db-wal"):
            assert stat.S_IMODE((database.parent / name).stat().st_mode) & 0o077 == 0, name
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    with Ownership(database, "test"):
        """Free again."""


def test_a_socket_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    database = tmp_path / ("d" * 120) / "x.db"
    folder = socket_path(database).parent
    assert folder.parent == tmp_path
    folder.chmod(0o755)
    with pytest.raises(PermissionError):
        socket_path(database)


def test_two_databases_have_two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / ("d" * 120)
    names = [tmp_path / "a.db", tmp_path / "b.db", folder / "a.db", folder / "b.db"]
    assert len({socket_path(name) for name in names}) == 4
    monkeypatch.chdir(tmp_path)
    assert socket_path(Path("a.db")) == socket_path(tmp_path / "a.db")


def test_the_lock_is_exclusive_and_says_who_holds_it(tmp_path: Path) -> None:
    database = tmp_path / "new folder" / "x.db"
    with Ownership(database, "first"):
        with pytest.raises(DatabaseOwnedError, match="`vida-coach first`") as error:
            Ownership(database, "second").take()
        assert (error.value.role, error.value.pid) == ("first", os.getpid())
        with Ownership(tmp_path / "other.db", "second"):
            """Another database is another lock."""
    with Ownership(database, "second"):
        """Free again."""


def test_a_short_command_is_waited_for_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "x.db"
    cleanup = Ownership(database, "cleanup")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            cleanup.release()

    monkeypatch.setattr(ownership, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pause))
    cleanup.take()
    with Ownership(database, "serve", 10.0):
        assert len(pauses) == 3
    with cleanup:
        with pytest.raises(DatabaseOwnedError, match="cleanup"):
            Ownership(database, "serve").take()
        assert len(pauses) == 3
        with pytest.raises(DatabaseOwnedError, match="cleanup"):
            Ownership(database, "serve", 1.0).take()
        waited = sum(pauses[3:])
        assert 0.9 < waited < 1.1
    for role in ("serve", "chat"):
        with Ownership(database, role), pytest.raises(DatabaseOwnedError, match=role):
            Ownership(database, "other", 10.0).take()
    assert sum(pauses[3:]) == waited


async def test_what_is_made_beside_a_service_is_as_open_as_ever(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        async with served():
            (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_lock_file_that_says_nothing_is_a_lock_all_the_same(tmp_path: Path) -> None:
    database = tmp_path / "x.db"
    with Ownership(database, "first"):
        for words in ("", "{", "[]", '{"role": 1}', '{"role": "x", "pid": "y"}'):
            (tmp_path / "x.db.lock").write_text(words)
            with pytest.raises(DatabaseOwnedError, match="another process") as error:
                Ownership(database, "second").take()
            assert error.value.role == ""


@pytest.mark.parametrize("how", ["relative", "dots", "link to the file", "link to the folder"])
def test_a_database_has_one_owner_by_whatever_name(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    database = folder / "x.db"
    database.touch()
    (tmp_path / "link.db").symlink_to(database)
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(folder)
    other = {
        "relative": Path("x.db"),
        "dots": folder / ".." / "folder" / "x.db",
        "link to the file": tmp_path / "link.db",
        "link to the folder": tmp_path / "linked" / "x.db",
    }[how]
    with Ownership(database, "first"), pytest.raises(DatabaseOwnedError):
        Ownership(other, "second").take()


class FailingOwner(AdminServiceServicer):
    """An owner that can't do what it is asked."""

    def __init__(self, error: CoreError | grpc.StatusCode) -> None:
        self._error = error

    async def ListTurns(self, request: Any, context: Any) -> Any:
        if isinstance(self._error, CoreError):
            await refuse(context, self._error)
        await context.abort(self._error, "Somehow.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (grpc.StatusCode.UNAVAILABLE, "the owner of the database has left in the middle: try again"),
        (grpc.StatusCode.INTERNAL, "the owner of the database could not do it: Somehow. [INTERNAL]"),
        (Draining(), "the owner of the database could not do it: The service is shutting down. [DRAINING]"),
        (StoreUnavailable(), "the database does not answer: check VIDA_DATABASE_URL"),
    ],
    ids=str,
)
async def test_what_an_owner_can_not_do_is_told(
    sqlite_url: str,
    error: CoreError | grpc.StatusCode,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    database = Path(sqlite_url.removeprefix("sqlite:///"))
    server = grpc.aio.server()
    owner = FailingOwner(error)  # type: ignore[abstract] # the rest is not asked for
    add_AdminServiceServicer_to_server(owner, server)
    server.add_insecure_port(f"unix:{socket_path(database)}")
    await server.start()
    try:
        with Ownership(database, "serve"):
            assert await asyncio.to_thread(main, ["turns", "list"]) == 1
    finally:
        await server.stop(None)
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(f"vida-coach: {said}")


# One connection writes


def test_the_writer_is_durable_and_the_only_one_that_writes(sqlite_url: str) -> None:
    writer, readers = writer_engine(sqlite_url), reader_engine(sqlite_url)
    try:
        with writer.connect() as connection:
            wanted: dict[str, object] = {
                "journal_mode": "wal",
                "synchronous": 2,  # FULL
                "foreign_keys": 1,
                "secure_delete": 1,
                "temp_store": 2,  # MEMORY
                "query_only": 0,
            }
            assert {name: connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in wanted} == wanted
        insert = "INSERT INTO users (id, created_at) VALUES ('x', '2026-01-01')"
        for _ in range(8):  # whichever of the pool's connections
            with readers.connect() as one, readers.connect() as other:
                for connection in (one, other):
                    assert connection.execute(text("PRAGMA query_only")).scalar_one() == 1
                    assert connection.execute(text("PRAGMA wal_autocheckpoint")).scalar_one() == 0
                    with pytest.raises(exc.OperationalError, match="readonly"):
                        connection.execute(text(insert))
                    connection.rollback()
        pool: Any = writer.pool
        assert (pool.size(), pool._max_overflow) == (1, 0)
    finally:
        writer.dispose()
        readers.dispose()


async def test_a_query_that_writes_is_refused(database_url: str) -> None:
    store = SqlStore(database_url, ManualClock())
    try:
        for _ in range(8):
            with pytest.raises(Exception, match=r"StoreFaultError|store is unavailable|ReadOnly"):
                await store.read(lambda tx: tx.users.ensure("x", tx.now()))
        await store.write(lambda tx: tx.users.ensure("x", tx.now()))
    finally:
        await store.aclose()


def test_what_was_committed_is_in_the_file_when_the_last_connection_has_closed(sqlite_url: str) -> None:
    async def use() -> None:
        store = SqlStore(sqlite_url, ManualClock())
        await store.write(lambda tx: tx.users.ensure("ada", tx.now()))
        await store.read(lambda tx: tx.now())
        await store.aclose()

    asyncio.run(use())
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    assert b"ada" in file.read_bytes()
    assert not file.with_name(file.name + "-wal").exists()
