"""Copies of an embedded database: whole, of one moment, and put back without losing what was there."""

import errno
import json
import os
import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from adapters.sql import backup
from adapters.sql.errors import UnreadableDatabaseError
from entrypoints.cli.main import main
from entrypoints.ownership import Ownership


def quiet(done: int, of: int) -> None:
    """Progress that nobody looks at."""


def execute(file: Path, statement: str, *values: Any) -> list[Any]:
    """Runs a statement."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


@pytest.fixture
def database(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database that the commands find."""
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    return Path(sqlite_url.removeprefix("sqlite:///"))


def users(file: Path) -> list[str]:
    """The users in a database."""
    return [user for (user,) in execute(file, "SELECT id FROM users ORDER BY id")]


def add(file: Path, *names: str) -> None:
    """Adds users."""
    for name in names:
        execute(file, "INSERT INTO users (id, created_at) VALUES (?, '2026-01-01')", name)


def left_behind(database: Path, *names: str) -> None:
    """Adds users, and leaves them in the log as a killed process does."""
    aside = [Path(f"{database}.aside{end}") for end in ("", "-wal")]
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        for name in names:
            writer.execute("INSERT INTO users (id, created_at) VALUES (?, '2026-01-01')", [name])
        for end, file in zip(("", "-wal"), aside, strict=True):
            shutil.copy(f"{database}{end}", file)
    for end, file in zip(("", "-wal"), aside, strict=True):
        file.rename(f"{database}{end}")


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for the lock and what SQLite makes of the log in memory."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and not file.name.endswith((".lock", "-shm"))
    }


