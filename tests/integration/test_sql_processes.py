"""What processes that share a PostgreSQL database see of each other, and what is left of what is deleted."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from adapters.sql.engines import BUSY_TIMEOUT, SESSION_SETTINGS
from adapters.sql.fiber import apart
from adapters.sql.store import SqlStore
from adapters.sql.tables import metadata
from core.model.attachment import FilePart, ImagePart
from core.model.erasure import Counts
from core.model.events import AttemptRestarted, TextDelta, TurnStarted
from core.model.message import Role
from core.model.thread import ProviderState, Thread
from core.model.turn import Turn, TurnState
from core.ports.store import UNCLAIMED, Transaction
from core.ports.turns import Appended, Holder, LogAppend
from core.use_cases.erase_thread import erase_thread
from doubles import CATALOG, ManualClock
from harness import until
from records import IDS, NOW, a_line, a_thread, a_turn, request

TEXT = (TextDelta("abc"),)


def add(tx: Transaction, thread: Thread, turn: Turn) -> None:
    tx.users.ensure("ada", NOW)
    tx.threads.add(thread)
    tx.turns.add(turn, request(), owner="one")
    tx.log.begin(turn.id, [TurnStarted(turn.id, thread.id, turn.agent_id)])
    tx.messages.append(thread.id, [a_line(turn)])


def adding(thread: Thread, turn: Turn) -> Callable[[Transaction], None]:
    return lambda tx: add(tx, thread, turn)


async def begun(store: SqlStore) -> tuple[Thread, Turn]:
    """A thread with a running turn."""
    thread = a_thread()
    turn = a_turn(thread)
    await store.write(adding(thread, turn))
    return thread, turn


async def append(store: SqlStore, *appends: LogAppend) -> Appended:
    return await store.write(lambda tx: tx.log.append(appends))


@asynccontextmanager
async def half_way(store: SqlStore, *appends: LogAppend) -> AsyncIterator[None]:
    """Appends to logs, and commits that only when it is left."""
    inside, leave = threading.Event(), threading.Event()

    def appending(tx: Transaction) -> Appended:
        appended = tx.log.append(appends)
        tx.now()  # has it done
        inside.set()
        assert apart(lambda: leave.wait(60))
        return appended

    task = asyncio.create_task(store.write(appending))
    await until(inside.is_set)
    try:
        yield
    finally:
        leave.set()
        assert (await task).accepted == {each.turn_id for each in appends}


@asynccontextmanager
async def processes(url: str, *clocks: ManualClock) -> AsyncIterator[Sequence[SqlStore]]:
    """A store for each clock."""
    stores = [SqlStore(url, clock) for clock in clocks]
    await stores[0].write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    try:
        yield stores
    finally:
        for store in stores:
            await store.aclose()


@contextmanager
def held(url: str, lock: str, *parameters: object) -> Iterator[psycopg.Connection[Any]]:
    """Somebody else's transaction that holds what a statement locks."""
    with psycopg.connect(url) as other:
        other.execute(lock.encode(), parameters)
        yield other
        other.rollback()


