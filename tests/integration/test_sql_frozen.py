"""A PostgreSQL that stands still: everything that waits for it ends within bounds, and it may come back."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import psycopg
import pytest
from sqlalchemy import Engine

from adapters.sql import engines
from adapters.sql.fiber import apart
from adapters.sql.store import SqlStore
from core.model.errors import StoreUnavailable
from core.ports.store import Transaction
from doubles import ManualClock
from harness import until
from own_postgres import OwnPostgres

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE = 0.5
BOUND = 3.0
CONNECTING = 2
"""Seconds that a connection may take here, the fewest that the driver takes. Elsewhere they are at most 5."""


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines._CONNECT_TIMEOUT <= 5
    monkeypatch.setattr(engines, "_CONNECT_TIMEOUT", CONNECTING)


class Server:
    """A PostgreSQL of its own, which can be frozen."""

    def __init__(self, own: OwnPostgres) -> None:
        self.url = own.create("frozen")
        self.frozen = own.frozen
        self.demote, self.promote = own.demote, own.promote

    def users(self) -> set[str]:
        """What is committed in `users`."""
        with psycopg.connect(self.url) as connection:
            return {row[0] for row in connection.execute(b"SELECT id FROM users").fetchall()}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that nothing else uses."""
    own = OwnPostgres()
    try:
        yield Server(own)
    finally:
        own.close()


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[SqlStore]:
    """A store whose writer and one reader are connected."""
    store = SqlStore(server.url, ManualClock(), patience=PATIENCE)
    try:
        await store.write(lambda tx: tx.now())
        await store.read(lambda tx: tx.now())
        yield store
    finally:
        await store.aclose()


def ensure(*users: str) -> Callable[[Transaction], None]:
    """A change that asks for something: without an answer it is not committed."""

    def change(tx: Transaction) -> None:
        for user in users:
            tx.users.ensure(user, NOW)
        tx.now()

    return change


async def test_writing_and_reading_end_and_begin_again(server: Server) -> None:
    async with opened(server) as store:
        with server.frozen():
            started = time.monotonic()
            for call in (store.write(ensure("lost")), store.read(lambda tx: tx.now())):
                with pytest.raises(StoreUnavailable):
                    await call
            assert time.monotonic() - started < 2 * BOUND
        await store.write(ensure("kept"))
        assert (await store.read(lambda tx: tx.now())).tzinfo is not None
    assert "kept" in server.users()
    assert "lost" not in server.users()


async def test_the_loop_goes_on_while_the_writer_waits(server: Server) -> None:
    async with opened(server) as store:
        with server.frozen():
            writing = asyncio.create_task(store.write(ensure("waiting")))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not writing.done()
        await writing
    assert "waiting" in server.users()


async def test_a_transaction_that_is_cut_in_the_middle_leaves_nothing(server: Server) -> None:
    async with opened(server) as store:
        half_way, go_on = threading.Event(), threading.Event()

        def change(tx: Transaction) -> None:
            ensure("first half")(tx)
            half_way.set()
            assert apart(lambda: go_on.wait(20))
            ensure("second half")(tx)

        writing = asyncio.create_task(store.write(change))
        await until(half_way.is_set)
        with server.frozen():
            go_on.set()
            with pytest.raises(StoreUnavailable):
                await writing
        await store.write(ensure("after it"))
    assert server.users() & {"first half", "second half", "after it"} == {"after it"}


async def test_a_change_that_asks_for_nothing_is_done_as_a_whole_or_not_at_all(server: Server) -> None:
    """It is sent with its commit: without an answer nobody knows what has become of it."""
    async with opened(server) as store:
        with server.frozen(), pytest.raises(StoreUnavailable):
            await store.write(lambda tx: [tx.users.ensure(f"whole {number}", NOW) for number in range(3)])
        await store.write(ensure("after the whole"))
    assert len([user for user in server.users() if user.startswith("whole ")]) in {0, 3}


