"""What becomes of a message for a thread that is busy, and of a thread that is deleted, on every store."""

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest

from adapters.system import Ids
from core.model.errors import (
    Overloaded,
    ProviderUnavailable,
    QueueFull,
    QuotaExceeded,
    StoreBusy,
    ThreadNotFound,
    TurnInProgress,
    TurnNotFound,
)
from core.model.events import TurnFinished, TurnStarted
from core.model.message import Role
from core.model.thread import ProviderState, ThreadState
from core.model.turn import BusyPolicy, TurnReason, TurnState
from core.ports.agent import AgentFailed, StateChanged
from core.ports.store import Store
from core.use_cases import recover_turns
from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads
from core.use_cases.read_threads import MessageQuery
from core.use_cases.turn_engine import TurnLimits
from doubles import DONE, Gate, ManualClock, ScriptedAgent, Service, kinds, service, text_of
from harness import until

QUEUE, INTERRUPT = BusyPolicy.QUEUE, BusyPolicy.INTERRUPT


async def thread_of(it: Service, turn_id: str, user: str = "ada") -> str:
    """A turn's thread."""
    return (await it.threads.turn(user, turn_id))[0].thread_id


async def lines(it: Service, thread_id: str) -> Sequence[tuple[Role, str]]:
    """The transcript."""
    found, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=thread_id), 0, "")
    return [(line.role, line.text) for line in found]


async def test_queued_messages_are_answered_in_order(store: Store) -> None:
    gate = Gate()
    agent = ScriptedAgent(
        ["r1", gate, DONE], ["r2", DONE], [AgentFailed(TurnReason.PROVIDER_CONFIG)], ["r4", DONE]
    )
    async with service(store, agent) as it:
        first = await it.say("q1")
        thread_id = await thread_of(it, first)
        await it.stream(first, "r1")
        waiting = [await it.say(f"q{n}", thread_id=thread_id, on_busy=QUEUE) for n in (2, 3, 4)]
        for turn_id in waiting:
            turn, reply = await it.threads.turn("ada", turn_id)
            assert (turn.state, reply, turn.last_position) == (TurnState.ACCEPTED, None, 1)
        assert await lines(it, thread_id) == [(Role.USER, "q1")]  # questions join when they are answered
        with pytest.raises(TurnInProgress) as refusal:
            await it.say("q5", thread_id=thread_id)
        assert refusal.value.turn_id == first
        follower = asyncio.create_task(it.events(waiting[2]))
        gate.open()
        assert kinds(await follower)[0] is TurnStarted
        assert await lines(it, thread_id) == [
            (Role.USER, "q1"), (Role.ASSISTANT, "r1"), (Role.USER, "q2"), (Role.ASSISTANT, "r2"),
            (Role.USER, "q3"), (Role.USER, "q4"), (Role.ASSISTANT, "r4"),
        ]  # fmt: skip
        turns = [(await it.threads.turn("ada", turn_id))[0] for turn_id in waiting]
        assert [turn.state for turn in turns] == [TurnState.COMPLETED, TurnState.FAILED, TurnState.COMPLETED]
        assert {(turn.model, turn.provider) for turn in turns} == {("script-1", "scripted")}
        assert [request.message.index for request in agent.requests] == [1, 3, 5, 6]


async def test_on_a_free_thread_a_policy_changes_nothing(store: Store) -> None:
    async with service(store) as it:
        first = await it.say(on_busy=QUEUE)
        await it.events(first)
        for policy in BusyPolicy:
            events = await it.events(await it.say(thread_id=await thread_of(it, first), on_busy=policy))
            assert text_of(events) == "All right."


async def test_eight_may_wait(store: Store) -> None:
    gate = Gate()
    limits = TurnLimits(max_turns=1, max_turns_per_user=1)  # waiting turns do not count
    async with service(store, ScriptedAgent([gate, "x", DONE]), limits=limits) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        waiting = [await it.say(thread_id=thread_id, on_busy=QUEUE) for _ in range(8)]
        with pytest.raises(QueueFull):
            await it.say(thread_id=thread_id, on_busy=QUEUE)
        with pytest.raises(Overloaded):
            await it.say(user="eve")
        await it.cancel("ada", waiting.pop(3))
        waiting.append(await it.say(thread_id=thread_id, on_busy=QUEUE))
        gate.open()
        for turn_id in waiting:
            assert text_of(await it.events(turn_id)) == "All right."
        await until(lambda: not it.engine._places.taken)


async def test_a_cancelled_waiting_turn_leaves_no_message(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE])) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        waiting = await it.say("never mind", thread_id=thread_id, on_busy=QUEUE)
        turn = await it.cancel("ada", waiting)
        assert (turn.state, turn.reason) == (TurnState.CANCELLED, TurnReason.CANCELLED_BY_CALLER)
        assert kinds(await it.events(waiting)) == [TurnStarted, TurnFinished]
        assert (await it.threads.turn("ada", waiting))[0] == turn
        gate.open()
        await it.events(first)
        assert await lines(it, thread_id) == [(Role.USER, "Hello"), (Role.ASSISTANT, "x")]
        assert await store.read(lambda tx: tx.turns.waiting_message(waiting)) is None


