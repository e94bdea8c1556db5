"""What becomes of turns whose process is gone, on every store."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from core.model.errors import StoreUnavailable
from core.model.events import (
    AttemptRestarted,
    LogEntry,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    merged,
)
from core.model.message import RefusalPart, Role, TextPart
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState
from core.ports.agent import AgentFailed, Begun, CannotResume, Resumption, StateChanged
from core.ports.store import Store, Transaction
from core.ports.tools import ToolOutput
from core.use_cases import recover_turns, reply_writer
from core.use_cases.read_threads import MessageQuery
from core.use_cases.turn_engine import TurnLimits
from doubles import DONE, Gate, ManualClock, NotedTools, ScriptedAgent, Service, Step, kinds, service, text_of
from harness import until

LEASE = 0.5


def ending(events: list[LogEntry]) -> Turn:
    """How a followed turn ended."""
    last = events[-1].event
    assert isinstance(last, TurnFinished)
    return last.turn


async def left_behind(store: Store, *script: Step, tools: NotedTools | None = None) -> str:
    """A turn of a process that was killed when the script's last step, a gate, was reached, or its tool's."""
    async with service(store, ScriptedAgent(script), tools) as it:
        turn_id = await it.say()
        gate = script[-1] if isinstance(script[-1], Gate) else tools._gate if tools else None
        assert gate is not None
        await gate.reached.wait()
        if text := "".join(step for step in script if isinstance(step, str)):
            await it.stream(turn_id, text)
        await it.kill()
    return turn_id


async def test_a_turn_without_text_begins_again(store: Store) -> None:
    turn_id = await left_behind(store, Gate())
    async with service(store, ScriptedAgent(["Here I am.", DONE])) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        assert (turn.state, turn.attempt, turn.reason) == (TurnState.COMPLETED, 2, None)
        assert text_of(events) == "Here I am."
        assert AttemptRestarted not in kinds(events)  # there was nothing to drop
        lines, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=turn.thread_id), 0, "")
        assert [line.role for line in lines] == [Role.USER, Role.ASSISTANT]
        assert it.agent.requests[0].message.text == "Hello"


async def test_text_that_was_committed_is_kept_and_the_turn_ends(store: Store) -> None:
    turn_id = await left_behind(store, "some", Gate())
    async with service(store) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        assert (turn.state, turn.attempt, turn.reason) == (TurnState.INCOMPLETE, 1, TurnReason.INTERRUPTED)
        assert text_of(events) == "some"
        assert not it.engine._places.taken  # ending it took none for longer than that
        _, reply = await it.threads.turn("ada", turn_id)
        assert reply is not None
        assert (reply.text, reply.partial) == ("some", True)
        assert not it.agent.requests
        await it.events(await it.say(thread_id=turn.thread_id))  # the thread is free


async def test_where_configured_the_reply_begins_again_and_says_so(store: Store) -> None:
    copy = ProviderState(provider="scripted", conversation_id="conv", synced_to=0)
    turn_id = await left_behind(store, StateChanged(copy), "some", Gate())
    async with service(store, ScriptedAgent(["other", DONE]), limits=TurnLimits(restart=True)) as it:
        events = await it.events(turn_id)
        assert ending(events).state is TurnState.COMPLETED
        restart = events[2].event
        assert restart == AttemptRestarted(2, "INTERRUPTED")
        assert text_of(events[:2]) == "some"
        assert text_of(events[3:]) == "other"
        turn, reply = await it.threads.turn("ada", turn_id)
        assert turn.attempt == 2
        assert reply is not None
        assert reply.text == "other"
        state = it.agent.requests[0].state
        assert state is not None
        assert (state.conversation_id, state.synced_to) == ("conv", UNSYNCED)


async def test_a_failure_of_the_provider_after_text_begins_again_only_where_configured(store: Store) -> None:
    copy = ProviderState(provider="scripted", conversation_id="conv", synced_to=0)
    broken: list[Step] = [StateChanged(copy), "so", AgentFailed(TurnReason.PROVIDER_TRUNCATED)]
    async with service(store, ScriptedAgent(broken, ["so be it", DONE]), limits=TurnLimits(restart=True)) as it:
        events = await it.events(await it.say())
        turn = ending(events)
        assert (turn.state, turn.attempt) == (TurnState.COMPLETED, 2)
        assert AttemptRestarted(2, "PROVIDER_TRUNCATED") in [entry.event for entry in events]
        turn, reply = await it.threads.turn("ada", turn.id)
        assert reply is not None
        assert reply.text == "so be it"
        assert it.agent.requests[1].state == replace(copy, synced_to=UNSYNCED)  # it may have any of the first
    async with service(store, ScriptedAgent(default=broken), limits=TurnLimits(restart=True)) as it:
        events = await it.events(await it.say())
        turn = ending(events)
        assert (turn.state, turn.attempt) == (TurnState.INCOMPLETE, 3)
        assert len(it.agent.requests) == 3
    refused = AgentFailed(TurnReason.PROVIDER_CONFIG)
    async with service(store, ScriptedAgent(["so", refused]), limits=TurnLimits(restart=True)) as it:
        assert ending(await it.events(await it.say())).reason is TurnReason.PROVIDER_CONFIG


async def test_an_idempotent_call_without_an_answer_is_made_again_with_the_same_key(store: Store) -> None:
    call = ToolCalled("c1", "note", "{}")
    before = NotedTools(idempotent=True, gate=Gate())
    turn_id = await left_behind(store, call, DONE, tools=before)
    tools = NotedTools(idempotent=True)
    async with service(store, ScriptedAgent(["Noted.", DONE]), tools) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        assert (turn.state, turn.attempt) == (TurnState.COMPLETED, 2)
        keys = [context.idempotency_key for _, _, context in (*before.calls, *tools.calls)]
        assert keys == [f"{turn_id}:c1"] * 2
        assert [type(entry.event) for entry in events[1:]] == [
            ToolCalled, AttemptRestarted, ToolCalled, ToolAnswered, TextDelta, TurnFinished,
        ]  # fmt: skip
        (done,) = it.agent.requests[0].rounds
        assert [exchange.call_id for exchange in done.exchanges] == ["c1"]
        lines, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=turn.thread_id), 0, "")
        assert [line.role for line in lines] == [Role.USER, Role.TOOL, Role.ASSISTANT]


@pytest.mark.parametrize("text", ["", "Let me see. "])
async def test_what_a_call_did_that_may_not_be_repeated_is_unknown(store: Store, text: str) -> None:
    said = [text] if text else []
    before = NotedTools(gate=Gate())
    turn_id = await left_behind(store, *said, ToolCalled("c1", "note", "{}"), DONE, tools=before)
    tools = NotedTools()
    async with service(store, tools=tools, limits=TurnLimits(restart=True)) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        assert turn.reason is TurnReason.TOOL_OUTCOME_UNKNOWN
        assert turn.state is (TurnState.INCOMPLETE if text else TurnState.FAILED)
        assert text_of(events) == text
        assert not tools.calls
        assert not it.agent.requests


async def test_a_call_of_a_tool_that_is_not_the_agents_keeps_no_reply_from_beginning_again(store: Store) -> None:
    before = NotedTools(idempotent=True, gate=Gate())
    calls = [ToolCalled("c1", "missing", "{}"), ToolCalled("c2", "note", "{}")]
    turn_id = await left_behind(store, *calls, DONE, tools=before)
    tools = NotedTools(idempotent=True)
    async with service(store, ScriptedAgent(["Noted.", DONE]), tools) as it:
        assert ending(await it.events(turn_id)).state is TurnState.COMPLETED
        assert [context.call_id for _, _, context in tools.calls] == ["c2"]
        (done,) = it.agent.requests[0].rounds
        assert [exchange.is_error for exchange in done.exchanges] == [True, False]


async def test_what_a_tool_did_that_is_gone_is_unknown(store: Store) -> None:
    class NoTools(NotedTools):
        names = frozenset[str]()

    before = NotedTools(idempotent=True, gate=Gate())
    turn_id = await left_behind(store, ToolCalled("c1", "note", "{}"), DONE, tools=before)
    async with service(store, tools=NoTools(idempotent=True)) as it:
        turn = ending(await it.events(turn_id))
        assert (turn.state, turn.reason) == (TurnState.FAILED, TurnReason.TOOL_OUTCOME_UNKNOWN)
        assert not it.agent.requests


@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_call_that_was_answered_is_never_made_again(store: Store, idempotent: bool) -> None:
    call, gate = ToolCalled("c1", "note", "{}"), Gate()
    agent, before = ScriptedAgent([call, DONE], [gate]), NotedTools(idempotent=idempotent)
    async with service(store, agent, before) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()
    tools = NotedTools(lambda *_: ToolOutput("another answer"), idempotent=idempotent)
    async with service(store, ScriptedAgent(["Noted.", DONE]), tools) as it:
        turn = ending(await it.events(turn_id))
        assert not tools.calls
        if idempotent:
            assert turn.state is TurnState.COMPLETED
            assert it.agent.requests[0].rounds[0].exchanges[0].output == "noted {}"
        else:
            assert (turn.state, turn.reason) == (TurnState.FAILED, TurnReason.INTERRUPTED)


async def test_a_second_crash_forgets_no_effect(store: Store) -> None:
    call = ToolCalled("c1", "note", "{}")
    turn_id = await left_behind(store, call, DONE, tools=NotedTools(idempotent=True, gate=Gate()))
    again = NotedTools(idempotent=True, gate=Gate())
    async with service(store, ScriptedAgent(), again) as it:
        assert again._gate is not None
        await again._gate.reached.wait()
        await it.kill()
    tools = NotedTools(idempotent=True)
    async with service(store, ScriptedAgent(["Noted.", DONE]), tools) as it:
        turn = ending(await it.events(turn_id))
        assert (turn.state, turn.attempt) == (TurnState.COMPLETED, 3)
        assert [context.call_id for _, _, context in tools.calls] == ["c1"]


REFUSING: list[Step] = [
    "Hm. ", TextDelta("Not ", refusal=True), TextDelta("that.", refusal=True), " A note, then. ",
    ToolCalled("c1", "note", "{}"), DONE,
]  # fmt: skip
REFUSED = (TextPart("Hm. "), RefusalPart("Not that."), TextPart(" A note, then. Noted."))


def said(events: Iterable[LogEntry]) -> list[TurnEvent]:
    """The text of a log and the calls, with text in the fewest pieces."""
    return merged(entry.event for entry in events if isinstance(entry.event, TextDelta | ToolCalled))


async def test_a_refusal_in_a_round_that_is_kept_stays_one(store: Store) -> None:
    async with service(store, ScriptedAgent(REFUSING, ["Noted.", DONE])) as it:
        undisturbed = await it.events(await it.say())
    gate = Gate()
    async with service(store, ScriptedAgent(REFUSING, [gate]), NotedTools(idempotent=True)) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()
    tools, limits = NotedTools(idempotent=True), TurnLimits(restart=True)
    async with service(store, ScriptedAgent(["Noted.", DONE]), tools, limits) as it:
        events = await it.events(turn_id)
        (restart,) = [entry for entry in events if isinstance(entry.event, AttemptRestarted)]
        again = await it.events(turn_id, restart.position)
        assert said(again) == said(undisturbed)
        for whole in (undisturbed, events):
            finished = whole[-1].event
            assert isinstance(finished, TurnFinished)
            assert finished.reply is not None
            assert finished.reply.content == REFUSED


async def test_attempts_are_bounded(store: Store) -> None:
    turn_id = await left_behind(store, Gate())
    for attempt in (2, 3):
        gate = Gate()
        async with service(store, ScriptedAgent([gate])) as it:
            await gate.reached.wait()
            assert (await it.threads.turn("ada", turn_id))[0].attempt == attempt
            await it.kill()
    async with service(store) as it:
        turn = ending(await it.events(turn_id))
        assert (turn.state, turn.attempt, turn.reason) == (TurnState.FAILED, 3, TurnReason.INTERRUPTED)
        assert not it.agent.requests


async def test_the_budget_runs_from_the_first_claim(store: Store, clock: ManualClock) -> None:
    turn_id = await left_behind(store, Gate())
    clock.advance(seconds=10)
    async with service(store, limits=TurnLimits(budget=0.001)) as it:
        turn = ending(await it.events(turn_id))
        assert (turn.state, turn.reason) == (TurnState.FAILED, TurnReason.BUDGET_EXCEEDED)
        assert not it.agent.requests


async def test_one_broken_turn_does_not_keep_the_others_waiting(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = [Gate(), Gate()]
    async with service(store, ScriptedAgent([gates[0]], [gates[1]])) as it:
        broken, fine = await it.say(), await it.say()
        for gate in gates:
            await gate.reached.wait()
        await it.kill()
    log_type: Any = type(await store.read(lambda tx: tx.log))
    read, tries = log_type.read, 0

    def unreadable(log: Any, turn_id: str, after: int = 0) -> Any:
        nonlocal tries
        if turn_id == broken:
            tries += 1
            raise ValueError("not what was written")
        return read(log, turn_id, after)

    monkeypatch.setattr(log_type, "read", unreadable)
    async with service(store) as it:
        assert ending(await it.events(fine)).state is TurnState.COMPLETED
        assert not it.engine.knows(broken)
        assert tries == 2  # to claim it, and to end it
        await it.recover._take_stock()
        assert tries == 2  # it was told once, and is left as it is
    monkeypatch.undo()
    async with service(store) as it:
        assert ending(await it.events(broken)).state is TurnState.COMPLETED


async def test_a_turn_whose_acceptance_was_not_answered_is_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_turns, "_LONGEST_PERIOD", 0.1)  # between two looks at what is on record
    async with service(store, ScriptedAgent(["Here.", DONE])) as it:
        write = store.write

        async def unanswered(change: Callable[..., Any]) -> Any:
            await write(change)
            raise StoreUnavailable

        monkeypatch.setattr(store, "write", unanswered)
        with pytest.raises(StoreUnavailable):
            await it.say(request_id="r")
        monkeypatch.undo()
        turn_id = await it.say(request_id="r")
        assert ending(await it.events(turn_id)).state is TurnState.COMPLETED
        assert len(it.agent.requests) == 1
        assert not it.engine._expected


# Several processes on one database


@contextlib.asynccontextmanager
async def pair(store: Store, one: ScriptedAgent, two: ScriptedAgent, **more: Any) -> Any:
    """Two processes."""
    async with service(store, one, lease=LEASE, **more) as first, service(store, two, lease=LEASE) as second:
        yield first, second


async def halt(it: Service) -> None:
    """Has a process look for nothing, and renew no lease."""
    for task in it.recover._tasks:
        task.cancel()
    await asyncio.gather(*it.recover._tasks, return_exceptions=True)


async def expire(it: Service, clock: ManualClock) -> None:
    """Time in which a process does not renew its lease; a server database has its own clock."""
    await halt(it)
    clock.advance(seconds=2 * LEASE)


async def test_another_process_takes_over_and_the_zombie_writes_nothing(store: Store, clock: ManualClock) -> None:
    silent, spoken = Gate(), Gate()
    copy = StateChanged(ProviderState(provider="scripted", conversation_id="zombie"))
    zombie = ScriptedAgent(["kept", spoken, " lost", DONE], [silent, copy, "lost", DONE])
    async with pair(store, zombie, ScriptedAgent(["Taken over.", DONE])) as (one, two):
        with_text = await one.say()
        await one.stream(with_text, "kept")
        without = await one.say(user="eve")
        await silent.reached.wait()
        await expire(one, clock)
        taken = await two.events(without)
        assert (ending(taken).state, ending(taken).attempt) == (TurnState.COMPLETED, 2)
        kept = await two.events(with_text)
        assert (ending(kept).state, ending(kept).reason) == (TurnState.INCOMPLETE, TurnReason.INTERRUPTED)
        silent.open()
        spoken.open()
        await until(lambda: not one.engine._running)
        assert one.agent.closed == 2
        assert await one.events(without) == taken
        assert await one.events(with_text) == kept
        thread_id = ending(taken).thread_id
        assert await store.read(lambda tx: tx.threads.provider_state(thread_id)) is None


async def test_a_follower_hears_at_once_of_the_end_that_its_own_process_brought(
    store: Store, clock: ManualClock
) -> None:
    async with pair(store, ScriptedAgent(["kept", Gate()]), ScriptedAgent()) as (one, two):
        turn_id = await one.say()
        await one.stream(turn_id, "kept")
        two.feeds.poll = 1e6  # nothing is found by looking
        follower = asyncio.create_task(two.events(turn_id))
        await until(lambda: any(news.position == 5 for news in two.feeds._waiting.get(turn_id, ())))
        await expire(one, clock)
        assert ending(await follower).reason is TurnReason.INTERRUPTED


async def test_a_process_that_lost_its_lease_calls_no_tool_before_it_knows(
    store: Store, clock: ManualClock
) -> None:
    gate, tools = Gate(), NotedTools()
    agent = ScriptedAgent([gate, ToolCalled("c1", "note", "{}"), DONE])
    async with pair(store, agent, ScriptedAgent(), tools=tools) as (one, _):
        turn_id = await one.say()
        await gate.reached.wait()
        one.engine.leased(0.0)  # as after a pause: the loop's time went on
        gate.open()
        await until(lambda: one.engine._running[turn_id].log.position > 1)
        one.engine.leased(0.0)  # a renewal that took so long that it is over again
        for _ in range(10):  # time to make the call in
            await asyncio.sleep(0)
        assert not tools.calls
        await until(lambda: tools.calls)  # it has renewed its lease, and the turn is still its own
        assert ending(await one.events(turn_id)).attempt == 1


async def test_without_a_lease_nothing_is_accepted(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with pair(store, ScriptedAgent(["a", gate, DONE]), ScriptedAgent()) as (one, _):
        turn_id = await one.say(request_id="r")
        await one.stream(turn_id, "a")
        thread_id = (await one.threads.turn("ada", turn_id))[0].thread_id
        await halt(one)
        one.engine.leased(0.0)
        for more in ({}, {"thread_id": thread_id, "on_busy": BusyPolicy.INTERRUPT}):
            with pytest.raises(StoreUnavailable):
                await one.say(**more)
        assert await one.say(request_id="r") == turn_id  # a repeat needs none


async def test_a_clock_set_back_lengthens_no_budget(store: Store, clock: ManualClock) -> None:
    turn_id = await left_behind(store, Gate())
    clock.advance(hours=-5)
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE]), limits=TurnLimits(budget=60)) as it:
        await gate.reached.wait()
        assert it.engine._running[turn_id].claimed.budget_left <= 60


async def test_nobody_takes_the_turns_of_a_living_process(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with pair(store, ScriptedAgent(["a", gate, "b", DONE]), ScriptedAgent()) as (one, two):
        turn_id = await one.say()
        loop = asyncio.get_running_loop()
        end = loop.time() + 3 * LEASE
        await until(lambda: loop.time() > end)
        gate.open()
        turn = ending(await two.events(turn_id))
        assert (turn.state, turn.attempt, turn.epoch) == (TurnState.COMPLETED, 1, 2)
        assert not two.agent.requests


async def test_after_an_outage_everybody_keeps_what_is_theirs(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with pair(store, ScriptedAgent(["a", gate, "b", DONE]), ScriptedAgent()) as (one, two):
        turn_id = await one.say()
        await one.stream(turn_id, "a")
        asked = 0

        async def away(_: object) -> Any:
            nonlocal asked
            asked += 1
            raise StoreUnavailable

        for method in ("read", "write"):
            monkeypatch.setattr(store, method, away)
        clock.advance(seconds=10 * LEASE)
        loop = asyncio.get_running_loop()
        end = loop.time() + 1.5 * LEASE
        await until(lambda: loop.time() > end)
        assert asked > 2
        monkeypatch.undo()
        await two.recover._renew()  # the other is the first to be back
        await two.recover._take_stock()
        gate.open()
        turn = ending(await two.events(turn_id))
        assert (turn.state, turn.epoch) == (TurnState.COMPLETED, 2)


async def test_after_a_renewal_that_was_not_answered_the_others_get_time_for_theirs(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with pair(store, ScriptedAgent(["a", gate]), ScriptedAgent()) as (one, two):
        turn_id = await one.say()
        await one.stream(turn_id, "a")
        await halt(one)
        asked = 0

        async def away(_: object) -> Any:
            nonlocal asked
            asked += 1
            raise StoreUnavailable

        with monkeypatch.context() as outage:
            outage.setattr(store, "write", away)
            await until(lambda: asked)
            await halt(two)
        two.recover._watched_since = 0.0  # it has looked for long, and would take what it finds
        await store.write(lambda tx: tx.leases.renew(two.engine.claimant.owner, 1e6))  # its own lasts
        await store.write(lambda tx: tx.leases.end(one.engine.claimant.owner))
        await two.recover._renew()
        await two.recover._take_stock()
        assert (await two.threads.turn("ada", turn_id))[0].state is TurnState.RUNNING
        two.recover._watched_since -= LEASE
        await two.recover._take_stock()
        assert (await two.threads.turn("ada", turn_id))[0].state is TurnState.INCOMPLETE


async def test_what_runs_in_an_epoch_that_is_over_is_stopped_and_claimed_anew(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "old", DONE], ["new", DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()

        def move_on(tx: Transaction) -> None:
            turn = tx.turns.find(turn_id)
            assert turn is not None
            tx.turns.save_claim(replace(turn, epoch=turn.epoch + 1), it.engine.claimant.owner)

        await store.write(move_on)
        await it.recover._take_stock()
        await until(lambda: not it.engine.knows(turn_id))
        await it.recover._take_stock()
        assert text_of(await it.events(turn_id)) == "new"


async def test_a_turn_is_cancelled_and_followed_from_another_process(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with pair(store, ScriptedAgent(["half", gate, DONE]), ScriptedAgent()) as (one, two):
        turn_id = await one.say()
        here, there = asyncio.create_task(one.events(turn_id)), asyncio.create_task(two.events(turn_id))
        await two.stream(turn_id, "half")
        assert (await two.cancel("ada", turn_id)).state is TurnState.CANCELLED
        assert await here == await there
        await until(lambda: not one.engine._running)
        assert one.agent.closed == 1


async def test_a_stop_hands_over_what_has_no_text(store: Store, clock: ManualClock) -> None:
    spoken, silent = Gate(), Gate()
    leaving = ScriptedAgent(["My ", spoken, "text.", DONE], [silent, "never", DONE])
    async with pair(store, leaving, ScriptedAgent(["Elsewhere.", DONE])) as (one, two):
        with_text = await one.say()
        await one.stream(with_text, "My ")
        without = await one.say(user="eve")
        await silent.reached.wait()
        follower = asyncio.create_task(one.events(without))
        drain = asyncio.create_task(one.engine.drain(20))
        moved = await follower
        assert not drain.done()
        assert text_of(moved) == "Elsewhere."
        assert (ending(moved).state, ending(moved).attempt) == (TurnState.COMPLETED, 2)
        spoken.open()
        await drain
        kept = await two.events(with_text)
        assert (ending(kept).state, ending(kept).attempt) == (TurnState.COMPLETED, 1)
        assert text_of(kept) == "My text."


async def test_a_stop_without_another_process_waits_and_then_leaves_turns_to_the_next_start(store: Store) -> None:
    quick, silent, spoken = Gate(), Gate(), Gate()
    async with service(store, ScriptedAgent([quick, "a", DONE], [silent, DONE], ["b", spoken])) as it:
        first = await it.say()
        second = await it.say(user="eve")
        third = await it.say(user="bob")
        for gate in (quick, silent, spoken):
            await gate.reached.wait()
        await it.stream(third, "b")
        drain = asyncio.create_task(it.engine.drain(0.2))
        quick.open()
        assert ending(await it.events(first)).state is TurnState.COMPLETED
        await drain
        assert (await it.threads.turn("eve", second))[0].state is TurnState.ACCEPTED
        turn, _ = await it.threads.turn("bob", third)
        assert (turn.state, turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERRUPTED)
        assert it.agent.closed == 3
    async with service(store, ScriptedAgent(["Later.", DONE])) as it:
        events = await it.events(second)
        assert (text_of(events), ending(events).attempt) == ("Later.", 2)


async def test_a_stop_lets_a_turn_finish_that_was_on_its_way(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, spoken, arrived = Gate(), Gate(), asyncio.Event()
    async with service(store, ScriptedAgent([quick, "a", DONE], ["b", spoken, "c", DONE])) as it:
        first = await it.say()
        await quick.reached.wait()
        write = store.write

        async def late(change: Any) -> Any:
            await arrived.wait()
            return await write(change)

        with monkeypatch.context() as slow:
            slow.setattr(store, "write", late)
            saying = asyncio.create_task(it.say(user="eve"))
            await until(lambda: it.engine._places.taken == 2)
        drain = asyncio.create_task(it.engine.drain(20))
        await until(lambda: it.engine._draining)
        arrived.set()
        second = await saying
        await it.stream(second, "b")
        quick.open()
        await until(lambda: not it.engine.knows(first))
        for _ in range(100):  # time for a stop to go wrong in
            await asyncio.sleep(0)
        spoken.open()
        assert text_of(await it.events(second)) == "bc"
        await drain
        assert (await it.threads.turn("eve", second))[0].state is TurnState.COMPLETED


async def test_a_stop_tries_once_more_to_write_an_ending_that_was_decided(
    store: Store, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, refused = Gate(), 0
    async with service(store, ScriptedAgent(["said", gate, DONE])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "said")

        async def away(_: object) -> Any:
            nonlocal refused
            refused += 1
            raise StoreUnavailable

        stop = it.engine._stop

        async def back(chosen: Any) -> None:
            monkeypatch.undo()
            await stop(chosen)

        monkeypatch.setattr(store, "write", away)
        monkeypatch.setattr(it.engine, "_stop", back)
        gate.open()
        await until(lambda: refused > 1)
        await it.engine.drain(0.1)
        assert (await it.threads.turn("ada", turn_id))[0].state is TurnState.COMPLETED


@pytest.mark.parametrize("why", ["last attempt", "rounds that are kept"])
async def test_a_stop_lets_a_turn_finish_that_can_not_move_unnoticed(
    store: Store, clock: ManualClock, why: str
) -> None:
    attempt, call, gate = 2, ToolCalled("c1", "note", "{}"), Gate()
    scripts: list[list[Step]] = [[gate]]
    if why == "rounds that are kept":
        attempt = 1
        scripts.insert(0, [call, DONE])
    async with service(store, ScriptedAgent(*scripts), NotedTools(idempotent=True)) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()

    def release(tx: Transaction) -> None:
        turn = tx.turns.find(turn_id)
        assert turn is not None
        waiting = replace(turn, state=TurnState.ACCEPTED, epoch=turn.epoch + 1, attempt=attempt)
        tx.turns.save_claim(waiting, "")

    await store.write(release)
    gate = Gate()
    agent, tools = ScriptedAgent([gate, "a", DONE]), NotedTools(idempotent=True)
    async with pair(store, agent, ScriptedAgent(), tools=tools) as (one, two):
        await gate.reached.wait()
        drain = asyncio.create_task(one.engine.drain(20))
        assert await one.engine._has_peers()
        for _ in range(100):  # time for a stop to go wrong in
            await asyncio.sleep(0)
        gate.open()
        await drain
        assert not two.agent.requests
        assert (await two.threads.turn("ada", turn_id))[0].state is TurnState.COMPLETED


async def test_a_hurried_stop_waits_no_longer(store: Store) -> None:
    async with service(store, ScriptedAgent(["a", Gate()])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "a")
        drain = asyncio.create_task(it.engine.drain(1e6))
        await until(lambda: it.engine._draining)
        it.engine.hurry()
        await drain
        assert (await it.threads.turn("ada", turn_id))[0].reason is TurnReason.INTERRUPTED


async def test_nobody_waits_for_a_process_that_has_stopped(store: Store, clock: ManualClock) -> None:
    async with pair(store, ScriptedAgent(), ScriptedAgent()) as (one, two):
        the_other = two.engine.claimant.owner
        assert await store.read(lambda tx: tx.leases.others(the_other))
        await one.recover.stop()
        assert not await store.read(lambda tx: tx.leases.others(the_other))


async def test_a_queue_goes_on_in_another_process(store: Store, clock: ManualClock) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["one", gate])) as it:
        first = await it.say()
        await it.stream(first, "one")
        turn, _ = await it.threads.turn("ada", first)
        more = {"thread_id": turn.thread_id, "on_busy": BusyPolicy.QUEUE}
        waiting = [await it.say(f"question {number}", **more) for number in range(3)]
        await it.kill()
    async with service(store, ScriptedAgent(["a1", DONE], ["a2", DONE], ["a3", DONE])) as it:
        assert ending(await it.events(first)).reason is TurnReason.INTERRUPTED
        assert [text_of(await it.events(turn_id)) for turn_id in waiting] == ["a1", "a2", "a3"]
        assert [ending(await it.events(turn_id)).attempt for turn_id in waiting] == [1, 1, 1]


async def released(store: Store, *users: str) -> list[str]:
    """Turns that wait, each in a thread of its own, for a process that is not there yet."""
    limits = TurnLimits(max_turns_per_user=len(users))
    async with service(store, ScriptedAgent(default=[Gate()]), limits=limits) as it:
        return [await it.say(user=user) for user in users]


@pytest.fixture
def no_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for because time has passed."""
    monkeypatch.setattr(recover_turns, "_LONGEST_PERIOD", 1e6)


