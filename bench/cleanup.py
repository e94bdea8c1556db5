"""What a cleanup of a backlog costs: beside one bare UPDATE, and for those who chat meanwhile.

One command starts everything itself: the databases, and the service in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from own_postgres import OwnPostgres

T = TypeVar("T")

RATIO_BAR = 1.25
LONGEST_BAR = 150.0
CHAT_BAR = 2.0
STORES = ("sqlite", "postgresql")
LAYOUTS = ("alternate", "by-age")
USERS = 1_000
MEMORY_DISKS = ("tmpfs", "ramfs")
START_SECONDS = 60.0
CALL_SECONDS = 120.0

DESCRIPTION = """\
Measure what a cleanup of a backlog costs, and print a table. Half of the threads are due.
"""

EPILOG = f"""\
what is measured
  bare UPDATE     one UPDATE of the whole table with the cleanup's own condition
  cleanup         the use case on the store, in this process; nothing else uses the database. The bar is
                  {RATIO_BAR:g} times the bare UPDATE
  longest         its longest transaction that writes, commit included; the bar is {LONGEST_BAR:g} ms. The
                  longest that only reads stands beside it: it holds nobody up
  first text      from sending Chat to the first text_delta, for so many replies of the practice coach at a time,
                  each a new thread: without a cleanup and then beside one. The bar for the 99th percentile is
                  {CHAT_BAR:g} times that without

layouts
  alternate       every second thread is due; the index has the threads in the order of the table
  by-age          threads in the order in which they began, each used for some days from then on: the index has
                  them in nearly that order, and a piece of the table is strewn over a stretch of the index

examples
  python bench/cleanup.py
  python bench/cleanup.py --stores sqlite --layout by-age --measures idle
  python bench/cleanup.py --folder /mnt/the-disk-that-matters --json > cleanup.json
  python bench/cleanup.py --quick                                     # does it run at all?

exit status
  0  measured     1  something could not be started or failed     2  wrong arguments
"""


class BenchError(Exception):
    """Something could not be started or measured. The text is written for the person at the terminal."""


def say(text: str) -> None:
    """Tells the person how far it is."""
    print(text, file=sys.stderr, flush=True)


# The databases

_IDLE = """
    is_active AND last_message_at < {cutoff} AND NOT EXISTS (
        SELECT * FROM turns WHERE turns.thread_id = assistant_threads.id
        AND turns.state IN ('accepted', 'running', 'waiting_for_client'))
