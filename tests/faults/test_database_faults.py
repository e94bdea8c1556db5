"""The database goes away, hangs, is locked or full: nothing acknowledged is lost, and turns go on afterwards."""

import asyncio
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import grpc
import psycopg
import pytest
from sqlalchemy import make_url

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import Tables, go_on, judge
from faults.client import Client, Told, chat_request, stubs, why
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, SIZE, chance, chosen, sized, stores
from faults.load import CLIENTS, Load, some_message
from harness import until
from own_postgres import OwnPostgres

SUITE = "database faults"
CYCLES = sized("DATABASE_CYCLES", 1, 5, 125)
"""Of crashes and of hangs, under one process and under two: 500 in all at the large size."""
BACK = 3.0
"""Seconds from the database's return to the first message that is accepted."""
ANSWER = 12.0
"""Seconds within which a message is refused while the database does not answer."""
EXIT = 30.0
"""Seconds within which a server that was asked to stop is gone, whatever the database does: one for its turns, ten
for its last writes, twelve until a database that stands still counts as gone, and a few for what is left."""

pytestmark = pytest.mark.timeout(90 + 40 * CYCLES)

Harm = Callable[[], Awaitable[None]]


async def _harm_under_load(
    suite: str,
    cluster: Cluster,
    database_url: str,
    draw: random.Random,
    break_it: Harm,
    mend_it: Harm,
    *,
    call_timeout: float = DEADLINE,
) -> list[Told]:
    """Breaks and mends the database under eight clients, cycle by cycle; returns what they were told."""
    load = Load(suite, cluster, draw, some_message, call_timeout=call_timeout)
    everything: list[Told] = []
    try:
        for cycle in range(1, CYCLES + 1):
            load.begin()
            await load.acknowledged(draw.randrange(CLIENTS, 2 * CLIENTS))
            await break_it()
            struck = load.unfinished
            assert struck, "the fault struck nobody"
            await mend_it()
            mended = time.monotonic()
            await load.acknowledged(sum(bool(told.turn_id) for told in load.tolds) + 1)
            back = time.monotonic() - mended
            tolds = await load.finish()
            FIGURES.add(suite, {"cycles": 1, "turns at work when struck": len(struck)})
            FIGURES.most(suite, "longest way back, ms", round(back * 1000))
            await judge(suite, database_url, cluster.addresses, tolds, draw, reasons=())
            await go_on(cluster.addresses[0], tolds)
            assert back <= BACK
            everything += tolds
            FIGURES.progress(suite, cycle, CYCLES)
    finally:
        await load.aclose()
    return everything


async def _refused(cluster: Cluster) -> str:
    """Why a message is refused, soon, before anything is accepted."""
    asked = time.monotonic()
    async with stubs(cluster.addresses[0]) as (agents, _):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await agents.Chat(chat_request(Told("eve", f"words:1 {uuid4().hex}")), timeout=DEADLINE).read()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - asked <= ANSWER
    return why(refusal.value)


def _reasons(tolds: list[Told]) -> set[str]:
    return {reason for told in tolds for reason in told.refusals}


@pytest.mark.parametrize("replicas", chosen((1, 2)))
async def test_postgresql_crashes(
    replicas: int, breakable: OwnPostgres, broken_url: str, cluster: Cluster
) -> None:
    suite = f"{SUITE}: PostgreSQL stopped, {replicas} replicas"
    draw = chance(suite)
    for _ in range(replicas):
        await cluster.start(broken_url)
    refusals = []

    async def crash() -> None:
        await asyncio.to_thread(breakable.stop, draw.choice(["immediate", "immediate", "fast"]))
        refusals.append(await _refused(cluster))
        await asyncio.sleep(draw.uniform(0, 2))

    tolds = await _harm_under_load(
        suite, cluster, broken_url, draw, crash, lambda: asyncio.to_thread(breakable.start)
    )
    assert set(refusals) == {"STORE_UNAVAILABLE"}
    assert _reasons(tolds) <= {"STORE_UNAVAILABLE"}


