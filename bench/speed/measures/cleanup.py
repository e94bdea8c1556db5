"""Expiring half of a large record: beside one bare UPDATE, and beside live streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from sqlalchemy import text

from adapters.sql.engines import BEGIN_WRITING, migration_engine
from adapters.sql.schema import migrate
from adapters.sql.session import Session
from core.use_cases.clean_up_threads import Cleanup
from entrypoints.container import opened
from entrypoints.settings import Settings
from own_postgres import OwnPostgres
from speed.bench import PACE, Bench, say
from speed.filling import TTL_DAYS, fill
from speed.load import Run
from speed.processes import BenchError, clean_environment
from speed.servers import PRODUCT
from speed.verdict import Verdict

T = TypeVar("T")

_BARE = text(
    "UPDATE assistant_threads SET is_active = false WHERE is_active AND last_message_at < :cutoff AND NOT EXISTS "
    "(SELECT 1 FROM turns WHERE turns.thread_id = assistant_threads.id "
    "AND turns.state IN ('accepted', 'running', 'waiting_for_client'))"
)
_CUTOFF = {
    "sqlite": f"SELECT strftime('%Y-%m-%d %H:%M:%S.000000', 'now', '-{TTL_DAYS} days')",
    "postgresql": f"SELECT now() - interval '{TTL_DAYS} days'",
}


@dataclass(frozen=True, slots=True)
class Sweep:
    """A cleanup: its seconds, and those of its longest transactions, commit included."""

    seconds: float
    transactions: int
    write: float
    """Of those that may write: others wait for these."""
    read: float
    """Of those that only read, which hold nobody up."""


def cleanup(bench: Bench) -> list[Verdict]:
    """Cleanup of a million threads, half of them expired, beside one bare UPDATE; what streams notice of it."""
    threads = 20_000 if bench.quick else 1_000_000
    verdicts = []
    with bench.room() as folder, _records(folder, threads) as records:
        for kind, copied in records.items():
            verdicts += [*_idle(bench, kind, copied, threads), _beside_streams(bench, kind, copied)]
    return verdicts


def _idle(bench: Bench, kind: str, copied: Copied, threads: int) -> list[Verdict]:
    """The cleanup of a record that nobody else uses."""
    bare: list[float] = []
    sweeps: list[Sweep] = []
    for _ in range(bench.rounds):
        with copied() as url:
            bare.append(_bare_update(url, threads // 2))
        with copied() as url:
            sweeps.append(asyncio.run(_sweep(url, threads // 2)))
        say(f"  {kind}: a bare UPDATE {bare[-1]:.2f} s, cleanup {sweeps[-1].seconds:.2f} s")
    return [
        Verdict(
            measure="cleanup",
            what=f"cleanup of {threads:,} threads on {kind}, in one bare UPDATE's time",
            figures=[sweep.seconds / least for sweep, least in zip(sweeps, bare, strict=True)],
            target=1.25,
            detail=f"{statistics.median(sweep.seconds for sweep in sweeps):.2f} s; "
            f"a bare UPDATE {statistics.median(bare):.2f} s",
            raw={"bare": bare, "sweeps": [asdict(sweep) for sweep in sweeps]},
        ),
        Verdict(
            measure="cleanup",
            what=f"its longest transaction that writes, on {kind}",
            figures=[sweep.write * 1000 for sweep in sweeps],
            target=150,
            unit="ms",
            detail=f"of {statistics.median(sweep.transactions for sweep in sweeps):.0f}; "
            f"the longest that only reads {statistics.median(sweep.read for sweep in sweeps) * 1000:.0f} ms",
        ),
    ]


Copied = Callable[[], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def _records(folder: Path, threads: int) -> Iterator[dict[str, Copied]]:
    """A filled record on each store; what gives a copy of it, which is removed afterwards."""
    template = folder / "template.db"
    migrate(f"sqlite:///{template}")
    say(f"  filling records with {threads:,} threads …")
    fill(f"sqlite:///{template}", threads)
    postgres = OwnPostgres()
    try:
        source = f"bench_{os.getpid()}"
        fill(postgres.create(source), threads)

        @contextlib.contextmanager
        def sqlite() -> Iterator[str]:
            place = folder / "copy"
            place.mkdir()
            shutil.copyfile(template, place / "record.db")
            with (place / "record.db").open("rb") as copy:
                os.fsync(copy.fileno())  # else the first commits wait for all of it
            try:
                yield f"sqlite:///{place / 'record.db'}"
            finally:
                shutil.rmtree(place)

        @contextlib.contextmanager
        def postgresql() -> Iterator[str]:
            name = f"{source}_copy"
            url = postgres.databases.sibling(name)
            with psycopg.connect(postgres.databases.url, autocommit=True) as administered:
                administered.execute(f'CREATE DATABASE "{name}" TEMPLATE "{source}" STRATEGY FILE_COPY'.encode())
                administered.execute("CHECKPOINT")  # else the first commits wait for all of the copy
            with psycopg.connect(url) as connection:  # as a server that has been running has it: in memory
                connection.execute("SELECT count(title) FROM assistant_threads")
            try:
                yield url
            finally:
                postgres.drop(name)

        yield {"sqlite": sqlite, "postgresql": postgresql}
    finally:
        postgres.close()


def _bare_update(url: str, expected: int) -> float:
    """Seconds of one transaction that expires all of them, as durable as the store's own."""
    engine = migration_engine(url)
    with engine.connect() as connection:
        cutoff = connection.exec_driver_sql(_CUTOFF[engine.dialect.name]).scalar_one()
        connection.commit()
        begun = time.perf_counter()
        expired = connection.execute(_BARE, {"cutoff": cutoff}).rowcount
        connection.commit()
        seconds = time.perf_counter() - begun
    engine.dispose()
    if abs(expired - expected) > expected / 100:
        raise BenchError(f"one UPDATE expired {expired} threads of {expected}")
    return seconds


