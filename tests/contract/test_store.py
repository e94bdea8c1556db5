"""What the ports to the record promise, on every store."""

import asyncio
import random
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import date, datetime, timedelta
from functools import partial
from typing import TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.memory.store import MemoryStore
from adapters.sql.fiber import apart
from adapters.sql.store import SqlStore
from core.model.agent import Domain
from core.model.errors import StoreUnavailable, ThreadNotFound
from core.model.events import (
    AttemptRestarted,
    LogEntry,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    extent,
    place,
)
from core.model.goal import Goal
from core.model.message import ContentPart, Message, RefusalPart, Role, TextPart, ToolExchange
from core.model.thread import ProviderState, Thread, ThreadState, Tombstone
from core.model.turn import Continuation, Turn, TurnReason, TurnState, Usage
from core.ports.agents import AgentVersionChanged
from core.ports.store import Conflict, Store, Transaction
from core.ports.threads import NewMessage, ThreadKey
from core.ports.turns import Appended, Holder, LogAppend, RequestKey
from doubles import CATALOG, ManualClock, definition
from harness import until
from records import IDS, NOW, a_line, a_thread, a_turn, request

T = TypeVar("T")

ACTIVE = frozenset({ThreadState.ACTIVE})
ANY = frozenset(ThreadState)

TEXTS = {
    "plain": "plain",
    "emoji": "👩‍🚀👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﷽ Z̷̧͓",
    "quotes": """ "double" 'single' `back` \\ \\\\ \\n \\u0041 \\" """,
    "lines": "a\nb\r\nc\rd\u0085e\u2028f\u2029g\th",
    "control": "\x01\x08\x1b\x7f",
    "edges of Unicode": "\ufffd\ufffe\uffff\U0001fffe\U0010ffff\ud7ff\ue000",
    "end of a log": '["f"]]',
    "JSON": '{"a": [null, true, "\\""]}',
    "JSON string": '"',
    "SQL": "'; DROP TABLE turns; -- %s %(x)s :name ? $1",
    "64 Ki": "x" * 65_536,
    "64 Ki emoji": "👋" * 65_536,
}


def add_thread(tx: Transaction, thread: Thread) -> None:
    tx.users.ensure(thread.user_id, NOW)
    tx.threads.add(thread)


def add_threads(threads: Sequence[Thread], tx: Transaction) -> None:
    for thread in threads:
        add_thread(tx, thread)


def add_turn(tx: Transaction, turn: Turn, key: RequestKey | None = None) -> None:
    tx.turns.add(turn, key or request(turn.user_id), owner="test")
    tx.log.begin(turn.id, [TurnStarted(turn.id, turn.thread_id, turn.agent_id)])


@pytest.fixture
async def record(store: Store) -> Store:
    """A store with the catalog's agents."""
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    return store


async def lines_of(store: Store, thread: Thread) -> list[Message]:
    """A thread's transcript."""
    return list(
        await store.read(lambda tx: tx.messages.list(thread.id, after=None, newest_first=False, limit=None))
    )


async def begun(store: Store, **changes: object) -> tuple[Thread, Turn]:
    """A thread with a running turn."""
    thread = a_thread()
    turn = a_turn(thread, **changes)

    def change(tx: Transaction) -> None:
        add_thread(tx, thread)
        add_turn(tx, turn)

    await store.write(change)
    return thread, turn


class Hold:
    """Keeps a database's writer busy, so that what is submitted meanwhile shares a commit."""

    def __init__(self, store: Store) -> None:
        self._go_on = threading.Event()
        self.reached = threading.Event()
        if isinstance(store, MemoryStore):
            self._go_on.set()  # it runs every change at once

    def change(self, _: Transaction) -> None:
        self.reached.set()
        assert apart(lambda: self._go_on.wait(20))

    def open(self) -> None:
        self._go_on.set()


async def together(store: Store, changes: Sequence[Callable[[Transaction], T]]) -> list[T | BaseException]:
    """Submits changes in order, all of them before the first one runs."""
    hold = Hold(store)
    first = asyncio.create_task(store.write(hold.change))
    await until(hold.reached.is_set)
    tasks = [asyncio.create_task(store.write(change)) for change in changes]
    await asyncio.sleep(0)  # every task has submitted its change
    hold.open()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def spread(entries: Sequence[LogEntry]) -> list[tuple[int, object]]:
    """A log by positions: every code point and every event at its own."""
    result: list[tuple[int, object]] = []
    for entry in entries:
        if isinstance(entry.event, TextDelta):
            start = entry.position - len(entry.event.text)
            result += [(start + n, (c, entry.event.refusal)) for n, c in enumerate(entry.event.text, start=1)]
        else:
            result.append((entry.position, entry.event))
    return result


# The store


@pytest.mark.parametrize("first", [0, 1, 3, 5])
async def test_a_change_that_fails_leaves_no_trace_and_those_beside_it_are_committed(
    record: Store, first: int
) -> None:
    class OwnError(Exception):
        pass

    taken, _ = await begun(record)
    threads = [a_thread(f"user{number}") for number in range(60)]

    def change_of(number: int, thread: Thread) -> Callable[[Transaction], str]:
        def change(tx: Transaction) -> str:
            add_thread(tx, thread)
            turn = a_turn(thread)
            add_turn(tx, turn, request(thread.user_id, "r"))
            tx.messages.append(thread.id, [a_line(turn)])
            match (first + number) % 6:
                case 1:
                    raise OwnError
                case 3:
                    raise ThreadNotFound
                case 5:
                    tx.turns.add(a_turn(taken), request(), owner="test")  # a second turn at work
            return thread.id

        return change

    results = await together(record, [change_of(n, thread) for n, thread in enumerate(threads)])
    expected = [{1: OwnError, 3: ThreadNotFound, 5: Conflict}.get((first + number) % 6) for number in range(60)]
    assert [type(result) if isinstance(result, Exception) else None for result in results] == expected
    for thread, error, result in zip(threads, expected, results, strict=True):
        found = await record.read(lambda tx, t=thread: tx.threads.get(t.user_id, t.id))  # type: ignore[misc]
        earlier = await record.read(
            lambda tx, t=thread: tx.turns.by_request("local", t.user_id, "r")  # type: ignore[misc]
        )
        lines = await lines_of(record, thread)
        if error is None:
            assert result == thread.id
            assert found is not None
            assert found.message_count == len(lines) == 1
            assert earlier is not None
        else:
            assert (found, earlier, list(lines)) == (None, None, [])
    held = await record.read(lambda tx: tx.turns.held_by("test"))
    assert len(held) == 1 + expected.count(None)


async def test_a_lone_change_that_fails_leaves_no_trace(record: Store) -> None:
    thread = a_thread()

    def change(tx: Transaction) -> None:
        add_thread(tx, thread)
        tx.threads.describe(thread.id, title="x", metadata=None)
        raise ValueError

    with pytest.raises(ValueError):
        await record.write(change)
    assert await record.read(lambda tx: tx.threads.get("ada", thread.id)) is None
    await record.write(lambda tx: add_thread(tx, thread))  # nothing is left in the way


async def test_an_iteration_that_ends_within_a_change_is_an_error_like_others(record: Store) -> None:
    """No future takes it, and nobody would be told."""
    with pytest.raises(RuntimeError):
        await record.write(lambda tx: next(iter(tx.turns.unfinished("nothing"))))
    await record.write(lambda tx: tx.now())