async def test_turns_of_a_user_without_room_hide_no_others(
    store: Store, no_period: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    *hiding, hidden = await released(store, "ada", "ada", "ada", "ada", "eve")
    monkeypatch.setattr(recover_turns, "_BATCH", 2)
    gate, limits = Gate(), TurnLimits(max_turns_per_user=1)
    async with service(store, ScriptedAgent([gate, "a", DONE]), limits=limits, lease=1e7) as it:
        assert ending(await it.events(hidden)).state is TurnState.COMPLETED
        assert [it.engine.knows(turn_id) for turn_id in hiding].count(True) == 1
        await until(lambda: it.engine.users_without_room() == {"ada"})
        assert len(it.agent.requests) == 2
        gate.open()
        for turn_id in hiding:
            assert ending(await it.events(turn_id)).state is TurnState.COMPLETED


@pytest.mark.parametrize("limits", [TurnLimits(max_turns=2), TurnLimits(max_turns_per_user=2)])
async def test_a_place_that_is_given_back_is_taken_at_once(
    store: Store, no_period: None, limits: TurnLimits
) -> None:
    turns = await released(store, *["ada"] * 6)
    gate = Gate()
    agent = ScriptedAgent([gate, "a", DONE], [gate, "b", DONE])
    async with service(store, agent, limits=limits, lease=1e7) as it:
        await until(lambda: len(agent.requests) == 2)
        gate.open()
        for turn_id in turns:
            assert ending(await it.events(turn_id)).state is TurnState.COMPLETED


# A provider that goes on by itself


async def test_a_round_that_the_provider_goes_on_with_is_read_on(store: Store) -> None:
    copy = ProviderState(provider="scripted", conversation_id="conv", synced_to=0)
    turn_id = await left_behind(store, StateChanged(copy), Begun("h1"), "half", Gate())
    async with service(store, ScriptedAgent([" and half", DONE])) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        assert (turn.state, turn.attempt) == (TurnState.COMPLETED, 1)
        assert text_of(events) == "half and half"
        assert AttemptRestarted not in kinds(events)
        (request,) = it.agent.requests
        assert request.resume == Resumption("h1", "half")
        assert request.state == copy
        _, reply = await it.threads.turn("ada", turn_id)
        assert reply is not None
        assert reply.text == "half and half"
        assert not it.agent.stopped


async def test_a_round_behind_a_tool_that_may_not_be_repeated_is_read_on(store: Store) -> None:
    gate, call = Gate(), ToolCalled("c1", "note", "{}")
    agent = ScriptedAgent([Begun("h1"), "Noting. ", call, DONE], [Begun("h2"), gate])
    async with service(store, agent) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()
    async with service(store, ScriptedAgent(["Noted.", DONE])) as it:
        events = await it.events(turn_id)
        assert (ending(events).state, ending(events).attempt) == (TurnState.COMPLETED, 1)
        assert text_of(events) == "Noting. Noted."
        (request,) = it.agent.requests
        assert request.resume == Resumption("h2", "")
        assert [done.text for done in request.rounds] == ["Noting. "]
        assert not it.tools.calls


async def test_what_was_said_before_counts_towards_what_a_reply_may_say(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_writer, "MAX_OUTPUT", 10)
    gate, call = Gate(), ToolCalled("c1", "note", "{}")
    async with service(store, ScriptedAgent([Begun("h1"), "123", call, DONE], [Begun("h2"), "456", gate])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "123456")
        await it.kill()
    async with service(store, ScriptedAgent(["78901", DONE])) as it:
        events = await it.events(turn_id)
        assert (ending(events).reason, text_of(events)) == (TurnReason.OUTPUT_LIMIT, "1234567890")


async def test_a_call_made_before_keeps_its_name(store: Store) -> None:
    gate, call = Gate(), ToolCalled("c1", "note", "{}")
    async with service(store, ScriptedAgent([call, DONE], [gate]), NotedTools(idempotent=True)) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()
    tools = NotedTools(idempotent=True)
    async with service(store, ScriptedAgent([call, DONE]), tools) as it:
        assert ending(await it.events(turn_id)).reason is TurnReason.PROVIDER_PROTOCOL
        assert not tools.calls


async def test_a_round_that_is_over_is_not_stopped(store: Store) -> None:
    broken: list[Step] = ["so", AgentFailed(TurnReason.PROVIDER_TRUNCATED)]
    agent = ScriptedAgent([Begun("h1"), ToolCalled("c1", "note", "{}"), DONE], broken, ["so be it", DONE])
    tools, limits = NotedTools(idempotent=True), TurnLimits(restart=True)
    async with service(store, agent, tools, limits) as it:
        assert ending(await it.events(await it.say())).attempt == 2
    assert not agent.stopped


async def test_another_providers_round_is_not_stopped_here(store: Store) -> None:
    class AnotherAgent(ScriptedAgent):
        provider = "another"

    async with service(store, AnotherAgent([Begun("h1"), "half", Gate()])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "half")
        await it.kill()
    async with service(store) as it:
        assert ending(await it.events(turn_id)).reason is TurnReason.INTERRUPTED
    assert not it.agent.stopped
    assert not it.agent.requests


async def test_a_round_that_is_over_is_not_read_again(store: Store) -> None:
    tools = NotedTools(idempotent=True, gate=Gate())
    turn_id = await left_behind(store, Begun("h1"), ToolCalled("c1", "note", "{}"), DONE, tools=tools)
    async with service(store, ScriptedAgent(["Noted.", DONE]), NotedTools(idempotent=True)) as it:
        assert ending(await it.events(turn_id)).attempt == 2
        assert it.agent.requests[0].resume is None


@pytest.mark.parametrize("text", ["", "half"])
async def test_a_round_that_can_not_be_read_on_counts_as_lost(store: Store, text: str) -> None:
    said = [text] if text else []
    turn_id = await left_behind(store, Begun("h1"), *said, Gate())
    async with service(store, ScriptedAgent([CannotResume()], ["Anew.", DONE])) as it:
        events = await it.events(turn_id)
        turn = ending(events)
        if text:
            assert (turn.state, turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERRUPTED)
            assert text_of(events) == "half"
        else:
            assert (turn.state, turn.attempt) == (TurnState.COMPLETED, 2)
            assert text_of(events) == "Anew."
            assert it.agent.requests[1].resume is None
        await until(lambda: it.agent.stopped == ["h1"])


async def test_what_nobody_will_read_is_stopped(store: Store) -> None:
    gates = [Gate(), Gate(), Gate()]
    scripts: list[list[Step]] = [[Begun(f"h{n}"), "x", gate, DONE] for n, gate in enumerate(gates)]
    agent = ScriptedAgent(*scripts)
    async with service(store, agent) as it:
        cancelled = await it.say()
        await gates[0].reached.wait()
        await it.cancel("ada", cancelled)
        interrupted = await it.say()
        await gates[1].reached.wait()
        thread_id = (await it.threads.turn("ada", interrupted))[0].thread_id
        deleted = await it.say(thread_id=thread_id, on_busy=BusyPolicy.INTERRUPT)
        await gates[2].reached.wait()
        await it.delete("ada", thread_id)
        await until(lambda: not it.engine.knows(deleted))
        await until(lambda: len(it.agent.stopped) == 3)
        assert it.agent.stopped == ["h0", "h1", "h2"]
        await it.events(await it.say())
        assert len(it.agent.stopped) == 3
