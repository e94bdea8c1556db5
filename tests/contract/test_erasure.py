"""What erasure promises, on every store."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest

from adapters.openai.stream import MAX_ID
from adapters.system import Ids
from core.model.agent import Domain
from core.model.attachment import FilePart, ImagePart
from core.model.erasure import Copy, Counts, Receipt, user_hash
from core.model.errors import InvalidField, LeaseLost, LegalHold, StoreUnavailable, ThreadNotFound, TurnNotFound
from core.model.events import TextDelta
from core.model.goal import Goal
from core.model.message import Role, TextPart
from core.model.thread import ProviderState, Thread, Tombstone
from core.model.turn import Turn, TurnState
from core.ports.agent import Begun, StateChanged, Stored
from core.ports.erasures import OpenErasure
from core.ports.provider_copies import CopyStays, ProviderCopies
from core.ports.store import Conflict, Store, Transaction
from core.ports.telemetry import Unmeasured
from core.ports.turns import LogAppend
from core.use_cases import clean_up_threads, finish_erasures
from core.use_cases.accept_message import IncomingMessage
from core.use_cases.claim_turn import require_claim
from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads, _erase_forgotten
from core.use_cases.delete_thread import DeleteThread
from core.use_cases.erase_user import EraseUser
from core.use_cases.finish_erasures import FinishErasures
from core.use_cases.hold_user import HoldUser
from core.use_cases.read_erasures import ReadErasures
from doubles import CATALOG, DONE, Gate, ManualClock, ScriptedAgent, service
from harness import until
from records import IDS, a_line, a_thread, a_turn, request

OLD = timedelta(days=100)
LEFT_AFTER = timedelta(seconds=30)


async def with_thread(store: Store, user: str = "ada", age: timedelta = OLD, **changes: object) -> Thread:
    """A thread of one turn that has ended, with a message and a copy at the provider."""
    now = await store.read(lambda tx: tx.now())
    thread = a_thread(user, last_message_at=now - age, created_at=now - age, **changes)
    turn = a_turn(thread, state=TurnState.COMPLETED)

    def change(tx: Transaction) -> None:
        for agent in CATALOG.agents():
            tx.agents.publish(agent)
        tx.users.ensure(user, now)
        tx.threads.add(thread)
        tx.turns.add(turn, request(user))
        tx.messages.append(thread.id, [a_line(turn, created_at=now - age)])
        tx.copies.keep(thread.id, "p", [f"of {thread.id}"])

    await store.write(change)
    return thread


def eraser(store: Store) -> EraseUser:
    """Erases users beside nothing that runs."""
    return EraseUser(store=store, ids=IDS, gone=lambda _: None, erased=lambda: None)


async def nothing_left(store: Store) -> None:
    """Waits until nothing is to be erased at a provider."""
    while await store.read(lambda tx: tx.copies.count_left()):  # noqa: ASYNC110 - no event of ours
        await asyncio.sleep(0)


def a_goal(user: str, number: int = 1) -> Goal:
    now = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    return Goal(
        id=f"goal-{user}-{number}",
        user_id=user,
        domain=Domain.CAREER,
        text="t",
        commitment="",
        due=None,
        created_at=now,
    )


# Users


async def test_a_user_goes_with_everything_and_nobody_else_does(store: Store) -> None:
    threads = [await with_thread(store) for _ in range(3)]
    eves = await with_thread(store, "eve")
    await store.write(lambda tx: [tx.goals.add(a_goal(user), user) for user in ("ada", "eve")])
    assert await store.read(lambda tx: tx.users.belongings("ada")) == (
        Counts(threads=3, turns=3, messages=3, goals=1),
        3,
    )
    receipt = await eraser(store)("ada")
    assert receipt.erased == Counts(threads=3, turns=3, messages=3, goals=1)
    assert (receipt.copies_left, receipt.state) == (3, "at_provider")
    assert receipt.user_hash == user_hash(receipt.id, "ada") != user_hash(IDS.new(), "ada")
    assert await store.read(lambda tx: tx.users.get("ada")) is None
    assert await store.read(lambda tx: tx.users.belongings("ada")) == (Counts(), 0)
    graves = [await store.read(lambda tx, t=thread: tx.threads.tombstone(t.id)) for thread in threads]  # type: ignore[misc]
    assert {grave.erasure_id for grave in graves if grave is not None} == {receipt.id}
    assert await store.read(lambda tx: tx.users.belongings("eve")) == (
        Counts(threads=1, turns=1, messages=1, goals=1),
        1,
    )
    assert await store.read(lambda tx: tx.threads.tombstone(eves.id)) is None
    again = await eraser(store)("ada")
    assert (again.id != receipt.id, again.erased, again.state) == (True, Counts(), "done")
    assert [each.id for each in await store.read(lambda tx: tx.erasures.newest(9))] == [again.id, receipt.id]


async def test_a_receipt_counts_what_there_was_and_a_rehearsal_says_the_same(store: Store) -> None:
    """No two counts are alike, so none can stand in another's place."""
    counts, copies = Counts(threads=2, turns=3, messages=5, attachments=4, goals=6), 7

    def fill(user: str, first: Thread, second: Thread, tx: Transaction) -> None:
        turn = a_turn(first, state=TurnState.COMPLETED)
        tx.turns.add(turn, request(user))
        tx.turns.attach(turn.id, (ImagePart(b"1"), TextPart("x"), ImagePart(b"2"), FilePart(b"3"), FilePart(b"4")))
        tx.messages.append(first.id, [a_line(turn, role=role) for role in Role])
        tx.copies.keep(second.id, "p", [f"{number} of {user}" for number in range(5)])
        for number in range(6):
            tx.goals.add(a_goal(user, number), f"{number} of {user}")

    for user in ("ada", "eve"):
        first, second = [await with_thread(store, user) for _ in range(2)]
        await store.write(partial(fill, user, first, second))
    begun = await store.read(lambda tx: tx.now())
    rehearsal = await eraser(store)("ada", dry_run=True)
    assert (rehearsal.erased, rehearsal.copies_left) == (counts, copies)
    receipt = await eraser(store)("ada")
    assert (receipt.erased, receipt.copies_left) == (counts, copies)
    assert receipt.finished_at is not None
    assert begun < receipt.requested_at < receipt.finished_at < await store.read(lambda tx: tx.now())
    assert await store.read(lambda tx: tx.users.belongings("eve")) == (counts, copies)


