"""Locks of other processes on PostgreSQL: whoever needs what is held waits alone, and nobody waits in a circle."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

import psycopg
import pytest

from adapters.sql import writer
from adapters.sql.fiber import apart
from adapters.sql.repositories.expiry import Pages
from adapters.sql.repositories.threads import _choose
from adapters.sql.session import Session
from adapters.sql.statement import Statement
from adapters.sql.store import SqlStore
from adapters.system import Ids
from core.model.errors import StoreBusy, TurnInProgress, TurnNotFound
from core.model.message import Role, TextPart
from core.model.thread import ThreadState
from core.model.turn import BusyPolicy, TurnState
from core.ports.store import Transaction
from core.ports.threads import NewMessage
from core.use_cases.turn_engine import TurnLimits
from doubles import CATALOG, DONE, Gate, ManualClock, ScriptedAgent, service
from entrypoints.cli.main import main
from harness import until
from records import a_thread, a_turn, request

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def test_what_is_held_keeps_nobody_else_waiting(postgres_url: str, clock: ManualClock) -> None:
    store = SqlStore(postgres_url, clock)
    try:
        async with service(store, lease=5.0) as it:
            threads = []
            for _ in range(12):
                turn, _ = await it.threads.turn("ada", await it.say())
                await it.events(turn.id)
                threads.append(turn.thread_id)
            with psycopg.connect(postgres_url) as holder:
                held = holder.execute(
                    "SELECT id FROM assistant_threads WHERE id = ANY(%s) FOR UPDATE", (threads[:10],)
                ).fetchall()
                assert len(held) == 10
                asked = [asyncio.create_task(it.say(thread_id=thread_id)) for thread_id in threads[:10]]
                others = 0
                while not all(task.done() for task in asked):
                    async with asyncio.timeout(1):
                        await it.events(await it.say(thread_id=threads[10], user="ada"))
                    others += 1
                assert others >= 10
                for outcome in await asyncio.gather(*asked, return_exceptions=True):
                    assert isinstance(outcome, StoreBusy)
            await it.events(await it.say(thread_id=threads[0]))  # the holder is gone
    finally:
        await store.aclose()


async def test_what_is_given_up_in_time_is_got(postgres_url: str, clock: ManualClock) -> None:
    store = SqlStore(postgres_url, clock)
    try:
        async with service(store, lease=5.0) as it:
            turn, _ = await it.threads.turn("ada", await it.say())
            await it.events(turn.id)
            with psycopg.connect(postgres_url) as holder:
                holder.execute("SELECT id FROM assistant_threads FOR UPDATE")
                asked = asyncio.create_task(it.say(thread_id=turn.thread_id))
                await until(lambda: store._writer._later)  # it has met the lock, and is put off
                holder.rollback()
            await it.events(await asked)
    finally:
        await store.aclose()


async def test_two_processes_on_the_same_threads_never_wait_in_a_circle(
    postgres_url: str, clock: ManualClock
) -> None:
    async with AsyncExitStack() as stack:
        limits = TurnLimits(max_turns_per_user=1_000)
        both = []
        for _ in range(2):
            store = SqlStore(postgres_url, clock)
            stack.push_async_callback(store.aclose)
            both.append(await stack.enter_async_context(service(store, lease=15.0, limits=limits)))
        threads = []
        for _ in range(8):
            turn, _ = await both[0].threads.turn("ada", await both[0].say())
            await both[0].events(turn.id)
            threads.append(turn.thread_id)
        policies = [BusyPolicy.INTERRUPT, BusyPolicy.REJECT]
        calls = [
            both[number % 2].say(thread_id=threads[number * 5 % 8], on_busy=policies[number % 3 == 0])
            for number in range(160)
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        accepted = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert {type(o) for o in outcomes} <= {str, TurnInProgress}
        assert len(accepted) >= 80
        for turn_id in accepted:
            await both[0].events(turn_id)
        states = [(await both[1].threads.turn("ada", turn_id))[0].state for turn_id in accepted]
        assert set(states) <= {TurnState.COMPLETED, TurnState.CANCELLED}


@pytest.mark.parametrize("locked", ["assistant_threads", "turns"])
async def test_one_turn_that_stays_locked_keeps_no_other_from_being_taken_over(
    postgres_url: str, clock: ManualClock, locked: str
) -> None:
    async with AsyncExitStack() as stack:
        stores = [SqlStore(postgres_url, clock) for _ in range(2)]
        for store in stores:
            stack.push_async_callback(store.aclose)
        gates = [Gate(), Gate()]
        agent = ScriptedAgent([gates[0], DONE], [gates[1], DONE])
        async with service(stores[0], agent, lease=0.5) as it:
            stuck, free = await it.say(), await it.say()
            for gate in gates:
                await gate.reached.wait()
            await it.kill()
        turn = await stores[1].read(partial(_find, stuck))
        with psycopg.connect(postgres_url) as holder:
            key = turn.thread_id if locked == "assistant_threads" else turn.id
            holder.execute(f"SELECT id FROM {locked} WHERE id = %s FOR UPDATE".encode(), (key,))
            async with service(stores[1], lease=0.5) as other:
                await other.events(free)
                assert (await stores[1].read(partial(_find, stuck))).epoch == 1
                holder.rollback()
                await other.events(stuck)


def _find(turn_id: str, tx: Transaction):  # type: ignore[no-untyped-def] # a test's own
    turn = tx.turns.find(turn_id)
    assert turn is not None
    return turn


@pytest.mark.parametrize("old_lines", [0, 2_000])
async def test_a_thread_is_deleted_by_one_process_while_another_writes_in_it(
    postgres_url: str, clock: ManualClock, old_lines: int
) -> None:
    async with AsyncExitStack() as stack:
        gate = Gate()
        script = [f"word {number} " for number in range(500)]
        stores = [SqlStore(postgres_url, clock) for _ in range(2)]
        for store in stores:
            stack.push_async_callback(store.aclose)
        agent = ScriptedAgent(["Here", gate, *script, Gate()])
        writer = await stack.enter_async_context(service(stores[0], agent, lease=15.0))
        other = await stack.enter_async_context(service(stores[1], lease=15.0))
        turn_id = await writer.say()
        await gate.reached.wait()
        thread_id = (await other.threads.turn("ada", turn_id))[0].thread_id
        if old_lines:
            await stores[1].write(partial(_fill, thread_id, turn_id, old_lines))
        gate.open()
        await other.delete("ada", thread_id)
        await until(lambda: not writer.engine.knows(turn_id))
        with pytest.raises(TurnNotFound):
            await writer.threads.turn("ada", turn_id)
        with psycopg.connect(postgres_url) as look:
            for table in ("assistant_threads", "turns", "messages", "turn_log", "attachments"):
                assert look.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def _fill(thread_id: str, turn_id: str, count: int, tx: Transaction) -> None:
    ids, now = Ids(), tx.now()
    lines = [
        NewMessage(id=ids.new(), turn_id=turn_id, role=Role.TOOL, content=(TextPart("x" * 200),), created_at=now)
        for _ in range(count)
    ]
    tx.messages.append(thread_id, lines)


async def test_a_group_that_takes_long_is_committed_before_it_is_done(
    postgres_url: str, clock: ManualClock
) -> None:
    """It holds rows that others may need."""
    store = SqlStore(postgres_url, clock)
    reached, go_on, steps = threading.Event(), threading.Event(), [threading.Event() for _ in range(3)]
    done: list[int] = []

    def hold(_: Transaction) -> None:
        reached.set()
        assert apart(lambda: go_on.wait(20))

    def change(number: int) -> Callable[[Transaction], None]:
        def wait(tx: Transaction) -> None:
            tx.users.ensure(f"user {number}", NOW)
            tx.now()  # it has arrived at the server
            assert apart(lambda: steps[number].wait(20))

        return wait

    async def write(work: Callable[[Transaction], object], number: int) -> None:
        await store.write(work)
        done.append(number)

    try:
        first = asyncio.create_task(store.write(hold))
        await until(reached.is_set)
        writes = [asyncio.create_task(write(change(number), number)) for number in range(3)]
        await asyncio.sleep(0)  # all of them are submitted
        go_on.set()
        await first
        steps[0].set()
        await asyncio.to_thread(time.sleep, 2 * writer._LONGEST_GROUP)  # the second one takes its time
        assert not done
        steps[1].set()
        await until(lambda: len(done) >= 2)
        assert done == [0, 1]
    finally:
        steps[2].set()
        await asyncio.gather(*writes)
        await store.aclose()


@pytest.mark.parametrize("by_place", [True, False])
async def test_a_turn_that_a_look_did_not_see_keeps_its_thread(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, by_place: bool
) -> None:
    """A statement finds what was so when it began: a turn that began since may be on record by the row's lock."""
    store = SqlStore(postgres_url, clock)
    idle, busy = a_thread(), a_thread()

    def fill(tx: Transaction) -> None:
        for agent in CATALOG.agents():
            tx.agents.publish(agent)
        tx.users.ensure("ada", NOW)
        for thread in (idle, busy):
            tx.threads.add(thread)
        tx.turns.add(a_turn(busy), request(), owner="somebody")

    await store.write(fill)
    with psycopg.connect(postgres_url) as connection:
        (places,) = connection.execute("SELECT array_agg(ctid)::text FROM assistant_threads").fetchone() or ("",)
    rows = Session.rows
    looks = 0

    def unseeing(session: Session, statement: Statement, parameters: Any = MappingProxyType({})) -> list[Any]:
        nonlocal looks
        found = rows(session, statement, parameters)
        if statement is _choose("postgresql", in_domain=False, after=False):
            looks += 1
            return [*found, type(found[0])(busy.last_message_at, busy.id)]
        if statement is Pages._lock(in_domain=False):
            looks += 1
            return [type(found[0])(places)]
        return found

    monkeypatch.setattr(Session, "rows", unseeing)
    cutoff = NOW + timedelta(days=1)

    def expire(tx: Transaction) -> int:
        if by_place:
            return tx.threads.expire_places(cutoff, None, 0, tx.threads.places())
        return tx.threads.expire(cutoff, None, None, 10).expired

    assert await store.write(expire) == 1
    assert looks == 1
    states = [await store.read(lambda tx, t=thread: tx.threads.find(t.id).state) for thread in (idle, busy)]  # type: ignore[misc]
    assert states == [ThreadState.INACTIVE, ThreadState.ACTIVE]
    await store.aclose()


