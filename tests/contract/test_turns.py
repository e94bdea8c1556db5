"""What the service promises of a turn, on every store."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from adapters.memory.store import MemoryStore
from adapters.system import Ids
from core.model.agent import Catalog, Domain
from core.model.errors import (
    AgentNotFound,
    InvalidField,
    Overloaded,
    PositionAhead,
    QuotaExceeded,
    RequestIdReused,
    ThreadNotFound,
    TurnInProgress,
    TurnNotFound,
)
from core.model.events import (
    LogEntry,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)
from core.model.message import Role
from core.model.thread import ProviderState, Thread
from core.model.turn import TurnReason, TurnState, Usage
from core.ports.agent import AgentFailed, RoundFinished, StateChanged
from core.ports.store import Conflict, Store, Transaction
from core.ports.tools import ToolContext, ToolOutput
from core.ports.turns import RequestKey
from core.use_cases import read_threads, turn_engine
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.definitions import Definitions
from core.use_cases.end_turn import Ending, end_turn
from core.use_cases.follow_turn import FollowTurn
from core.use_cases.read_threads import MessageQuery, ThreadQuery
from core.use_cases.reply_writer import MAX_ARGUMENTS, MAX_OUTPUT, MAX_TOOL_CALLS, MAX_TOOL_ROUNDS
from core.use_cases.turn_engine import TurnLimits
from core.use_cases.turn_feed import TurnFeeds
from doubles import CATALOG, DONE, Gate, NotedTools, ScriptedAgent, definition, kinds, service, text_of
from harness import until
from records import NOW, a_thread


async def test_a_turn_is_started_text_finished(store: Store) -> None:
    async with service(store, ScriptedAgent(["Hi ", "there 👋", DONE])) as it:
        turn_id = await it.say()
        events = await it.events(turn_id)
        assert events[0].position == 1
        assert isinstance(events[0].event, TurnStarted)
        assert text_of(events) == "Hi there 👋"
        last = events[-1]
        assert isinstance(last.event, TurnFinished)
        assert last.position == 1 + len("Hi there 👋") + 1 == last.event.turn.last_position
        assert last.event.turn.state is TurnState.COMPLETED
        assert last.event.turn.usage.output_tokens == 5
        assert last.event.reply is not None
        assert last.event.reply.text == "Hi there 👋"
        turn, reply = await it.threads.turn("ada", turn_id)
        assert (turn, reply) == (last.event.turn, last.event.reply)
        messages, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=turn.thread_id), 0, "")
        assert [(line.index, line.role, line.text, line.partial) for line in messages] == [
            (1, Role.USER, "Hello", False),
            (2, Role.ASSISTANT, "Hi there 👋", False),
        ]


async def test_every_cut_of_a_live_and_of_an_ended_turn_resumes_exactly(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["Añ", "o 👩‍🚀 b", gate, "ye", DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        text = "Año 👩‍🚀 bye"
        live = [asyncio.create_task(it.events(turn_id, after)) for after in range(9)]
        gate.open()
        whole = await it.events(turn_id)
        last = whole[-1].position
        for after, task in enumerate(live):
            assert text_of(await task) == text[max(0, after - 1) :]
        for after in range(last):
            rest = await it.events(turn_id, after)
            assert text_of(rest) == text[max(0, after - 1) :]
            assert rest[-1].position == last
            assert kinds(rest)[-1] is TurnFinished
        assert await it.events(turn_id, last) == []


async def test_positions_outside_the_log_are_refused(store: Store) -> None:
    async with service(store) as it:
        turn_id = await it.say()
        last = (await it.events(turn_id))[-1].position
        assert (await it.follow.find("ada", turn_id, last)).id == turn_id
        with pytest.raises(PositionAhead):
            await it.follow.find("ada", turn_id, last + 1)
        with pytest.raises(InvalidField):
            await it.follow.find("ada", turn_id, -1)
        with pytest.raises(TurnNotFound):
            await it.follow.find("eve", turn_id, 0)


async def test_nothing_is_shown_that_is_not_committed(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["one two three", gate, " four", DONE])) as it:
        turn_id = await it.say()
        async with aclosing(it.follow.events(turn_id, 0)) as entries:
            async for entry in entries:
                stored = await store.read(lambda tx: tx.log.read(turn_id))
                assert stored[-1].position >= entry.position
                gate.open()


async def test_a_turn_outlives_its_caller(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["a", gate, "b", DONE])) as it:
        turn_id = await it.say()
        follower = asyncio.create_task(it.events(turn_id))
        await gate.reached.wait()
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        gate.open()
        assert text_of(await it.events(turn_id)) == "ab"


async def test_cancelling_the_call_that_accepts_loses_nothing(store: Store) -> None:
    async with service(store) as it:
        call = asyncio.create_task(it.say(request_id="r1"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await it.accept.settle()
        turn_id = await it.say(request_id="r1")
        assert text_of(await it.events(turn_id)) == "All right."
        assert len(it.agent.requests) == 1


async def test_a_repeated_request_id_attaches(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "once", DONE])) as it:
        ids = await asyncio.gather(*(it.say("Hello", request_id="r1") for _ in range(8)))
        assert len(set(ids)) == 1
        gate.open()
        assert text_of(await it.events(ids[0])) == "once"
        assert await it.say("Hello", request_id="r1") == ids[0]
        turn, _ = await it.threads.turn("ada", ids[0])
        thread = await it.threads.thread("ada", turn.thread_id)
        assert thread.message_count == 2
        with pytest.raises(RequestIdReused):
            await it.say("Something else", request_id="r1")
        assert await it.say("Hello", user="eve", request_id="r1") != ids[0]


async def test_a_repeat_attaches_that_another_process_was_faster_with(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["before", DONE], [gate, "once", DONE])) as it:
        turn, _ = await it.threads.turn("ada", await it.say())
        await it.events(turn.id)
        running = await it.say(thread_id=turn.thread_id, request_id="r1")
        turns_type: Any = type(await store.read(lambda tx: tx.turns))
        by_request, looks = turns_type.by_request, 0

        def not_yet(turns: Any, *key: str) -> Any:
            nonlocal looks
            looks += 1
            return None if looks == 1 else by_request(turns, *key)

        monkeypatch.setattr(turns_type, "by_request", not_yet)
        assert await it.say(thread_id=turn.thread_id, request_id="r1") == running
        assert looks == 2


async def test_the_fingerprint_covers_thread_domain_and_content(store: Store) -> None:
    async with service(store) as it:
        first = await it.say(request_id="r1", domain=Domain.CAREER)
        await it.events(first)
        turn, _ = await it.threads.turn("ada", first)
        assert await it.say(request_id="r1", domain=Domain.CAREER) == first
        for other in ({"domain": Domain.HEALTH}, {}, {"domain": Domain.CAREER, "thread_id": turn.thread_id}):
            with pytest.raises(RequestIdReused):
                await it.say(request_id="r1", **other)
        # Unset is GENERAL for a new thread.
        assert await it.say(request_id="r2") == await it.say(request_id="r2", domain=Domain.GENERAL)


async def test_a_cancelled_call_of_cancel_still_stops_the_owner(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["a", gate, DONE])) as it:
        turn_id = await it.say()
        follower = asyncio.create_task(it.events(turn_id))
        await gate.reached.wait()
        call = asyncio.create_task(it.cancel("ada", turn_id))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        last = (await follower)[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.state is TurnState.CANCELLED


async def test_a_turn_stopped_before_its_first_step_gives_its_place_back(store: Store) -> None:
    async with service(store) as it:
        turn_id = await it.say()
        it.engine.abandon(turn_id)
        await until(lambda: not it.engine._running)
        assert not it.engine._places.taken


async def test_following_from_the_end_while_it_is_being_told_ends_at_once(store: Store) -> None:
    entries = [LogEntry(1, TurnStarted("t", "h", "a"))]
    feeds = TurnFeeds()
    feed = feeds.open("t", entries)
    follower = FollowTurn(store, feeds)

    async def rest() -> list[LogEntry]:
        async with aclosing(follower.events("t", 2)) as events:
            return [entry async for entry in events]

    waiting = asyncio.create_task(rest())
    await asyncio.sleep(0)
    async with service(store) as it:
        last = (await it.events(await it.say()))[-1].event
    feed.publish([LogEntry(2, last)])
    assert await waiting == []


async def test_a_busy_thread_refuses_and_names_the_turn(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE])) as it:
        turn_id = await it.say()
        turn, _ = await it.threads.turn("ada", turn_id)
        with pytest.raises(TurnInProgress) as refusal:
            await it.say(thread_id=turn.thread_id)
        assert refusal.value.details == {"turn_id": turn_id}
        gate.open()
        await it.events(turn_id)
        await it.events(await it.say(thread_id=turn.thread_id))


async def test_the_store_itself_refuses_a_second_turn_at_work(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn, _ = await it.threads.turn("ada", await it.say())
        second = replace(turn, id=Ids().new())
        request = RequestKey(caller="local", user_id="ada", request_id="", fingerprint="")
        with pytest.raises(Conflict):
            await store.write(lambda tx: tx.turns.add(second, request, owner="somebody"))
        assert await store.read(lambda tx: tx.turns.find(second.id)) is None


async def test_another_users_ids_do_not_exist(store: Store) -> None:
    async with service(store) as it:
        turn_id = await it.say()
        await it.events(turn_id)
        turn, _ = await it.threads.turn("ada", turn_id)
        with pytest.raises(TurnNotFound):
            await it.threads.turn("eve", turn_id)
        with pytest.raises(TurnNotFound):
            await it.cancel("eve", turn_id)
        with pytest.raises(ThreadNotFound):
            await it.threads.thread("eve", turn.thread_id)
        with pytest.raises(ThreadNotFound):
            await it.threads.messages(MessageQuery(user_id="eve", thread_id=turn.thread_id), 0, "")
        with pytest.raises(ThreadNotFound):
            await it.threads.describe("eve", turn.thread_id, title="mine", metadata=None)
        with pytest.raises(ThreadNotFound):
            await it.say(user="eve", thread_id=turn.thread_id)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
async def test_only_the_last_page_has_no_next_one(store: Store, size: int) -> None:
    async with service(store) as it:
        for _ in range(4):
            turn, _ = await it.threads.turn("ada", await it.say())
            await it.events(turn.id)
        await it.events(await it.say(thread_id=turn.thread_id))
        pages: list[int] = []
        token = ""
        while token or not pages:
            found, token = await it.threads.threads(ThreadQuery(user_id="ada"), size, token)
            pages.append(len(found))
        assert pages == [size] * (4 // size) + [4 % size] * (4 % size > 0)
        for newest_first in (True, False):
            query = MessageQuery(user_id="ada", thread_id=turn.thread_id, newest_first=newest_first)
            pages, token = [], ""
            while token or not pages:
                lines, token = await it.threads.messages(query, size, token)
                pages.append(len(lines))
            assert pages == [size] * (4 // size) + [4 % size] * (4 % size > 0)


async def test_a_page_of_threads_ends_before_it_grows_too_large(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_threads, "MAX_PAGE_BYTES", 100)
    more: dict[str, Any] = {"title": "é" * 10, "metadata": {"k": "👋" * 5}}  # 41 bytes
    threads = [a_thread(last_message_at=NOW - timedelta(hours=number), **more) for number in range(5)]
    threads.insert(2, a_thread(last_message_at=NOW - timedelta(minutes=90), metadata={"k" * 60: "v" * 60}))
    async with service(store) as it:

        def fill(tx: Transaction) -> None:
            tx.users.ensure("ada", NOW)
            for thread in threads:
                tx.threads.add(thread)

        await store.write(fill)
        pages: list[list[Thread]] = []
        token = ""
        while token or not pages:
            found, token = await it.threads.threads(ThreadQuery(user_id="ada"), 0, token)
            pages.append([*found])
        assert pages == [threads[:2], threads[2:3], threads[3:5], threads[5:]]


async def test_cancel_keeps_the_partial_text_and_is_idempotent(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["half a", gate, " word", DONE])) as it:
        turn_id = await it.say()
        follower = asyncio.create_task(it.events(turn_id))
        await gate.reached.wait()
        async with aclosing(it.follow.events(turn_id, 1)) as entries:
            await anext(entries)
        turn = await it.cancel("ada", turn_id)
        assert (turn.state, turn.reason) == (TurnState.CANCELLED, TurnReason.CANCELLED_BY_CALLER)
        assert await it.cancel("ada", turn_id) == turn
        events = await follower
        assert text_of(events) == "half a"
        assert kinds(events).count(TurnFinished) == 1
        last = events[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn == turn
        assert last.reply is not None
        assert (last.reply.text, last.reply.partial) == ("half a", True)
        assert it.agent.closed == 1
        assert it.feeds.get(turn_id) is None


@pytest.mark.parametrize(
    ("script", "state", "reason", "text"),
    [
        (["a"], TurnState.INCOMPLETE, TurnReason.PROVIDER_TRUNCATED, "a"),
        ([], TurnState.FAILED, TurnReason.PROVIDER_TRUNCATED, ""),
        ([DONE], TurnState.FAILED, TurnReason.PROVIDER_PROTOCOL, ""),
        (["a", AgentFailed(TurnReason.PROVIDER_STALLED)], TurnState.INCOMPLETE, TurnReason.PROVIDER_STALLED, "a"),
        ([AgentFailed(TurnReason.PROVIDER_CONFIG)], TurnState.FAILED, TurnReason.PROVIDER_CONFIG, ""),
        (["a", RuntimeError("secret")], TurnState.INCOMPLETE, TurnReason.INTERNAL, "a"),
        (
            ["a", RoundFinished(DONE.usage, TurnReason.CONTENT_FILTERED)],
            TurnState.INCOMPLETE,
            TurnReason.CONTENT_FILTERED,
            "a",
        ),
        (["x" * (MAX_OUTPUT + 1), DONE], TurnState.INCOMPLETE, TurnReason.OUTPUT_LIMIT, "x" * MAX_OUTPUT),
        (["x" * MAX_OUTPUT, DONE], TurnState.COMPLETED, None, "x" * MAX_OUTPUT),
        (["a\0b\ud800", DONE], TurnState.COMPLETED, None, "a\ufffdb\ufffd"),
    ],
)
async def test_endings(
    store: Store, script: list[object], state: TurnState, reason: TurnReason | None, text: str
) -> None:
    async with service(store, ScriptedAgent(script)) as it:  # type: ignore[arg-type]
        events = await it.events(await it.say())
        last = events[-1].event
        assert isinstance(last, TurnFinished)
        assert (last.turn.state, last.turn.reason) == (state, reason)
        assert text_of(events) == text
        assert (last.reply.text if last.reply else "") == text
        assert last.reply is None or last.reply.partial is (state is not TurnState.COMPLETED)
        turn_id = await it.say(thread_id=last.turn.thread_id)
        assert text_of(await it.events(turn_id)) == "All right."  # no thread stays blocked


async def test_what_the_store_can_not_take_ends_the_turn_all_the_same(store: Store) -> None:
    if isinstance(store, MemoryStore):
        return  # it takes anything
    too_much = RoundFinished(Usage(output_tokens=2**63))
    async with service(store, ScriptedAgent(["a", too_much])) as it:
        turn_id = await it.say()
        last = (await it.events(turn_id))[-1].event
        assert isinstance(last, TurnFinished)
        assert (last.turn.state, last.turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERNAL)
        assert last.reply is not None
        assert last.reply.text == "a"
        await it.events(await it.say(thread_id=last.turn.thread_id))


async def test_text_that_the_store_can_not_take_is_given_up_for_everybody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["a", gate, "b", DONE])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "a")
        follower = asyncio.create_task(it.events(turn_id))

        def refusing(*arguments: Any, tail: Sequence[TurnEvent], **more: Any) -> Any:
            if tail:
                raise ValueError("not to be stored")
            return end_turn(*arguments, tail=tail, **more)

        monkeypatch.setattr(turn_engine, "end_turn", refusing)
        gate.open()
        live = await follower
        last = live[-1].event
        assert isinstance(last, TurnFinished)
        assert (last.turn.state, last.turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERNAL)
        assert text_of(live) == "a"
        assert live[-1].position == last.turn.last_position
        assert await store.read(lambda tx: tx.log.read(turn_id)) == live
        _, reply = await it.threads.turn("ada", turn_id)
        assert reply is not None
        assert reply.text == "a"


async def test_a_turn_has_a_budget(store: Store) -> None:
    gate = Gate()
    limits = TurnLimits(budget=0.05)
    async with service(store, ScriptedAgent(["a", gate]), limits=limits) as it:
        last = (await it.events(await it.say()))[-1].event
        assert isinstance(last, TurnFinished)
        assert (last.turn.state, last.turn.reason) == (TurnState.INCOMPLETE, TurnReason.BUDGET_EXCEEDED)


async def test_bounds_on_turns_in_flight(store: Store) -> None:
    gates = [Gate() for _ in range(3)]
    limits = TurnLimits(max_turns=3, max_turns_per_user=2)
    async with service(store, ScriptedAgent(*((gate, "x", DONE) for gate in gates)), limits=limits) as it:
        first = await it.say(request_id="r1")
        await it.say()
        with pytest.raises(QuotaExceeded):
            await it.say()
        await it.say(user="eve")
        with pytest.raises(Overloaded):
            await it.say(user="bob")
        assert await it.say(request_id="r1") == first  # a repeat needs no place
        for gate in gates:
            gate.open()
        await it.events(first)
        await it.events(await it.say(user="bob"))


async def test_tools_go_round_and_stand_in_the_transcript(store: Store) -> None:
    call = ToolCalled("c1", "note", '{"text": "x"}')
    other = ToolCalled("c2", "missing", "{}")
    agent = ScriptedAgent(["Let me note that. ", call, other, DONE], ["Noted.", DONE])
    async with service(store, agent) as it:
        events = await it.events(await it.say())
        assert kinds(events) == [
            TurnStarted, TextDelta, ToolCalled, ToolCalled, ToolAnswered, ToolAnswered, TextDelta, TurnFinished,
        ]  # fmt: skip
        assert text_of(events) == "Let me note that. Noted."
        (name, arguments, context) = it.tools.calls[0]
        assert len(it.tools.calls) == 1
        assert (name, arguments, context.user_id, context.call_id) == ("note", call.arguments_json, "ada", "c1")
        (round_one,) = agent.requests[1].rounds
        assert [(e.call_id, e.is_error) for e in round_one.exchanges] == [("c1", False), ("c2", True)]
        last = events[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.usage.output_tokens == 10
        query = MessageQuery(user_id="ada", thread_id=last.turn.thread_id)
        lines, _ = await it.threads.messages(query, 0, "")
        assert [line.role for line in lines] == [Role.USER, Role.TOOL, Role.TOOL, Role.ASSISTANT]
        assert lines[1].tool is not None
        assert lines[1].tool.arguments_json == call.arguments_json


async def test_a_tool_call_is_on_record_before_it_has_an_effect(store: Store) -> None:
    seen: list[bool] = []
    tools = NotedTools()

    async def look(name: str, arguments: str, context: object) -> object:
        stored = await store.read(lambda tx: tx.log.read(turn_ids[0]))
        seen.append(any(isinstance(entry.event, ToolCalled) for entry in stored))
        return ToolOutput("ok")

    tools.call = look  # type: ignore[method-assign, assignment]
    turn_ids: list[str] = []
    gate = Gate()
    agent = ScriptedAgent(["a", gate, ToolCalled("c1", "note", "{}"), DONE])
    async with service(store, agent, tools) as it:
        turn_ids.append(await it.say())
        await it.stream(turn_ids[0], "a")  # a commit has just been made: nothing else brings the next one
        gate.open()
        await it.events(turn_ids[0])
    assert seen == [True]


async def test_the_tool_loop_is_bounded(store: Store) -> None:
    rounds = [(ToolCalled(f"c{number}", "note", "{}"), DONE) for number in range(MAX_TOOL_ROUNDS + 5)]
    async with service(store, ScriptedAgent(*rounds)) as it:
        last = (await it.events(await it.say()))[-1].event
        assert isinstance(last, TurnFinished)
        assert (last.turn.state, last.turn.reason) == (TurnState.FAILED, TurnReason.TOOL_LIMIT)
        assert len(it.tools.calls) == MAX_TOOL_ROUNDS


@pytest.mark.parametrize("beyond", [0, 1])
async def test_the_calls_of_a_turn_are_bounded(store: Store, beyond: int) -> None:
    calls = [ToolCalled(f"c{number}", "note", "{}") for number in range(MAX_TOOL_CALLS + beyond)]
    async with service(store, ScriptedAgent([calls[0], DONE], [*calls[1:], DONE])) as it:
        last = (await it.events(await it.say()))[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.reason is (TurnReason.TOOL_LIMIT if beyond else None)
        assert len(it.tools.calls) == (1 if beyond else MAX_TOOL_CALLS)


@pytest.mark.parametrize("in_one_round", [True, False])
async def test_a_call_has_a_name_of_its_own_in_its_turn(store: Store, in_one_round: bool) -> None:
    call = ToolCalled("c1", "note", "{}")
    agent = ScriptedAgent([call, call, DONE]) if in_one_round else ScriptedAgent([call, DONE], [call, DONE])
    async with service(store, agent) as it:
        last = (await it.events(await it.say()))[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.reason is TurnReason.PROVIDER_PROTOCOL
        assert len(it.tools.calls) == (0 if in_one_round else 1)


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([ToolCalled("", "note", "{}")], TurnReason.PROVIDER_PROTOCOL),
        ([ToolCalled("c1", "note", "x" * MAX_ARGUMENTS)], None),
        ([ToolCalled("c1", "note", "x" * (MAX_ARGUMENTS + 1))], TurnReason.PROVIDER_PROTOCOL),
        # No store can hold these names, and what can stand for them is the same.
        ([ToolCalled("c\0", "note", "{}"), ToolCalled("c\ud800", "note", "{}")], TurnReason.PROVIDER_PROTOCOL),
    ],
    ids=["no name", "long", "too long", "one name on record"],
)
async def test_calls_that_can_not_be_are_not_made(
    store: Store, calls: list[ToolCalled], reason: TurnReason | None
) -> None:
    async with service(store, ScriptedAgent([*calls, DONE])) as it:
        last = (await it.events(await it.say()))[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.reason is reason
        assert len(it.tools.calls) == (0 if reason else len(calls))


async def test_what_no_store_can_hold_is_replaced_in_a_call(store: Store) -> None:
    agent = ScriptedAgent([ToolCalled("c\0", "no\ud800te", '{"a": "\0"}'), DONE], ["Well.", DONE])
    async with service(store, agent) as it:
        events = [entry.event for entry in await it.events(await it.say())]
        assert ToolCalled("c\ufffd", "no\ufffdte", '{"a": "\ufffd"}') in events
        assert not it.tools.calls  # there is none of that name
        (exchange,) = agent.requests[1].rounds[0].exchanges
        assert (exchange.call_id, exchange.is_error) == ("c\ufffd", True)


async def test_what_no_store_can_hold_is_replaced_in_a_tools_answer(store: Store) -> None:
    tools = NotedTools(lambda *_: ToolOutput("a\0b\ud800"))
    agent = ScriptedAgent([ToolCalled("c1", "note", "{}"), DONE], ["Noted.", DONE])
    async with service(store, agent, tools) as it:
        events = await it.events(await it.say())
        assert ToolAnswered("c1", "a\ufffdb\ufffd", is_error=False) in [entry.event for entry in events]
        assert agent.requests[1].rounds[0].exchanges[0].output == "a\ufffdb\ufffd"


async def test_a_domain_that_nobody_serves_is_refused_and_leaves_nothing(store: Store) -> None:
    async with service(store) as it:
        some = Catalog({Domain.CAREER: CATALOG.by_domain[Domain.CAREER]})
        it.accept = AcceptMessage(
            store=store, engine=it.engine, catalog=some, definitions=Definitions(some), ids=Ids()
        )
        for domain in (Domain.HEALTH, None):
            with pytest.raises(AgentNotFound):
                await it.say(domain=domain, request_id="r1")
        assert not it.engine._places.taken
        assert await store.read(lambda tx: tx.users.get("ada")) is None
        await it.events(await it.say(domain=Domain.CAREER, request_id="r1"))


async def test_a_thread_stays_with_the_version_of_its_agent(store: Store) -> None:
    older = definition(Domain.CAREER, version=7, instructions="As it was.")  # on record, not on offer
    thread = a_thread(agent_id=older.id)

    def fill(tx: Transaction) -> None:
        tx.agents.publish(older)
        tx.users.ensure("ada", NOW)
        tx.threads.add(thread)

    async with service(store) as it:
        await store.write(fill)
        turn, _ = await it.threads.turn("ada", await it.say(thread_id=thread.id))
        await it.events(turn.id)
        new, _ = await it.threads.turn("ada", await it.say(domain=Domain.CAREER))
        await it.events(new.id)
        assert (turn.agent_id, new.agent_id) == ("career-v7", "career-v1")
        assert [request.definition for request in it.agent.requests] == [older, CATALOG.by_domain[Domain.CAREER]]


async def test_a_coach_and_its_tools_are_told_on_whose_behalf_they_work(store: Store) -> None:
    agent = ScriptedAgent([ToolCalled("c1", "note", "{}"), DONE])
    async with service(store, agent) as it:
        turn, _ = await it.threads.turn("ada", await it.say(domain=Domain.HEALTH))
        await it.events(turn.id)
        for request in agent.requests:
            assert (request.turn_id, request.thread_id, request.user_id) == (turn.id, turn.thread_id, "ada")
            assert (request.domain, request.definition.id) == (Domain.HEALTH, "health-v1")
            assert (request.message.turn_id, request.message.text) == (turn.id, "Hello")
            assert [spec.name for spec in request.tools] == ["note"]
        ((_, _, context),) = it.tools.calls
        assert context == ToolContext(
            user_id="ada",
            thread_id=turn.thread_id,
            turn_id=turn.id,
            epoch=1,
            call_id="c1",
            domain=Domain.HEALTH,
        )


async def test_a_coach_is_reminded_of_the_lines_before_in_their_order(store: Store) -> None:
    async with service(store) as it:
        turn, _ = await it.threads.turn("ada", await it.say("one"))
        for text in ("two", "three"):
            await it.events(turn.id)
            turn, _ = await it.threads.turn("ada", await it.say(text, thread_id=turn.thread_id))
        await it.events(turn.id)
        before = await it.agent.requests[2].history(0)
        assert [line.text for line in before] == ["one", "All right.", "two", "All right."]


async def test_another_providers_copy_is_not_handed_over(store: Store) -> None:
    foreign = ProviderState(provider="another", conversation_id="conv_1", synced_to=2)
    async with service(store) as it:
        turn, _ = await it.threads.turn("ada", await it.say())
        await it.events(turn.id)
        await store.write(lambda tx: tx.threads.save_provider_state(turn.thread_id, foreign))
        await it.events(await it.say(thread_id=turn.thread_id))
        assert [request.state for request in it.agent.requests] == [None, None]


async def test_the_providers_copy_follows_the_transcript(store: Store) -> None:
    state = ProviderState(provider="scripted", conversation_id="conv_1", synced_to=0)
    kept = RoundFinished(DONE.usage, copy=state)
    agent = ScriptedAgent([StateChanged(state), "a", kept], ["b", AgentFailed(TurnReason.PROVIDER_STALLED)])
    async with service(store, agent) as it:
        turn, _ = await it.threads.turn("ada", await it.say())
        await it.events(turn.id)
        await it.events(await it.say(thread_id=turn.thread_id))
        await it.events(await it.say(thread_id=turn.thread_id))
        first, second, third = (request.state for request in agent.requests)
        assert first is None
        assert second is not None
        assert (second.conversation_id, second.synced_to) == ("conv_1", 2)
        assert third is not None
        assert third.synced_to == 2  # a failed turn is not in the copy
        assert agent.requests[2].message.index == 5


async def test_a_copy_that_a_round_has_changed_is_handed_to_the_next(store: Store) -> None:
    made = ProviderState(provider="scripted", conversation_id="conv_1", synced_to=0)
    agent = ScriptedAgent([StateChanged(made), ToolCalled("c1", "note", "{}"), DONE], ["a", DONE])
    async with service(store, agent) as it:
        await it.events(await it.say())
        assert [request.state for request in agent.requests] == [None, made]


async def test_the_next_round_is_handed_the_copy_and_the_deadline_and_only_completion_stores_it(
    store: Store,
) -> None:
    first = ProviderState(provider="scripted", response_id="resp_1", synced_to=1)
    second = ProviderState(provider="scripted", response_id="resp_2", synced_to=1)
    gate = Gate()
    agent = ScriptedAgent(
        [ToolCalled("c1", "note", "{}"), RoundFinished(Usage(), copy=first)],
        [gate, "a", RoundFinished(Usage(), copy=second)],
    )
    async with service(store, agent, limits=TurnLimits(budget=60)) as it:
        begun = asyncio.get_running_loop().time()
        turn, _ = await it.threads.turn("ada", await it.say())
        await gate.reached.wait()
        assert [request.state for request in agent.requests] == [None, first]
        assert len({request.deadline for request in agent.requests}) == 1
        assert begun + 50 < agent.requests[0].deadline <= asyncio.get_running_loop().time() + 60
        assert await store.read(lambda tx: tx.threads.provider_state(turn.thread_id)) is None
        gate.open()
        await it.events(turn.id)
        stored = await store.read(lambda tx: tx.threads.provider_state(turn.thread_id))
        assert stored == replace(second, synced_to=3)


async def test_a_lost_lease_writes_nothing(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["kept", gate, " lost", DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        async with aclosing(it.follow.events(turn_id, 1)) as entries:
            await anext(entries)
        ending = Ending(reason=TurnReason.INTERRUPTED)
        await store.write(lambda tx: end_turn(tx, Ids(), turn_id, ending))  # somebody else ends it
        before = await store.read(lambda tx: tx.log.read(turn_id))
        gate.open()
        events = await it.events(turn_id)
        assert text_of(events) == "kept"
        assert await store.read(lambda tx: tx.log.read(turn_id)) == before


async def test_draining_refuses_waits_and_interrupts(store: Store) -> None:
    quick, stuck = Gate(), Gate()
    async with service(store, ScriptedAgent(["a", quick, "b", DONE], ["c", stuck])) as it:
        first = await it.say()
        second = await it.say(user="eve")
        await stuck.reached.wait()
        it.engine.refuse()
        with pytest.raises(Exception, match="shutting down"):
            await it.say(user="bob")
        quick.open()
        assert text_of(await it.events(first)) == "ab"
        await it.engine.drain(0)
        turn, reply = await it.threads.turn("eve", second)
        assert (turn.state, turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERRUPTED)
        assert reply is not None
        assert reply.text == "c"


async def test_the_log_of_a_finished_turn_is_one_row_and_its_memory_is_free(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([*"abcdef", gate, *"ghij", DONE])) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "abcdef")
        gate.open()
        await it.events(turn_id)
        await until(lambda: not it.engine.knows(turn_id))
        stored = await store.read(lambda tx: tx.log.read(turn_id))
        assert len(stored) == 3
        assert it.feeds.get(turn_id) is None
        assert not it.engine._running
        assert not it.engine._places.taken