async def test_what_is_left_is_told_in_its_order(store: Store) -> None:
    now = await store.read(lambda tx: tx.now())
    ages = {"ada": timedelta(minutes=20), "bob": timedelta(minutes=30), "cleo": timedelta(minutes=10)}
    thread = await with_thread(store)

    def fill(tx: Transaction) -> dict[str, str]:
        for ref in ("thrice", "twice", "once"):
            tx.copies.keep(thread.id, "p", [ref], erase=True)
            tx.copies.claim("p", 9, -1)
        return {user: tx.erasures.open(IDS.new(), user, now - age).id for user, age in ages.items()}

    ids = await store.write(fill)

    async def left(age: timedelta, limit: int) -> list[str]:
        return [each.user_id for each in await store.read(lambda tx: tx.erasures.left(now - age, limit))]

    assert await left(timedelta(minutes=5), 9) == ["bob", "ada", "cleo"]  # the oldest first
    assert await left(timedelta(minutes=5), 2) == ["bob", "ada"]
    assert await left(timedelta(minutes=15), 9) == ["bob", "ada"]
    newest = await store.read(lambda tx: tx.erasures.newest(2))
    assert [receipt.id for receipt in newest] == [ids["cleo"], ids["ada"]]
    tried = await store.read(lambda tx: tx.copies.left(2))
    assert [(copy.ref, copy.tries) for copy in tried] == [("thrice", 3), ("twice", 2)]
    assert await store.read(lambda tx: tx.copies.count_left()) == {"p": 3}


async def test_an_erasure_under_way_is_joined_and_gone_on_with(store: Store, clock: ManualClock) -> None:
    first, second = [await with_thread(store) for _ in range(2)]
    erase = eraser(store)
    begun = IDS.new()

    def begin(tx: Transaction) -> str:
        return tx.erasures.open(begun, "ada", tx.now() - LEFT_AFTER).id

    assert await store.write(begin) == begun
    assert (await store.write(lambda tx: tx.erasures.open(IDS.new(), "ada", tx.now()))).id == begun
    assert [each.id for each in await store.read(lambda tx: tx.erasures.left(tx.now(), 9))] == [begun]
    assert await store.read(lambda tx: tx.erasures.left(tx.now() - timedelta(days=1), 9)) == []
    await store.write(lambda tx: tx.erasures.note(begun, Counts(), tx.now()))
    assert await store.read(lambda tx: tx.erasures.left(tx.now() - LEFT_AFTER, 9)) == []  # somebody is at it
    # One thread went before the process did.
    await store.write(lambda tx: tx.threads.delete(first.id, tx.now(), erasure_id=begun))
    await store.write(lambda tx: tx.erasures.note(begun, Counts(threads=1), tx.now() - 2 * LEFT_AFTER))
    await erase.go_on()
    receipt = await store.read(lambda tx: tx.erasures.find(begun))
    assert receipt is not None
    assert receipt.erased == Counts(threads=2, turns=1, messages=1)
    assert receipt.state == "at_provider"
    assert await store.read(lambda tx: tx.threads.find(second.id)) is None
    assert await store.read(lambda tx: tx.erasures.left(tx.now(), 9)) == []