async def test_work_of_its_own_is_no_reason_to_cut(server: Server) -> None:
    """Only waiting for the server counts, not how long a transaction is open."""
    async with opened(server) as store:
        reached, go_on = threading.Event(), threading.Event()

        def change(tx: Transaction) -> None:
            ensure("patient")(tx)
            reached.set()
            apart(lambda: go_on.wait(3 * PATIENCE))
            ensure("patient too")(tx)

        await store.write(change)
    assert server.users() >= {"patient", "patient too"}


async def test_connecting_ends_as_well(server: Server) -> None:
    store = SqlStore(server.url, ManualClock(), patience=PATIENCE)
    with server.frozen():
        started = time.monotonic()
        results = await asyncio.gather(
            store.write(ensure("never")), store.read(lambda tx: tx.now()), hold(store), return_exceptions=True
        )
        assert [type(result) for result in results] == [StoreUnavailable] * 3
        assert time.monotonic() - started < CONNECTING + BOUND
    await store.write(ensure("connected"))
    await store.aclose()
    assert server.users() & {"never", "connected"} == {"connected"}


async def hold(store: SqlStore) -> None:
    async with store.exclusive("x") as held:
        assert held


async def test_closing_does_not_wait_for_a_server_that_stands_still(server: Server) -> None:
    async with opened(server) as store:
        assert store.listen(lambda _: None)
        await until(lambda: [t for t in threading.enumerate() if t.name == "store-listen"])
        holding, hold_on = asyncio.Event(), asyncio.Event()

        async def keep() -> None:
            async with store.exclusive("x") as held:
                assert held
                holding.set()
                await hold_on.wait()

        keeping = asyncio.create_task(keep())
        await holding.wait()
        with server.frozen():
            started = time.monotonic()
            calls = [asyncio.create_task(store.write(ensure(f"last {number}"))) for number in range(3)]
            calls += [asyncio.create_task(store.read(lambda tx: tx.now())) for _ in range(2)]  # type: ignore[arg-type]
            hold_on.set()
            await keeping
            await store.aclose()
            assert time.monotonic() - started < CONNECTING + BOUND
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(result) for result in results] == [StoreUnavailable] * 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store-")]


async def test_a_connection_that_the_server_has_closed_is_replaced_unnoticed(server: Server) -> None:
    async with opened(server) as store:
        with psycopg.connect(server.url, autocommit=True) as killer:
            killer.execute(
                b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                b" WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        await store.write(ensure("again"))
        await store.read(lambda tx: tx.now())
    assert "again" in server.users()


async def test_what_a_server_may_have_heard_is_not_said_to_it_again(server: Server) -> None:
    """Of a connection that stands still nobody knows what will yet be done on it."""
    async with opened(server) as store:
        driver = store._writer._session._driver
        pid = await store.write(lambda tx: int(driver.rows("SELECT pg_backend_pid()")[0][0]))
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await store.write(lambda tx: tx.users.ensure("said once", NOW))
            assert "said once" not in server.users()
        finally:
            os.kill(pid, signal.SIGCONT)
        await store.write(ensure("said anew"))
    assert "said anew" in server.users()


@pytest.mark.parametrize("made", [engines.writer_engine, engines.reader_engine, engines.session_engine])
def test_a_machine_that_is_gone_is_noticed_within_half_a_minute(
    server: Server, made: Callable[[str], Engine]
) -> None:
    engine = made(server.url)
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        told = {name: int(value) for name, value in driver.info.get_parameters().items() if value.isdigit()}
    engine.dispose()
    assert told["keepalives_idle"] + told["keepalives_interval"] * told["keepalives_count"] <= 30
    assert told["connect_timeout"] == CONNECTING
    if made is not engines.session_engine:  # there nothing is sent that could stay unanswered
        assert told["tcp_user_timeout"] <= 30_000


async def test_nothing_is_asked_of_a_standby(server: Server) -> None:
    """A name may lead to one for a while, and what it says may be from before."""
    async with opened(server) as store:
        server.demote()
        try:
            with psycopg.connect(server.url) as look:
                assert look.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            for call in (store.write, store.read):
                with pytest.raises(StoreUnavailable):
                    await call(lambda tx: tx.now())
        finally:
            server.promote()
        await store.write(ensure("on the new primary"))
        assert await store.read(lambda tx: tx.users.get("on the new primary")) is not None