async def test_a_follower_hears_at_once_of_the_end_of_a_turn_that_does_not_run(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE])) as it:
        waiting = await it.say(thread_id=await thread_of(it, await it.say()), on_busy=QUEUE)
        it.feeds.poll = 1e6  # nothing is found by looking
        follower = asyncio.create_task(it.events(waiting))
        await until(lambda: any(news.position for news in it.feeds._waiting.get(waiting, ())))
        await it.cancel("ada", waiting)
        assert kinds(await follower)[-1] is TurnFinished


async def test_a_question_joins_its_thread_when_its_turn_comes(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE])) as it:
        thread_id = await thread_of(it, await it.say("q1"))
        second = await it.say("q2", thread_id=thread_id, on_busy=QUEUE)
        clock.advance(hours=1)
        gate.open()
        await it.events(second)
        found, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=thread_id), 0, "")
        times = [line.created_at for line in found]
        assert times == sorted(times)
        assert (await it.threads.thread("ada", thread_id)).last_message_at == times[-1]


async def test_cancelling_the_running_turn_lets_the_next_one_run(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["r1", gate, DONE], ["r2", DONE])) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        await it.stream(first, "r1")
        second = await it.say(thread_id=thread_id, on_busy=QUEUE)
        await it.cancel("ada", first)
        assert text_of(await it.events(second)) == "r2"


async def test_a_repeat_attaches_to_a_waiting_turn(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE])) as it:
        thread_id = await thread_of(it, await it.say())
        ids = {await it.say("q", thread_id=thread_id, on_busy=QUEUE, request_id="r") for _ in range(3)}
        assert len(ids) == 1
        assert {await it.say("q", thread_id=thread_id, request_id="r")} == ids
        gate.open()
        assert text_of(await it.events(ids.pop())) == "All right."


async def test_interrupt_ends_what_runs_and_what_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_turns, "_LONGEST_PERIOD", 1e6)  # nothing is noticed later
    gate = Gate()
    limits = TurnLimits(max_turns=1, max_turns_per_user=1)
    async with service(store, ScriptedAgent(["half", gate, DONE], ["new", DONE]), limits=limits, lease=1e7) as it:
        first = await it.say("q1")
        thread_id = await thread_of(it, first)
        follower = asyncio.create_task(it.events(first))
        await it.stream(first, "half")
        second = await it.say("q2", thread_id=thread_id, on_busy=QUEUE)
        third = await it.say("q3", thread_id=thread_id, on_busy=INTERRUPT)
        assert text_of(await it.events(third)) == "new"
        for turn_id in (first, second):
            turn, _ = await it.threads.turn("ada", turn_id)
            assert (turn.state, turn.reason) == (TurnState.CANCELLED, TurnReason.INTERRUPTED)
        assert text_of(await follower) == "half"
        assert await lines(it, thread_id) == [
            (Role.USER, "q1"), (Role.ASSISTANT, "half"), (Role.USER, "q3"), (Role.ASSISTANT, "new"),
        ]  # fmt: skip
        async with asyncio.timeout(20):
            await until(lambda: not it.engine._places.taken)
        assert it.agent.closed == 2


async def test_interrupt_respects_bounds_where_nothing_is_replaced(store: Store) -> None:
    gate = Gate()
    limits = TurnLimits(max_turns_per_user=1)
    async with service(store, ScriptedAgent(["x", DONE], [gate, DONE]), limits=limits) as it:
        first = await it.say()
        await it.events(first)
        thread_id = await thread_of(it, first)
        await until(lambda: not it.engine._places.taken)
        await it.say()
        with pytest.raises(QuotaExceeded):
            await it.say(thread_id=thread_id, on_busy=INTERRUPT)


async def test_many_at_once_run_one_by_one(store: Store) -> None:
    async with service(store, limits=TurnLimits(max_turns_per_user=50)) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        policies = [QUEUE, INTERRUPT, BusyPolicy.REJECT] * 4
        calls = [it.say(thread_id=thread_id, on_busy=on_busy) for on_busy in policies]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        accepted = [outcome for outcome in outcomes if isinstance(outcome, str)]
        assert all(isinstance(o, str | TurnInProgress | QueueFull) for o in outcomes)
        assert len(accepted) >= 2
        for turn_id in accepted:
            await it.events(turn_id)
        roles = [role for role, _ in await lines(it, thread_id)]
        assert roles.count(Role.USER) >= roles.count(Role.ASSISTANT)


async def test_a_thread_with_a_waiting_turn_is_in_use(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE]), limits=TurnLimits(max_turns=1)) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        before = (await it.threads.thread("ada", thread_id)).last_message_at
        await it.say(thread_id=thread_id, on_busy=QUEUE)
        assert (await it.threads.thread("ada", thread_id)).last_message_at > before
        await it.engine.drain(0)
        report = await CleanUpThreads(store)(Cleanup(ttl_days=0))
        assert report.expired == 0
        assert (await it.threads.thread("ada", thread_id)).state is ThreadState.ACTIVE