async def test_who_is_at_an_erasure_is_left_alone(store: Store) -> None:
    await with_thread(store)
    await store.write(lambda tx: tx.erasures.open(IDS.new(), "ada", tx.now()))
    await eraser(store).go_on()
    assert (await store.read(lambda tx: tx.users.belongings("ada")))[0].threads == 1


@pytest.mark.parametrize("threads", [0, 1])
async def test_what_comes_after_an_erasure_stays_whoever_is_still_at_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    await with_thread(store)
    begun = await store.write(lambda tx: tx.erasures.open(IDS.new(), "ada", tx.now()))
    erasures_type: Any = type(await store.read(lambda tx: tx.erasures))
    monkeypatch.setattr(erasures_type, "left", lambda *_: [begun])  # two processes have found it
    await eraser(store).go_on()
    done = await store.read(lambda tx: tx.erasures.find(begun.id))
    assert done is not None
    assert done.finished_at is not None
    # The user begins anew, and the other process gets to it only now.
    for _ in range(threads):
        await with_thread(store)
    await store.write(lambda tx: tx.users.ensure("ada", tx.now()))
    await store.write(lambda tx: tx.goals.add(a_goal("ada"), "ada"))
    await eraser(store).go_on()
    left, _ = await store.read(lambda tx: tx.users.belongings("ada"))
    assert (left.threads, left.messages, left.goals) == (threads, threads, 1)
    assert await store.read(lambda tx: tx.users.get("ada")) is not None
    assert await store.read(lambda tx: tx.erasures.find(begun.id)) == done
    assert not await store.write(lambda tx: tx.erasures.note(begun.id, Counts(threads=1), tx.now()))
    assert await store.read(lambda tx: tx.erasures.find(begun.id)) == done


async def test_an_erasure_that_breaks_holds_up_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    users = ("ada", "bob")
    broken, _ = [await with_thread(store, user) for user in users]
    for user in users:
        await store.write(lambda tx, u=user: tx.erasures.open(IDS.new(), u, tx.now() - 2 * LEFT_AFTER))  # type: ignore[misc]
    threads_type: Any = type(await store.read(lambda tx: tx.threads))
    delete = threads_type.delete

    def breaks(threads: Any, thread_id: str, *arguments: Any, **more: Any) -> Any:
        if thread_id == broken.id:
            raise ValueError("not what was written")
        return delete(threads, thread_id, *arguments, **more)

    monkeypatch.setattr(threads_type, "delete", breaks)
    await eraser(store).go_on()
    left = [await store.read(lambda tx, u=user: tx.users.belongings(u)) for user in users]  # type: ignore[misc]
    assert [counts.threads for counts, _ in left] == [1, 0]
    monkeypatch.undo()
    await eraser(store)("ada")  # nothing was given up
    assert await store.read(lambda tx: tx.users.get("ada")) is None


async def test_a_user_with_belongings_cannot_be_removed(store: Store) -> None:
    await with_thread(store)
    with pytest.raises(Conflict):
        await store.write(lambda tx: tx.users.remove("ada"))
    assert await store.read(lambda tx: tx.users.get("ada")) is not None


async def test_messages_that_come_meanwhile_are_erased_or_begin_anew(store: Store) -> None:
    async with service(store, ScriptedAgent()) as it:
        erase = EraseUser(store=store, ids=Ids(), gone=it.engine.gone, erased=lambda: None)
        accepted: list[str] = []

        async def talk() -> None:
            for number in range(30):
                accepted.append((await it.accept(_message(str(number)))).turn.thread_id)
                await asyncio.sleep(0)

        talking = asyncio.create_task(talk())
        receipts = [await erase("ada") for _ in range(3)]
        await talking
        left = await store.read(lambda tx: tx.threads.ids_of("ada", "", 100))
        assert set(left) <= set(accepted)
        assert len(left) + sum(receipt.erased.threads for receipt in receipts) == 30
        last = await erase("ada")
        assert last.erased.threads == len(left)
        assert await store.read(lambda tx: tx.users.get("ada")) is None
        await until(lambda: not it.engine._running)