def waiting(url: str) -> int:
    """How many wait for a lock."""
    with psycopg.connect(url) as watch:
        return int((watch.execute(b"SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() or [0])[0])


# The log


@pytest.mark.parametrize(
    "lock", ["SELECT 1 FROM turns WHERE id = %s FOR UPDATE", "UPDATE turns SET epoch = 7 WHERE id = %s"]
)
async def test_an_append_waits_for_no_lock(postgres_url: str, clock: ManualClock, lock: str) -> None:
    async with processes(postgres_url, clock) as (store,):
        (_, busy), (_, free), (_, lost) = [await begun(store) for _ in range(3)]
        batch = [LogAppend(turn.id, 1, 1, TEXT) for turn in (free, busy)]
        batch += [LogAppend(lost.id, 9, 1, TEXT), LogAppend(IDS.new(), 1, 1, TEXT)]
        with held(postgres_url, lock, busy.id):
            assert await append(store, *batch) == Appended(frozenset({free.id}), frozenset({busy.id}))
            assert await append(store, batch[1]) == Appended(frozenset(), frozenset({busy.id}))
        assert await append(store, LogAppend(busy.id, 1, 1, TEXT)) == Appended(frozenset({busy.id}))
        assert len(await store.read(lambda tx: tx.log.read(lost.id))) == 1


async def test_whoever_only_refers_to_a_turn_does_not_make_it_busy(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock) as (store,):
        _, turn = await begun(store)
        with held(postgres_url, "SELECT 1 FROM turns WHERE id = %s FOR KEY SHARE", turn.id):
            assert await append(store, LogAppend(turn.id, 1, 1, TEXT)) == Appended(frozenset({turn.id}))


async def test_an_append_that_lost_while_it_was_busy_is_neither(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock, clock) as (one, two):
        _, turn = await begun(one)
        claimed = replace(turn, epoch=2)
        await two.write(lambda tx: tx.turns.save_claim(claimed, "two"))
        assert await append(one, LogAppend(turn.id, 1, 1, TEXT)) == Appended(frozenset())
        assert await append(two, LogAppend(turn.id, 2, 1, TEXT)) == Appended(frozenset({turn.id}))


async def test_a_new_attempt_counts_from_the_commit_that_says_so(database_url: str, clock: ManualClock) -> None:
    async with processes(database_url, clock) as (store,):
        (_, again), (_, still), (_, lost) = [await begun(store) for _ in range(3)]
        restarted = (*TEXT, AttemptRestarted(2, "x"), AttemptRestarted(3, "x"), *TEXT)
        await append(
            store,
            LogAppend(again.id, 1, 1, restarted),
            LogAppend(still.id, 1, 1, TEXT),
            LogAppend(lost.id, 5, 1, restarted),
        )
        for turn, attempt in ((again, 3), (still, 1), (lost, 1)):
            found = await store.read(lambda tx, t=turn: tx.turns.find(t.id))  # type: ignore[misc]
            assert found is not None
            assert found.attempt == attempt


# Locks


async def test_a_turn_is_locked_behind_its_thread(postgres_url: str, clock: ManualClock) -> None:
    """Whoever holds a thread holds its turns: two processes can't wait for each other."""
    async with processes(postgres_url, clock) as (store,):
        thread, turn = await begun(store)
        with held(postgres_url, "SELECT 1 FROM assistant_threads WHERE id = %s FOR UPDATE", thread.id) as other:
            locking = asyncio.create_task(store.write(lambda tx: tx.turns.lock(turn.id)))
            await until(lambda: waiting(postgres_url) == 1)
            other.execute(b"SELECT 1 FROM turns WHERE id = %s FOR UPDATE NOWAIT", [turn.id])
            other.rollback()
            assert await locking == turn


Look = Callable[[Transaction, Thread, Turn], object]
LOCKS: dict[str, tuple[Look, str, str]] = {
    "Threads.lock": (
        lambda tx, thread, _: tx.threads.lock("ada", thread.id),
        "assistant_threads",
        "NO KEY UPDATE",
    ),
    "Turns.lock": (lambda tx, _, turn: tx.turns.lock(turn.id), "turns", "NO KEY UPDATE"),
    "Users.lock": (lambda tx, *_: tx.users.lock("ada"), "users", "NO KEY UPDATE"),
    "Users.held": (lambda tx, *_: tx.users.held("ada"), "users", "NO KEY UPDATE"),
    "Copies.keep": (lambda tx, thread, _: tx.copies.keep(thread.id, "p", ["r"]), "assistant_threads", "UPDATE"),
}
"""What keeps others away from a row, and what they would need: to change it, or to delete it as well."""


@pytest.mark.parametrize("name", LOCKS)
async def test_others_are_kept_away_until_the_transaction_ends(
    postgres_url: str, clock: ManualClock, name: str
) -> None:
    look, table, strength = LOCKS[name]
    async with processes(postgres_url, clock) as (store,):
        thread, turn = await begun(store)
        row = {"assistant_threads": thread.id, "turns": turn.id, "users": "ada"}[table]
        taking = f"SELECT 1 FROM {table} WHERE id = %s FOR {strength} NOWAIT"

        def change(tx: Transaction) -> None:
            look(tx, thread, turn)
            tx.now()  # has it done
            with pytest.raises(psycopg.errors.LockNotAvailable), held(postgres_url, taking, row):
                raise AssertionError

        await store.write(change)
        with held(postgres_url, taking, row):
            assert True  # it is free again


async def test_a_copy_that_another_process_takes_is_left_out(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock) as (store,):
        await store.write(lambda tx: tx.copies.keep("gone", "p", ["a", "b", "c"]))
        with held(postgres_url, "SELECT 1 FROM copies WHERE ref = %s FOR UPDATE", "b"):
            taken = await store.write(lambda tx: tx.copies.claim("p", 9, 60))
        assert [copy.ref for copy in taken] == ["a", "c"]
        assert [copy.ref for copy in await store.write(lambda tx: tx.copies.claim("p", 9, 60))] == ["b"]


async def test_what_two_processes_have_erased_is_added_up(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SESSION_SETTINGS, "lock_timeout", "60000")
    async with processes(postgres_url, clock) as (store,):
        await store.write(lambda tx: tx.erasures.open("one", "ada", NOW))
        more = "UPDATE erasures SET erased = jsonb_set(erased::jsonb, '{messages}', '3')::json WHERE id = %s"
        with held(postgres_url, more, "one") as other:
            noting = asyncio.create_task(
                store.write(lambda tx: tx.erasures.note("one", Counts(threads=1, messages=2), NOW))
            )
            await until(lambda: waiting(postgres_url) == 1)
            other.commit()
            await noting
        receipt = await store.read(lambda tx: tx.erasures.find("one"))
        assert receipt is not None
        assert receipt.erased == Counts(threads=1, messages=5)


@pytest.mark.parametrize("alone", [True, False])
async def test_whoever_takes_a_turn_sees_what_was_appended_until_then(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """An append changes no row of the turn: the lock alone keeps it and a claim apart."""
    monkeypatch.setitem(SESSION_SETTINGS, "lock_timeout", "60000")
    async with processes(postgres_url, clock, clock) as (owner, other):
        turns = [(await begun(owner))[1] for _ in range(1 if alone else 2)]
        turn = turns[0]
        async with half_way(owner, *(LogAppend(each.id, 1, 1, TEXT) for each in turns)):
            locking = asyncio.create_task(other.write(lambda tx: tx.turns.lock(turn.id)))
            await until(lambda: waiting(postgres_url) == 1)
        assert await locking == replace(turn, last_position=4)


@pytest.mark.parametrize("alone", [True, False])
async def test_whoever_erases_a_thread_erases_what_was_appended_until_then(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """Nothing but the lock keeps a row of a log from outliving its turn: PostgreSQL has no foreign key there."""
    monkeypatch.setitem(SESSION_SETTINGS, "lock_timeout", "60000")
    async with processes(postgres_url, clock, clock) as (owner, other):
        pairs = [await begun(owner) for _ in range(1 if alone else 2)]
        async with half_way(owner, *(LogAppend(turn.id, 1, 1, TEXT) for _, turn in pairs)):
            erasing = asyncio.create_task(other.write(lambda tx: erase_thread(tx, "ada", pairs[0][0].id)))
            await until(lambda: waiting(postgres_url) == 1)
        erased = await erasing
        assert erased is not None
        assert erased.unfinished == (replace(pairs[0][1], last_position=4),)
        assert rows(postgres_url, "turn_log") == 2 * (len(pairs) - 1)
        assert await append(owner, LogAppend(pairs[0][1].id, 1, 4, TEXT)) == Appended(frozenset())
        assert rows(postgres_url, "turn_log") == 2 * (len(pairs) - 1)


async def test_an_append_that_meets_a_claim_is_refused_by_it(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SESSION_SETTINGS, "lock_timeout", "60000")
    async with processes(postgres_url, clock) as (store,):
        _, turn = await begun(store)
        with held(postgres_url, "UPDATE turns SET epoch = 2 WHERE id = %s RETURNING 1", turn.id) as claim:
            appending = asyncio.create_task(append(store, LogAppend(turn.id, 1, 1, TEXT)))
            await until(lambda: waiting(postgres_url) == 1)
            claim.commit()
            assert await appending == Appended(frozenset())
        assert [entry.position for entry in await store.read(lambda tx: tx.log.read(turn.id))] == [1]


# Leases


async def test_leases_count_in_the_databases_time(postgres_url: str) -> None:
    fast, slow = ManualClock(), ManualClock()
    fast.advance(days=1000)
    slow.advance(days=-1000)
    async with processes(postgres_url, fast, slow) as stores:
        _, turn = await begun(stores[0])
        for own, other in (stores, stores[::-1]):
            await own.write(lambda tx: tx.leases.renew("one", 60))
            assert await other.read(lambda tx: tx.leases.others("two"))
            assert await other.read(lambda tx: tx.turns.holder(turn.id)) == Holder("one", alive=True)
            assert list(await other.read(lambda tx: tx.turns.abandoned(9))) == []
            assert await other.write(lambda tx: tx.leases.renew("one", -1))
            assert not await own.read(lambda tx: tx.leases.others("two"))
            assert list(await own.read(lambda tx: tx.turns.abandoned(9))) == [turn.id]
            assert not await own.write(lambda tx: tx.leases.renew("one", 60))
        with psycopg.connect(postgres_url) as server:
            row = server.execute(b"SELECT lease_until - clock_timestamp() FROM leases").fetchone()
        assert row is not None
        assert timedelta(seconds=50) < row[0] <= timedelta(seconds=60)


async def test_what_has_run_out_does_not_pile_up(database_url: str, clock: ManualClock) -> None:
    async with processes(database_url, clock) as (store,):
        for number in range(5):
            await store.write(lambda tx, n=number: tx.leases.renew(f"process-{n}", -1))  # type: ignore[misc]
        await store.write(lambda tx: tx.leases.renew("kept", 60))
        await store.write(lambda tx: tx.leases.renew("new", 60))
        assert rows(database_url, "leases") == 2


# Hints


class Heard:
    """What a store's listener was told."""

    def __init__(self, store: SqlStore) -> None:
        self.sets: list[frozenset[str]] = []
        assert store.listen(self.sets.append)

    @property
    def ids(self) -> frozenset[str]:
        return frozenset().union(*self.sets)

    async def connected(self, times: int = 1) -> None:
        await until(lambda: self.sets.count(frozenset()) >= times)


async def test_an_embedded_database_gives_no_hints(sqlite_url: str, clock: ManualClock) -> None:
    async with processes(sqlite_url, clock) as (store,):
        assert not store.listen(lambda _: None)


async def test_changes_are_heard_by_other_processes_once_they_can_be_read(
    postgres_url: str, clock: ManualClock
) -> None:
    async with processes(postgres_url, clock, clock) as (one, two):
        heard, own = Heard(two), Heard(one)
        await heard.connected()
        await own.connected()
        assert heard.sets == [frozenset()]
        thread, turn = await begun(one)
        await until(lambda: heard.ids == {turn.id})
        queued, claimed = a_turn(thread, state=TurnState.ACCEPTED), replace(turn, epoch=2)
        released = replace(turn, state=TurnState.ACCEPTED, epoch=3)
        changes: list[tuple[Callable[[Transaction], object], set[str]]] = [
            (lambda tx: tx.log.append([LogAppend(turn.id, 1, 1, TEXT)]), {turn.id}),
            (lambda tx: tx.log.append([LogAppend(turn.id, 7, 1, TEXT)]), set()),
            (lambda tx: tx.threads.describe(thread.id, title="x", metadata=None), set()),
            (lambda tx: tx.turns.add(queued, request(), waiting=a_line(queued)), {queued.id, UNCLAIMED}),
            (lambda tx: tx.turns.save_claim(claimed, "one"), {turn.id}),
            (lambda tx: tx.turns.save_claim(released, ""), {turn.id, UNCLAIMED}),
            (lambda tx: tx.turns.save_ending(replace(released, state=TurnState.FAILED)), {turn.id, UNCLAIMED}),
            (lambda tx: tx.turns.save_ending(replace(queued, state=TurnState.FAILED)), {queued.id}),
            (lambda tx: tx.leases.renew("one", 60), set()),
            (lambda tx: tx.leases.end("one"), {UNCLAIMED}),
            (lambda tx: tx.threads.delete(thread.id, NOW), {turn.id, queued.id}),
        ]
        for change, ids in changes:
            heard.sets.clear()
            marker = a_thread()
            mark = a_turn(marker)
            await one.write(change)
            await one.write(adding(marker, mark))
            await until(lambda m=mark: m.id in heard.ids)
            assert heard.ids - {mark.id} == ids
            assert await two.read(lambda tx, m=mark: tx.turns.find(m.id)) == mark  # type: ignore[misc]
        _, theirs = await begun(two)
        await until(lambda: theirs.id in own.ids)
        assert own.ids == {theirs.id}  # nobody is told of its own changes


async def test_many_changes_at_once_are_all_heard(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock, clock) as (one, two):
        heard = Heard(two)
        await heard.connected()
        pairs = [(thread := a_thread(), a_turn(thread)) for _ in range(450)]

        def change(tx: Transaction) -> None:
            for thread, turn in pairs:
                add(tx, thread, turn)

        await one.write(change)
        await until(lambda: heard.ids == {turn.id for _, turn in pairs})
        await append(one, *(LogAppend(turn.id, 1, 1, TEXT) for _, turn in pairs))
        assert await two.read(lambda tx: len(tx.log.read(pairs[0][1].id))) == 2


async def test_a_change_that_is_taken_back_takes_no_hint_of_others_along(
    postgres_url: str, clock: ManualClock
) -> None:
    async with processes(postgres_url, clock, clock) as (one, two):
        heard = Heard(two)
        await heard.connected()
        reached, go_on = threading.Event(), threading.Event()

        def hold(_: Transaction) -> None:
            reached.set()
            assert apart(lambda: go_on.wait(20))

        def fail(tx: Transaction) -> None:
            thread = a_thread()
            add(tx, thread, a_turn(thread))
            raise ValueError

        threads = [a_thread() for _ in range(3)]
        turns = [a_turn(thread) for thread in threads]
        tasks = [asyncio.create_task(one.write(hold))]
        await until(reached.is_set)
        for thread, turn in zip(threads, turns, strict=True):
            tasks.append(asyncio.create_task(one.write(adding(thread, turn))))
            tasks.append(asyncio.create_task(one.write(fail)))
        await asyncio.sleep(0)  # all of them are submitted
        go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: heard.ids >= {turn.id for turn in turns})


async def test_a_listener_that_is_cut_off_hears_again(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock, clock) as (one, two):
        heard = Heard(two)
        for time in (1, 2, 3):
            await heard.connected(time)
            _, turn = await begun(one)
            await until(lambda t=turn: t.id in heard.ids)
            with psycopg.connect(postgres_url, autocommit=True) as killer:
                killer.execute(
                    b"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
                    b" AND datname = current_database()"
                )
        await heard.connected(4)


async def test_a_listener_ends_with_its_store(postgres_url: str, clock: ManualClock) -> None:
    async with processes(postgres_url, clock) as (store,):
        await Heard(store).connected()
    assert not [thread for thread in threading.enumerate() if thread.name == "store-listen"]


# Deletion


def rows(url: str, table: str, where: str = "TRUE") -> int:
    """How many rows a table has."""
    query = f"SELECT count(*) FROM {table} WHERE {where}"
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            return int(file.execute(query).fetchone()[0])
    with psycopg.connect(url) as server:
        row = server.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


async def test_nothing_of_a_deleted_thread_is_left_but_its_tombstone(
    database_url: str, clock: ManualClock
) -> None:
    async with processes(database_url, clock) as (store,):
        pairs = [await begun(store) for _ in range(2)]
        for thread, turn in pairs:
            waiting = a_turn(thread, state=TurnState.ACCEPTED)

            def fill(tx: Transaction, thread: Thread = thread, turn: Turn = turn, waiting: Turn = waiting) -> None:
                tx.messages.append(thread.id, [a_line(turn, role=Role.TOOL), a_line(turn, role=Role.ASSISTANT)])
                tx.turns.add(waiting, request(), waiting=a_line(waiting))
                tx.turns.attach(turn.id, (ImagePart(b"one"),))
                tx.turns.attach(waiting.id, (FilePart(b"two"),))
                tx.log.begin(waiting.id, [TurnStarted(waiting.id, thread.id, turn.agent_id)])
                tx.log.append([LogAppend(turn.id, 1, 1, TEXT)])
                tx.threads.save_provider_state(thread.id, ProviderState(provider="p", conversation_id="c"))

            await store.write(fill)
        before = {table: rows(database_url, table) for table in metadata.tables}
        (gone, _), _ = pairs
        await store.write(lambda tx: tx.threads.delete(gone.id, NOW))
        after = {table: rows(database_url, table) for table in metadata.tables}
        theirs = {"assistant_threads", "turns", "messages", "turn_log", "attachments"}
        assert {table for table in after if after[table] != before[table]} == {*theirs, "tombstones"}
        for table in theirs:
            assert after[table] == before[table] / 2 > 0
        assert after["tombstones"] == 1
        assert rows(database_url, "assistant_threads", f"id = '{gone.id}'") == 0


async def test_a_purge_empties_the_log_once_nobody_reads_it(sqlite_url: str, clock: ManualClock) -> None:
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    log = file.with_name(f"{file.name}-wal")
    fresh = SqlStore(sqlite_url, clock)
    assert await fresh.purge()  # the first that is asked of it
    await fresh.aclose()
    async with processes(sqlite_url, clock) as (store,):
        await begun(store)
        with closing(sqlite3.connect(file, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM turns").fetchone()
            await begun(store)
            assert not await store.purge()
            assert log.stat().st_size > 0
            reader.execute("COMMIT")
            assert await store.purge()
            assert log.stat().st_size == 0
        waits_for = await store.write(lambda tx: store._writer._session._driver.rows("PRAGMA busy_timeout"))
        assert waits_for == [(BUSY_TIMEOUT,)]  # as before: others' locks are waited for


# Indexes


QUERIES: dict[str, tuple[Callable[[Transaction], object], set[str]]] = {
    "held_by": (lambda tx: tx.turns.held_by("x"), {"ix_turns_held"}),
    "abandoned": (lambda tx: tx.turns.abandoned(9), {"ix_turns_held", "uq_turns_one_at_work"}),
    "unclaimed": (
        lambda tx: tx.turns.unclaimed(9, but_of=["x"]),
        {"ix_turns_waiting", "ix_turns_thread", "ix_turns_held", "uq_turns_one_at_work"},
    ),
    "unfinished": (lambda tx: tx.turns.unfinished("x"), {"ix_turns_thread"}),
    "spent": (lambda tx: tx.ledger.spent("x", date(2026, 1, 1)), {"ix_turns_of_user"}),
}


@pytest.mark.parametrize("name", QUERIES)
async def test_turns_that_have_ended_are_in_nobodys_way(
    database_url: str, clock: ManualClock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks for turns that have not ended never looks at the others."""
    query, indexes = QUERIES[name]
    async with processes(database_url, clock) as (store,):
        session = store._writer._session
        plans: list[str] = []
        original = type(session).rows

        def explained(self: Any, statement: Any, parameters: Any = {}) -> Any:  # noqa: B006 - never changed
            form = statement.form(self.dialect, parameters)
            if " turns" in form.sql:
                if self.is_server:
                    self._driver.run("SET enable_seqscan = off")
                explain = "EXPLAIN " if self.is_server else "EXPLAIN QUERY PLAN "
                found = self._driver.rows(explain + form.sql, form.bind(parameters))
                plans.append("\n".join(str(line) for line in found))
            return original(self, statement, parameters)

        monkeypatch.setattr(type(session), "rows", explained)
        await store.write(query)
    (plan,) = plans
    used = {index.name for index in metadata.tables["turns"].indexes if str(index.name) in plan}
    assert used, plan
    assert used <= indexes, plan
    assert "SCAN turns'" not in plan, plan
    assert "Seq Scan" not in plan.replace("Seq Scan on leases", ""), plan