"""
_THREAD = (
    "id, user_id, assistant_id, domain, is_active, metadata, last_message_at, created_at, title, message_count"
)


def threads(count: int, layout: str) -> Iterator[tuple[Any, ...]]:
    """Rows of threads, half of them due after 30 days."""
    random, now = Random(1), datetime.now(UTC)
    for number in range(count):
        began = 60 * (1 - number / count)
        days = (40 if number % 2 else 1) if layout == "alternate" else max(0, began - random.expovariate(1 / 2))
        at = now - timedelta(days=days)
        thread_id = str(uuid.UUID(int=(number << 80) + random.getrandbits(80)))
        yield thread_id, f"u{number % USERS}", "old-v1", "career", True, "{}", at, at, "A title as they are", 4


class Sqlite:
    """A file with a backlog, and copies of it."""

    def __init__(self, folder: Path, count: int, layout: str) -> None:
        from adapters.sql.schema import migrate

        self._folder = folder
        self._filled = folder / "filled.db"
        self._copy = folder / "record.db"
        migrate(f"sqlite:///{self._filled}")
        with closing(sqlite3.connect(self._filled)) as connection, connection:
            began = "2026-01-01 00:00:00.000000"
            connection.execute("INSERT INTO agents VALUES ('old-v1', 'old', 1, 'career', '{}', ?)", (began,))
            connection.executemany("INSERT INTO users VALUES (?, ?)", [(f"u{n}", began) for n in range(USERS)])
            connection.executemany(
                f"INSERT INTO assistant_threads ({_THREAD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (*row[:6], *(at.strftime("%Y-%m-%d %H:%M:%S.%f") for at in row[6:8]), *row[8:])
                    for row in threads(count, layout)
                ),
            )
        with closing(sqlite3.connect(self._filled)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def fresh(self) -> str:
        """The URL of a database with the backlog."""
        for ending in ("", "-wal", "-shm"):
            Path(f"{self._copy}{ending}").unlink(missing_ok=True)
        shutil.copyfile(self._filled, self._copy)
        os.sync()
        return f"sqlite:///{self._copy}"

    def update(self, url: str, cutoff: datetime) -> int:
        """One bare UPDATE."""
        from adapters.sql.engines import writer_engine

        engine = writer_engine(url)
        connection = engine.raw_connection()
        try:
            moment = cutoff.strftime("%Y-%m-%d %H:%M:%S.%f")
            condition = _IDLE.replace("is_active", "is_active = 1").format(cutoff="?")
            driver: Any = connection.driver_connection
            driver.execute("BEGIN IMMEDIATE")
            changed = driver.execute(f"UPDATE assistant_threads SET is_active = 0 WHERE {condition}", (moment,))
            driver.execute("COMMIT")
            return int(changed.rowcount)
        finally:
            connection.close()
            engine.dispose()


class Postgresql:
    """A database with a backlog on a server of its own, and copies of it."""

    def __init__(self, server: OwnPostgres, count: int, layout: str) -> None:
        import psycopg

        self._server = server
        filled = server.create("filled")
        with psycopg.connect(filled) as connection:
            connection.execute("INSERT INTO agents VALUES ('old-v1', 'old', 1, 'career', '{}', now())")
            connection.execute(
                f"INSERT INTO users SELECT 'u' || n, now() FROM generate_series(0, {USERS}) n".encode()
            )
            with connection.cursor().copy(f"COPY assistant_threads ({_THREAD}) FROM STDIN".encode()) as copy:
                for row in threads(count, layout):
                    copy.write_row(row)
        with psycopg.connect(filled, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")

    def fresh(self) -> str:
        """The URL of a database with the backlog."""
        import psycopg

        self._server.drop("record")
        with psycopg.connect(self._server.databases.url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE record TEMPLATE filled STRATEGY FILE_COPY")
            connection.execute("CHECKPOINT")
        url = self._server.databases.sibling("record")
        with psycopg.connect(url) as connection:  # as a server that has been running has it: in memory
            connection.execute("SELECT count(title) FROM assistant_threads")
        return url

    def update(self, url: str, cutoff: datetime) -> int:
        """One bare UPDATE."""
        import psycopg

        with psycopg.connect(url) as connection:
            condition = _IDLE.format(cutoff="%s")
            update = f"UPDATE assistant_threads SET is_active = false WHERE {condition}".encode()
            return connection.execute(update, (cutoff,)).rowcount


@contextmanager
def databases(stores: Sequence[str], folder: Path, count: int, layout: str) -> Iterator[dict[str, Any]]:
    """Databases with a backlog."""
    with ExitStack() as stack:
        made: dict[str, Any] = {}
        for store in stores:
            say(f"{store}: filling in {count:,} threads …")
            if store == "sqlite":
                made[store] = Sqlite(folder, count, layout)
            else:
                sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
                try:
                    from own_postgres import OwnPostgres
                except ImportError as error:
                    raise BenchError(
                        f"PostgreSQL comes with the tests' set-up ({error}): `make test`, or --stores sqlite"
                    ) from None
                tempfile.tempdir = str(folder)
                folder.chmod(0o755)  # the server is another user
                server = OwnPostgres()
                stack.callback(server.close)
                made[store] = Postgresql(server, count, layout)
        yield made


def disk_of(folder: Path) -> str:
    """The kind of file system that a folder is on."""
    best, kind = "", "?"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, where, what, *_ = line.split()
        if folder.is_relative_to(where) and len(where) >= len(best):
            best, kind = where, what
    return kind


# On an idle database


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and the result."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


@contextmanager
def transactions() -> Iterator[dict[str, list[float]]]:
    """How long transactions take meanwhile: those that may write, and those that only read."""
    from adapters.sql.engines import BEGIN_WRITING
    from adapters.sql.session import Session

    seconds: dict[str, list[float]] = {"write": [], "read": []}
    transact = Session.transact

    def measured(session: Session, work: Callable[[], Any]) -> Any:
        spent, result = timed(lambda: transact(session, work))
        writes = session._begin in BEGIN_WRITING.values()  # noqa: SLF001 - nobody else asks a session what it is for
        seconds["write" if writes else "read"].append(spent)
        return result

    Session.transact = measured  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Session.transact = transact  # type: ignore[method-assign]


async def clean_up(url: str) -> int:
    """Cleans up in this process; returns how many threads expired."""
    from adapters.sql.store import SqlStore
    from adapters.system import Clock
    from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads

    store = SqlStore(url, Clock())
    try:
        return (await CleanUpThreads(store)(Cleanup(ttl_days=30))).expired
    finally:
        await store.aclose()


def round_on(database: Any, *, cleanup_first: bool) -> dict[str, float]:
    """One bare UPDATE and one cleanup, in turn."""
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    for what in sorted(("update", "cleanup"), reverse=not cleanup_first):
        url = database.fresh()
        if what == "update":
            cutoff = datetime.now(UTC) - timedelta(days=30)
            seconds[what], counts[what] = timed(lambda url=url, cutoff=cutoff: database.update(url, cutoff))  # type: ignore[misc]
        else:
            with transactions() as spent:
                seconds[what], counts[what] = timed(lambda url=url: asyncio.run(clean_up(url)))  # type: ignore[misc]
            seconds["write"], seconds["read"] = max(spent["write"]), max(spent["read"])
            seconds["transactions"] = len(spent["write"])
    if abs(counts["update"] - counts["cleanup"]) > counts["update"] / 1_000:  # the cutoff moves on between them
        raise BenchError(f"the UPDATE changed {counts['update']} threads and the cleanup {counts['cleanup']}")
    return {**seconds, "ratio": seconds["cleanup"] / seconds["update"]}


# Beside chats


class Chats:
    """So many replies at a time, over and over; how long each took to its first text."""

    def __init__(self, address: str, live: int) -> None:
        self.first_texts: list[tuple[float, float]] = []
        self._address = address
        self._live = live
        self._stop = False

    async def run(self) -> None:
        """Chats until told to stop."""
        import grpc

        from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub

        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            stub: Any = AgentServiceStub(channel)
            async with asyncio.TaskGroup() as group:
                for number in range(self._live):
                    group.create_task(self._chat(stub, f"chatter-{number}", delay=number / self._live * 4))

    def stop(self) -> None:
        """Lets every reply end, and no other begin."""
        self._stop = True

    async def _chat(self, stub: Any, user: str, delay: float) -> None:
        from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
        from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb

        await asyncio.sleep(delay)
        while not self._stop:
            request = api.ChatRequest(
                user_id=user,
                content=[pb.ContentPart(text="I want to run more but I never get up early enough.")],
            )
            begun, shown, ended = time.perf_counter(), 0.0, False
            async for response in stub.Chat(request, timeout=CALL_SECONDS):
                if not shown and response.event.HasField("text_delta"):
                    shown = time.perf_counter()
                ended = ended or response.event.HasField("finished")
            if not shown or not ended:
                raise BenchError("a reply did not come to its end")
            self.first_texts.append((begun, shown - begun))

    def between(self, begun: float, ended: float) -> list[float]:
        """The first texts of replies that were asked for in this time."""
        return sorted(seconds for at, seconds in self.first_texts if begun <= at < ended)


async def beside_chats(url: str, live: int, quiet: float) -> dict[str, float]:
    """First texts before a cleanup and during it; the cleanup is the command."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("VIDA_", "OPENAI_"))}
    environment = {**clean, "VIDA_DATABASE_URL": url, "VIDA_LOG_LEVEL": "error", "VIDA_DRAIN": "0"}
    command = [sys.executable, "-m", "entrypoints.cli.main"]
    pipe = asyncio.subprocess.PIPE
    server = await asyncio.create_subprocess_exec(
        *command, "serve", "--listen", "127.0.0.1:0", stdout=pipe, env=environment
    )
    try:
        assert server.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await server.stdout.readline()).decode()
        if not line:
            raise BenchError("the service did not start")
        chats = Chats(line.removeprefix("listening on ").strip(), live)
        running = asyncio.create_task(chats.run())
        await asyncio.sleep(8)  # every reply has begun, and the first have ended
        before = time.perf_counter()
        await asyncio.sleep(quiet)
        begun = time.perf_counter()
        cleanup = await asyncio.create_subprocess_exec(
            *command, "cleanup", "--ttl-days", "30", "--format", "json", stdout=pipe, env=environment
        )
        output, _ = await cleanup.communicate()
        ended = time.perf_counter()
        if cleanup.returncode:
            raise BenchError("the cleanup failed")
        chats.stop()
        await running
        without, beside = chats.between(before, begun), chats.between(begun, ended)
        if min(len(without), len(beside)) < 20:
            raise BenchError("too few replies were asked for: more threads, or more replies at a time")
        figures = {
            "without p50": statistics.median(without),
            "without p99": percentile(without, 0.99),
            "beside p50": statistics.median(beside),
            "beside p99": percentile(beside, 0.99),
            "replies without": len(without),
            "replies beside": len(beside),
            "seconds": json.loads(output)["seconds"],
            "expired": json.loads(output)["expired"],
        }
        return {**figures, "ratio": figures["beside p99"] / figures["without p99"]}
    finally:
        if server.returncode is None:
            server.terminate()
        await server.wait()