async def test_who_works_on_an_erased_turn_is_told(store: Store) -> None:
    gone: list[Turn] = []
    erased = asyncio.Event()
    async with service(store, ScriptedAgent(["a", DONE], ["b", Gate()])) as it:
        ended, running = await it.say(), await it.say()
        await it.events(ended)
        await it.stream(running, "b")
        await EraseUser(store=store, ids=Ids(), gone=gone.append, erased=erased.set)("ada")
        assert [turn.id for turn in gone] == [running]
        assert erased.is_set()


def _message(text: str) -> IncomingMessage:
    return IncomingMessage(user_id="ada", content=(TextPart(text),))


async def test_a_zombie_brings_nothing_back(store: Store) -> None:
    """Whoever had a turn when its thread was erased can write nothing of it, by any way there is."""
    gate = Gate()
    state = StateChanged(ProviderState(provider="scripted", conversation_id="late-conversation"))
    agent = ScriptedAgent(["half", gate, Stored("late-response"), state, " more", DONE])
    async with service(store, agent) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "half")
        turn = await store.read(lambda tx: tx.turns.find(turn_id))
        assert turn is not None
        # The owner does not hear of it.
        await EraseUser(store=store, ids=Ids(), gone=lambda _: None, erased=lambda: None)("ada")
        gate.open()
        await until(lambda: not it.engine._running and not it.engine._aside)
        left = await store.read(lambda tx: tx.copies.left(9))
        assert {copy.ref for copy in left} == {"late-response", "late-conversation"}  # found, and to be erased
        append = LogAppend(turn.id, turn.epoch, turn.last_position + 4, (TextDelta("late"),))
        assert not (await store.write(lambda tx: tx.log.append([append]))).accepted
        with pytest.raises((LeaseLost, TurnNotFound)):
            await store.write(lambda tx: require_claim(tx, turn.id, turn.epoch))
        with pytest.raises(ThreadNotFound):
            await it.say(thread_id=turn.thread_id)
        assert await store.read(lambda tx: tx.threads.find(turn.thread_id)) is None
        assert await store.read(lambda tx: tx.users.get("ada")) is None
        assert await store.read(lambda tx: tx.users.belongings("ada")) == (Counts(), 0)


async def test_what_is_noted_of_an_erased_thread_is_due_at_once(store: Store) -> None:
    thread = await with_thread(store)
    await store.write(lambda tx: tx.copies.keep(thread.id, "p", ["conv_1", "resp_1", "conv_1"]))
    assert not await store.read(lambda tx: tx.copies.any_due("p"))
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now(), in_use=True))
    assert not await store.read(lambda tx: tx.copies.any_due("p"))  # the provider has a moment to notice
    assert await store.read(lambda tx: tx.copies.count_left()) == {"p": 3}
    await store.write(lambda tx: tx.copies.keep(thread.id, "p", ["resp_1", "resp_late"]))
    taken = await store.write(lambda tx: tx.copies.claim("p", 9, 60))
    assert [(copy.ref, copy.tries) for copy in taken] == [("resp_late", 1)]
    assert not await store.read(lambda tx: tx.copies.any_due("p"))
    assert await store.write(lambda tx: tx.copies.claim("p", 9, 60)) == []
    await store.write(lambda tx: tx.copies.stays(taken[0], "500", -1))
    (again,) = await store.write(lambda tx: tx.copies.claim("p", 9, 60))
    assert again == replace(taken[0], tries=2, reason="500")
    assert (await store.read(lambda tx: tx.copies.left(1))) == [again]
    await store.write(lambda tx: tx.copies.erased(again))
    assert await store.read(lambda tx: tx.copies.count_left()) == {"p": 3}
    alive = await with_thread(store)
    await store.write(lambda tx: tx.copies.keep(alive.id, "p", ["stray"], erase=True))
    assert [copy.ref for copy in await store.write(lambda tx: tx.copies.claim("p", 9, 60))] == ["stray"]
    assert not await store.read(lambda tx: tx.copies.any_due("another"))
    # Whoever has taken one keeps it for its time, whatever becomes of the thread meanwhile.
    await store.write(lambda tx: tx.threads.delete(alive.id, tx.now()))
    assert [copy.ref for copy in await store.write(lambda tx: tx.copies.claim("p", 9, 60))] == [f"of {alive.id}"]


# Legal hold