async def test_changes_take_effect_in_the_order_of_submission(record: Store) -> None:
    thread, turn = await begun(record)

    def append(number: int) -> Callable[[Transaction], int]:
        def change(tx: Transaction) -> int:
            line = a_line(turn, str(number), Role.TOOL)
            (stored,) = tx.messages.append(thread.id, [line])
            if number % 5 == 4:
                raise ValueError
            return stored.index

        return change

    results = await together(record, [append(number) for number in range(300)])
    kept = [number for number in range(300) if number % 5 != 4]
    assert [result for result in results if isinstance(result, int)] == list(range(1, len(kept) + 1))
    lines = await lines_of(record, thread)
    assert [line.text for line in lines] == [str(number) for number in kept]


async def test_a_read_sees_every_write_committed_before_it(record: Store) -> None:
    thread, _ = await begun(record)
    for number in range(50):
        await record.write(
            lambda tx, title=str(number): tx.threads.describe(thread.id, title=title, metadata=None)  # type: ignore[misc]
        )
        reads = [record.read(lambda tx: tx.threads.get("ada", thread.id)) for _ in range(3)]
        assert {found.title if found else None for found in await asyncio.gather(*reads)} == {str(number)}


async def test_a_change_sees_what_it_has_written(record: Store) -> None:
    thread = a_thread()

    def change(tx: Transaction) -> Thread | None:
        add_thread(tx, thread)
        return tx.threads.get("ada", thread.id)

    assert await record.write(change) == thread


async def test_cancelling_the_caller_does_not_stop_a_submitted_change(record: Store) -> None:
    thread, hold = a_thread(), Hold(record)
    first = asyncio.create_task(record.write(hold.change))
    await until(hold.reached.is_set)
    second = asyncio.create_task(record.write(lambda tx: add_thread(tx, thread)))
    await asyncio.sleep(0)  # submitted
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    hold.open()
    await first
    await record.write(lambda tx: tx.now())  # one more behind it
    assert await record.read(lambda tx: tx.threads.get("ada", thread.id)) == thread


async def test_closing_waits_for_submitted_changes(database_url: str, clock: ManualClock) -> None:
    store, thread = SqlStore(database_url, clock), a_thread()
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    hold = Hold(store)
    writes = [
        asyncio.create_task(store.write(hold.change)),
        asyncio.create_task(store.write(lambda tx: add_thread(tx, thread))),
    ]
    await until(hold.reached.is_set)
    closing = asyncio.create_task(store.aclose())
    await asyncio.sleep(0)
    hold.open()
    await closing
    await asyncio.gather(*writes)
    for call in (store.write, store.read):
        with pytest.raises(StoreUnavailable):
            await call(lambda tx: tx.now())
    await store.aclose()
    again = SqlStore(database_url, clock)
    assert await again.read(lambda tx: tx.threads.get("ada", thread.id)) == thread
    await again.aclose()


async def test_time_is_utc_and_does_not_run_backwards(record: Store) -> None:
    times = [await record.read(lambda tx: tx.now()) for _ in range(3)] + [await record.write(lambda tx: tx.now())]
    assert times == sorted(times)
    assert {time.utcoffset() for time in times} == {timedelta(0)}


async def test_about_now_is_a_little_late_at_most(record: Store) -> None:
    def look(tx: Transaction) -> list[datetime]:
        return [tx.now(), tx.about_now(), tx.now()]

    before, about, after = await record.write(look)
    assert before <= about <= after
    later = await record.write(lambda tx: (tx.about_now(), tx.now()))
    assert after - timedelta(seconds=0.05) <= later[0] <= later[1]


async def fail_holding(store: Store, name: str) -> None:
    async with store.exclusive(name) as held:
        assert held
        raise ValueError


async def test_exclusive_excludes_by_name_and_never_waits(record: Store) -> None:
    async with record.exclusive("a") as first:
        async with record.exclusive("a") as second, record.exclusive("b") as other:
            assert (first, second, other) == (True, False, True)
        async with record.exclusive("a") as third:  # one that did not get it frees nothing
            assert not third
    with pytest.raises(ValueError):
        await fail_holding(record, "a")
    async with record.exclusive("a") as again:
        assert again


@asynccontextmanager
async def two_processes(url: str, clock: ManualClock) -> AsyncIterator[tuple[SqlStore, SqlStore]]:
    stores = SqlStore(url, clock), SqlStore(url, clock)
    await stores[0].write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    try:
        yield stores
    finally:
        for store in stores:
            await store.aclose()


async def test_postgresql_exclusive_holds_over_processes_and_ends_with_its_holder(
    postgres_url: str, clock: ManualClock
) -> None:
    async with two_processes(postgres_url, clock) as (one, two):
        async with one.exclusive("a") as mine, two.exclusive("a") as theirs:
            assert (mine, theirs) == (True, False)
        async with one.exclusive("a") as mine:
            assert mine
            with psycopg.connect(postgres_url, autocommit=True) as killer:
                killer.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
                gone = "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND database ="
                gone += " (SELECT oid FROM pg_database WHERE datname = current_database())"
                await until(lambda: (killer.execute(gone.encode()).fetchone() or [False])[0])
            async with two.exclusive("a") as theirs:
                assert theirs


async def test_postgresql_a_change_that_collides_with_another_processes_is_run_again(
    postgres_url: str, clock: ManualClock
) -> None:
    async with two_processes(postgres_url, clock) as stores:
        both_have_looked = threading.Barrier(2)
        runs: list[str] = []

        def change_of(name: str) -> Callable[[Transaction], str]:
            thread = a_thread()

            def change(tx: Transaction) -> str:
                runs.append(name)
                found = tx.turns.by_request("local", "ada", "r1")
                if runs.count(name) == 1:
                    apart(lambda: both_have_looked.wait(20))
                if found:
                    return found[0].id
                add_thread(tx, thread)
                turn = a_turn(thread)
                add_turn(tx, turn, request(request_id="r1"))
                return turn.id

            return change

        ids = await asyncio.gather(*(s.write(change_of(n)) for s, n in zip(stores, "ab", strict=True)))
        assert len(set(ids)) == 1
        assert len(runs) == 3


@pytest.mark.parametrize("what", ["thread", "turn"])
async def test_postgresql_a_lock_keeps_other_processes_away(
    postgres_url: str, clock: ManualClock, what: str
) -> None:
    async with two_processes(postgres_url, clock) as (one, two):
        thread, turn = await begun(one)
        hold = Hold(one)

        def lock(tx: Transaction) -> None:
            assert tx.threads.lock("ada", thread.id) if what == "thread" else tx.turns.lock(turn.id)
            hold.change(tx)

        def collide(tx: Transaction) -> None:
            if what == "thread":
                tx.threads.describe(thread.id, title="late", metadata=None)
            else:
                tx.turns.save_ending(replace(turn, state=TurnState.FAILED))

        holding = asyncio.create_task(one.write(lock))
        await until(hold.reached.is_set)
        colliding = asyncio.create_task(two.write(collide))
        with psycopg.connect(postgres_url, autocommit=True) as watch:
            waiting = b"SELECT count(*) FROM pg_locks WHERE NOT granted"
            await until(lambda: (watch.execute(waiting).fetchone() or [0])[0] == 1)
        cutoff = NOW + timedelta(days=1)
        if what == "thread":  # and a cleanup leaves out what another process holds
            third = SqlStore(postgres_url, clock)
            await third.write(lambda tx: tx.turns.save_ending(replace(turn, state=TurnState.FAILED)))
            batch = await third.write(lambda tx: tx.threads.expire(cutoff, None, None, 10))
            assert batch.expired == 0
            assert (
                await third.write(lambda tx: tx.threads.expire_places(cutoff, None, 0, tx.threads.places())) == 0
            )
            await third.aclose()
        assert not colliding.done()
        hold.open()
        await asyncio.gather(holding, colliding)