async def test_what_is_tried_again_is_finished_when_a_store_closes(
    postgres_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqlStore(postgres_url, clock)
    desk, last = store._writer._desk, asyncio.Event()
    put = desk.put

    def noted(job: writer.Job | None) -> None:
        put(job)
        if job is None:
            last.set()

    monkeypatch.setattr(desk, "put", noted)
    await store.write(lambda tx: tx.users.ensure("ada", NOW))
    with psycopg.connect(postgres_url) as holder:
        holder.execute("SELECT id FROM users FOR UPDATE")
        asked = asyncio.create_task(store.write(lambda tx: tx.users.hold("ada", NOW)))
        await until(lambda: store._writer._later)
        closing = asyncio.create_task(store.aclose())
        await last.wait()
        holder.rollback()
        async with asyncio.timeout(20):
            await asyncio.gather(asked, closing)
        assert holder.execute("SELECT held_since FROM users").fetchone() == (NOW,)


def test_a_command_that_meets_a_lock_is_told_to_come_again(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", postgres_url)
    monkeypatch.setattr(writer, "_HELD_TOO_LONG", 0.0)
    assert main(["users", "hold", "ada"]) == 0
    with psycopg.connect(postgres_url) as holder:
        holder.execute("SELECT id FROM users FOR UPDATE")
        capsys.readouterr()
        assert main(["users", "release", "ada"]) == 1
    assert capsys.readouterr().err == (
        "vida-coach: another process holds what this needs in the database: try again in a moment\n"
    )
    assert main(["users", "release", "ada"]) == 0