def percentile(ordered: Sequence[float], part: float) -> float:
    """The value below which a part of them lies."""
    return ordered[min(len(ordered) - 1, math.floor(len(ordered) * part))]


# The report


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that was asked for."""
    report: dict[str, Any] = {"threads": options.threads, "layout": options.layout, "live": options.live}
    with tempfile.TemporaryDirectory(prefix="vida-bench-", dir=options.folder) as name:
        folder = Path(name).resolve()
        if (kind := disk_of(folder)) in MEMORY_DISKS:
            raise BenchError(f"{folder.parent} is {kind}, which is memory: name a disk with --folder")
        with databases(options.stores, folder, options.threads, options.layout) as made:
            if "idle" in options.measures:
                rounds: dict[str, list[dict[str, float]]] = {store: [] for store in made}
                for number in range(options.rounds):
                    for store, database in made.items():
                        say(f"{store}: round {number + 1} of {options.rounds} …")
                        rounds[store].append(round_on(database, cleanup_first=number % 2 == 1))
                report["idle"] = rounds
            if "live" in options.measures:
                report["beside"] = {}
                for store, database in made.items():
                    say(f"{store}: beside {options.live} replies …")
                    report["beside"][store] = asyncio.run(
                        beside_chats(database.fresh(), options.live, options.quiet)
                    )
    return report


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"{report['threads']:,} threads, half of them due, {report['layout']}"]
    for store, rounds in report.get("idle", {}).items():
        median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        ratios = sorted(each["ratio"] for each in rounds)
        longest, look = (max(each[key] for each in rounds) * 1000 for key in ("write", "read"))
        lines.append(
            f"{store}: bare UPDATE {median['update']:.2f} s, cleanup {median['cleanup']:.2f} s in"
            f" {median['transactions']:.0f} transactions: {median['ratio']:.2f}"
            f" [{ratios[0]:.2f} to {ratios[-1]:.2f}], {_bar(median['ratio'], RATIO_BAR)}"
        )
        lines.append(
            f"{store}: longest transaction {longest:.0f} ms, {_bar(longest, LONGEST_BAR)} ms;"
            f" longest that only reads {look:.0f} ms"
        )
    for store, each in report.get("beside", {}).items():
        p50, p99, p50_beside, p99_beside = (
            each[f"{when} {which}"] * 1000 for when in ("without", "beside") for which in ("p50", "p99")
        )
        lines.append(
            f"{store}: beside {report['live']} replies the cleanup took {each['seconds']:.1f} s; first text"
            f" p50 {p50:.0f} to {p50_beside:.0f} ms, p99 {p99:.0f} to {p99_beside:.0f} ms:"
            f" {each['ratio']:.2f}, {_bar(each['ratio'], CHAT_BAR)}"
            f" ({each['replies without']} and {each['replies beside']} replies)"
        )
    return "\n".join(lines)


def _bar(value: float, bar: float) -> str:
    return f"{'within' if value <= bar else 'over'} the bar of {bar:g}"


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python bench/cleanup.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--stores", nargs="+", choices=STORES, default=list(STORES), help="what to measure; default: both")
    add("--measures", nargs="+", choices=("idle", "live"), default=["idle", "live"], help="default: both")
    add("--threads", type=_positive, default=1_000_000, metavar="N", help="threads; default: 1000000")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="where those that are due lie; default: alternate")
    add("--rounds", type=_positive, default=3, metavar="N", help="rounds on an idle database; default: 3")
    add("--live", type=_positive, default=200, metavar="N", help="replies at a time; default: 200")
    add(
        "--quiet", type=_positive, default=15, metavar="S", help="seconds of chats before the cleanup; default: 15"
    )
    add("--folder", type=Path, metavar="DIR", help="where the databases are made; default: the temporary folder")
    add("--json", action="store_true", help="print all figures as JSON, every round included")
    add("--quick", action="store_true", help="100,000 threads and two rounds: a smoke test only")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    if options.quick:
        options.threads, options.rounds, options.live, options.quiet = 100_000, 2, 100, 5
    try:
        report = run(options)
    except (BenchError, subprocess.SubprocessError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