def test_a_copy_is_of_one_moment_while_others_write(database: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE filling (data)")
        for _ in range(3_000):
            writer.execute("INSERT INTO filling VALUES (zeroblob(10000))")
        writer.execute("INSERT INTO users (id, created_at) VALUES ('ada', '2026-01-01')")
        told: list[tuple[int, int]] = []

        def write(done: int, of: int) -> None:
            told.append((done, of))
            writer.execute("INSERT INTO users (id, created_at) VALUES (?, '2026-01-01')", [f"late{len(told)}"])

        size = backup.back_up(database, copy, write)
    assert len(told) > 2, "nobody wrote meanwhile"
    assert told[-1] == (size, size)
    assert users(copy) == ["ada"]
    assert len(users(database)) == 1 + len(told)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert size == copy.stat().st_size
    assert [file.name for file in tmp_path.glob("*copy*")] == ["copy.db"]


def test_a_copy_is_on_the_disk_before_it_has_its_name(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(database, "ada")
    copy = tmp_path / "copy.db"
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, copy.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    backup.back_up(database, copy, quiet)
    assert synced == [(copy.stat().st_ino, False), (tmp_path.stat().st_ino, True)]  # the copy, then its name


def test_a_copy_takes_no_files_place(database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.db"
    copy.write_text("precious")
    assert main(["backup", str(copy)]) == 1
    assert "there is such a file" in capsys.readouterr().err
    assert copy.read_text() == "precious"


def test_a_copy_that_fails_leaves_nothing(database: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()

    def full(_: int, __: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        backup.back_up(database, folder / "copy.db", full)
    assert not list(folder.iterdir())


def test_a_copy_has_what_is_in_the_log_alone_and_leaves_it_there(database: Path, tmp_path: Path) -> None:
    left_behind(database, "ada")
    before = files(tmp_path)
    assert set(before) == {"record.db", "record.db-wal"}
    copies = tmp_path / "copies"
    copies.mkdir()
    backup.back_up(database, copies / "copy.db", quiet)
    assert files(tmp_path) == before
    assert users(copies / "copy.db") == ["ada"]


def test_without_a_database_there_is_nothing_to_copy(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database.unlink()
    assert main(["backup", str(tmp_path / "copy.db")]) == 1
    assert f"there is no such file: {database}" in capsys.readouterr().err
    assert not files(tmp_path)


def test_a_disk_without_room_is_named(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    connect = sqlite3.connect

    def cramped(place: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(place, **options)
        if not options.get("uri"):  # where the copy is written
            connection.execute("PRAGMA max_page_count=2")
        return connection

    monkeypatch.setattr(sqlite3, "connect", cramped)
    assert main(["backup", str(folder / "copy.db")]) == 1
    assert f"no room for the copy: {folder}" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_file_system_that_gives_a_file_one_name_only_takes_copies_too(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    add(database, "ada")
    folder = tmp_path / "copies"
    folder.mkdir()
    copy = folder / "copy.db"
    assert backup.back_up(database, copy, quiet) == copy.stat().st_size
    assert users(copy) == ["ada"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    taken = folder / "taken.db"

    def taken_meanwhile(*_: int) -> None:
        taken.write_text("precious")

    with pytest.raises(FileExistsError):
        backup.back_up(database, taken, taken_meanwhile)
    assert taken.read_text() == "precious"
    assert {file.name for file in folder.iterdir()} == {"copy.db", "taken.db"}


def test_a_damaged_copy_is_not_called_one(database: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("CREATE TABLE filling (data)")
        connection.execute("INSERT INTO filling VALUES (zeroblob(100000))")
    with database.open("r+b") as file:
        file.seek(-60_000, os.SEEK_END)
        file.write(os.urandom(30_000))
    with pytest.raises((backup.DamagedBackupError, UnreadableDatabaseError)):
        backup.back_up(database, tmp_path / "copy.db", quiet)
    assert not (tmp_path / "copy.db").exists()


def test_a_restore_brings_back_what_was_there_and_keeps_what_is(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    add(database, "ada")
    assert main(["backup", str(copy), "--format", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made.items() >= {"file": str(copy), "bytes": copy.stat().st_size}.items()
    writer = sqlite3.connect(database, isolation_level=None)  # its log stays, as a killed process leaves it
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("INSERT INTO users (id, created_at) VALUES ('eve', '2026-01-01')")
    assert main(["restore", str(copy), "--format", "json"]) == 0
    moved = [Path(name) for name in json.loads(capsys.readouterr().out)["moved"]]
    assert users(database) == ["ada"]
    assert users(copy) == ["ada"]
    (before,) = [file for file in moved if file.name == "record.db.replaced-1"]
    assert users(before) == ["ada", "eve"]
    writer.close()
    assert main(["restore", str(copy)]) == 0
    assert "record.db.replaced-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "step", ["the copy is not on the disk", "nothing can be moved", "it does not get its name"]
)
def test_a_restore_that_fails_changes_nothing(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    copy = tmp_path / "copy.db"
    backup.back_up(database, copy, quiet)
    left_behind(database, "ada")
    before = files(tmp_path)
    rename = Path.rename

    def refused(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def renamed(file: Path, target: Any) -> Path:
        struck = file == database if step == "nothing can be moved" else file.name.startswith(".record.db.")
        if struck:
            refused()
        return rename(file, target)

    if step == "the copy is not on the disk":
        monkeypatch.setattr(os, "fsync", refused)
    else:
        monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(OSError, match="Input/output"):
        backup.restore(copy, database, quiet)
    assert files(tmp_path) == before
    assert users(database) == ["ada"]


def test_a_damaged_database_is_replaced_and_kept(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    add(database, "ada")
    backup.back_up(database, copy, quiet)
    with database.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 9_000)
    database.with_name("record.db-journal").write_bytes(b"another's")
    damaged = database.read_bytes()
    assert main(["restore", str(copy)]) == 0
    assert f"what was there is {database}.replaced-1\n" in capsys.readouterr().out
    assert users(database) == ["ada"]
    assert database.with_name("record.db.replaced-1-journal").read_bytes() == b"another's"
    assert database.with_name("record.db.replaced-1").read_bytes() == damaged


def test_where_there_is_no_database_a_copy_becomes_one(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, elsewhere = tmp_path / "copy.db", tmp_path / "else where" / "record.db"
    add(database, "ada")
    backup.back_up(database, copy, quiet)
    monkeypatch.setenv("VIDA_DATABASE_URL", f"sqlite:///{quote(str(elsewhere))}")
    assert main(["restore", str(copy), "--format", "json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done == {"database": str(elsewhere), "file": str(copy), "moved": []}
    assert users(elsewhere) == ["ada"]
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600
    assert files(elsewhere.parent).keys() == {"record.db"}


def test_a_link_to_the_database_stays_one(database: Path, tmp_path: Path) -> None:
    copy, folder = tmp_path / "copy.db", tmp_path / "linked"
    backup.back_up(database, copy, quiet)
    left_behind(database, "eve")
    folder.mkdir()
    link = folder / "record.db"
    link.symlink_to(database)
    moved = backup.restore(copy, link, quiet)
    assert link.is_symlink()
    assert (users(link), users(database)) == ([], [])
    assert {file.name for file in moved} == {"record.db.replaced-1", "record.db.replaced-1-wal"}
    assert users(tmp_path / "record.db.replaced-1") == ["eve"]


@pytest.mark.parametrize("what", ["nothing", "junk", "empty", "newer"])
def test_what_is_no_copy_is_not_restored(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    copy = tmp_path / "copy.db"
    add(database, "ada")
    match what:
        case "junk":
            copy.write_bytes(b"SQLite format 3\0" + os.urandom(9_000))
        case "empty":
            execute(copy, "CREATE TABLE another (id)")
        case "newer":
            backup.back_up(database, copy, quiet)
            execute(copy, "UPDATE alembic_version SET version_num = '9999'")
    assert main(["restore", str(copy)]) == 1
    said = {"nothing": "no such file", "newer": "newer than this version"}
    assert said.get(what, f"{copy} is no database, or a damaged one") in capsys.readouterr().err
    assert users(database) == ["ada"]
    assert not list(tmp_path.glob("*.replaced-*"))


def test_a_restore_that_fails_at_the_end_has_changed_nothing(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full or broken may say so only when it is asked to have written."""
    copy = tmp_path / "copy.db"
    backup.back_up(database, copy, quiet)
    add(database, "eve")

    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    before = sorted(file.name for file in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            backup.restore(copy, database, quiet)
    assert sorted(file.name for file in tmp_path.iterdir()) == before
    assert users(database) == ["eve"]
    assert backup.restore(copy, database, quiet)
    assert users(database) == []


def test_nothing_is_restored_under_an_owner(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    backup.back_up(database, copy, quiet)
    add(database, "eve")
    with Ownership(database, "serve"):
        assert main(["restore", str(copy)]) == 1
    assert "in use by `vida-coach serve`" in capsys.readouterr().err
    assert users(database) == ["eve"]


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_a_servers_database_has_tools_of_its_own(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", "postgresql://nowhere/vida")
    assert main([command, "copy"]) == 2
    assert "pg_dump" in capsys.readouterr().err