@pytest.mark.parametrize("replicas", chosen((1, 2)))
async def test_postgresql_hangs(replicas: int, breakable: OwnPostgres, broken_url: str, cluster: Cluster) -> None:
    suite = f"{SUITE}: PostgreSQL frozen, {replicas} replicas"
    draw = chance(suite)
    for _ in range(replicas):
        await cluster.start(broken_url)

    async def hang() -> None:
        breakable.freeze()
        await asyncio.sleep(draw.uniform(0.5, 1.5 if SIZE == "tiny" else 4))

    async def thaw() -> None:
        breakable.thaw()

    tolds = await _harm_under_load(suite, cluster, broken_url, draw, hang, thaw)
    assert _reasons(tolds) <= {"STORE_UNAVAILABLE"}


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_stop_without_a_database(
    how: str, breakable: OwnPostgres, broken_url: str, cluster: Cluster
) -> None:
    draw = chance(SUITE, "stop", how)
    server = await cluster.start(broken_url, VIDA_DRAIN="1")
    told = Told("ada", "words:40 pace:20")
    chat = asyncio.create_task(Client(cluster, draw).chat(told))
    await until(lambda: told.text)
    if how == "stopped":
        await asyncio.to_thread(breakable.stop, "immediate")
    else:
        breakable.freeze()
    asked = time.monotonic()
    async with asyncio.timeout(2 * EXIT):
        code = await server.terminate()
    took = time.monotonic() - asked
    FIGURES.most(SUITE, f"stop while {how}, ms", round(took * 1000))
    cluster.forget(server)
    await asyncio.to_thread(breakable.mend)
    await cluster.start(broken_url)
    await chat
    await judge(SUITE, broken_url, cluster.addresses, [told], draw)
    assert told.turn.error.reason == "INTERRUPTED"
    assert code == 0
    assert took <= EXIT


@pytest.mark.parametrize("table", chosen(("turns", "assistant_threads")))
async def test_a_row_is_locked(table: str, postgres_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE, table)
    await cluster.start(postgres_url)
    locked = Told("ada", "words:10 pace:20 slow-start:0.2")
    others = [Told(f"eve{number}", "words:10 pace:20") for number in range(CLIENTS)]
    held = asyncio.create_task(Client(cluster, draw).chat(locked))
    await until(lambda: locked.turn_id)
    url = make_url(postgres_url).set(drivername="postgresql").render_as_string(False)
    connection = await asyncio.to_thread(lambda: psycopg.connect(url))
    try:
        row = locked.turn_id if table == "turns" else locked.thread_id
        connection.execute(f"SELECT 1 FROM {table} WHERE id = %s FOR UPDATE".encode(), [row])
        began = time.monotonic()
        await asyncio.gather(*(Client(cluster, draw).chat(told) for told in others))
        FIGURES.most(SUITE, "others beside a locked row, ms", round((time.monotonic() - began) * 1000))
        assert not held.done(), "the lock was in nobody's way"
    finally:
        connection.close()
    await held
    assert {told.turn.attempt for told in [locked, *others]} == {1}
    await judge(SUITE, postgres_url, cluster.addresses, [locked, *others], draw, reasons=())


async def test_sqlite_is_full(sqlite_url: str, cluster: Cluster) -> None:
    suite = f"{SUITE}: SQLite full"
    draw = chance(suite)
    server = await cluster.start(sqlite_url)
    database = make_url(sqlite_url).database
    assert database is not None
    refusals = []

    async def fill() -> None:
        # Every write fails, harder than on a full disk, where what there is may still be overwritten.
        server.limit_file_size(1)
        refusals.append(await _refused(cluster))
        await asyncio.sleep(draw.uniform(0, 1))

    async def make_room() -> None:
        server.limit_file_size(-1)

    tolds = await _harm_under_load(suite, cluster, sqlite_url, draw, fill, make_room)
    assert set(refusals) == {"STORE_UNAVAILABLE"}
    assert _reasons(tolds) <= {"STORE_UNAVAILABLE"}
    (check,) = Tables(sqlite_url).rows("PRAGMA integrity_check")
    assert check == {"integrity_check": "ok"}


async def test_sqlite_is_locked(sqlite_url: str, cluster: Cluster) -> None:
    suite = f"{SUITE}: SQLite locked"
    draw = chance(suite)
    await cluster.start(sqlite_url)
    foreign = sqlite3.connect(str(make_url(sqlite_url).database), isolation_level=None, check_same_thread=False)

    async def lock() -> None:
        await asyncio.to_thread(foreign.execute, "BEGIN IMMEDIATE")
        await asyncio.sleep(0.5 if SIZE == "tiny" else draw.uniform(1, 3))

    async def unlock() -> None:
        foreign.execute("ROLLBACK")

    try:
        tolds = await _harm_under_load(suite, cluster, sqlite_url, draw, lock, unlock)
    finally:
        foreign.close()
    assert not _reasons(tolds), "shorter than the time that a writer waits"


@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_nothing_is_shown_that_is_not_committed(database_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE, "shown")
    server = await cluster.start(database_url)
    told = Told("ada", f"words:{draw.randint(20, 40)} before:5 tool:idempotent pace:50")
    tables = Tables(database_url)
    async with stubs(server.address) as (agents, _):
        async for response in agents.Chat(chat_request(told), timeout=DEADLINE):
            told.take(response.event)
            rows = tables.rows("SELECT max(position) AS position FROM turn_log WHERE turn_id = ?", told.turn_id)
            assert rows[0]["position"] >= told.position, "shown before it was committed"
    assert told.turn.state == pb.TURN_STATE_COMPLETED
    assert told.position > 100