async def _sweep(url: str, expected: int) -> Sweep:
    """The service's cleanup on an idle record."""
    settings = Settings(VIDA_DATABASE_URL=url, _env_file=None)
    with _timed_transactions() as spent:
        async with opened(settings) as container:
            begun = time.perf_counter()
            report = await container.cleanup()(Cleanup(ttl_days=TTL_DAYS))
            seconds = time.perf_counter() - begun
    if abs(report.expired - expected) > expected / 100:
        raise BenchError(f"cleanup expired {report.expired} threads of {expected}")
    return Sweep(seconds, len(spent[True]), max(spent[True]), max(spent[False]))


@contextlib.contextmanager
def _timed_transactions() -> Iterator[dict[bool, list[float]]]:
    """Has every session note how many seconds its transactions take: under True those that may write."""
    spent: dict[bool, list[float]] = {True: [], False: []}
    transact = Session.transact

    def timed(session: Session, work: Callable[[], T]) -> T:
        begun = time.perf_counter()
        try:
            return transact(session, work)
        finally:
            writes = session._begin in BEGIN_WRITING.values()  # noqa: SLF001 - nobody else asks what it is for
            spent[writes].append(time.perf_counter() - begun)

    Session.transact = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Session.transact = transact  # type: ignore[method-assign]


def _beside_streams(bench: Bench, kind: str, copied: Copied) -> Verdict:
    """How late deltas are while the command cleans up, beside how late they are without that."""
    streams = 40 if bench.quick else 200
    calm: list[Run] = []
    swept: list[Run] = []
    reports: list[dict[str, Any]] = []
    for _ in range(bench.rounds):
        for runs, sweeping in ((calm, False), (swept, True)):
            with (
                copied() as url,
                bench.field(PRODUCT, database=url) as found,
                contextlib.ExitStack() as stack,
            ):
                started: list[subprocess.Popen[str]] = []

                def sweep(url: str = url, started: list[subprocess.Popen[str]] = started) -> None:
                    started.append(stack.enter_context(_command(url)))

                ramp, hold = 4.0, 8.0 if bench.quick else 20.0
                runs.append(
                    bench.run(
                        found.servers[PRODUCT],
                        streams=streams,
                        deltas=math.ceil((ramp + hold) * PACE),
                        pace=PACE,
                        ramp=ramp,
                        when_live=sweep if sweeping else None,
                    )
                )
                reports += [_report(each) for each in started]
            if runs[-1].outcome.failed or runs[-1].outcome.added is None:
                raise BenchError(f"streams beside a cleanup: {runs[-1].outcome.failed}")
        say(f"  {kind}, {streams} streams: p99 {_late(calm[-1]):.0f} ms, beside it {_late(swept[-1]):.0f} ms")
    with_it, without = (statistics.median(map(_late, runs)) for runs in (swept, calm))
    took = statistics.median(report["seconds"] for report in reports)
    return Verdict(
        measure="cleanup",
        what=f"lateness (p99) of {streams} streams on {kind} beside it, in that without it",
        figures=[_late(one) / _late(other) for one, other in zip(swept, calm, strict=True)],
        target=2.0,
        detail=f"{with_it:.0f} ms; without {without:.0f} ms; the cleanup took {took:.1f} s",
        raw={"calm": [asdict(run) for run in calm], "swept": [asdict(run) for run in swept], "reports": reports},
    )


def _command(url: str) -> subprocess.Popen[str]:
    """`vida-coach cleanup`. On SQLite the service does it, which owns the record; on PostgreSQL the command."""
    command = [str(Path(sys.executable).with_name("vida-coach")), "cleanup", "--format", "json"]
    environment = clean_environment({"VIDA_DATABASE_URL": url, "OPENAI_THREAD_TTL": str(TTL_DAYS)})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _report(command: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = command.communicate(timeout=600)
    if command.returncode:
        raise BenchError(f"cleanup beside streams ended {command.returncode}")
    report = dict(json.loads(said))
    if not report["expired"]:
        raise BenchError("cleanup beside streams found nothing to do")
    return report


def _late(run: Run) -> float:
    assert run.outcome.added is not None
    return run.outcome.added.p99
