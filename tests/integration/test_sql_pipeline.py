"""Statements that travel together: whose their errors are, and what is left of them."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select

from adapters.sql import errors, session, writer
from adapters.sql.errors import StoreFaultError
from adapters.sql.fiber import apart
from adapters.sql.pipeline import Pipeline
from adapters.sql.statement import Statement
from adapters.sql.store import SqlStore
from adapters.sql.transaction import SqlTransaction
from core.model.agent import Domain
from core.model.errors import StoreBusy, StoreUnavailable
from core.model.events import TextDelta, TurnStarted
from core.model.goal import Goal
from core.model.message import Role
from core.model.thread import Thread
from core.ports.store import Conflict, Transaction
from core.ports.telemetry import Unmeasured
from core.ports.turns import LogAppend
from doubles import CATALOG, ManualClock
from harness import until
from records import NOW, a_line, a_thread, a_turn, request

THREAD = a_thread(id="one")
TURN = a_turn(THREAD, id="turn")
GOAL = Goal(id="goal", user_id="ada", domain=Domain.CAREER, text="x", commitment="", due=None, created_at=NOW)


@pytest.fixture
async def record(database_url: str, clock: ManualClock) -> AsyncIterator[SqlStore]:
    """A store with one thread."""
    store = SqlStore(database_url, clock)
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    await store.write(adding(THREAD))
    yield store
    await store.aclose()


def adding(thread: Thread) -> Callable[[Transaction], None]:
    def change(tx: Transaction) -> None:
        tx.users.ensure("ada", NOW)
        tx.threads.add(thread)

    return change


def saying(*texts: str) -> Callable[[Transaction], list[int]]:
    """Adds lines to the thread; returns their indexes."""

    def change(tx: Transaction) -> list[int]:
        return [
            message.index
            for text in texts
            for message in tx.messages.append("one", [a_line(TURN, text, Role.TOOL)])
        ]

    return change


async def together(store: SqlStore, *changes: Callable[[Transaction], object]) -> list[object]:
    """Runs changes as one group; returns their results and errors."""
    reached, go_on = threading.Event(), threading.Event()

    def hold(_: Transaction) -> None:
        reached.set()
        assert apart(lambda: go_on.wait(20))

    holding = asyncio.create_task(store.write(hold))
    await until(reached.is_set)
    tasks = [asyncio.create_task(store.write(change)) for change in changes]
    await asyncio.sleep(0)  # all of them are submitted
    go_on.set()
    await holding
    return list(await asyncio.gather(*tasks, return_exceptions=True))


async def threads(store: SqlStore, *asked: str) -> set[str]:
    """Those of the threads that are on record."""
    return {thread_id for thread_id in asked if await store.read(lambda tx, i=thread_id: tx.threads.find(i))}  # type: ignore[misc]


async def test_an_error_that_nobody_has_waited_for_is_its_own_changes(record: SqlStore) -> None:
    two, three = replace(THREAD, id="two"), replace(THREAD, id="three")
    results = await together(record, adding(two), adding(THREAD), adding(three))
    assert [type(result) for result in results] == [type(None), Conflict, type(None)]
    assert await threads(record, "one", "two", "three") == {"one", "two", "three"}


async def test_an_error_at_the_very_end_of_a_lone_change_is_raised(record: SqlStore) -> None:
    with pytest.raises(Conflict):
        await record.write(adding(THREAD))


async def test_a_change_that_hides_an_error_is_not_committed(postgres_url: str, clock: ManualClock) -> None:
    """PostgreSQL has undone everything by then, and a COMMIT there only says so in its tag."""
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    await store.write(adding(THREAD))

    def hiding(tx: Transaction) -> None:
        tx.threads.add(replace(THREAD, id="two"))
        with suppress(Exception):
            tx.threads.add(THREAD)
            tx.now()

    def hiding_more(tx: Transaction) -> None:
        hiding(tx)
        tx.threads.add(replace(THREAD, id="three"))

    for change in (hiding, hiding_more):
        with pytest.raises(StoreFaultError):
            await store.write(change)
    results = await together(store, hiding, adding(replace(THREAD, id="four")), hiding_more)
    assert [isinstance(result, Exception) for result in results] == [True, False, True]
    assert await threads(store, "two", "three", "four") == {"four"}
    await store.aclose()


async def test_what_was_cut_off_by_an_error_can_be_asked_for_again(record: SqlStore) -> None:
    """The statement behind the error was never prepared."""

    def failing(tx: Transaction) -> None:
        tx.threads.add(THREAD)
        tx.goals.add(GOAL, "key")

    with pytest.raises(Conflict):
        await record.write(failing)
    assert await record.write(lambda tx: tx.goals.add(GOAL, "key")) == GOAL


async def test_a_message_is_counted_once_whatever_is_taken_back_beside_it(record: SqlStore) -> None:
    await record.write(lambda tx: tx.turns.add(TURN, request(), owner="me"))

    def failing(tx: Transaction) -> None:
        saying("lost", "lost too")(tx)
        raise ValueError

    results = await together(record, saying("a", "b"), failing, saying("c"), failing, saying("d", "e"))
    assert [result for result in results if isinstance(result, list)] == [[1, 2], [3], [4, 5]]
    thread = await record.read(lambda tx: tx.threads.find("one"))
    assert thread is not None
    assert thread.message_count == 5


async def test_a_new_threads_messages_are_counted_from_the_first(record: SqlStore) -> None:
    def change(tx: Transaction) -> list[int]:
        adding(replace(THREAD, id="two"))(tx)
        tx.turns.add(replace(TURN, thread_id="two"), request(), owner="me")
        found = tx.messages.append("two", [a_line(TURN, text, Role.TOOL) for text in "ab"])
        return [message.index for message in (*found, *tx.messages.append("two", [a_line(TURN, "c", Role.TOOL)]))]

    assert await record.write(change) == [1, 2, 3]
    thread = await record.read(lambda tx: tx.threads.find("two"))
    assert thread is not None
    assert thread.message_count == 3


async def test_more_than_the_wire_takes_at_once_goes_through(record: SqlStore) -> None:
    await record.write(lambda tx: tx.turns.add(TURN, request(), owner="me"))
    await record.write(saying(*("x" * 65_536 for _ in range(100))))
    lines = await record.read(lambda tx: tx.messages.list("one", after=None, newest_first=False, limit=None))
    assert [len(found.text) for found in lines] == [65_536] * 100


async def test_a_connection_that_is_lost_before_it_has_answered_is_replaced_unnoticed(
    postgres_url: str, clock: ManualClock
) -> None:
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: tx.users.ensure("ada", NOW))
    for change in (lambda tx: tx.users.ensure("bob", NOW), lambda tx: tx.now()):
        kill(postgres_url)
        await store.write(change)
        kill(postgres_url)
        await together(store, change, change)
    await store.aclose()


async def test_a_connection_that_is_lost_in_the_middle_is_not(postgres_url: str, clock: ManualClock) -> None:
    store = SqlStore(postgres_url, clock)

    def cut(tx: Transaction) -> None:
        tx.now()
        kill(postgres_url)
        tx.users.ensure("ada", NOW)

    with pytest.raises(StoreUnavailable):
        await store.write(cut)
    await store.write(lambda tx: tx.now())
    await store.aclose()


def kill(url: str) -> None:
    """Ends all other connections."""
    with psycopg.connect(url, autocommit=True) as killer:
        killer.execute(
            b"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            b" AND backend_type = 'client backend' AND datname = current_database()"
        )


async def test_the_server_never_looks_busy_while_it_waits_for_this_process(
    postgres_url: str, clock: ManualClock
) -> None:
    """Else its limit on transactions that stand still would not hold."""
    store = SqlStore(postgres_url, clock)

    def look(tx: Transaction) -> str:
        tx.users.ensure("ada", NOW)
        tx.now()
        tx.users.ensure("bob", NOW)
        with psycopg.connect(postgres_url) as other:
            row = other.execute(
                b"SELECT state FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND xact_start IS NOT NULL"
                b" AND backend_type = 'client backend' AND datname = current_database()"
            ).fetchone()
        assert row is not None
        return str(row[0])

    assert await store.write(look) == "idle in transaction"
    await store.aclose()


async def test_a_hint_that_can_not_be_committed_is_nobodys_trouble(postgres_url: str, clock: ManualClock) -> None:
    """Its error comes behind its result."""
    with psycopg.connect(postgres_url, autocommit=True) as look:
        look.execute("CREATE TABLE late (id integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        store = SqlStore(postgres_url, clock)
        await store.write(lambda tx: tx.users.ensure("ada", NOW))
        pipeline = store._writer._session._driver

        for number in range(3):
            pipeline.tell("INSERT INTO late VALUES (1), (1)")
            await store.write(lambda tx, number=number: tx.users.ensure(f"user {number}", NOW))  # type: ignore[misc]
        assert pipeline is store._writer._session._driver
        assert look.execute("SELECT count(*) FROM late").fetchone() == (0,)
        assert look.execute("SELECT count(*) FROM users").fetchone() == (4,)
        await store.aclose()


@pytest.mark.parametrize("lost", [True, False])
async def test_nothing_is_believed_of_a_connection_that_is_out_of_step(
    postgres_url: str, clock: ManualClock, lost: bool
) -> None:
    """Whether an answer is there that nobody waits for, or one is waited for that never comes."""
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: tx.users.ensure("ada", NOW))
    pipeline = store._writer._session._driver
    assert isinstance(pipeline, Pipeline)

    def get_out_of_step(tx: Transaction) -> None:
        tx.now()
        if lost:
            pipeline._server.send_query_params(b"SELECT 1", None)
            pipeline._server.pipeline_sync()
        else:
            pipeline._waiting.append(None)
        tx.users.ensure("eve", NOW)

    with pytest.raises(StoreUnavailable):
        await store.write(get_out_of_step)
    await store.write(lambda tx: tx.users.ensure("bob", NOW))
    assert pipeline is not store._writer._session._driver
    with psycopg.connect(postgres_url) as look:
        assert {"ada", "bob"} <= {name for (name,) in look.execute("SELECT id FROM users").fetchall()}
    await store.aclose()


async def test_a_session_that_the_server_ends_for_standing_still_is_an_outage_of_one_change(
    postgres_url: str, clock: ManualClock
) -> None:
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: tx.now())
    driver = store._writer._session._driver
    limit = "idle_in_transaction_session_timeout"
    with psycopg.connect(postgres_url, autocommit=True) as look:

        def stand_still(tx: Transaction) -> None:
            tx.users.ensure("eve", NOW)
            assert list(driver.rows(f"SHOW {limit}")[0]) == ["15s"]  # so long nobody waits here
            driver.run(f"SET LOCAL {limit} = 50")
            tx.now()
            ended = "SELECT count(*) = 0 FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            while look.execute(ended).fetchone() == (False,):
                continue
            tx.now()

        with pytest.raises(StoreUnavailable):
            await store.write(stand_still)
        await store.write(lambda tx: tx.users.ensure("ada", NOW))
        assert look.execute("SELECT id FROM users").fetchall() == [("ada",)]
    await store.aclose()


async def test_the_way_of_a_change_to_the_server_and_back_is_short(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not read costs no wait of its own."""
    monkeypatch.setattr(writer, "_WORD", 60.0)  # word of it to others travels between two changes, or with one
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    waits = 0
    original = Pipeline._receive

    def counted(pipeline: Pipeline) -> object:
        nonlocal waits
        waits += 1
        return original(pipeline)

    def accept(tx: Transaction) -> None:
        tx.about_now()
        adding(THREAD)(tx)
        tx.turns.add(TURN, request(), owner="me")
        tx.log.begin(TURN.id, [TurnStarted(TURN.id, "one", TURN.agent_id)])
        tx.messages.begin("one", a_line(TURN))

    monkeypatch.setattr(Pipeline, "_receive", counted)
    await store.write(accept)
    assert waits == 2  # for the time, which nobody has asked for yet, and for everything else with the commit
    event = LogAppend(TURN.id, 1, 1, (TextDelta("Hello"),))
    assert (await store.write(lambda tx: tx.log.append([event]))).accepted
    assert waits == 3
    assert not (await store.write(lambda tx: tx.log.append([event]))).accepted  # it is in already
    await store.write(lambda tx: tx.users.ensure("eve", tx.about_now()))
    monkeypatch.setattr(session, "_KNOWN_FOR", 0.0)
    before = waits
    await store.write(lambda tx: tx.users.ensure("bob", tx.about_now()))
    assert waits == before + 2
    monkeypatch.undo()
    monkeypatch.setattr(session, "_QUICK", 0.0)  # no answer is quick enough to be relied on
    await store.write(lambda tx: tx.now())
    assert store._writer._session._seen is None
    await store.aclose()


