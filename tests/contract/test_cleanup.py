"""What a cleanup promises, on every store."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import records
from adapters.system import Ids
from core.model.agent import Domain
from core.model.errors import CleanupRunning, InvalidField
from core.model.thread import Thread, ThreadState
from core.model.turn import Turn, TurnState
from core.ports.store import Store, Transaction
from core.ports.threads import ThreadKey
from core.ports.turns import RequestKey
from core.use_cases.clean_up_threads import MAX_BATCH, Cleanup, CleanUpThreads
from core.use_cases.read_threads import MessageQuery, ThreadQuery
from doubles import CATALOG, DONE, Gate, ScriptedAgent, service, text_of

IDS = Ids()
INACTIVE = frozenset({ThreadState.INACTIVE})
ANY = frozenset(ThreadState)


async def time_of(store: Store) -> datetime:
    return await store.read(lambda tx: tx.now())


def a_thread(last_message_at: datetime, **changes: object) -> Thread:
    return records.a_thread("ada", last_message_at=last_message_at, created_at=last_message_at, **changes)


def a_turn(of: Thread, state: TurnState) -> Turn:
    return records.a_turn(of, state=state, accepted_at=of.created_at)


async def keep(store: Store, threads: Sequence[tuple[Thread, Sequence[TurnState]]]) -> None:
    """Stores threads with turns in these states."""

    def change(tx: Transaction) -> None:
        for agent in CATALOG.agents():
            tx.agents.publish(agent)
        request = RequestKey(caller="local", user_id="ada", request_id="", fingerprint="")
        for user in {thread.user_id for thread, _ in threads}:
            tx.users.ensure(user, tx.now())
        for thread, states in threads:
            tx.threads.add(thread)
            for state in states:
                tx.turns.add(a_turn(thread, state), request, owner="test")

    await store.write(change)


async def all_threads(store: Store, users: Sequence[str] = ("ada",)) -> list[Thread]:
    found: list[Thread] = []
    for user in users:
        found += await store.read(lambda tx, user=user: tx.threads.list(user, None, ANY, None, 100_000))  # type: ignore[misc]
    return sorted(found, key=lambda thread: thread.id)


ENDED = [state for state in TurnState if state.is_terminal]
UNFINISHED = [state for state in TurnState if not state.is_terminal]


@pytest.mark.parametrize("domain", [None, Domain.HEALTH], ids=str)
@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
async def test_exactly_the_expired_ones_expire(store: Store, domain: Domain | None, batch_size: int) -> None:
    now = await time_of(store)
    threads: list[tuple[Thread, list[TurnState]]] = []
    due: set[str] = set()
    for age in (timedelta(0), timedelta(days=29, hours=23), timedelta(days=30, hours=1), timedelta(days=900)):
        for of in (Domain.CAREER, Domain.HEALTH):
            for state in ThreadState:
                for turns in ([], ENDED, *([*ENDED, busy] for busy in UNFINISHED)):
                    thread = a_thread(
                        now - age, domain=of, state=state, user_id=("ada", "eve")[len(threads) % 2], title="t"
                    )
                    threads.append((thread, turns))
                    busy = any(not turn.is_terminal for turn in turns)
                    if age.days >= 30 and state is ThreadState.ACTIVE and not busy and domain in (None, of):
                        due.add(thread.id)
    await keep(store, threads)
    before = await all_threads(store, ["ada", "eve"])
    cleanup = CleanUpThreads(store)
    plan = await cleanup(Cleanup(ttl_days=30, batch_size=batch_size, dry_run=True, domain=domain))
    assert (plan.expired, plan.deleted, plan.batches, plan.dry_run) == (len(due), 0, 0, True)
    assert await all_threads(store, ["ada", "eve"]) == before
    report = await cleanup(Cleanup(ttl_days=30, batch_size=batch_size, domain=domain))
    batches = -(-len(due) // batch_size)
    assert (report.expired, report.deleted, report.batches, report.dry_run) == (len(due), 0, batches, False)
    assert abs(report.cutoff - (now - timedelta(days=30))) < timedelta(minutes=5)
    assert report.seconds >= 0
    after = await all_threads(store, ["ada", "eve"])
    assert len(due) == len({*due})
    changed = {old.id for old, new in zip(before, after, strict=True) if old != new}
    assert changed == due
    assert all(new.state is ThreadState.INACTIVE for new in after if new.id in due)
    again = await cleanup(Cleanup(ttl_days=30, batch_size=batch_size, domain=domain))
    assert (again.expired, again.batches) == (0, 0)


@pytest.mark.parametrize("step", [1, 3, 1_000])
@pytest.mark.parametrize("domain", [None, Domain.HEALTH], ids=str)
async def test_places_hold_every_thread_once(store: Store, domain: Domain | None, step: int) -> None:
    now = await time_of(store)
    kinds = [
        (days, of, state, turns)
        for days in (1, 40)
        for of in (Domain.CAREER, Domain.HEALTH)
        for state in ThreadState
        for turns in ([], ENDED, *([*ENDED, busy] for busy in UNFINISHED))
    ]
    threads = [
        (a_thread(now - timedelta(days=days), domain=of, state=state), turns)
        for _ in range(10)
        for days, of, state, turns in kinds
    ]
    due = {
        thread.id
        for thread, (days, of, state, turns) in zip([thread for thread, _ in threads], kinds * 10, strict=True)
        if days == 40 and state is ThreadState.ACTIVE and turns in ([], ENDED) and domain in (None, of)
    }
    await keep(store, threads)
    before = await all_threads(store)
    cutoff = now - timedelta(days=30)
    for limit in (1, len(due), len(due) + 1):
        assert await store.read(lambda tx, limit=limit: tx.threads.count_expired(cutoff, domain, limit)) == min(  # type: ignore[misc]
            limit, len(due)
        )
    places = await store.read(lambda tx: tx.threads.places())
    assert 3 < places < len(threads)
    expired = [
        await store.write(lambda tx, first=first: tx.threads.expire_places(cutoff, domain, first, step))  # type: ignore[misc]
        for first in range(0, places, step)
    ]
    assert sum(expired) == len(due)
    after = await all_threads(store)
    assert {old.id for old, new in zip(before, after, strict=True) if old != new} == due
    assert all(new.state is ThreadState.INACTIVE for new in after if new.id in due)
    assert await store.write(lambda tx: tx.threads.expire_places(cutoff, domain, 0, places)) == 0
    assert await store.write(lambda tx: tx.threads.expire_places(now, None, places, 1_000)) == 0


async def test_an_empty_store_has_no_places(store: Store) -> None:
    assert await store.read(lambda tx: tx.threads.places()) == 0
    assert (await CleanUpThreads(store, backlog=0)(Cleanup(ttl_days=0))).batches == 0


async def test_a_backlog_goes_place_by_place_and_with_a_batch_size_it_does_not(store: Store) -> None:
    now = await time_of(store)
    threads = [a_thread(now - timedelta(days=40 if number % 2 else 1)) for number in range(2_000)]
    await keep(store, [(thread, []) for thread in threads])
    cleanup = CleanUpThreads(store, backlog=1_000)
    by_batches = await cleanup(Cleanup(ttl_days=39, batch_size=600, dry_run=True))
    assert (by_batches.expired, by_batches.batches) == (1_000, 0)
    told: list[tuple[int, int]] = []

    async def progress(expired: int, batches: int) -> None:
        told.append((expired, batches))

    report = await cleanup(Cleanup(ttl_days=30), progress)
    assert (report.expired, report.batches) == (1_000, len(told))
    assert told == sorted(told)
    assert [batches for _, batches in told] == list(range(1, len(told) + 1))
    assert told[0][0] < 600  # the first step is a short one
    listed = await store.read(lambda tx: tx.threads.list("ada", None, INACTIVE, None, 10_000))
    assert {thread.id for thread in listed} == {thread.id for thread in threads[1::2]}


async def test_a_batch_goes_on_behind_a_thread_that_is_gone(store: Store) -> None:
    old = await time_of(store) - timedelta(days=40)
    threads = sorted((a_thread(old) for _ in range(5)), key=lambda thread: thread.id)
    busy = {threads[0].id, threads[2].id}
    await keep(store, [(each, [TurnState.RUNNING] if each.id in busy else []) for each in threads])
    cutoff = old + timedelta(days=10)
    first = await store.write(lambda tx: tx.threads.expire(cutoff, None, None, 1))
    assert (first.expired, first.last) == (1, ThreadKey(old, threads[1].id))
    await store.write(lambda tx: tx.threads.delete(threads[1].id, tx.now()))
    second = await store.write(lambda tx: tx.threads.expire(cutoff, None, first.last, 1))
    assert (second.expired, second.last) == (1, ThreadKey(old, threads[3].id))
    third = await store.write(lambda tx: tx.threads.expire(cutoff, None, second.last, 9))
    assert (third.expired, third.last) == (1, ThreadKey(old, threads[4].id))
    assert (await store.write(lambda tx: tx.threads.expire(cutoff, None, third.last, 9))).last is None


@pytest.mark.parametrize(("due", "batches"), [(999, 1), (1_000, 2)])
async def test_what_is_a_backlog(store: Store, due: int, batches: int) -> None:
    old = await time_of(store) - timedelta(days=40)
    await keep(store, [(a_thread(old), []) for _ in range(due)])
    report = await CleanUpThreads(store, backlog=1_000)(Cleanup(ttl_days=30))
    assert report.expired == due
    assert (report.batches == 1) is (batches == 1)


async def test_a_thread_that_moves_out_of_the_way_of_a_sweep_expires_all_the_same(store: Store) -> None:
    now = await time_of(store)
    threads = [a_thread(now - timedelta(days=40)) for _ in range(500)]
    await keep(store, [(thread, []) for thread in threads])
    cutoff = now - timedelta(days=30)
    places = await store.read(lambda tx: tx.threads.places())

    def move(tx: Transaction) -> None:
        for thread in threads[-100:]:  # PostgreSQL writes a changed row where there is room
            tx.threads.describe(thread.id, title="t" * 200, metadata={"k": "v" * 500})

    await store.write(move)
    swept = await store.write(lambda tx: tx.threads.expire_places(cutoff, None, 0, places))
    left = await store.read(lambda tx: tx.threads.count_expired(cutoff, None))
    assert swept + left == 500
    if getattr(store, "_url", "").startswith("postgresql"):
        assert left > 0
    report = await CleanUpThreads(store, backlog=1)(Cleanup(ttl_days=30))
    assert report.expired == left
    assert await store.read(lambda tx: tx.threads.count_expired(cutoff, None)) == 0


async def test_a_backlog_is_left_and_woken_meanwhile(store: Store) -> None:
    old = await time_of(store) - timedelta(days=40)
    threads = [a_thread(old) for _ in range(3_000)]
    await keep(store, [(thread, []) for thread in threads])
    async with service(store) as it:
        stop = asyncio.Event()

        async def progress(expired: int, batches: int) -> None:
            if batches == 1:  # one of the places that come last, and one of the first
                await it.events(await it.say(thread_id=threads[-1].id))
                await it.events(await it.say(thread_id=threads[0].id))
            if batches == 2:
                stop.set()
                await asyncio.Event().wait()

        cleanup = CleanUpThreads(store, backlog=100)
        first = asyncio.create_task(cleanup(Cleanup(ttl_days=30), progress))
        await stop.wait()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        done = {thread.id for thread in await all_threads(store) if thread.state is ThreadState.INACTIVE}
        assert 0 < len(done) < 2_998
        report = await cleanup(Cleanup(ttl_days=30))
        assert len(done) + report.expired == 2_998
        active = {thread.id for thread in await all_threads(store) if thread.state is ThreadState.ACTIVE}
        assert active == {threads[0].id, threads[-1].id}


STEPS = st.lists(
    st.tuples(st.sampled_from(["sweep", "batch", "wake", "begin", "end", "describe"]), st.integers(0, 199)),
    max_size=60,
)


@given(steps=STEPS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_two_sweeps_and_what_happens_meanwhile_in_any_order(
    store: Store, steps: Sequence[tuple[str, int]]
) -> None:
    now = await time_of(store)
    threads = [a_thread(now - timedelta(days=40)) for _ in range(200)]
    await keep(store, [(thread, []) for thread in threads])
    cutoff = now - timedelta(days=30)
    first = [0, 0]
    expired = 0
    woken: set[str] = set()
    slept: list[str] = []
    at_work: dict[str, Turn] = {}
    places = await store.read(lambda tx: tx.threads.places())
    request = RequestKey(caller="local", user_id="ada", request_id="", fingerprint="")

    def take(tx: Transaction, what: str, pick: int) -> int:
        thread = threads[pick]
        match what:
            case "sweep":
                first[pick % 2], begin = first[pick % 2] + pick % 5, first[pick % 2]
                return tx.threads.expire_places(cutoff, None, begin, pick % 5)
            case "batch":
                return tx.threads.expire(cutoff, None, None, pick % 7 + 1).expired
            case "wake":
                found = tx.threads.lock("ada", thread.id)
                assert found is not None
                slept.extend([thread.id] if found.state is ThreadState.INACTIVE else [])
                tx.threads.touch(thread.id, now)
                woken.add(thread.id)
            case "begin" if thread.id not in at_work:
                # As an acceptance does, but for the time: the thread stays old.
                found = tx.threads.lock("ada", thread.id)
                assert found is not None
                if found.state is ThreadState.ACTIVE:
                    at_work[thread.id] = a_turn(thread, TurnState.RUNNING)
                    tx.turns.add(at_work[thread.id], request, owner="test")
            case "end" if at_work:
                turn = at_work.pop(sorted(at_work)[pick % len(at_work)])
                tx.turns.save_ending(replace(turn, state=TurnState.FAILED, epoch=2))
            case "describe":
                tx.threads.describe(thread.id, title="t" * pick, metadata=None)
        return 0

    for what, pick in steps:
        expired += await store.write(partial(take, what=what, pick=pick))
    for begin in first:
        expired += await store.write(
            lambda tx, begin=begin: tx.threads.expire_places(cutoff, None, begin, places)  # type: ignore[misc]
        )
    expired += await store.write(lambda tx: tx.threads.expire(cutoff, None, None, 1_000).expired)
    ours = {thread.id for thread in threads}
    asleep = {thread.id for thread in await all_threads(store) if thread.state is ThreadState.INACTIVE} & ours
    assert asleep == ours - woken - set(at_work)
    assert expired == len(asleep) + len(slept)
    await store.write(
        lambda tx: [
            tx.turns.save_ending(replace(turn, state=TurnState.FAILED, epoch=2)) for turn in at_work.values()
        ]
    )
    await store.write(lambda tx: tx.threads.expire(cutoff, None, None, 1_000))


async def test_a_thread_as_old_as_the_cutoff_is_not_expired(store: Store) -> None:
    cutoff = await time_of(store)
    old, edge = a_thread(cutoff - timedelta(microseconds=1)), a_thread(cutoff)
    await keep(store, [(old, []), (edge, [])])
    assert await store.read(lambda tx: tx.threads.count_expired(cutoff, None)) == 1
    batch = await store.write(lambda tx: tx.threads.expire(cutoff, None, None, 10))
    assert batch.expired == 1
    assert batch.last is not None
    assert (batch.last.last_message_at, batch.last.id) == (old.last_message_at, old.id)
    rest = await store.write(lambda tx: tx.threads.expire(cutoff, None, batch.last, 10))
    assert (rest.expired, rest.last) == (0, None)


async def test_thousands_go_in_batches_and_progress_is_told(store: Store) -> None:
    now = await time_of(store)
    moments = [now - timedelta(days=40), now - timedelta(days=50)]  # many ties
    threads = [a_thread(moments[number % 2]) for number in range(2_500)]
    fresh = [a_thread(now) for _ in range(500)]
    await keep(store, [(thread, []) for thread in (*threads, *fresh)])
    told: list[tuple[int, int]] = []

    async def progress(expired: int, batches: int) -> None:
        told.append((expired, batches))

    report = await CleanUpThreads(store)(Cleanup(ttl_days=30, batch_size=1_000), progress)
    assert told == [(1_000, 1), (2_000, 2), (2_500, 3)]
    assert (report.expired, report.batches) == (2_500, 3)
    listed = await store.read(lambda tx: tx.threads.list("ada", None, INACTIVE, None, 10_000))
    assert {thread.id for thread in listed} == {thread.id for thread in threads}


async def test_a_ttl_of_zero_expires_every_idle_thread(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["done", DONE], [gate])) as it:
        idle = await it.threads.turn("ada", await it.say())
        await it.events(idle[0].id)
        busy, _ = await it.threads.turn("ada", await it.say())
        await gate.reached.wait()
        report = await CleanUpThreads(store)(Cleanup(ttl_days=0))
        assert report.expired == 1
        assert (await it.threads.thread("ada", idle[0].thread_id)).state is ThreadState.INACTIVE
        assert (await it.threads.thread("ada", busy.thread_id)).state is ThreadState.ACTIVE


@pytest.mark.parametrize(
    ("field", "values"),
    [("ttl_days", (-1, 36_501)), ("batch_size", (0, -1, MAX_BATCH + 1))],
    ids=["ttl_days", "batch_size"],
)
async def test_bounds(store: Store, field: str, values: Sequence[int]) -> None:
    for value in values:
        with pytest.raises(InvalidField) as error:
            await CleanUpThreads(store)(Cleanup(**{"ttl_days": 30, field: value}))  # type: ignore[arg-type]
        assert error.value.field == field


async def test_one_cleanup_at_a_time(store: Store) -> None:
    old = a_thread(await time_of(store) - timedelta(days=40))
    await keep(store, [(old, [])])
    cleanup = CleanUpThreads(store)
    async with store.exclusive("cleanup") as held:
        assert held
        for dry_run in (False, True):
            with pytest.raises(CleanupRunning):
                await cleanup(Cleanup(ttl_days=30, dry_run=dry_run))
    assert (await cleanup(Cleanup(ttl_days=30))).expired == 1


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_stopped_cleanup_keeps_its_batches_and_another_goes_on(store: Store, how: str) -> None:
    old = await time_of(store) - timedelta(days=40)
    await keep(store, [(a_thread(old), []) for _ in range(10)])
    cleanup = CleanUpThreads(store)
    waiting = asyncio.Event()

    async def progress(expired: int, batches: int) -> None:
        if batches == 2:
            waiting.set()
            if how == "failed":
                raise ConnectionError
            await asyncio.Event().wait()

    task = asyncio.create_task(cleanup(Cleanup(ttl_days=30, batch_size=3), progress))
    await waiting.wait()
    if how == "cancelled":
        task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError | ConnectionError)
    listed = await store.read(lambda tx: tx.threads.list("ada", None, INACTIVE, None, 100))
    assert len(listed) == 6
    report = await cleanup(Cleanup(ttl_days=30, batch_size=3))
    assert (report.expired, report.batches) == (4, 2)


async def test_a_cleanup_may_be_cancelled_at_any_time_and_leaves_no_lock(store: Store) -> None:
    old = await time_of(store) - timedelta(days=40)
    await keep(store, [(a_thread(old), []) for _ in range(10)])
    cleanup = CleanUpThreads(store)
    for steps in range(24):
        task = asyncio.create_task(cleanup(Cleanup(ttl_days=30, dry_run=True)))
        for _ in range(steps // 2):
            await asyncio.sleep(0)
        task.cancel()
        if steps % 2:  # and once more while it goes
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(5):
            while True:
                try:
                    assert (await cleanup(Cleanup(ttl_days=30, dry_run=True))).expired == 10
                    break
                except CleanupRunning:  # what was cancelled is still on its way out
                    continue


async def test_a_thread_that_is_used_meanwhile_stays(store: Store) -> None:
    old = await time_of(store) - timedelta(days=40)
    first, second = sorted([a_thread(old), a_thread(old)], key=lambda thread: thread.id)
    await keep(store, [(first, []), (second, [])])
    async with service(store) as it:

        async def progress(expired: int, batches: int) -> None:
            if batches == 1:
                await it.events(await it.say(thread_id=second.id))

        report = await CleanUpThreads(store)(Cleanup(ttl_days=30, batch_size=1), progress)
        assert report.expired == 1
        assert (await it.threads.thread("ada", first.id)).state is ThreadState.INACTIVE
        assert (await it.threads.thread("ada", second.id)).state is ThreadState.ACTIVE


async def test_an_expired_thread_is_readable_and_a_new_message_wakes_it(store: Store) -> None:
    async with service(store) as it:
        turn, _ = await it.threads.turn("ada", await it.say("before", metadata={"k": "v"}))
        await it.events(turn.id)
        asleep = await it.threads.thread("ada", turn.thread_id)
        assert (await CleanUpThreads(store)(Cleanup(ttl_days=0))).expired == 1
        expired = await it.threads.thread("ada", turn.thread_id)
        assert expired.state is ThreadState.INACTIVE
        assert (expired.metadata, expired.last_message_at) == (asleep.metadata, asleep.last_message_at)
        query = MessageQuery(user_id="ada", thread_id=turn.thread_id)
        lines, _ = await it.threads.messages(query, 0, "")
        assert [line.text for line in lines] == ["before", "All right."]
        assert text_of(await it.events(turn.id)) == "All right."
        assert (await it.threads.threads(ThreadQuery(user_id="ada"), 0, ""))[0] == []
        (listed,), _ = await it.threads.threads(ThreadQuery(user_id="ada", states=INACTIVE), 0, "")
        assert listed == expired
        await it.threads.describe("ada", turn.thread_id, title="kept", metadata=None)
        assert (await it.threads.thread("ada", turn.thread_id)).state is ThreadState.INACTIVE

        await it.events(await it.say("after", thread_id=turn.thread_id))
        (awake,), _ = await it.threads.threads(ThreadQuery(user_id="ada"), 0, "")
        assert (awake.id, awake.title, awake.message_count) == (turn.thread_id, "kept", 4)
        assert [line.text for line in await it.agent.requests[-1].history()] == ["before", "All right."]
