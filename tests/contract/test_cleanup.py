"""What a cleanup promises, on every store."""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta

import pytest

from adapters.system import Ids
from core.model.agent import Domain
from core.model.errors import CleanupRunning, InvalidField
from core.model.thread import Thread, ThreadState
from core.model.turn import Turn, TurnState, Usage
from core.ports.store import Store, Transaction
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
    values: dict[str, object] = {
        "id": IDS.new(),
        "user_id": "ada",
        "domain": Domain.CAREER,
        "agent_id": "career-v1",
        "title": "",
        "state": ThreadState.ACTIVE,
        "metadata": {},
        "last_message_at": last_message_at,
        "created_at": last_message_at,
        "message_count": 0,
    }
    return Thread(**{**values, **changes})  # type: ignore[arg-type]


def a_turn(of: Thread, state: TurnState) -> Turn:
    return Turn(
        id=IDS.new(),
        thread_id=of.id,
        user_id=of.user_id,
        agent_id=of.agent_id,
        state=state,
        attempt=1,
        epoch=1,
        last_position=1,
        usage=Usage(),
        reason=None,
        model="m",
        provider="p",
        accepted_at=of.created_at,
    )


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