async def test_a_hold_keeps_everything_until_it_is_released(store: Store) -> None:
    thread = await with_thread(store)
    hold, erase = HoldUser(store), eraser(store)
    delete = DeleteThread(store=store, gone=lambda _: None, erased=lambda: None)
    await hold("ada", hold=True)
    since = await store.read(lambda tx: tx.users.get("ada"))
    await hold("ada", hold=True)
    assert await store.read(lambda tx: tx.users.get("ada")) == since
    for refused in (erase("ada"), erase("ada", dry_run=True), delete("ada", thread.id)):
        with pytest.raises(LegalHold):
            await refused
    report = await CleanUpThreads(store)(Cleanup(ttl_days=1, delete_after_days=2))
    assert (report.deleted, report.held) == (0, 1)
    assert await store.read(lambda tx: tx.erasures.newest(9)) == []
    with pytest.raises(ThreadNotFound):
        await delete("eve", thread.id)
    await hold("ada", hold=False)
    assert (await erase("ada")).erased.threads == 1
    await hold("nobody", hold=True)  # may come
    with pytest.raises(LegalHold):
        await erase("nobody")


async def test_an_erasure_that_meets_a_hold_goes_on_when_it_is_released(store: Store) -> None:
    await with_thread(store)
    begun = IDS.new()
    await store.write(lambda tx: tx.erasures.open(begun, "ada", tx.now() - 2 * LEFT_AFTER))
    await HoldUser(store)("ada", hold=True)
    erase = eraser(store)
    await erase.go_on()

    async def receipt() -> Receipt:
        found = await store.read(lambda tx: tx.erasures.find(begun))
        assert found is not None
        return found

    assert (await receipt()).state == "held"
    await HoldUser(store)("ada", hold=False)
    assert (await receipt()).state == "running"
    await erase.go_on()
    assert (await receipt()).state == "at_provider"


async def test_a_hold_that_comes_last_keeps_what_is_left_and_holds_up_nobody_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [await with_thread(store, user) for user in ("ada", "bob")]
    begun = [OpenErasure(IDS.new(), user) for user in ("ada", "cleo", "bob", "dan")]

    def begin(tx: Transaction) -> None:
        for user in ("cleo", "dan"):
            tx.users.ensure(user, tx.now())
            tx.goals.add(a_goal(user), user)
        for erasure in begun:
            tx.erasures.open(erasure.id, erasure.user_id, tx.now())

    await store.write(begin)
    erasures_type: Any = type(await store.read(lambda tx: tx.erasures))
    monkeypatch.setattr(erasures_type, "left", lambda *_: begun)  # they were found before the holds
    for user in ("ada", "cleo"):
        await HoldUser(store)(user, hold=True)
    await eraser(store).go_on()
    left = [await store.read(lambda tx, u=user: tx.threads.ids_of(u, "", 9)) for user in ("ada", "bob")]  # type: ignore[misc]
    assert left == [[threads[0].id], []]
    for user, goals in (("cleo", 1), ("dan", 0)):
        assert (await store.read(lambda tx, u=user: tx.users.belongings(u)))[0].goals == goals  # type: ignore[misc]


# Retention


@pytest.mark.parametrize("batch_size", [None, 1])
async def test_exactly_what_is_forgotten_is_erased(store: Store, batch_size: int | None) -> None:
    def days(number: float) -> timedelta:
        return timedelta(days=number)

    due = [await with_thread(store, age=days(61)) for _ in range(20)]
    kept = [await with_thread(store, age=days(age)) for age in (0, 29, 31, 59)]
    busy = await with_thread(store, age=days(300))
    health = await with_thread(store, age=days(300), domain=Domain.HEALTH, agent_id="health-v1")
    held = await with_thread(store, "eve", age=days(300))
    await HoldUser(store)("eve", hold=True)
    await store.write(lambda tx: tx.turns.add(a_turn(busy), request(), owner="x"))
    erased = 0

    def told() -> None:
        nonlocal erased
        erased += 1

    cleanup = CleanUpThreads(store, erased=told)
    wanted = Cleanup(ttl_days=30, delete_after_days=60, batch_size=batch_size, domain=Domain.CAREER)
    plan = await cleanup(replace(wanted, dry_run=True))
    assert (plan.deleted, plan.held, erased) == (20, 1, 0)
    report = await cleanup(wanted)
    assert (report.deleted, report.held, erased) == (20, 1, 1)
    left = [
        thread_id
        for user in ("ada", "eve")
        for thread_id in await store.read(lambda tx, u=user: tx.threads.ids_of(u, "", 100))  # type: ignore[misc]
    ]
    assert sorted(left) == sorted(thread.id for thread in (*kept, busy, health, held))
    assert await store.read(lambda tx: tx.copies.count_left()) == {"p": 20}
    grave = await store.read(lambda tx: tx.threads.tombstone(due[0].id))
    assert isinstance(grave, Tombstone)
    assert grave.erasure_id == ""
    again = await cleanup(wanted)
    assert (again.deleted, again.held, erased) == (0, 1, 1)