# Users and agents


async def test_ensuring_a_user_is_idempotent(record: Store) -> None:
    await together(record, [lambda tx: tx.users.ensure("ada", tx.now()) for _ in range(20)])

    def change(tx: Transaction) -> None:
        tx.users.ensure("ada", NOW)
        tx.users.ensure("ada", NOW + timedelta(days=1))
        tx.threads.add(a_thread())

    await record.write(change)


@pytest.mark.parametrize(
    "changes",
    [
        {"instructions": "Other."},
        {"model": "gpt-x"},
        {"tools": ()},
        {"domain": Domain.HEALTH},
        {"name": "x"},
        {"max_output_tokens": 99},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_a_published_agent_never_changes(store: Store, changes: dict[str, object]) -> None:
    first = definition()
    second = definition(
        version=2, instructions='Ünï "quoted" 👋\n', effort="low", verbosity="high", tools=("a", "b")
    )
    for offered in (first, second, first):
        await store.write(lambda tx, agent=offered: tx.agents.publish(agent))  # type: ignore[misc]
    changed = replace(first, **changes)  # type: ignore[arg-type]
    with pytest.raises(AgentVersionChanged) as error:
        await store.write(lambda tx: tx.agents.publish(changed))
    assert error.value.agent_id == "career-v1"
    assert await store.read(lambda tx: tx.agents.get("career-v1")) == first
    assert await store.read(lambda tx: tx.agents.get("career-v2")) == second
    assert await store.read(lambda tx: tx.agents.get("career-v3")) is None


# Threads


async def test_a_thread_is_its_users_alone(record: Store) -> None:
    thread = a_thread(
        metadata={"k": "v", 'q"': "👋\\"}, title="T", domain=Domain.HEALTH, state=ThreadState.INACTIVE
    )
    await record.write(lambda tx: add_thread(tx, thread))
    for look in (
        lambda tx, user: tx.threads.get(user, thread.id),
        lambda tx, user: tx.threads.lock(user, thread.id),
    ):
        assert await record.write(lambda tx, look=look: look(tx, "ada")) == thread  # type: ignore[misc]
        assert await record.write(lambda tx, look=look: look(tx, "eve")) is None  # type: ignore[misc]
    assert await record.read(lambda tx: tx.threads.list("eve", None, ANY, None, 10)) == []
    assert await record.read(lambda tx: tx.threads.get("ada", IDS.new())) is None


async def pages(store: Store, size: int, **query: object) -> AsyncIterator[list[Thread]]:
    """A user's threads, page by page."""
    before: ThreadKey | None = None
    domain, states = query.get("domain"), query.get("states", ACTIVE)
    while page := await store.read(
        lambda tx, before=before: tx.threads.list("ada", domain, states, before, size)  # type: ignore[misc]
    ):
        yield list(page)
        before = ThreadKey(page[-1].last_message_at, page[-1].id)


async def test_threads_are_listed_newest_first_with_ties_in_one_order(record: Store) -> None:
    domains = list(Domain)
    threads = [
        a_thread(
            last_message_at=NOW + timedelta(microseconds=number // 4),
            domain=domains[number % 3],
            agent_id=f"{domains[number % 3]}-v1",
            state=ThreadState.INACTIVE if number % 5 == 0 else ThreadState.ACTIVE,
        )
        for number in range(24)
    ]

    def change(tx: Transaction) -> None:
        for thread in random.Random(1).sample(threads, len(threads)):  # ids do not follow the order of insertion
            add_thread(tx, thread)
        add_thread(tx, a_thread("eve"))

    await record.write(change)
    order = sorted(threads, key=lambda thread: (thread.last_message_at, thread.id), reverse=True)
    for domain in (None, *Domain):
        for states in (ACTIVE, frozenset({ThreadState.INACTIVE}), ANY):
            expected = [t for t in order if t.state in states and domain in (None, t.domain)]
            for size in (1, 3, 100):
                got = [page async for page in pages(record, size, domain=domain, states=states)]
                assert [thread for page in got for thread in page] == expected
                assert all(len(page) == size for page in got[:-1])


async def test_ties_have_one_order_whether_or_not_an_index_serves_them(
    database_url: str, clock: ManualClock
) -> None:
    drop = "DROP INDEX ix_assistant_threads_user"
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as file:
            file.execute(drop)
    else:
        with psycopg.connect(database_url, autocommit=True) as server:
            server.execute(drop.encode())
    store = SqlStore(database_url, clock)
    threads = [a_thread() for _ in range(24)]
    try:
        await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
        await store.write(partial(add_threads, random.Random(1).sample(threads, len(threads))))
        got = [thread.id async for page in pages(store, 5) for thread in page]
    finally:
        await store.aclose()
    assert got == sorted((thread.id for thread in threads), reverse=True)


async def test_no_state_is_no_thread(record: Store) -> None:
    await record.write(lambda tx: add_thread(tx, a_thread()))
    assert list(await record.read(lambda tx: tx.threads.list("ada", None, frozenset(), None, 10))) == []


async def test_pages_survive_what_comes_and_goes_between_them(record: Store) -> None:
    threads = [a_thread(last_message_at=NOW - timedelta(hours=number // 2)) for number in range(12)]
    await record.write(partial(add_threads, threads))
    order = sorted(threads, key=lambda thread: (thread.last_message_at, thread.id), reverse=True)
    seen: list[str] = []
    async for page in pages(record, 3):
        seen += [thread.id for thread in page]
        last = page[-1]

        def change(tx: Transaction, last: Thread = last) -> None:
            add_thread(tx, a_thread(last_message_at=NOW + timedelta(hours=1)))  # new ones come in front
            turn = a_turn(last)  # and the one that the cursor names is no longer there
            add_turn(tx, turn)
            tx.messages.append(last.id, [a_line(turn, created_at=NOW + timedelta(hours=2))])

        await record.write(change)
    assert seen == [thread.id for thread in order]


async def test_a_page_may_begin_behind_a_thread_that_is_gone(record: Store) -> None:
    threads = [a_thread(last_message_at=NOW - timedelta(hours=number)) for number in range(6)]
    await record.write(partial(add_threads, threads))
    await record.write(lambda tx: tx.threads.expire(NOW - timedelta(hours=2, minutes=30), None, None, 100))
    rest = await record.read(
        lambda tx: tx.threads.list("ada", None, ACTIVE, ThreadKey(NOW - timedelta(minutes=30), IDS.new()), 10)
    )
    assert [thread.id for thread in rest] == [thread.id for thread in threads[1:3]]


async def test_a_message_that_is_not_in_the_transcript_yet_wakes_its_thread(record: Store) -> None:
    thread = a_thread(state=ThreadState.INACTIVE)
    await record.write(lambda tx: add_thread(tx, thread))
    assert await record.read(lambda tx: tx.threads.find(thread.id)) == thread
    later = NOW + timedelta(hours=1, microseconds=7)
    await record.write(lambda tx: tx.threads.touch(thread.id, later))
    assert await record.read(lambda tx: tx.threads.find(thread.id)) == replace(
        thread, state=ThreadState.ACTIVE, last_message_at=later
    )
    assert await record.read(lambda tx: tx.threads.find(IDS.new())) is None


async def test_describing_replaces_what_is_given(record: Store) -> None:
    thread = a_thread(title="old", metadata={"a": "1"})
    await record.write(lambda tx: add_thread(tx, thread))
    await record.write(lambda tx: tx.threads.describe(thread.id, title='new "👋"', metadata=None))
    found = await record.read(lambda tx: tx.threads.get("ada", thread.id))
    assert found == replace(thread, title='new "👋"')
    await record.write(lambda tx: tx.threads.describe(thread.id, title=None, metadata={"b": "2\\"}))
    found = await record.read(lambda tx: tx.threads.get("ada", thread.id))
    assert found == replace(thread, title='new "👋"', metadata={"b": "2\\"})
    await record.write(lambda tx: tx.threads.describe(thread.id, title="", metadata={}))
    assert await record.read(lambda tx: tx.threads.get("ada", thread.id)) == replace(thread, title="", metadata={})


async def test_provider_state_is_kept_as_it_was_last_said(record: Store) -> None:
    thread = a_thread()
    await record.write(lambda tx: add_thread(tx, thread))
    assert await record.read(lambda tx: tx.threads.provider_state(thread.id)) is None
    for state in (
        ProviderState(provider="openai", conversation_id="conv_1", synced_to=4, begins_at=3),
        ProviderState(provider="openai", response_id="resp_1", synced_to=2),
        ProviderState(provider="openai"),
    ):
        await record.write(lambda tx, state=state: tx.threads.save_provider_state(thread.id, state))  # type: ignore[misc]
        assert await record.read(lambda tx: tx.threads.provider_state(thread.id)) == state
    assert await record.read(lambda tx: tx.threads.get("ada", thread.id)) == thread


# Messages


async def test_lines_have_dense_indexes_and_are_listed_both_ways(record: Store) -> None:
    thread, turn = await begun(record)
    wait = [timedelta(seconds=number) for number in range(7)]
    lines = [a_line(turn, str(number), Role.TOOL, created_at=NOW + wait[number]) for number in range(7)]
    stored: list[Message] = []
    for some in (lines[:1], lines[1:4], lines[4:]):
        stored += await record.write(lambda tx, some=some: tx.messages.append(thread.id, some))  # type: ignore[misc]
    assert [line.index for line in stored] == [1, 2, 3, 4, 5, 6, 7]
    other, other_turn = await begun(record)
    (first,) = await record.write(lambda tx: tx.messages.append(other.id, [a_line(other_turn)]))
    assert first.index == 1  # of its own thread
    for after in (None, *range(9)):
        for limit in (None, 1, 3, 100):
            for newest_first in (False, True):
                found = await record.read(
                    lambda tx, a=after, n=newest_first, m=limit: tx.messages.list(  # type: ignore[misc]
                        thread.id, after=a, newest_first=n, limit=m
                    )
                )
                behind = [
                    line
                    for line in (stored[::-1] if newest_first else stored)
                    if after is None or (line.index < after if newest_first else line.index > after)
                ]
                assert list(found) == behind[:limit]
    assert (
        list(await record.read(lambda tx: tx.messages.list(IDS.new(), after=None, newest_first=False, limit=None)))
        == []
    )


async def test_a_thread_begins_with_its_first_line(record: Store) -> None:
    thread = a_thread(message_count=1)
    turn = a_turn(thread)
    line = a_line(turn, "Hello")

    def begin(tx: Transaction) -> Message:
        add_thread(tx, thread)
        add_turn(tx, turn)
        return tx.messages.begin(thread.id, line)

    first = await record.write(begin)
    assert (first.thread_id, first.index, first.text) == (thread.id, 1, "Hello")
    (second,) = await record.write(lambda tx: tx.messages.append(thread.id, [a_line(turn, "b", Role.TOOL)]))
    assert await lines_of(record, thread) == [first, second]
    assert second.index == 2
    found = await record.read(lambda tx: tx.threads.find(thread.id))
    assert found is not None
    assert found.message_count == 2


async def test_a_line_wakes_its_thread_and_moves_it_on(record: Store) -> None:
    thread = a_thread(state=ThreadState.INACTIVE)
    turn = a_turn(thread)
    later = NOW + timedelta(hours=1, microseconds=7)

    def change(tx: Transaction) -> None:
        add_thread(tx, thread)
        add_turn(tx, turn)
        tx.messages.append(thread.id, [a_line(turn), a_line(turn, "b", Role.TOOL, created_at=later)])

    await record.write(change)
    assert await record.read(lambda tx: tx.threads.get("ada", thread.id)) == replace(
        thread, state=ThreadState.ACTIVE, last_message_at=later, message_count=2
    )


async def test_a_turn_has_one_reply(record: Store) -> None:
    thread, turn = await begun(record)
    exchange = ToolExchange("c1", "note", '{"a": "\\u00e9', 'answer "👋"', is_error=True)
    assert await record.read(lambda tx: tx.messages.question_of(turn.id)) is None
    (question,) = await record.write(lambda tx: tx.messages.append(thread.id, [a_line(turn)]))
    assert await record.read(lambda tx: tx.messages.question_of(turn.id)) == question
    assert await record.read(lambda tx: tx.messages.reply_of(turn.id)) is None
    *_, reply = await record.write(
        lambda tx: tx.messages.append(
            thread.id,
            [
                a_line(turn, "answer", Role.TOOL, tool=exchange),
                a_line(turn, content=(TextPart("a"), RefusalPart("b")), role=Role.ASSISTANT, partial=True),
            ],
        )
    )
    assert (reply.index, reply.text, reply.partial) == (3, "ab", True)
    with pytest.raises(Conflict):
        await record.write(lambda tx: tx.messages.append(thread.id, [a_line(turn, "two", Role.ASSISTANT)]))
    assert await record.read(lambda tx: tx.messages.reply_of(turn.id)) == reply
    _, tool, last = await lines_of(record, thread)
    assert (tool.tool, last) == (exchange, reply)


@pytest.mark.parametrize("name", TEXTS)
async def test_text_comes_back_as_it_went_in(record: Store, name: str) -> None:
    text = TEXTS[name]
    thread, turn = await begun(record)
    parts: tuple[ContentPart, ...] = (TextPart(text), RefusalPart(text))
    exchange = ToolExchange("c", "note", text, text, is_error=False)
    events: tuple[TurnEvent, ...] = (
        TextDelta(text),
        ToolCalled("c", "note", text),
        ToolAnswered("c", text, is_error=False),
        TextDelta(text, refusal=True),
        TextDelta(text),
    )

    def change(tx: Transaction) -> Sequence[Message]:
        assert tx.log.append([LogAppend(turn.id, 1, 1, events)]).accepted == {turn.id}
        tool = a_line(turn, role=Role.TOOL, tool=exchange)
        return tx.messages.append(thread.id, [a_line(turn, content=parts), tool])

    await record.write(change)
    lines = await lines_of(record, thread)
    assert (lines[0].content, lines[1].tool) == (parts, exchange)
    entries = await record.read(lambda tx: tx.log.read(turn.id))
    assert [entry.event for entry in entries[1:]] == list(events)
    assert entries[-1].position == 1 + 3 * len(text) + 2


async def test_texts_of_a_group_come_back_as_they_went_in(record: Store) -> None:
    turns = {name: (await begun(record))[1] for name in TEXTS}
    batch = [
        LogAppend(turn.id, 1, 1, (TextDelta(TEXTS[name]), ToolCalled("c", "note", TEXTS[name])))
        for name, turn in turns.items()
    ]
    outcome = await record.write(lambda tx: tx.log.append(batch))
    assert outcome == Appended(frozenset(append.turn_id for append in batch))
    for append in batch:
        entries = await record.read(lambda tx, of=append.turn_id: tx.log.read(of, 1))  # type: ignore[misc]
        assert entries == place(append.events, 1)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_text_comes_back_as_it_went_in(record: Store, text: str) -> None:
    thread, turn = await begun(record)
    await record.write(lambda tx: tx.log.append([LogAppend(turn.id, 1, 1, (TextDelta(text),))]))
    await record.write(lambda tx: tx.messages.append(thread.id, [a_line(turn, text)]))
    entries = await record.read(lambda tx: tx.log.read(turn.id))
    assert entries[1:] == [LogEntry(1 + len(text), TextDelta(text))]
    (line,) = await lines_of(record, thread)
    assert line.text == text


# Turns


async def test_a_turn_is_kept_whole(record: Store) -> None:
    thread, turn = await begun(record)
    assert await record.read(lambda tx: tx.turns.find(turn.id)) == turn
    assert await record.read(lambda tx: tx.turns.get("ada", turn.id)) == turn
    assert await record.read(lambda tx: tx.turns.get("eve", turn.id)) is None
    assert await record.write(lambda tx: tx.turns.lock(turn.id)) == turn
    assert list(await record.read(lambda tx: tx.turns.unfinished(thread.id))) == [turn]
    ended = replace(
        turn,
        state=TurnState.INCOMPLETE,
        epoch=2,
        last_position=2**40,
        reason=TurnReason.PROVIDER_STALLED,
        usage=Usage(input_tokens=2**40, cached_input_tokens=2, output_tokens=3, reasoning_tokens=4),
        finished_at=NOW + timedelta(seconds=1, microseconds=1),
    )
    await record.write(lambda tx: tx.turns.save_ending(ended))
    assert await record.read(lambda tx: tx.turns.find(turn.id)) == ended
    assert list(await record.read(lambda tx: tx.turns.unfinished(thread.id))) == []
    assert await record.write(lambda tx: tx.turns.lock(turn.id)) == ended
    for unknown in (IDS.new(), "", "x" * 1_000):
        assert await record.read(lambda tx, id_=unknown: tx.turns.find(id_)) is None  # type: ignore[misc]


@pytest.mark.parametrize("state", TurnState)
async def test_only_turns_that_have_not_ended_are_unfinished(record: Store, state: TurnState) -> None:
    ended = state in {TurnState.COMPLETED, TurnState.INCOMPLETE, TurnState.CANCELLED, TurnState.FAILED}
    thread, turn = await begun(record, state=TurnState.RUNNING if ended else state)
    if ended:
        await record.write(lambda tx: tx.turns.save_ending(replace(turn, state=state)))
    assert list(await record.read(lambda tx: tx.turns.unfinished(thread.id))) == ([] if ended else [turn])
    at_work = state in {TurnState.RUNNING, TurnState.WAITING_FOR_CLIENT}
    second = a_turn(thread)
    if at_work:
        with pytest.raises(Conflict):
            await record.write(lambda tx: add_turn(tx, second))
    else:
        await record.write(lambda tx: add_turn(tx, second))
    assert (await record.read(lambda tx: tx.turns.find(second.id)) is None) is at_work


async def test_a_request_id_is_unique_for_caller_and_user(record: Store) -> None:
    async def add(user: str, request_id: str, caller: str = "local") -> Turn:
        thread = a_thread(user)
        turn = a_turn(thread)

        def change(tx: Transaction) -> None:
            add_thread(tx, thread)
            add_turn(tx, turn, request(user, request_id, "print", caller))

        await record.write(change)
        return turn

    first = await add("ada", "r1")
    with pytest.raises(Conflict):
        await add("ada", "r1")
    others = [await add("eve", "r1"), await add("ada", "r1", caller="other"), await add("ada", "R1")]
    for _ in range(2):  # no request id, no rule
        await add("ada", "")
    found = await record.read(lambda tx: tx.turns.by_request("local", "ada", "r1"))
    assert found == (first, "print")
    assert first not in others
    for caller, user, request_id in [("x", "ada", "r1"), ("local", "bob", "r1"), ("local", "ada", "r2")]:
        key = (caller, user, request_id)
        assert await record.read(lambda tx, key=key: tx.turns.by_request(*key)) is None  # type: ignore[misc]


# Queues, claims and leases


def waiting(of: Thread, text: str = "Hello", /, **changes: object) -> tuple[Turn, NewMessage]:
    """A turn that waits in its thread, and its message."""
    values: dict[str, object] = {"state": TurnState.ACCEPTED, "epoch": 0, **changes}
    turn = a_turn(of, **values)
    return turn, a_line(turn, text, created_at=turn.accepted_at)


def enqueue(tx: Transaction, turn: Turn, line: NewMessage) -> None:
    tx.turns.add(turn, request(turn.user_id), waiting=line)
    tx.log.begin(turn.id, [TurnStarted(turn.id, turn.thread_id, turn.agent_id)])


async def queue(store: Store, of: Thread, count: int, **changes: object) -> list[Turn]:
    """Turns that wait in a thread."""
    turns = [waiting(of, **changes) for _ in range(count)]
    for turn, line in turns:
        await store.write(lambda tx, turn=turn, line=line: enqueue(tx, turn, line))  # type: ignore[misc]
    return [turn for turn, _ in turns]


def end(tx: Transaction, turn: Turn) -> str | None:
    return tx.turns.save_ending(replace(turn, state=TurnState.FAILED, epoch=turn.epoch + 1, finished_at=NOW))


async def order(store: Store, of: Thread) -> list[str]:
    """Ids of a thread's turns that have not ended."""
    return [turn.id for turn in await store.read(lambda tx: tx.turns.unfinished(of.id))]


async def test_turns_wait_in_the_order_in_which_they_came(record: Store) -> None:
    thread, first = await begun(record)
    other, _ = await begun(record)
    (elsewhere,) = await queue(record, other, 1)
    rest = await queue(record, thread, 3)
    ids = [turn.id for turn in rest]
    assert await record.read(lambda tx: tx.turns.unfinished(thread.id)) == [first, *rest]
    assert await record.write(lambda tx: end(tx, rest[1])) == ids[0]  # one that was never claimed, out of turn
    assert await record.write(lambda tx: end(tx, first)) == ids[0]
    assert await order(record, thread) == [ids[0], ids[2]]
    (late,) = await queue(record, thread, 1, accepted_at=NOW - timedelta(hours=1))
    assert await order(record, thread) == [ids[0], ids[2], late.id]  # in order of coming, whatever the clock said
    claimed = replace(rest[2], state=TurnState.RUNNING, epoch=1)
    await record.write(lambda tx: tx.turns.save_claim(claimed, "test"))
    assert await order(record, thread) == [ids[2], ids[0], late.id]  # the one at work first
    released = replace(claimed, state=TurnState.ACCEPTED, epoch=2)
    await record.write(lambda tx: tx.turns.save_claim(released, ""))
    assert await order(record, thread) == [ids[0], ids[2], late.id]  # and back in its place
    for turn, following in ((rest[0], ids[2]), (released, late.id), (late, None)):
        assert await record.write(lambda tx, turn=turn: end(tx, turn)) == following  # type: ignore[misc]
    assert await order(record, thread) == []
    assert await order(record, other) != [elsewhere.id]
    (again,) = await queue(record, thread, 1)
    assert await order(record, thread) == [again.id]


async def test_a_released_turn_goes_before_all_that_came_later(record: Store) -> None:
    thread, first = await begun(record)
    rest = await queue(record, thread, 2)
    released = replace(first, state=TurnState.ACCEPTED, epoch=2)
    await record.write(lambda tx: tx.turns.save_claim(released, ""))
    assert await order(record, thread) == [first.id, *(turn.id for turn in rest)]
    assert await record.write(lambda tx: end(tx, released)) == rest[0].id


async def test_a_claim_is_kept_whole_and_takes_the_message_out_of_the_queue(record: Store) -> None:
    thread, first = await begun(record)
    turn, line = waiting(thread, '"quoted" 👋')
    line = replace(line, content=(*line.content, TextPart("second part")))
    await record.write(lambda tx: enqueue(tx, turn, line))
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) == line
    assert await record.read(lambda tx: tx.turns.holder(turn.id)) == Holder("", alive=False)
    claimed = replace(
        turn,
        state=TurnState.RUNNING,
        epoch=1,
        attempt=2,
        model="m",
        provider="p",
        claimed_at=NOW + timedelta(seconds=1, microseconds=1),
    )
    with pytest.raises(Conflict):  # another one is at work
        await record.write(lambda tx: tx.turns.save_claim(claimed, "other"))
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) == line
    await record.write(lambda tx: end(tx, first))
    await record.write(lambda tx: tx.turns.save_claim(claimed, "other"))
    assert await record.read(lambda tx: tx.turns.find(turn.id)) == claimed
    assert (await record.read(lambda tx: tx.turns.holder(turn.id))).owner == "other"
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) is None
    released = replace(claimed, state=TurnState.ACCEPTED, epoch=2)
    await record.write(lambda tx: tx.turns.save_claim(released, ""))
    assert await record.read(lambda tx: tx.turns.find(turn.id)) == released
    assert await record.read(lambda tx: tx.turns.holder(turn.id)) == Holder("", alive=False)
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) is None


async def test_what_another_process_could_go_on_with_is_kept(record: Store) -> None:
    thread, turn = await begun(record)
    await record.write(lambda tx: end(tx, turn))
    running = a_turn(thread, continuation=Continuation("resp_0", 1, 0))
    await record.write(lambda tx: add_turn(tx, running))
    assert await record.read(lambda tx: tx.turns.find(running.id)) == running
    later = Continuation('resp_1 "👋"', 2, 3)
    await record.write(lambda tx: tx.turns.save_continuation(running.id, later))
    assert await record.read(lambda tx: tx.turns.find(running.id)) == replace(running, continuation=later)
    assert await record.read(lambda tx: tx.turns.unfinished(thread.id)) == [replace(running, continuation=later)]


async def test_a_release_of_a_turn_without_a_claim_keeps_its_message(record: Store) -> None:
    thread, _ = await begun(record)
    turn, line = waiting(thread)
    await record.write(lambda tx: enqueue(tx, turn, line))
    await record.write(lambda tx: tx.turns.save_claim(replace(turn, epoch=1), ""))
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) == line


async def test_the_message_of_a_turn_that_ended_in_the_queue_is_gone(record: Store) -> None:
    thread, _ = await begun(record)
    turn, line = waiting(thread)
    await record.write(lambda tx: enqueue(tx, turn, line))
    await record.write(lambda tx: end(tx, turn))
    assert await record.read(lambda tx: tx.turns.waiting_message(turn.id)) is None
    assert await record.read(lambda tx: tx.turns.waiting_message(IDS.new())) is None


async def test_turns_that_wait_for_a_process_come_oldest_first(record: Store) -> None:
    free: list[Turn] = []
    for number in range(4):
        thread, first = await begun(record, accepted_at=NOW - timedelta(hours=number))
        await queue(record, thread, 2)
        if number % 2:
            await record.write(lambda tx, t=first: end(tx, t))  # type: ignore[misc]
            (free_turn, _) = await record.read(lambda tx, t=thread: tx.turns.unfinished(t.id))  # type: ignore[misc]
            free.append(free_turn)
    thread = a_thread()
    await record.write(lambda tx: add_thread(tx, thread))
    (oldest, _) = await queue(record, thread, 2, accepted_at=NOW - timedelta(days=1))
    found = await record.read(lambda tx: tx.turns.unclaimed(10))
    assert list(found) == [oldest.id, *(turn.id for turn in free)]
    assert list(await record.read(lambda tx: tx.turns.unclaimed(2))) == list(found)[:2]


async def test_turns_of_some_users_are_left_out_of_those_that_wait(record: Store) -> None:
    users = ["ada", "eve", "o'brien \\", '"]', "Zoë 👩‍🚀", "%s :x ? $1", "null"]
    first: dict[str, str] = {}
    for number, user in enumerate(users):
        thread = a_thread(user)
        await record.write(lambda tx, t=thread: add_thread(tx, t))  # type: ignore[misc]
        (turn, _) = await queue(record, thread, 2, accepted_at=NOW - timedelta(minutes=number))
        first[user] = turn.id
    oldest_first = list(reversed(first.values()))
    assert list(await record.read(lambda tx: tx.turns.unclaimed(99))) == oldest_first
    for user in users:
        found = await record.read(lambda tx, u=user: tx.turns.unclaimed(99, but_of=[u]))  # type: ignore[misc]
        assert list(found) == [turn_id for turn_id in oldest_first if turn_id != first[user]]
    hiding = frozenset(users) - {"ada", "eve"}
    assert await record.read(lambda tx: tx.turns.unclaimed(1, but_of=hiding)) == [first["eve"]]
    # More than a statement can have parameters, on any database.
    many = [*(f"user{number}" for number in range(70_000)), *hiding]
    assert await record.read(lambda tx: tx.turns.unclaimed(99, but_of=many)) == [first["eve"], first["ada"]]
    assert await record.read(lambda tx: tx.turns.unclaimed(99, but_of=users)) == []


@pytest.mark.parametrize("state", [TurnState.RUNNING, TurnState.WAITING_FOR_CLIENT])
async def test_turns_are_held_by_whoever_claimed_them_and_abandoned_without_a_lease(
    record: Store, state: TurnState
) -> None:
    turns = [
        (await begun(record, state=state, epoch=number + 1, accepted_at=NOW - timedelta(hours=number)))[1]
        for number in range(3)
    ]
    ended = (await begun(record))[1]
    await record.write(lambda tx: end(tx, ended))
    queued, _ = await begun(record)
    await queue(record, queued, 1)
    assert await record.read(lambda tx: tx.turns.held_by("nobody")) == {}
    held = await record.read(lambda tx: tx.turns.held_by("test"))
    assert {turn.id: held.get(turn.id) for turn in turns} == {turn.id: turn.epoch for turn in turns}
    assert len(held) == 4
    abandoned = await record.read(lambda tx: tx.turns.abandoned(10))
    assert list(abandoned)[:3] == [turn.id for turn in reversed(turns)]
    assert len(abandoned) == 4
    assert list(await record.read(lambda tx: tx.turns.abandoned(2))) == list(abandoned)[:2]
    await record.write(lambda tx: tx.leases.renew("other", 60))
    assert len(await record.read(lambda tx: tx.turns.abandoned(10))) == 4
    await record.write(lambda tx: tx.leases.renew("test", 60))
    assert list(await record.read(lambda tx: tx.turns.abandoned(10))) == []
    assert await record.read(lambda tx: tx.turns.holder(turns[0].id)) == Holder("test", alive=True)
    await record.write(lambda tx: tx.leases.end("test"))
    assert list(await record.read(lambda tx: tx.turns.abandoned(10))) == list(abandoned)
    assert await record.read(lambda tx: tx.turns.holder(turns[0].id)) == Holder("test", alive=False)
    assert await record.read(lambda tx: tx.turns.holder(IDS.new())) == Holder("", alive=False)


async def test_a_lease_lasts_until_it_runs_out_or_ends(record: Store) -> None:
    async def renew(owner: str, seconds: float = 60) -> bool:
        return await record.write(lambda tx: tx.leases.renew(owner, seconds))

    async def others(owner: str) -> bool:
        return await record.read(lambda tx: tx.leases.others(owner))

    assert not await renew("a")
    assert await renew("a")
    assert (await others("a"), await others("b")) == (False, True)
    assert await renew("a", -1)
    assert not await others("b")  # it has run out
    assert not await renew("a")
    assert await others("b")
    await record.write(lambda tx: tx.leases.end("a"))
    assert not await others("b")
    assert not await renew("a")
    for owner in "bcd":
        assert not await renew(owner)
    await record.write(lambda tx: tx.leases.end_others("c"))
    assert (await others("c"), await others("a")) == (False, True)
    assert await renew("c")
    for owner in "abd":
        assert not await renew(owner)
    await record.write(lambda tx: tx.leases.end("unknown"))


# Deletion


async def test_a_deleted_thread_leaves_its_tombstone(record: Store) -> None:
    threads = [(await written(record))[0] for _ in range(2)]
    kept, gone = threads
    for thread in threads:
        (turn,) = await record.read(lambda tx, t=thread: tx.turns.unfinished(t.id))  # type: ignore[misc]
        state = ProviderState(provider="openai", conversation_id="conv_2")

        def fill(
            tx: Transaction, thread: Thread = thread, turn: Turn = turn, state: ProviderState = state
        ) -> None:
            tx.messages.append(thread.id, [a_line(turn), a_line(turn, "a", Role.ASSISTANT)])
            tx.threads.save_provider_state(thread.id, state)

        await record.write(fill)
        await queue(record, thread, 2)
    before = [await record.read(lambda tx, look=look: look(tx, kept)) for look in LOOKS]  # type: ignore[misc]
    lost = await record.read(lambda tx: tx.turns.unfinished(gone.id))
    assert await record.read(lambda tx: tx.threads.tombstone(gone.id)) is None

    def delete(tx: Transaction) -> None:
        assert tx.threads.lock("ada", gone.id)
        tx.threads.delete(gone.id, NOW)

    other = a_thread()
    await together(record, [lambda tx: add_thread(tx, other), delete, lambda tx: tx.leases.renew("x", 1)])
    assert await record.read(lambda tx: tx.threads.tombstone(gone.id)) == Tombstone(
        thread_id=gone.id, erasure_id="", deleted_at=NOW
    )
    assert await record.read(lambda tx: tx.threads.find(gone.id)) is None
    assert await record.read(lambda tx: tx.threads.find(other.id)) == other
    assert await lines_of(record, gone) == []
    assert await order(record, gone) == []
    for turn in lost:
        assert await record.write(lambda tx, t=turn: tx.turns.lock(t.id)) is None  # type: ignore[misc]
        assert list(await record.read(lambda tx, t=turn: tx.log.read(t.id))) == []  # type: ignore[misc]
        assert await record.read(lambda tx, t=turn: tx.messages.reply_of(t.id)) is None  # type: ignore[misc]
        append = LogAppend(turn.id, turn.epoch, turn.last_position, (TextDelta("late"),))
        assert await record.write(lambda tx, a=append: tx.log.append([a])) == NOTHING  # type: ignore[misc]
    after = [await record.read(lambda tx, look=look: look(tx, kept)) for look in LOOKS]  # type: ignore[misc]
    assert after == before
    assert all(after)
    assert await record.read(lambda tx: tx.threads.tombstone(kept.id)) is None


LOOKS: tuple[Callable[[Transaction, Thread], object], ...] = (
    lambda tx, thread: tx.threads.find(thread.id),
    lambda tx, thread: list(tx.messages.list(thread.id, after=None, newest_first=False, limit=None)),
    lambda tx, thread: list(tx.turns.unfinished(thread.id)),
    lambda tx, thread: [list(tx.log.read(turn.id)) for turn in tx.turns.unfinished(thread.id)],
    lambda tx, thread: tx.threads.provider_state(thread.id),
)


async def test_a_deletion_that_is_taken_back_leaves_everything(record: Store) -> None:
    thread, turn = await begun(record)

    def change(tx: Transaction) -> None:
        tx.threads.delete(thread.id, NOW)
        raise ValueError

    with pytest.raises(ValueError):
        await record.write(change)
    assert await record.read(lambda tx: tx.threads.find(thread.id)) == thread
    assert await record.read(lambda tx: tx.turns.find(turn.id)) == turn
    assert len(await record.read(lambda tx: tx.log.read(turn.id))) == 1
    assert await record.read(lambda tx: tx.threads.tombstone(thread.id)) is None


async def test_a_deleted_threads_request_ids_are_free_again(record: Store) -> None:
    for _ in range(2):
        thread = a_thread()

        def change(tx: Transaction, thread: Thread = thread) -> None:
            add_thread(tx, thread)
            add_turn(tx, a_turn(thread), request(request_id="r1"))

        await record.write(change)
        await record.write(lambda tx, t=thread: tx.threads.delete(t.id, NOW))  # type: ignore[misc]
        assert await record.read(lambda tx: tx.turns.by_request("local", "ada", "r1")) is None


# The log

NOTHING = Appended(frozenset())


def only(turn: Turn) -> Appended:
    """What became of a batch of which this turn's events are in, and nobody is busy."""
    return Appended(frozenset({turn.id}))


async def test_an_append_is_fenced(record: Store) -> None:
    (_, good), (_, other) = await begun(record), await begun(record)
    _, ended = await begun(record)
    await record.write(lambda tx: tx.turns.save_ending(replace(ended, state=TurnState.COMPLETED)))
    _, waiting = await begun(record, state=TurnState.WAITING_FOR_CLIENT)
    text = (TextDelta("abc"),)
    refused = {
        "an old epoch": LogAppend(good.id, 0, 1, text),
        "an epoch to come": LogAppend(good.id, 2, 1, text),
        "an old position": LogAppend(good.id, 1, 0, text),
        "a position to come": LogAppend(good.id, 1, 2, text),
        "an ended turn": LogAppend(ended.id, 1, 1, text),
        "a waiting turn": LogAppend(waiting.id, 1, 1, text),
        "an unknown turn": LogAppend(IDS.new(), 1, 1, text),
    }
    for why, append in refused.items():
        assert await record.write(lambda tx, a=append: tx.log.append([a])) == NOTHING, why  # type: ignore[misc]
        mixed = [append, LogAppend(other.id, 1, 1 + 3 * list(refused).index(why), text)]
        assert await record.write(lambda tx, m=mixed: tx.log.append(m)) == only(other), why  # type: ignore[misc]
    for turn, position in [(good, 1), (ended, 1), (waiting, 1), (other, 1 + 3 * len(refused))]:
        found = await record.read(lambda tx, t=turn: tx.turns.find(t.id))  # type: ignore[misc]
        assert found is not None
        entries = await record.read(lambda tx, t=turn: tx.log.read(t.id))  # type: ignore[misc]
        assert found.last_position == position == entries[-1].position
    assert await record.write(lambda tx: tx.log.append([LogAppend(good.id, 1, 1, text)])) == only(good)
    again = await record.write(lambda tx: tx.log.append([LogAppend(good.id, 1, 1, text)]))
    assert again == NOTHING  # a repeat adds nothing
    assert await record.write(lambda tx: tx.log.append([])) == NOTHING


async def test_the_appends_of_a_group_stand_each_by_itself(record: Store) -> None:
    turns = [(await begun(record))[1] for _ in range(5)]
    first = [LogAppend(turn.id, 1, 1, (TextDelta("abc"),)) for turn in turns]
    outcome = await record.write(lambda tx: tx.log.append(first))
    assert outcome == Appended(frozenset(turn.id for turn in turns))
    restarted, repeated, called, outdated, spoken = turns
    more = [
        LogAppend(restarted.id, 1, 4, (AttemptRestarted(2, "PROVIDER_STALLED"), TextDelta("d"))),
        LogAppend(repeated.id, 1, 1, (TextDelta("abc"),)),
        LogAppend(called.id, 1, 4, (ToolCalled("c", "note", "{}"),)),
        LogAppend(outdated.id, 2, 4, (TextDelta("d"),)),
        LogAppend(spoken.id, 1, 4, (TextDelta("d"), TextDelta("e", refusal=True))),
    ]
    outcome = await record.write(lambda tx: tx.log.append(more))
    assert outcome == Appended(frozenset({restarted.id, called.id, spoken.id}))
    for turn, begin, append in zip(turns, first, more, strict=True):
        events = begin.events + append.events * (turn.id in outcome.accepted)
        entries = await record.read(lambda tx, t=turn: tx.log.read(t.id, 1))  # type: ignore[misc]
        found = await record.read(lambda tx, t=turn: tx.turns.find(t.id))  # type: ignore[misc]
        assert entries == place(events, 1)
        assert found is not None
        assert (found.last_position, found.attempt) == (entries[-1].position, 2 if turn is restarted else 1)


EVENTS: tuple[tuple[TurnEvent, ...], ...] = (
    (TextDelta("Grüße 👩‍🚀"), TextDelta("!")),
    (ToolCalled("c1", "note", '{"a": 1'), ToolCalled("c2", "note", '["f"]]')),
    (ToolAnswered("c1", '["f"]]', is_error=False), ToolAnswered("c2", "no", is_error=True), TextDelta('["f"]]')),
    (AttemptRestarted(2, "PROVIDER_STALLED"), TextDelta("e\u0301")),
    (TextDelta("no", refusal=True), TextDelta("yes")),
)


async def written(store: Store) -> tuple[Thread, Turn, int]:
    """A running turn with a log of several commits, and its position."""
    thread, turn = await begun(store)
    position = 1
    for events in EVENTS:
        append = LogAppend(turn.id, 1, position, events)
        assert await store.write(lambda tx, a=append: tx.log.append([a])) == only(turn)  # type: ignore[misc]
        position += sum(map(extent, events))
    return thread, turn, position


async def test_a_log_is_read_behind_any_position(record: Store) -> None:
    _, turn, last = await written(record)
    entries = await record.read(lambda tx: tx.log.read(turn.id))
    whole = spread(entries)
    assert [position for position, _ in whole] == list(range(1, last + 1))
    assert [entry.event for entry in entries[1:]] == [event for events in EVENTS for event in events]
    for after in range(last + 3):
        rest = await record.read(lambda tx, a=after: tx.log.read(turn.id, a))  # type: ignore[misc]
        assert spread(rest) == [item for item in whole if item[0] > after]
    assert list(await record.read(lambda tx: tx.log.read(IDS.new()))) == []


async def test_folding_keeps_every_event_and_every_cursor(record: Store) -> None:
    thread, turn, last = await written(record)
    before = await record.read(lambda tx: tx.log.read(turn.id))

    def end(tx: Transaction) -> tuple[Turn, Message]:
        (reply,) = tx.messages.append(thread.id, [a_line(turn, "yes", Role.ASSISTANT)])
        ended = replace(
            turn, state=TurnState.COMPLETED, attempt=2, epoch=2, last_position=last + 1, finished_at=NOW
        )
        tx.turns.save_ending(ended)
        tx.log.fold(turn.id, [*(entry.event for entry in before), TurnFinished(ended, reply)])
        return ended, reply

    ended, reply = await record.write(end)
    whole = [*spread(before), (last + 1, TurnFinished(ended, reply))]
    for after in range(last + 2):
        rest = await record.read(lambda tx, a=after: tx.log.read(turn.id, a))  # type: ignore[misc]
        assert spread(rest) == whole[after:]


async def test_a_log_that_only_looks_ended_is_not(record: Store) -> None:
    _, turn = await begun(record)
    await record.write(lambda tx: tx.log.append([LogAppend(turn.id, 1, 1, (TextDelta('x["f"]]'),))]))
    entries = await record.read(lambda tx: tx.log.read(turn.id, 2))
    assert entries == [LogEntry(8, TextDelta('["f"]]'))]


# Goals


async def test_a_goal_is_stored_once_for_each_key(record: Store) -> None:
    def goal(text: str, user: str = "ada", domain: Domain = Domain.CAREER, hours: int = 0) -> Goal:
        return Goal(
            id=IDS.new(),
            user_id=user,
            domain=domain,
            text=text,
            commitment='tomorrow "👋"',
            due=date(2026, 2, 28) if hours else None,
            created_at=NOW + timedelta(hours=hours),
        )

    await record.write(lambda tx: [tx.users.ensure(user, NOW) for user in ("ada", "eve")])
    first = goal("run")
    assert await record.write(lambda tx: tx.goals.add(first, "t:c1")) == first
    assert await record.write(lambda tx: tx.goals.add(goal("run again"), "t:c1")) == first
    second, tie, elsewhere = goal("read", hours=2), goal("rest", hours=2), goal("x", domain=Domain.HEALTH)
    for number, added in enumerate([second, tie, elsewhere, goal("mine", "eve")]):
        await record.write(lambda tx, g=added, n=number: tx.goals.add(g, f"k{n}"))  # type: ignore[misc]
    listed = await record.read(lambda tx: tx.goals.list("ada", Domain.CAREER, 10))
    assert list(listed) == [*sorted([second, tie], key=lambda goal: goal.id, reverse=True), first]
    assert list(await record.read(lambda tx: tx.goals.list("ada", Domain.CAREER, 1))) == [listed[0]]
    assert [goal.text for goal in await record.read(lambda tx: tx.goals.list("eve", Domain.CAREER, 9))] == ["mine"]


async def test_a_key_may_be_as_long_as_gateways_make_the_ids_of_calls(record: Store) -> None:
    def goal(text: str) -> Goal:
        return Goal(
            id=IDS.new(),
            user_id="ada",
            domain=Domain.CAREER,
            text=text,
            commitment="",
            due=None,
            created_at=NOW,
        )

    await record.write(lambda tx: tx.users.ensure("ada", NOW))
    for length in (255, 256, 70_000):
        first, other = goal("first"), goal("other")
        key = f"turn:{'c' * (length - 6)}"
        assert await record.write(lambda tx, g=first, k=f"{key}1": tx.goals.add(g, k)) == first  # type: ignore[misc]
        assert await record.write(lambda tx, k=f"{key}1": tx.goals.add(goal("again"), k)) == first  # type: ignore[misc]
        assert await record.write(lambda tx, g=other, k=f"{key}2": tx.goals.add(g, k)) == other  # type: ignore[misc]
    assert len(await record.read(lambda tx: tx.goals.list("ada", Domain.CAREER, 99))) == 6