async def test_an_append_that_fails_tells_the_server_no_word(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It logs what it says of an error."""
    store = SqlStore(postgres_url, clock)
    told: list[BaseException] = []

    def translated(error: BaseException) -> Exception:
        told.append(error)
        return errors.translated(error)

    monkeypatch.setattr(writer, "translated", translated)
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    append = LogAppend("nobody", 1, 1, (TextDelta("a secret"),))
    assert not (await store.write(lambda tx: tx.log.append([append]))).accepted
    (error,) = told
    assert isinstance(error, psycopg.Error)
    assert "secret" not in f"{error} {error.diag.message_detail} {error.diag.context}"
    await store.aclose()


async def test_the_last_word_goes_out_when_a_store_closes(postgres_url: str, clock: ManualClock) -> None:
    one, two = SqlStore(postgres_url, clock), SqlStore(postgres_url, clock)
    heard: list[frozenset[str]] = []
    assert two.listen(heard.append)
    await until(lambda: bool(heard))
    await one.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])

    def change(tx: Transaction) -> None:
        adding(THREAD)(tx)
        tx.turns.add(TURN, request(), owner="me")

    await one.write(change)
    await one.aclose()
    await until(lambda: frozenset({"turn"}) in heard)
    await two.aclose()


async def test_every_commit_waits_for_the_disk_beside_hints_that_do_not(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    tell = Pipeline.tell

    def noted(pipeline: Pipeline, sql: str, values: Any = ()) -> None:
        told.append(sql)
        tell(pipeline, sql, values)

    monkeypatch.setattr(Pipeline, "tell", noted)
    store = SqlStore(postgres_url, clock)
    setting = Statement(select(func.current_setting("synchronous_commit").label("is_")))

    def change(tx: Transaction) -> str:
        assert isinstance(tx, SqlTransaction)
        tx.session.changed.add("turn")
        return str(tx.session.row(setting).is_)

    for number in range(3):
        assert await store.write(change) == "on"
        await until(lambda n=number: len(told) > n)
    await store.aclose()


async def test_a_full_disk_takes_its_group_along_and_is_called_by_its_name(
    sqlite_url: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite has undone everything by then, savepoints too."""
    store = SqlStore(sqlite_url, clock)
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    await store.write(adding(THREAD))
    await store.write(lambda tx: tx.turns.add(TURN, request(), owner="me"))
    driver = store._writer._session._driver
    group = adding(replace(THREAD, id="two")), saying("x" * 2_000_000), adding(replace(THREAD, id="three"))
    await store.write(lambda tx: driver.rows("PRAGMA max_page_count=1"))  # no more than there are
    assert [type(result) for result in await together(store, *group)] == [StoreUnavailable] * 3
    assert await threads(store, "one", "two", "three") == {"one"}
    await store.write(lambda tx: driver.rows("PRAGMA max_page_count=1000000"))
    assert await together(store, *group) == [None, [1], None]
    assert await threads(store, "one", "two", "three") == {"one", "two", "three"}
    await store.aclose()
    told = [record.getMessage() for record in caplog.records if record.name == "adapters.sql.writer"]
    assert [line.rpartition(" ")[2] for line in told] == ["SQLITE_FULL", "again"]


async def test_a_server_that_may_only_be_read_is_left_for_one_that_may_be_written_to(
    postgres_url: str, clock: ManualClock
) -> None:
    """A name may still lead to a standby when a connection is opened, and elsewhere a moment later."""
    with psycopg.connect(postgres_url, autocommit=True) as operator:
        database = f'ALTER DATABASE "{operator.info.dbname}"'
        operator.execute(f"{database} SET default_transaction_read_only = on".encode())  # in sessions to come
        store = SqlStore(postgres_url, clock)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await store.write(lambda tx: tx.users.ensure("ada", NOW))
        operator.execute(f"{database} RESET default_transaction_read_only".encode())
        await together(store, *(lambda tx, n=n: tx.users.ensure(f"user {n}", NOW) for n in range(3)))
        assert operator.execute("SELECT count(*) FROM users").fetchone() == (3,)
        await store.aclose()


async def test_a_process_goes_on_while_a_migration_changes_what_it_reads(
    postgres_url: str, clock: ManualClock
) -> None:
    """The server takes a statement that was prepared before for another."""
    store = SqlStore(postgres_url, clock)
    for call in (store.write, store.read):
        assert await call(lambda tx: list(tx.copies.left(9))) == []
    with psycopg.connect(postgres_url, autocommit=True) as migration:
        migration.execute("ALTER TABLE copies ALTER COLUMN ref TYPE varchar(4000)")
    for call in (store.write, store.read):
        with pytest.raises(StoreUnavailable):
            await call(lambda tx: list(tx.copies.left(9)))
        assert await call(lambda tx: list(tx.copies.left(9))) == []
    await store.aclose()


async def test_a_statement_that_takes_too_long_is_its_own_changes_trouble(
    postgres_url: str, clock: ManualClock
) -> None:
    store = SqlStore(postgres_url, clock)
    await store.write(lambda tx: tx.now())
    driver = store._writer._session._driver

    def dawdle(tx: Transaction) -> None:
        tx.users.ensure("eve", NOW)
        limits = {"statement_timeout": "10s", "lock_timeout": "5ms", "TimeZone": "UTC"}
        assert {name: driver.rows(f"SHOW {name}")[0][0] for name in limits} == limits
        driver.run("SET LOCAL statement_timeout = 20")
        driver.rows("SELECT pg_sleep(60)")

    def ensuring(user: str) -> Callable[[Transaction], None]:
        return lambda tx: tx.users.ensure(user, NOW)

    results = await together(store, ensuring("ada"), dawdle, ensuring("bob"))
    assert [type(result) for result in results] == [type(None), StoreBusy, type(None)]
    with pytest.raises(StoreBusy):
        await store.write(dawdle)
    with psycopg.connect(postgres_url) as look:
        assert {user for (user,) in look.execute("SELECT id FROM users").fetchall()} == {"ada", "bob"}
    await store.aclose()


async def test_what_a_connection_had_open_is_closed_when_it_is_lost(postgres_url: str, clock: ManualClock) -> None:
    store = SqlStore(postgres_url, clock)
    calls = (store.write, store.read)
    for call in calls:
        await call(lambda tx: tx.now())
    before = open_to(postgres_url)
    for _ in range(3):
        kill(postgres_url)
        for call in calls:
            await call(lambda tx: tx.now())
    await until(lambda: open_to(postgres_url) <= before)
    await store.aclose()
    await until(lambda: open_to(postgres_url) < before)


async def test_a_store_that_is_closed_leaves_nothing_open(database_url: str, clock: ManualClock) -> None:
    before = open_to(database_url)
    store = SqlStore(database_url, clock)
    heard: list[frozenset[str]] = []
    if store.listen(heard.append):
        await until(lambda: bool(heard))
    await asyncio.gather(*(store.read(lambda tx: tx.now()) for _ in range(8)), store.write(lambda tx: tx.now()))
    async with store.exclusive("x") as held:
        assert held
        assert open_to(database_url) > before
    await store.aclose()
    await until(lambda: open_to(database_url) <= before)


def open_to(url: str) -> int:
    """How many files or sockets this process has open that may be a database's."""
    kind = url.removeprefix("sqlite:///") if url.startswith("sqlite:") else "socket:"
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile: it was the list's own
            found += str(descriptor.readlink()).startswith(kind)
    return found


async def test_a_commit_tells_how_many_changes_shared_it_and_what_it_took(
    database_url: str, clock: ManualClock
) -> None:
    told: list[tuple[int, float]] = []

    class Told(Unmeasured):
        def time(self) -> float:
            return time.monotonic()

        def committed(self, changes: int, seconds: float) -> None:
            told.append((changes, seconds))

    store = SqlStore(database_url, clock, telemetry=Told())
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    await store.write(adding(THREAD))
    told.clear()
    begun = time.monotonic()
    await together(store, adding(replace(THREAD, id="two")), adding(THREAD), adding(replace(THREAD, id="three")))
    assert [changes for changes, _ in told] == [1, 3]  # what holds the others up, then they
    assert all(0 < seconds < time.monotonic() - begun for _, seconds in told)
    await store.aclose()