async def test_what_somebody_has_come_back_to_meanwhile_is_not_erased(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = await store.read(lambda tx: tx.now())
    due, woken = await with_thread(store), await with_thread(store, age=timedelta())
    busy = await with_thread(store, age=2 * OLD)
    cutoff = due.last_message_at
    await store.write(lambda tx: tx.turns.add(a_turn(busy), request(), owner="x"))
    found = [("ada", thread.id) for thread in (due, woken, busy)]
    assert now - cutoff > timedelta(days=1)
    for later, erased in ((timedelta(0), 0), (timedelta(microseconds=1), 1)):
        step = partial(_erase_forgotten, found, cutoff + later)
        assert await store.write(step) == (erased, 0)
    left = await store.read(lambda tx: tx.threads.ids_of("ada", "", 9))
    assert left == sorted([woken.id, busy.id])


@pytest.mark.parametrize("dry_run", [True, False])
async def test_retention_goes_on_behind_what_it_has_to_leave(
    store: Store, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    monkeypatch.setattr(clean_up_threads, "DEFAULT_BATCH", 2)  # threads that are looked for in one go
    for number in range(7):
        await with_thread(store, ("ada", "eve", "eve")[number % 3])
    await HoldUser(store)("eve", hold=True)
    report = await CleanUpThreads(store)(Cleanup(ttl_days=1, delete_after_days=2, dry_run=dry_run))
    assert (report.deleted, report.held) == (3, 4)
    left = await store.read(lambda tx: tx.threads.ids_of("ada", "", 9))
    assert len(left) == (3 if dry_run else 0)


async def test_a_cleanup_that_breaks_off_asks_for_what_follows_what_it_has_erased(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = sorted([await with_thread(store) for _ in range(3)], key=lambda thread: thread.id)
    threads_type: Any = type(await store.read(lambda tx: tx.threads))
    delete = threads_type.delete
    broken = ""
    asked: list[str] = []

    def breaks(threads: Any, thread_id: str, *arguments: Any, **more: Any) -> Any:
        if thread_id == broken:
            raise ValueError("not what was written")
        return delete(threads, thread_id, *arguments, **more)

    monkeypatch.setattr(threads_type, "delete", breaks)
    cleanup = CleanUpThreads(store, erased=lambda: asked.append(broken))
    wanted = Cleanup(ttl_days=1, delete_after_days=2, batch_size=1)
    for thread in threads[:2]:
        broken = thread.id
        with pytest.raises(ValueError):
            await cleanup(wanted)
    assert asked == [threads[1].id]  # behind the first one nothing had been erased yet


async def test_nothing_is_erased_unasked_or_before_it_has_expired(store: Store) -> None:
    await with_thread(store)
    assert (await CleanUpThreads(store)(Cleanup(ttl_days=0))).deleted == 0
    for ttl, after in ((30, 29), (0, 0), (1, 40_000)):
        with pytest.raises(InvalidField) as refused:
            await CleanUpThreads(store)(Cleanup(ttl_days=ttl, delete_after_days=after))
        assert refused.value.field == "delete_after_days"


# What providers keep


class Shelf(ProviderCopies):
    """A provider that refuses, or waits, as a test says, and notes what it was asked for."""

    def __init__(self, *refusals: Exception | asyncio.Event) -> None:
        self.refusals = list(refusals)
        self.asked: list[str] = []

    @property
    def provider(self) -> str:
        return "p"

    async def erase(self, ref: str) -> None:
        self.asked.append(ref)
        if self.refusals:
            refusal = self.refusals.pop(0)
            if isinstance(refusal, asyncio.Event):
                await refusal.wait()
            else:
                raise refusal


async def test_nothing_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_WAIT", "_LONGEST_WAIT", "_LONGEST_ASKED"):
        monkeypatch.setattr(finish_erasures, name, -1.0)  # due again at once, on any clock
    monkeypatch.setattr(finish_erasures, "_SHORTEST_PAUSE", 0.0)
    thread = await with_thread(store)
    never = CopyStays("429", retry_after=250e9)
    shelf = Shelf(CopyStays("500"), CopyStays("401", refused=True), never, RuntimeError("broken"), TimeoutError())
    wanted = asyncio.Event()
    finish = FinishErasures(store=store, copies=shelf, erase_user=eraser(store), wanted=wanted)
    await eraser(store)("ada")
    finish.start()
    try:
        await nothing_left(store)
    finally:
        await finish.stop()
    assert shelf.asked == [f"of {thread.id}"] * 6


class Counted(Unmeasured):
    """Keeps how many copies it was told are left."""

    def __init__(self) -> None:
        self.copies: dict[str, tuple[int, bool]] = {}

    def copies_left(self, provider: str, count: int, *, reached: bool) -> None:
        self.copies[provider] = (count, reached)


async def test_what_is_at_a_provider_out_of_reach_is_told_and_waits(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(finish_erasures, "_SHORTEST_PAUSE", 0.0)
    monkeypatch.setattr(finish_erasures, "_PERIOD", 0.0)
    monkeypatch.setattr(finish_erasures, "_COUNTED_EVERY", 0.0)
    first = await with_thread(store)
    await store.write(lambda tx: tx.copies.keep(first.id, "gone", ["a", "b"]))
    await eraser(store)("ada")
    shelf, counted = Shelf(), Counted()
    finish = FinishErasures(
        store=store, copies=shelf, erase_user=eraser(store), wanted=asyncio.Event(), telemetry=counted
    )
    finish.start()
    try:
        await until(lambda: counted.copies == {"p": (0, True), "gone": (2, False)})
        second = await with_thread(store, "eve")
        await store.write(lambda tx: tx.copies.keep(second.id, "gone", ["c"], erase=True))
        await until(lambda: counted.copies == {"p": (0, True), "gone": (3, False)})
    finally:
        await finish.stop()
    assert shelf.asked == [f"of {first.id}"]
    (told,) = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert told.startswith("2 objects of erased threads are at gone, which this process can't reach")
    found = await ReadErasures(store, "p")()
    assert (found.copies_left, found.waiting) == (3, {"gone": 3})
    assert (await ReadErasures(store, "gone")()).waiting == {}


async def test_what_fails_is_tried_less_and_less_often(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish_erasures, "_LONGEST", 0.05)
    waits: list[tuple[str, float]] = []
    copies_type: Any = type(await store.read(lambda tx: tx.copies))
    stays = copies_type.stays

    def noted(copies: Any, copy: Copy, reason: str, seconds: float) -> None:
        waits.append((reason, seconds))
        stays(copies, copy, reason, -1.0)  # due again at once, on any clock

    monkeypatch.setattr(copies_type, "stays", noted)
    thread = await with_thread(store)
    shelf = Shelf(
        CopyStays("500"),
        CopyStays("429", retry_after=600.0),
        CopyStays("500", retry_after=1.0),
        CopyStays("401", refused=True),
        RuntimeError("broken"),
        asyncio.Event(),
        *[CopyStays("500")] * 7,
    )
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    finish = FinishErasures(store=store, copies=shelf, erase_user=eraser(store), wanted=asyncio.Event())
    finish.start()
    try:
        await nothing_left(store)
    finally:
        await finish.stop()
    expected = [
        ("500", 5), ("429", 600), ("500", 20), ("401", 3_600), ("RuntimeError", 80), ("took too long", 160),
        ("500", 320), ("500", 640), ("500", 1_280), ("500", 2_560), *[("500", 3_600)] * 3,
    ]  # fmt: skip
    assert [reason for reason, _ in waits] == [reason for reason, _ in expected]
    for (_, seconds), (_, about) in zip(waits, expected, strict=True):
        assert 0.75 * about <= seconds <= 1.25 * about


async def test_what_a_reader_keeps_is_purged_when_it_has_left(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish_erasures, "_PERIOD", 1e6)
    monkeypatch.setattr(finish_erasures, "_SHORTEST_PAUSE", 0.0)
    answers, done = [True, False, False], asyncio.Event()

    async def purge() -> bool:
        if not answers:
            raise AssertionError("asked once too often")
        if len(answers) == 1:
            done.set()
        return answers.pop()

    monkeypatch.setattr(store, "purge", purge)
    finish = FinishErasures(store=store, copies=Shelf(), erase_user=eraser(store), wanted=asyncio.Event())
    finish.start()
    try:
        async with asyncio.timeout(20):
            await done.wait()
    finally:
        await finish.stop()


async def test_a_purge_that_fails_is_made_again_and_holds_up_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish_erasures, "_PERIOD", 0.0)
    monkeypatch.setattr(finish_erasures, "_SHORTEST_PAUSE", 0.0)
    thread = await with_thread(store)
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    shelf, purged = Shelf(), asyncio.Event()

    async def purge() -> bool:
        if not shelf.asked:
            raise RuntimeError("broken")
        purged.set()
        return True

    monkeypatch.setattr(store, "purge", purge)
    finish = FinishErasures(store=store, copies=shelf, erase_user=eraser(store), wanted=asyncio.Event())
    finish.start()
    try:
        async with asyncio.timeout(20):
            await purged.wait()
    finally:
        await finish.stop()
    assert shelf.asked == [f"of {thread.id}"]


async def test_much_that_is_left_at_a_provider_holds_up_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PERIOD", "_SHORTEST_PAUSE", "_COUNTED_EVERY"):
        monkeypatch.setattr(finish_erasures, name, 0.0)
    thread = await with_thread(store)
    await store.write(lambda tx: tx.copies.keep(thread.id, "p", [f"r{number:02}" for number in range(30)]))
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    shelf, wanted = Shelf(), asyncio.Event()
    purged: list[int] = []
    counted: list[int] = []

    class Counting(Unmeasured):
        def copies_left(self, provider: str, count: int, *, reached: bool) -> None:
            counted.append(count)
            wanted.set()  # somebody goes on deleting

    async def purge() -> bool:
        purged.append(len(shelf.asked))
        return True

    monkeypatch.setattr(store, "purge", purge)
    finish = FinishErasures(
        store=store, copies=shelf, erase_user=eraser(store), wanted=wanted, telemetry=Counting()
    )
    finish.start()
    try:
        await nothing_left(store)
    finally:
        await finish.stop()
    assert len(shelf.asked) == 31
    assert any(0 < count < 31 for count in counted)
    assert any(0 < asked < 31 for asked in purged)


async def test_what_runs_at_a_provider_gets_a_moment_to_end_before_its_copies_go(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([Stored("r1"), "a", DONE], [Stored("r2"), "b", gate])) as it:
        ended, running = await it.say(), await it.say()
        await it.events(ended)
        await it.stream(running, "b")
        for turn_id in (running, ended):
            assert not await store.read(lambda tx: tx.copies.any_due("scripted"))
            await until(lambda: not it.engine._aside)
            await it.delete("ada", (await it.threads.turn("ada", turn_id))[0].thread_id)
        taken = await store.write(lambda tx: tx.copies.claim("scripted", 9, 60))
        assert [copy.ref for copy in taken] == ["r1"]
        assert await store.read(lambda tx: tx.copies.count_left()) == {"scripted": 2}


async def test_a_deletion_asks_at_once_for_what_follows_it(store: Store) -> None:
    thread, erased = await with_thread(store), asyncio.Event()
    delete = DeleteThread(store=store, gone=lambda _: None, erased=erased.set)
    with pytest.raises(ThreadNotFound):
        await delete("eve", thread.id)
    assert not erased.is_set()
    await delete("ada", thread.id)
    assert erased.is_set()


async def test_a_copy_may_have_as_long_a_name_as_gateways_give(store: Store) -> None:
    thread = await with_thread(store)
    name = "r" * MAX_ID
    await store.write(lambda tx: tx.copies.keep(thread.id, "p", [name]))
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    shelf = Shelf()
    finish = FinishErasures(store=store, copies=shelf, erase_user=eraser(store), wanted=asyncio.Event())
    finish.start()
    try:
        await nothing_left(store)
    finally:
        await finish.stop()
    assert name in shelf.asked


async def test_two_processes_do_not_take_the_same(store: Store) -> None:
    thread = await with_thread(store)
    await store.write(lambda tx: tx.copies.keep(thread.id, "p", [f"r{number:02}" for number in range(30)]))
    await store.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    shelf = Shelf()
    workers = [
        FinishErasures(store=store, copies=shelf, erase_user=eraser(store), wanted=asyncio.Event())
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    await nothing_left(store)
    for worker in workers:
        await worker.stop()
    assert len(shelf.asked) == len(set(shelf.asked)) == 31


async def test_a_turn_does_not_end_before_it_is_on_record_what_the_provider_keeps(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies_type: Any = type(await store.read(lambda tx: tx.copies))
    keep, tries = copies_type.keep, 0

    def late(*arguments: Any) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise StoreUnavailable
        keep(*arguments)

    monkeypatch.setattr(copies_type, "keep", late)
    async with service(store, ScriptedAgent([Stored("r1"), "a", DONE])) as it:
        await it.events(await it.say())
        assert tries == 4


async def test_every_round_at_the_provider_is_on_record_before_its_turn_has_ended(store: Store) -> None:
    conversation = StateChanged(ProviderState(provider="scripted", conversation_id="c"))
    agent = ScriptedAgent([conversation, Stored("r1"), "a", DONE], [Begun("r2"), Stored("r3"), "b", DONE])
    async with service(store, agent) as it:
        for _ in range(2):
            turn_id = await it.say()
            await it.events(turn_id)
            await it.delete("ada", (await it.threads.turn("ada", turn_id))[0].thread_id)
        left: Sequence[Copy] = await store.read(lambda tx: tx.copies.left(9))
        assert sorted(copy.ref for copy in left) == ["c", "r1", "r2", "r3"]
        assert {copy.provider for copy in left} == {"scripted"}
