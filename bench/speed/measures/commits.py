"""Turns that the store commits in a second, beside one transaction for each of their steps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import event, make_url, text

from adapters.sql.engines import BEGIN_WRITING, migration_engine
from adapters.sql.schema import migrate
from adapters.sql.store import SqlStore
from adapters.sql.transaction import SqlTransaction
from adapters.system import Clock
from core.ports.store import Transaction
from own_postgres import OwnPostgres
from speed import extras
from speed.bench import Bench, say
from speed.processes import BenchError, on
from speed.recording import Call, Recording, Step, record
from speed.verdict import Verdict

IN_FLIGHT = 64
_TARGETS = {"sqlite": 8.0, "postgresql": 4.0}

RunStep = Callable[[Step], Awaitable[object]]


def commits(bench: Bench) -> list[Verdict]:
    """Turns committed a second, 64 in flight, beside the same statements in one transaction for each step."""
    if why := extras.missing():
        return [Verdict(measure="commits", what="turns committed a second", why=f"not installed: {why}")]
    extras.add()
    turns = 200 if bench.quick else 2000
    verdicts = []
    # The server's core: what the store does beside the loop's work is paid for on the same core.
    with on(frozenset([bench.cores.server])), bench.room() as folder, _databases(folder) as databases:
        for kind, make in databases.items():
            recording = asyncio.run(record(make(), turns))
            rates: dict[str, list[float]] = {"store": [], "reference": []}
            for _ in range(bench.rounds):
                rates["store"].append(asyncio.run(through_store(make(), recording)))
                rates["reference"].append(asyncio.run(_reference(make(), recording)))
                say(f"  {kind}: the store {rates['store'][-1]:,.0f}, the reference {rates['reference'][-1]:,.0f}")
            steps = statistics.mean(len(turn) for turn in recording.turns)
            ours, theirs = (statistics.median(rates[name]) for name in ("store", "reference"))
            verdicts.append(
                Verdict(
                    measure="commits",
                    what=f"turns committed a second on {kind}, in one transaction per step's",
                    figures=[own / other for own, other in zip(rates["store"], rates["reference"], strict=True)],
                    target=_TARGETS[kind],
                    at_most=False,
                    detail=f"{ours:,.0f} turns a second and {theirs:,.0f}, of {steps:.1f} steps each",
                    raw=rates,
                )
            )
    return verdicts


@contextlib.contextmanager
def _databases(folder: Path) -> Iterator[dict[str, Callable[[], str]]]:
    """What makes new databases of both kinds."""
    postgres = OwnPostgres()
    numbers = iter(range(1000))

    def sqlite() -> str:
        url = f"sqlite:///{folder / f'{next(numbers)}.db'}"
        migrate(url)
        return url

    try:
        yield {"sqlite": sqlite, "postgresql": lambda: postgres.create(f"bench_{os.getpid()}_{next(numbers)}")}
    finally:
        postgres.close()


async def through_store(url: str, recording: Recording, in_flight: int = IN_FLIGHT) -> float:
    """Turns a second through the service's store, so many at once. One at a time, nothing is grouped."""
    store = SqlStore(url, Clock())

    def again(step: Step, tx: Transaction) -> None:
        assert isinstance(tx, SqlTransaction)
        for call in step:
            given: Any = call.parameters if call.kind == "count_each" else call.parameters[0]
            getattr(tx.session, call.kind)(call.statement, given)

    async def run(step: Step) -> None:
        await store.write(lambda tx: again(step, tx))

    try:
        rate = await _rate(run, recording, in_flight)
    finally:
        await store.aclose()
    _check(url, recording)
    return rate


async def _reference(url: str, recording: Recording) -> float:
    """Turns a second through SQLAlchemy Core on the asynchronous driver, a transaction for each step."""
    async with _engine(url) as engine:

        async def run(step: Step) -> None:
            async with engine.begin() as connection:
                for call in step:
                    await connection.execute(_element(call), _values(call))

        rate = await _rate(run, recording, IN_FLIGHT)
    _check(url, recording)
    return rate


def _check(url: str, recording: Recording) -> None:
    """Both must have done the same work."""
    engine = migration_engine(url)
    with engine.connect() as connection:
        count = connection.execute(text("SELECT count(*) FROM turns WHERE state = 'completed'")).scalar_one()
    engine.dispose()
    if count != len(recording.turns):
        raise BenchError(f"{count} of {len(recording.turns)} turns are in the record")


@contextlib.asynccontextmanager
async def _engine(url: str) -> AsyncIterator[Any]:
    """As durable as the service's own. One connection to SQLite: it has one writer, more would wait in line."""
    from sqlalchemy.ext.asyncio import create_async_engine

    if url.startswith("sqlite"):
        engine = create_async_engine(make_url(url).set(drivername="sqlite+aiosqlite"), pool_size=1, max_overflow=0)

        @event.listens_for(engine.sync_engine, "connect")
        def set_up(connection: Any, _: object) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql(BEGIN_WRITING["sqlite"])

    else:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+psycopg"), pool_size=10)
    try:
        yield engine
    finally:
        await engine.dispose()


def _element(call: Call) -> Any:
    """What SQLAlchemy wrote it from."""
    return call.statement._element  # noqa: SLF001 - the reference runs the same, in the library's own way


def _values(call: Call) -> Any:
    return [dict(each) for each in call.parameters] if call.kind == "count_each" else dict(call.parameters[0])


async def _rate(run: RunStep, recording: Recording, in_flight: int) -> float:
    """Turns a second, so many in flight, each turn's steps one after another."""
    for step in recording.before:
        await run(step)
    turns: Iterator[Sequence[Step]] = iter(recording.turns)

    async def work() -> None:
        for turn in turns:
            for step in turn:
                await run(step)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(work())
    return len(recording.turns) / (time.perf_counter() - begun)
