"""The admin command as operators run it: 100,000 threads, beside traffic, in processes of its own."""

import asyncio
import functools
import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from adapters.system import Ids
from entrypoints.cli import record
from entrypoints.cli.main import main
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.ownership import Ownership
from harness import DEADLINE, message

COMMAND = [sys.executable, "-m", "entrypoints.cli.main"]
THREADS = 100_000
BUSY_EVERY = 100
KEYS = {"cutoff", "dry_run", "expired", "deleted", "batches", "seconds"}


@pytest.fixture
def file(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database, migrated and set in the environment."""
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    return Path(sqlite_url.removeprefix("sqlite:///"))


def fill(file: Path, count: int, *, busy: bool = True) -> set[str]:
    """Adds threads: every second one idle for 40 days, and some of each kind with a turn that has not ended.

    Returns those that are due.
    """
    ids, now = Ids(), datetime.now(UTC).replace(tzinfo=None)
    moments = {days: str(now - timedelta(days=days)) for days in (1, 40)}
    threads, turns, due = [], [], set()
    for number in range(count):
        thread_id, at = ids.new(), moments[40 if number % 2 else 1]
        threads.append((thread_id, f"u{number % 1_000}", at, at))
        if busy and number % BUSY_EVERY < 2:
            turns.append((ids.new(), thread_id, f"u{number % 1_000}", at))
        elif number % 2:
            due.add(thread_id)
    connection = sqlite3.connect(file)
    with connection:
        connection.execute(
            "INSERT INTO agents (id, slug, version, domain, definition, created_at)"
            " VALUES ('old-v1', 'old', 1, 'career', '{}', '2026-01-01 00:00:00.000000')"
        )
        connection.executemany(
            "INSERT INTO users (id, created_at) VALUES (?, '2026-01-01 00:00:00.000000')",
            [(f"u{number}",) for number in range(1_000)],
        )
        connection.executemany(
            "INSERT INTO assistant_threads (id, user_id, assistant_id, domain, is_active, metadata,"
            " last_message_at, created_at, title, message_count)"
            " VALUES (?, ?, 'old-v1', 'career', 1, '{}', ?, ?, '', 0)",
            threads,
        )
        connection.executemany(
            "INSERT INTO turns (id, thread_id, user_id, agent_id, caller, state, attempt, epoch, owner,"
            " last_position, input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, model, provider,"
            " accepted_at) VALUES (?, ?, ?, 'old-v1', 'local', 'accepted', 1, 0, '', 1, 0, 0, 0, 0, '', '', ?)",
            turns,
        )
    connection.close()
    return due


def inactive(file: Path) -> set[str]:
    """Which threads have expired."""
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return {row[0] for row in connection.execute("SELECT id FROM assistant_threads WHERE NOT is_active")}
    finally:
        connection.close()


def clean(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Runs the command to its end: the exit code, the JSON, and what stands on stderr."""
    done = subprocess.run(
        [*COMMAND, "cleanup", "--format", "json", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


@contextmanager
def serving() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A real server and its address."""
    command = [*COMMAND, "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().removeprefix("listening on ").strip()
        finally:
            server.kill()


def test_100_000_threads_without_an_owner(file: Path) -> None:
    due = fill(file, THREADS)
    assert len(due) == THREADS // 2 - THREADS // BUSY_EVERY
    code, report, _ = clean("--dry-run")
    assert code == 0
    assert set(report) == KEYS
    assert (report["dry_run"], report["expired"], report["deleted"], report["batches"]) == (True, len(due), 0, 0)
    assert inactive(file) == set()
    code, report, errors = clean()
    assert (code, errors) == (0, "")
    assert set(report) == KEYS
    assert (report["dry_run"], report["expired"], report["deleted"]) == (False, len(due), 0)
    assert 1 < report["batches"] < len(due) / 1_000  # a backlog: place by place
    assert report["seconds"] > 0
    cutoff = datetime.fromisoformat(report["cutoff"])
    assert abs(datetime.now(UTC) - timedelta(days=30) - cutoff) < timedelta(minutes=5)
    assert inactive(file) == due
    assert clean()[1]["expired"] == 0
    assert clean("--domain", "health", "--ttl-days", "0")[1]["expired"] == 0


def test_the_time_to_live_is_that_of_the_settings_or_of_the_option(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(file, 200)
    monkeypatch.setenv("OPENAI_THREAD_TTL", "50")
    for arguments, told in (
        ((), "expired 0 threads idle since before "),
        (("--ttl-days", "0", "--dry-run"), "would expire 196 threads "),
        (("--ttl-days", "0"), "expired 196 threads "),
    ):
        assert main(["cleanup", *arguments]) == 0
        assert capsys.readouterr().out.startswith(told)
    assert len(inactive(file)) == 196


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ttl-days", "-1"),
        ("--ttl-days", "36501"),
        ("--ttl-days", "x"),
        ("--batch-size", "0"),
        ("--batch-size", "10001"),
        ("--domain", "money"),
        ("--format", "xml"),
        ("--delete-after-days", "1"),
        ("now",),
    ],
    ids=" ".join,
)
def test_usage_errors(file: Path, arguments: tuple[str, ...]) -> None:
    code, report, errors = clean(*arguments)
    assert (code, report) == (2, {})
    assert arguments[0] in errors
    assert "Traceback" not in errors


def test_bad_settings_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_THREAD_TTL", "-1")
    code, _, errors = clean()
    assert code == 2
    assert "OPENAI_THREAD_TTL" in errors


def test_a_command_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", f"sqlite:///{tmp_path}")  # a folder
    code, report, errors = clean()
    assert (code, report) == (1, {})
    assert errors.startswith("vida-coach: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("threads", "arguments"), [(10_000, ["--batch-size", "50"]), (60_000, [])], ids=["batches", "backlog"]
)
def test_kill_9_in_the_middle_loses_nothing_and_another_goes_on(
    file: Path, threads: int, arguments: list[str]
) -> None:
    due = fill(file, threads)
    with subprocess.Popen([*COMMAND, "cleanup", *arguments], stdout=subprocess.DEVNULL) as first:
        while not (done := inactive(file)):
            assert first.poll() is None
        first.kill()
    done = inactive(file)
    assert 0 < len(done) < len(due)
    assert done < due
    assert not arguments or len(done) % 50 == 0
    code, report, _ = clean()
    assert (code, report["expired"]) == (0, len(due) - len(done))
    assert inactive(file) == due


def test_a_cleanup_beside_another_without_an_owner_exits_75_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "_START_WAIT", 10_000)
    with Ownership(file, "cleanup"):
        assert main(["cleanup"]) == 75
    out, errors = capsys.readouterr()
    assert out == ""
    assert "another cleanup is running" in errors


def test_a_cleanup_waits_for_a_short_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due = fill(file, 200)
    other = Ownership(file, "usage")
    looks = []

    async def nobody_listens(_: Path) -> None:
        looks.append(len(inactive(file)))
        if len(looks) == 3:
            other.release()

    monkeypatch.setattr(record, "_reached", nobody_listens)
    other.take()
    assert main(["cleanup"]) == 0
    assert looks == [0, 0, 0]
    assert inactive(file) == due


async def chatting(address: str, user: str, stop: asyncio.Event) -> int:
    """Chats on and on; returns how many turns completed. Every one must."""
    turns, thread_id = 0, ""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = AgentServiceStub(channel)
        while not stop.is_set():
            call = stub.Chat(message("I want to run more.", user, thread_id=thread_id), timeout=DEADLINE)
            events = [response.event async for response in call]
            assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
            thread_id, turns = events[0].started.thread_id, turns + 1
    return turns


async def test_100_000_threads_beside_chats_through_the_owner(file: Path) -> None:
    # None is busy: an owner begins with ending what a stopped process left.
    due = await asyncio.to_thread(functools.partial(fill, file, THREADS, busy=False))
    with serving() as (_, address):
        stop = asyncio.Event()
        chats = [asyncio.create_task(chatting(address, f"chatter{number}", stop)) for number in range(4)]
        cleaning = asyncio.create_task(asyncio.to_thread(clean))
        seen: list[int] = []
        while not cleaning.done():
            seen.append(len(await asyncio.to_thread(inactive, file)))
        code, report, errors = await cleaning
        stop.set()
        turns = await asyncio.gather(*chats)
        assert (code, errors) == (0, "")
        assert report["expired"] == len(due) == THREADS // 2
        assert 1 < report["batches"] < len(due) / 100  # each is as large as its time allows: on this machine
        assert seen == sorted(seen)
        assert min(turns) >= 1
        assert await asyncio.to_thread(inactive, file) == due


async def test_batches_beside_chats_through_the_owner(file: Path) -> None:
    due = await asyncio.to_thread(functools.partial(fill, file, THREADS // 2, busy=False))
    with serving() as (server, address):
        stop = asyncio.Event()
        chats = [asyncio.create_task(chatting(address, f"chatter{number}", stop)) for number in range(4)]
        command = [*COMMAND, "cleanup", "--format", "json", "--batch-size", "100"]
        pipe = asyncio.subprocess.PIPE
        first = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        seen: list[int] = []
        codes: list[int] = []
        while first.returncode is None:
            seen.append(len(await asyncio.to_thread(inactive, file)))
            if 0 < seen[-1] < len(due) and not codes:  # it is in the middle of it
                codes.append((await asyncio.to_thread(clean))[0])
        out, errors = await first.communicate()
        stop.set()
        turns = await asyncio.gather(*chats)
        assert (first.returncode, errors) == (0, b"")
        report = json.loads(out)
        assert set(report) == KEYS
        assert report["expired"] == len(due) == THREADS // 4
        assert report["batches"] == len(due) / 100
        assert codes == [75]
        assert seen == sorted(seen)
        assert len({count for count in seen if 0 < count < len(due)}) >= 2  # committed in batches
        assert all(count % 100 == 0 for count in seen)
        assert sum(turns) >= 4
        assert min(turns) >= 1
        assert await asyncio.to_thread(inactive, file) == due
        server.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 30) == 0