async def test_a_deleted_thread_is_gone_with_all_that_runs_and_waits_in_it(store: Store) -> None:
    gate = Gate()
    copy = StateChanged(ProviderState(provider="scripted", conversation_id="c2"))
    async with service(store, ScriptedAgent(["a", DONE], [copy, "half", gate, DONE])) as it:
        other = await it.say(user="eve")
        await it.events(other)
        first = await it.say(request_id="r")
        thread_id = await thread_of(it, first)
        await it.stream(first, "half")
        second = await it.say(thread_id=thread_id, on_busy=QUEUE)
        followers = [asyncio.create_task(it.events(turn_id)) for turn_id in (first, first, second)]
        await asyncio.sleep(0)
        with pytest.raises(ThreadNotFound):
            await it.delete("eve", thread_id)
        await it.delete("ada", thread_id)
        for follower in followers:
            with pytest.raises(TurnNotFound):
                await follower
        for turn_id in (first, second):
            with pytest.raises(TurnNotFound):
                await it.threads.turn("ada", turn_id)
            with pytest.raises(TurnNotFound):
                await it.cancel("ada", turn_id)
        for call in (
            it.threads.thread("ada", thread_id),
            it.delete("ada", thread_id),
            it.say(thread_id=thread_id),
        ):
            with pytest.raises(ThreadNotFound):
                await call
        await until(lambda: not it.engine._running)
        assert it.agent.closed == 2
        tombstone = await store.read(lambda tx: tx.threads.tombstone(thread_id))
        assert tombstone is not None
        (left,) = await store.read(lambda tx: tx.copies.left(9))
        assert (left.provider, left.ref, left.thread_id) == ("scripted", "c2", thread_id)
        assert text_of(await it.events(other)) == "a"
        assert await it.say(request_id="r") != first  # a request id lives as long as its turn


async def test_a_deletion_from_another_process_stops_the_owner(store: Store) -> None:
    gate = Gate()
    agent = ScriptedAgent(["half", gate, DONE])
    async with service(store, agent, lease=0.5) as one, service(store, lease=0.5) as two:
        turn_id = await one.say()
        thread_id = await thread_of(one, turn_id)
        await one.stream(turn_id, "half")
        follower = asyncio.create_task(one.events(turn_id))
        await two.delete("ada", thread_id)
        with pytest.raises(TurnNotFound):
            await follower
        await until(lambda: not one.engine._running)


async def test_who_loses_every_race_is_told_that_the_store_is_busy(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(store) as it:
        await it.events(await it.say(request_id="r"))
        turns: Any = type(await store.read(lambda tx: tx.turns))
        looked: list[str] = []

        def too_early(_: object, caller: str, user_id: str, request_id: str) -> None:
            looked.append(request_id)  # as if the other one were not on record yet

        monkeypatch.setattr(turns, "by_request", too_early)
        with pytest.raises(StoreBusy):
            await it.say(request_id="r")
        assert looked
        monkeypatch.undo()
        await it.say(request_id="r")
        await until(lambda: not it.engine._places.taken)


async def test_a_refusal_for_a_caller_who_has_left_is_no_error(store: Store) -> None:
    strays: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: strays.append(context))
    async with service(store) as it:
        turn_id = await it.say()
        await it.events(turn_id)
        missing = Ids().new()
        for call in (it.say(thread_id=missing), it.cancel("ada", missing), it.delete("ada", missing)):
            task = asyncio.create_task(call)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await it.accept.settle()
        await it.events(await it.say())
        gc.collect()
    assert not strays


async def test_while_the_agent_refuses_nothing_is_accepted_and_what_was_goes_on(store: Store) -> None:
    gate = Gate()
    agent = ScriptedAgent(["a", gate, DONE], ["b", DONE])
    async with service(store, agent) as it:
        running = await it.say("q1", request_id="r1")
        thread_id = await thread_of(it, running)
        await it.stream(running, "a")
        waiting = await it.say("q2", thread_id=thread_id, on_busy=QUEUE)
        agent.refused = 7.5
        attempts = (
            it.say("q3"),
            it.say("q3", thread_id=thread_id, on_busy=QUEUE),
            it.say("q3", thread_id=thread_id, on_busy=INTERRUPT),
        )
        for attempt in attempts:
            with pytest.raises(ProviderUnavailable) as refusal:
                await attempt
            assert refusal.value.retry_after == 7.5
        assert await it.say("q1", request_id="r1") == running
        with pytest.raises(TurnInProgress):
            await it.say("q3", thread_id=thread_id)
        gate.open()
        assert text_of(await it.events(running)) == "a"
        assert (await it.threads.turn("ada", waiting))[0].state is TurnState.ACCEPTED
        agent.refused = None
        assert text_of(await it.events(waiting)) == "b"
        assert await lines(it, thread_id) == [
            (Role.USER, "q1"), (Role.ASSISTANT, "a"), (Role.USER, "q2"), (Role.ASSISTANT, "b"),
        ]  # fmt: skip
