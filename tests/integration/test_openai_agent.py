"""The OpenAI agent against a provider on loopback."""

import asyncio
import logging
import re
from contextlib import aclosing
from dataclasses import replace
from datetime import date
from typing import Any, get_args

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel

from adapters.openai.agent import OpenAIAgent
from adapters.openai.client import make_client
from adapters.openai.errors import ProviderFault
from adapters.openai.memory import StateMode
from adapters.openai.models import KeyRefused, ModelMissing, model_sunset, sunset_warning
from core.model.events import TextDelta
from core.model.message import RefusalPart, Role, TextPart, ToolExchange
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import TurnReason
from core.ports.agent import ReplyRequest, RoundFinished, StateChanged, ToolRound
from fake_provider import (
    Answer,
    Break,
    Call,
    ErrorEvent,
    Failed,
    FakeProvider,
    Gate,
    HttpError,
    Incomplete,
    Load,
    Reasoning,
    Text,
    rate_limited,
)
from openai_thread import COACH, KEY, USER_KEY, Naps, ThreadOfTest, fails, said, words

# --- conversations


async def test_two_turns_use_one_conversation(provider: FakeProvider, thread: ThreadOfTest) -> None:
    assert await thread.say("I want to lead") == "You said: I want to lead What would you like to change?"
    assert await thread.say("My team") == "You said: My team What would you like to change?"
    (conversation,) = provider.conversations.values()
    assert words(conversation.items) == [
        "user: I want to lead",
        "assistant: You said: I want to lead What would you like to change?",
        "user: My team",
        "assistant: You said: My team What would you like to change?",
    ]
    assert thread.state == ProviderState(provider="openai", conversation_id=conversation.id, synced_to=4)
    assert [body["conversation"] for body in provider.posts] == [conversation.id] * 2
    assert [len(body["input"]) for body in provider.posts] == [1, 1]


async def test_the_conversation_is_known_before_the_response_is_asked_for(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    async with aclosing(thread.agent.reply(thread.begin("Hello"))) as reply:
        first = await anext(reply)
    assert isinstance(first, StateChanged)
    assert first.state.conversation_id in provider.conversations
    assert first.state.synced_to == 0
    assert provider.posts == []


async def test_what_is_sent(provider: FakeProvider, thread: ThreadOfTest) -> None:
    await thread.say("Hello")
    (body,) = provider.posts
    user_hash = body["safety_identifier"]
    assert len(user_hash) == 64
    assert "ann" not in str(body)
    assert body == {
        "model": "gpt-6-luna",
        "instructions": "Be kind.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "conversation": thread.state.conversation_id if thread.state else None,
        "store": True,
        "stream": True,
        "tools": [
            {
                "type": "function",
                "name": "goals",
                "description": "Lists goals.",
                "parameters": {"type": "object", "properties": {}},
                "strict": False,
            }
        ],
        "parallel_tool_calls": True,
        "reasoning": {"effort": "none"},
        "text": {"verbosity": "low"},
        "max_output_tokens": 2048,
        "context_management": [{"type": "compaction", "compact_threshold": 737_600}],
        "metadata": {
            "thread_id": "thread-1",
            "turn_id": "turn-1",
            "agent_id": "career-v1",
            "domain": "career",
        },
        "safety_identifier": user_hash,
        "prompt_cache_key": f"career-v1-{user_hash[:16]}",
    }
    request = provider.requests[-1]
    assert request.headers["x-client-request-id"] == "turn-1-0-0"


async def test_what_comes_while_nobody_wants_more_is_one_piece(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Load(deltas=40, pace=500))
    pauses = 0

    async def pause() -> None:
        nonlocal pauses
        pauses += 1
        await provider.quiet()

    async with aclosing(thread.agent.reply(replace(thread.begin("Hello"), pause=pause))) as reply:
        pieces = [event.text async for event in reply if isinstance(event, TextDelta)]
    assert "".join(pieces) == "word " * 40
    assert len(pieces) <= 5  # of 40 that were sent; a read may end in the middle of what has come
    assert 1 <= pauses <= len(pieces)  # none before the first text


async def test_what_is_not_set_is_not_sent(provider: FakeProvider, thread: ThreadOfTest) -> None:
    thread.definition = replace(COACH, model="gpt-4o", effort="", verbosity="", max_output_tokens=1)
    thread.tools = ()
    await thread.say("Hello")
    (body,) = provider.posts
    assert body["model"] == "gpt-4o"
    assert body["max_output_tokens"] == 16
    assert not {"tools", "parallel_tool_calls", "reasoning", "text", "temperature", "top_p"} & body.keys()


async def test_a_user_is_the_same_to_the_provider_in_every_turn(
    provider: FakeProvider, client: AsyncOpenAI, thread: ThreadOfTest
) -> None:
    await thread.say("Hello")
    await thread.say("Hello")
    other = ThreadOfTest(OpenAIAgent(client, model="gpt-6-luna", user_key=b"another key"))
    await other.say("Hello")
    first, second, third = (body["safety_identifier"] for body in provider.posts)
    assert first == second != third


async def test_usage_is_counted(provider: FakeProvider, thread: ThreadOfTest) -> None:
    events = await thread.round(thread.begin("Hello"))
    finished = events[-1]
    assert isinstance(finished, RoundFinished)
    assert finished.copy is not None
    assert finished.shortfall is None
    assert finished.usage.input_tokens > finished.usage.cached_input_tokens > 0
    assert finished.usage.cached_input_tokens > finished.usage.cache_write_tokens > 0
    assert finished.usage.output_tokens > 0


# --- tools


async def test_a_tool_call_goes_round(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Text(text="Let me look."), Call("goals", '{"a": 1}', "call_a"))))
    reply = await thread.say("What are my goals?")
    assert reply == "Let me look.\n\nYou said: answer to goals What would you like to change?"
    (conversation,) = provider.conversations.values()
    assert words(conversation.items) == [
        "user: What are my goals?",
        "assistant: Let me look.",
        "call call_a: goals",
        "answer call_a: answer to goals",
        "assistant: You said: answer to goals What would you like to change?",
    ]
    assert provider.posts[1]["input"] == [
        {"type": "function_call_output", "call_id": "call_a", "output": "answer to goals"}
    ]
    assert [request.headers.get("x-client-request-id") for request in provider.requests[1:]] == [
        "turn-1-0-0",
        "turn-1-1-0",
    ]


async def test_parallel_calls_are_answered_together(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Reasoning(), Call("goals"), Call("goals"))))
    await thread.say("What are my goals?")
    assert len(provider.posts[1]["input"]) == 2


async def test_a_conversation_lost_between_two_rounds_is_rebuilt_with_the_rounds(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("Hello")
    provider.then(Answer(output=(Text(text="Let me look."), Call("goals", "{}", "call_a"))))
    request = thread.begin("My goals?")
    await thread.round(request)
    provider.conversations.clear()
    exchange = ToolExchange("call_a", "goals", "{}", "none", False)
    events = await thread.round(replace(request, rounds=(ToolRound("Let me look.", (exchange,)),)))
    assert said(events) == "\n\nYou said: none What would you like to change?"
    (conversation,) = provider.conversations.values()
    assert words(conversation.items)[2:] == [
        "user: My goals?",
        "assistant: Let me look.",
        "call call_a: goals",
        "answer call_a: none",
        "assistant: You said: none What would you like to change?",
    ]
    assert len([ref for ref in thread.kept if ref.startswith("conv")]) == 2


async def test_a_first_message_that_is_asked_again_makes_no_second_conversation(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(HttpError(status=503), Answer(fault=Break(how="eof", after=0)))
    await thread.say("Hello")
    (conversation,) = provider.conversations.values()
    assert words(conversation.items) == [
        "user: Hello",
        "assistant: You said: Hello What would you like to change?",
    ]


async def taken_over_behind_a_tool(provider: FakeProvider, thread: ThreadOfTest) -> ReplyRequest:
    """A request whose first round called a tool, as another process goes on with it."""
    provider.then(Answer(output=(Call("goals", "{}", "call_a"),)))
    request = thread.begin("My goals?")
    await thread.round(request)
    thread.ahead = None  # what its process alone knew
    exchange = ToolExchange("call_a", "goals", "{}", "none", False)
    return replace(request, rounds=(ToolRound("", (exchange,)),))


async def test_another_process_goes_on_behind_a_tool_with_a_copy_that_it_has_looked_at(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("Hello")
    again = await taken_over_behind_a_tool(provider, thread)
    (conversation,) = provider.conversations.values()
    late: Any = {**conversation.items[-1], "id": "fc_x", "call_id": "call_x"}
    conversation.items.append(late)  # of a try that was not the last
    assert said(await thread.round(again)) == "You said: none What would you like to change?"
    assert list(provider.conversations) == [conversation.id]
    assert words(conversation.items)[2:] == [
        "user: My goals?",
        "call call_a: goals",
        "answer call_a: none",
        "assistant: You said: none What would you like to change?",
    ]
    assert len(provider.posts) == 3


async def test_a_round_that_broke_off_is_repeated_with_all_of_the_turn(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(output=(Call("goals", "{}", "call_a"),)), Answer(fault=Break(how="eof", after=0)))
    request = thread.begin("My goals?")
    await thread.round(request)
    exchange = ToolExchange("call_a", "goals", "{}", "none", False)
    later = replace(request, rounds=(ToolRound("", (exchange,)),))
    assert said(await thread.round(later)) == "You said: none What would you like to change?"
    (conversation,) = provider.conversations.values()
    assert [len(body["input"]) for body in provider.posts] == [1, 1, 3]
    assert words(conversation.items) == [
        "user: My goals?",
        "call call_a: goals",
        "answer call_a: none",
        "assistant: You said: none What would you like to change?",
    ]


async def test_a_conversation_with_an_unanswered_call_is_rebuilt(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("Hello")
    (first,) = provider.conversations.values()
    first.items.append({"id": "fc_x", "type": "function_call", "call_id": "x", "name": "goals", "arguments": "{}"})
    assert await thread.say("Again") == "You said: Again What would you like to change?"
    assert len(provider.conversations) == 2


# --- the record and its copy


async def test_a_lost_conversation_is_rebuilt_from_the_record_item_by_item(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(output=(Call("goals", "{}", "call_a"),)))
    await thread.say("First")
    thread.add(Role.USER, "Forbidden?")
    thread.add(Role.ASSISTANT, "", content=(TextPart("Well. "), RefusalPart("I can't.")), partial=True)
    thread.add(Role.USER, "Unanswered")
    old = next(iter(provider.conversations))
    provider.conversations.clear()
    assert thread.state is not None
    thread.state = replace(thread.state, synced_to=len(thread.messages))
    await thread.say("Last")
    (conversation,) = provider.conversations.values()
    assert words(conversation.items) == [
        "user: First",
        "call call_a: goals",
        "answer call_a: answer to goals",
        "assistant: You said: answer to goals What would you like to change?",
        "user: Forbidden?",
        "assistant: Well.  | I can't.",
        "user: Unanswered",
        "user: Last",
        "assistant: You said: Last What would you like to change?",
    ]
    assert conversation.items[5]["status"] == "incomplete"
    assert conversation.metadata == {"thread_id": "thread-1", "agent_id": "career-v1", "domain": "career"}
    assert thread.state == ProviderState(
        provider="openai", conversation_id=conversation.id, synced_to=len(thread.messages)
    )
    assert {old, conversation.id} <= set(thread.kept)


async def test_a_copy_that_is_behind_the_record_is_told_what_is_missing(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("First")
    thread.add(Role.USER, "A turn that failed")
    await thread.say("Last")
    (conversation,) = provider.conversations.values()
    assert words(conversation.items)[2:4] == ["user: A turn that failed", "user: Last"]
    assert thread.state == ProviderState(provider="openai", conversation_id=conversation.id, synced_to=5)
    assert len(provider.posts) == 2


async def test_what_the_record_does_not_have_is_deleted_from_the_copy(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("First")
    (conversation,) = provider.conversations.values()
    extra: Any = [
        {"id": "rs_x", "type": "reasoning", "summary": []},
        {"id": "fc_x", "type": "function_call", "call_id": "x", "name": "goals", "arguments": "{}"},
    ]
    asked: Any = {
        "id": "msg_x",
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "?"}],
    }
    conversation.items += [asked, *extra]
    thread.add(Role.USER, "?")
    thread.add(Role.ASSISTANT, "Half of", partial=True)
    await thread.say("Last")
    assert list(provider.conversations) == [conversation.id]
    assert words(conversation.items) == [
        "user: First",
        "assistant: You said: First What would you like to change?",
        "user: ?",
        "assistant: Half of",
        "user: Last",
        "assistant: You said: Last What would you like to change?",
    ]
    deleted = [request.path.rpartition("/")[2] for request in provider.requests if request.method == "DELETE"]
    assert deleted == ["fc_x", "rs_x", "msg_x"]


async def test_what_is_too_much_to_repair_is_built_anew(provider: FakeProvider, thread: ThreadOfTest) -> None:
    await thread.say("First")
    old = next(iter(provider.conversations))
    for number in range(21):
        thread.add(Role.USER, f"Unanswered {number}")
    await thread.say("Last")
    assert thread.state is not None
    assert {old, thread.state.conversation_id} <= set(thread.kept)
    assert len(provider.conversations[thread.state.conversation_id or ""].items) == 25


@pytest.mark.parametrize("status", [400, 403, 404])
async def test_a_repair_that_the_provider_refuses_is_given_up(
    provider: FakeProvider, thread: ThreadOfTest, status: int
) -> None:
    await thread.say("First")
    thread.add(Role.USER, "Unanswered")
    provider.refusals["items"] = [HttpError(status=status)]
    await thread.say("Last")
    assert len(provider.conversations) == 2
    assert len([ref for ref in thread.kept if ref.startswith("conv")]) == 2


async def test_a_repair_is_tried_again_as_a_reply_is(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    await thread.say("First")
    thread.add(Role.USER, "Unanswered")
    provider.refusals["items"] = [HttpError(status=503), HttpError(status=400, code="conversation_locked")]
    await thread.say("Last")
    assert len(naps.taken) == 2
    assert len(provider.conversations) == 1
    assert len(provider.posts) == 2


async def test_a_long_history_is_added_in_pieces_of_twenty(provider: FakeProvider, thread: ThreadOfTest) -> None:
    for number in range(25):
        thread.add(Role.USER, f"question {number}")
        thread.add(Role.ASSISTANT, f"answer {number}")
    events = await thread.round(thread.begin("Last"))
    states = [event.state for event in events if isinstance(event, StateChanged)]
    assert [state.synced_to for state in states] == [-1, 50]
    (conversation,) = provider.conversations.values()
    assert len(conversation.items) == 52
    assert [request.path for request in provider.requests].count(f"/v1/conversations/{conversation.id}/items") == 2


async def test_a_copy_that_was_not_finished_is_not_used(provider: FakeProvider, thread: ThreadOfTest) -> None:
    for number in range(25):
        thread.add(Role.USER, f"question {number}")
    provider.refusals["items"] = [HttpError(status=400)]
    assert await fails(thread) == (TurnReason.PROVIDER_CONFIG, "")
    assert thread.state is not None
    assert (thread.state.synced_to, len(provider.conversations)) == (-1, 1)
    await thread.say("Again")
    (conversation,) = provider.conversations.values()
    assert [line[:4] for line in words(conversation.items)] == ["user"] * 27 + ["assi"]


async def test_a_conversation_that_is_too_long_makes_room_for_a_shorter_one_which_is_kept(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    for number in range(4):
        await thread.say(f"question {number}")
    provider.then(HttpError(status=400, code="context_length_exceeded"))
    await thread.say("Last")
    long, short = provider.conversations.values()
    kept = words(short.items)
    assert 2 < len(kept) < len(long.items)
    assert kept[:-2] == words(long.items)[-len(kept[:-2]) :]
    thread.add(Role.USER, "Unanswered")
    await thread.say("And now?")
    assert list(provider.conversations.values()) == [long, short]
    assert words(short.items) == [
        *kept,
        "user: Unanswered",
        "user: And now?",
        "assistant: You said: And now? What would you like to change?",
    ]


async def test_a_locked_conversation_is_waited_for(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    await thread.say("First")
    provider.then(
        HttpError(status=400, code="conversation_locked"), HttpError(status=400, code="conversation_locked")
    )
    await thread.say("Second")
    assert len(naps.taken) == 2
    assert len(provider.conversations) == 1


async def test_a_conversation_that_stays_locked_is_replaced(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    await thread.say("First")
    next(iter(provider.conversations.values())).busy = True
    await thread.say("Second")
    assert len(naps.taken) == 4
    assert len(provider.conversations) == 2


async def test_after_an_unknown_outcome_the_provider_is_asked_what_it_has(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await thread.say("First")
    (conversation,) = provider.conversations.values()
    gate = Gate()
    provider.then(HttpError(reset=True, gate=gate))
    turn = asyncio.create_task(thread.say("Second"))
    await gate.reached.wait()
    # The request had its effect all the same.
    late: Any = {
        "id": "msg_x",
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "?"}],
    }
    conversation.items.append({**late, "content": [{"type": "input_text", "text": "Second"}]})
    gate.released.set()
    await turn
    assert [request.method for request in provider.requests[-4:]] == ["POST", "GET", "DELETE", "POST"]
    assert [line for line in words(conversation.items) if line == "user: Second"] == ["user: Second"]


@pytest.fixture
def chain(client: AsyncOpenAI, naps: Naps) -> ThreadOfTest:
    """A thread whose copy is a chain of responses."""
    mode = StateMode.RESPONSE_CHAIN
    return ThreadOfTest(OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, state_mode=mode, sleep=naps))


async def test_another_process_goes_on_behind_a_tool_from_the_last_link_that_is_on_record(
    provider: FakeProvider, chain: ThreadOfTest
) -> None:
    await chain.say("Hello")
    again = await taken_over_behind_a_tool(provider, chain)
    assert said(await chain.round(again)) == "You said: none What would you like to change?"
    _, asked, resumed = provider.posts
    assert resumed["previous_response_id"] == asked["previous_response_id"]
    assert len(resumed["input"]) == 3


async def test_a_chain_in_doubt_is_begun_anew(provider: FakeProvider, chain: ThreadOfTest) -> None:
    await chain.say("First")
    await chain.say("Second")
    assert chain.state is not None
    chain.state = replace(chain.state, synced_to=UNSYNCED)
    await chain.say("Third")
    await chain.say("Fourth")
    sent = [("previous_response_id" in body, len(body["input"])) for body in provider.posts]
    assert sent == [(False, 1), (True, 1), (False, 5), (True, 1)]


async def test_a_chain_that_is_too_long_is_begun_anew_with_less(
    provider: FakeProvider, chain: ThreadOfTest
) -> None:
    for number in range(4):
        await chain.say(f"question {number}")
    provider.then(HttpError(status=400, code="context_length_exceeded"))
    await chain.say("Last")
    refused, sent = provider.posts[-2:]
    assert "previous_response_id" in refused
    assert "previous_response_id" not in sent
    assert 1 < len(sent["input"]) < 9


async def test_what_another_mode_has_left_behind_is_not_gone_on_with(
    provider: FakeProvider, thread: ThreadOfTest, chain: ThreadOfTest
) -> None:
    await thread.say("First")
    chain.messages, chain.turns, chain.state = thread.messages, thread.turns, thread.state
    await chain.say("Second")
    thread.turns, thread.state = chain.turns, chain.state
    await thread.say("Third")
    assert thread.state is not None
    conversation = provider.conversations[thread.state.conversation_id or ""]
    said_there = [line for line in words(conversation.items) if line.startswith("user: ")]
    assert said_there == ["user: First", "user: Second", "user: Third"]


async def test_without_state_every_request_says_everything(
    provider: FakeProvider, client: AsyncOpenAI, naps: Naps
) -> None:
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, state_mode=StateMode.STATELESS, sleep=naps)
    thread = ThreadOfTest(agent)
    provider.then(Answer(output=(Call("goals", "{}", "call_a"),)))
    await thread.say("First")
    events = await thread.round(thread.begin("Second"))
    assert provider.conversations == {}
    assert thread.state is None
    assert events[-1] == RoundFinished(events[-1].usage) if isinstance(events[-1], RoundFinished) else False
    assert [len(body["input"]) for body in provider.posts] == [1, 3, 5]
    assert [body["store"] for body in provider.posts] == [False] * 3
    assert provider.responses == {}


async def test_where_nothing_is_kept_nothing_is_asked_that_needs_it(
    provider: FakeProvider, client: AsyncOpenAI
) -> None:
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, state_mode=StateMode.STATELESS)
    thread = ThreadOfTest(agent)
    await thread.say("First")
    await thread.say("Second")
    needs = {"conversation", "previous_response_id", "background", "context_management"}
    assert [needs & body.keys() for body in provider.posts] == [set(), set()]


# --- what a request can hold


@pytest.fixture
def small(request: pytest.FixtureRequest, provider: FakeProvider, client: AsyncOpenAI, naps: Naps) -> ThreadOfTest:
    """A thread with a model of which nobody knows how much it reads: it is said to be 3,000 tokens."""
    provider.models["own"] = None
    agent = OpenAIAgent(
        client, model="own", user_key=USER_KEY, state_mode=request.param, context_tokens=3_000, sleep=naps
    )
    return ThreadOfTest(agent)


@pytest.mark.parametrize("small", [StateMode.STATELESS], indirect=True)
async def test_the_oldest_turns_are_left_out_where_a_model_reads_little(
    provider: FakeProvider, small: ThreadOfTest
) -> None:
    for number in range(4):
        await small.say(f"{number} " + "x" * 600)
    assert [len(body["input"]) for body in provider.posts] == [1, 3, 3, 3]
    assert provider.posts[-1]["input"][0]["content"][0]["text"].startswith("2 ")


@pytest.mark.parametrize("small", [StateMode.CONVERSATION, StateMode.RESPONSE_CHAIN], indirect=True)
async def test_a_copy_that_is_too_long_is_given_up_even_where_nothing_of_the_record_fits(
    provider: FakeProvider, small: ThreadOfTest
) -> None:
    await small.say("x" * 3_000)
    provider.then(HttpError(status=400, code="context_length_exceeded"))
    await small.say("And now?")
    assert words(provider.shown[-1]) == ["user: And now?"]
    assert len(provider.posts) == 3
    await small.say("Go on")
    assert words(provider.shown[-1]) == [
        "user: And now?",
        "assistant: You said: And now? What would you like to change?",
        "user: Go on",
    ]


@pytest.mark.parametrize("small", [StateMode.CONVERSATION, StateMode.RESPONSE_CHAIN], indirect=True)
async def test_a_message_that_is_too_long_by_itself_costs_the_copy_nothing(
    provider: FakeProvider, small: ThreadOfTest
) -> None:
    await small.say("First")
    before = small.state
    provider.then(HttpError(status=400, code="context_length_exceeded"))
    assert await fails(small, "x" * 9_000) == (TurnReason.CONTEXT_TOO_LONG, "")
    assert (len(provider.posts), small.state) == (2, before)


# --- what a response may say


async def test_a_refusal_is_marked(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Text(text="I can't help with that.", refusal=True),)))
    events = await thread.round(thread.begin("Hello"))
    assert said(events) == "I can't help with that."
    assert all(event.refusal for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize(
    ("reason", "shortfall"),
    [("max_output_tokens", TurnReason.OUTPUT_LIMIT), ("content_filter", TurnReason.CONTENT_FILTERED)],
)
async def test_an_incomplete_answer_says_so(
    provider: FakeProvider, thread: ThreadOfTest, reason: str, shortfall: TurnReason
) -> None:
    provider.then(Answer(output=(Text(text="Half an"),), ending=Incomplete(reason)))
    events = await thread.round(thread.begin("Hello"))
    assert said(events) == "Half an"
    finished = events[-1]
    assert isinstance(finished, RoundFinished)
    assert (finished.shortfall, finished.copy) == (shortfall, None)


async def test_an_answer_incomplete_for_unknown_reasons_broke_off(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(ending=Incomplete("steered")))
    assert (await fails(thread))[0] is TurnReason.PROVIDER_TRUNCATED


@pytest.mark.parametrize(
    "answer",
    [
        Answer(unknown_events=True),
        Answer(comments=True),
        Answer(twice=True),
        Answer(newline="\r\n"),
        Answer(newline="\r"),
        Answer(byte_by_byte=True),
        Answer(sequence_numbers=False),
        Answer(event_names=False, unknown_events=True),
        Answer(output_in_terminal=False),
        Answer(output=(Text(deltas=False),)),
        Answer(output=(Text(deltas=False, done=False),)),
        Answer(output=(Text(deltas=False, done=False, in_item=False),)),
        Answer(output=(Text(done=False, in_item=False),)),
        Answer(output=(Reasoning(), Text())),
    ],
)
async def test_however_it_is_sent_it_reads_the_same(
    provider: FakeProvider, thread: ThreadOfTest, answer: Answer
) -> None:
    provider.then(answer)
    assert await thread.say("Hello") == "You said: Hello What would you like to change?"


async def test_unfit_characters_are_replaced_and_halves_joined(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(output=(Text(pieces=("a\0", "\ud83d", "\ude00b", "\ud83d")),)))
    assert await thread.say("Hello") == "a\ufffd\U0001f600b\ufffd"


# --- what can go wrong


@pytest.mark.parametrize(
    ("answer", "reason", "text"),
    [
        (Answer(fault=Break(how="eof")), TurnReason.PROVIDER_TRUNCATED, "You said"),
        (Answer(fault=Break(how="half")), TurnReason.PROVIDER_TRUNCATED, "You said"),
        (Answer(fault=Break(how="cut")), TurnReason.PROVIDER_TRUNCATED, "You said"),
        (Answer(fault=Break(how="malformed")), TurnReason.PROVIDER_PROTOCOL, "You said"),
        (
            Answer(ending=Failed()),
            TurnReason.PROVIDER_UNAVAILABLE,
            "You said: Hello What would you like to change?",
        ),
        (
            Answer(output=(), ending=Failed("invalid_prompt")),
            TurnReason.CONTENT_FILTERED,
            "",
        ),
        (Answer(output=(Text(text="Well"),), ending=ErrorEvent()), TurnReason.PROVIDER_UNAVAILABLE, "Well"),
        (
            Answer(output=(Text(text="Well"),), ending=ErrorEvent(nested=True)),
            TurnReason.PROVIDER_UNAVAILABLE,
            "Well",
        ),
        (
            Answer(output=(), ending=ErrorEvent("context_length_exceeded", nested=True)),
            TurnReason.CONTEXT_TOO_LONG,
            "",
        ),  # of a thread that has nothing to leave out
        (HttpError(status=429, code="insufficient_quota"), TurnReason.PROVIDER_RATE_LIMITED, ""),
        (HttpError(status=400, body=b"<html>"), TurnReason.PROVIDER_CONFIG, ""),
        (HttpError(status=400, body=b'{"detail": "no"}'), TurnReason.PROVIDER_CONFIG, ""),
        (Answer(output=(Text(text="x" * (2 << 20), deltas=False),)), TurnReason.OUTPUT_LIMIT, ""),
    ],
)
async def test_failures_are_not_repeated(
    provider: FakeProvider, thread: ThreadOfTest, answer: Answer | HttpError, reason: TurnReason, text: str
) -> None:
    provider.then(answer)
    assert await fails(thread) == (reason, text)
    assert len(provider.posts) == 1
    await provider.quiet()
    assert await thread.say("And now?") == "You said: And now? What would you like to change?"


@pytest.mark.parametrize(
    "failure",
    [
        HttpError(status=500),
        HttpError(status=503, code="server_is_overloaded"),
        HttpError(status=408),
        HttpError(reset=True),
        Answer(fault=Break(how="cut", after=0)),
        rate_limited(),
        Answer(output=(), ending=Failed()),
        Answer(output=(), ending=Failed("rate_limit_exceeded")),
        Answer(output=(), ending=ErrorEvent()),
        Answer(output=(Reasoning(),), ending=ErrorEvent("server_is_overloaded", nested=True)),
    ],
)
async def test_what_can_pass_is_tried_twice_more(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps, failure: Answer | HttpError
) -> None:
    provider.then(failure, failure)
    assert await thread.say("Hello") == "You said: Hello What would you like to change?"
    posts = [request for request in provider.requests if request.path == "/v1/responses"]
    assert [request.headers["x-client-request-id"] for request in posts] == [
        "turn-1-0-0",
        "turn-1-0-1",
        "turn-1-0-2",
    ]
    assert len(naps.taken) == 2
    provider.then(failure, failure, failure)
    await fails(thread)
    assert len(provider.posts) == 6


async def test_the_provider_says_when_to_come_back(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    provider.then(rate_limited("7"))
    await thread.say("Hello")
    assert naps.taken == [7.0]
    provider.then(rate_limited("21"))
    assert await fails(thread) == (TurnReason.PROVIDER_RATE_LIMITED, "")
    assert naps.taken == [7.0]


async def test_a_limit_that_a_message_names_is_not_run_against(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    spent = "Limit 200, Used 200, Requested 1. Please try again in 7m12s."
    provider.then(Answer(output=(), ending=Failed("rate_limit_exceeded", spent)))
    assert await fails(thread) == (TurnReason.PROVIDER_RATE_LIMITED, "")
    assert (naps.taken, len(provider.posts)) == ([], 1)


async def test_a_wrong_key_is_a_fault_of_the_configuration(provider: FakeProvider, naps: Naps) -> None:
    client = make_client("sk-wrong", provider.base_url, 5)
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, sleep=naps)
    assert await fails(ThreadOfTest(agent)) == (TurnReason.PROVIDER_CONFIG, "")
    await agent.aclose()
    assert len(provider.requests) == 1


async def test_a_wrong_model_is_a_fault_of_the_configuration(provider: FakeProvider, thread: ThreadOfTest) -> None:
    thread.definition = replace(COACH, model="gpt-3")
    assert await fails(thread) == (TurnReason.PROVIDER_CONFIG, "")
    assert len(provider.posts) == 1


async def test_nobody_listening_is_tried_twice_more(naps: Naps) -> None:
    async with FakeProvider() as gone:
        url = gone.base_url
    agent = OpenAIAgent(make_client("", url, 5), model="gpt-6-luna", user_key=USER_KEY, sleep=naps)
    assert await fails(ThreadOfTest(agent)) == (TurnReason.PROVIDER_UNAVAILABLE, "")
    assert len(naps.taken) == 2
    await agent.aclose()


async def test_a_server_without_conversations_is_a_fault_of_the_configuration(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.refusals["conversations"] = [HttpError(status=404), HttpError(status=404)]
    assert await fails(thread) == (TurnReason.PROVIDER_CONFIG, "")
    assert len(provider.requests) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(fault=Break(how="stall", after=2)), TurnReason.PROVIDER_STALLED),
        (Answer(fault=Break(how="comments", after=2)), TurnReason.PROVIDER_STALLED),
    ],
)
async def test_silence_has_a_bound(
    provider: FakeProvider, client: AsyncOpenAI, answer: Answer, reason: TurnReason
) -> None:
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, first_event=0.2, idle=0.1)
    provider.then(answer)
    assert (await fails(ThreadOfTest(agent)))[0] is reason
    await provider.quiet()
    assert len(provider.posts) == 1


async def test_the_readers_own_time_is_not_the_providers_silence(
    provider: FakeProvider, client: AsyncOpenAI
) -> None:
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, first_event=5.0, idle=0.05)
    fault = Break(how="stall", after=1)
    provider.then(Answer(fault=fault))
    async with aclosing(agent.reply(ThreadOfTest(agent).begin("Hello"))) as reply:
        async for event in reply:
            if isinstance(event, TextDelta) and not fault.gate.released.is_set():
                fault.gate.released.set()
                elapsed = asyncio.Event()
                asyncio.get_running_loop().call_later(0.1, elapsed.set)
                await elapsed.wait()
    assert isinstance(event, RoundFinished)


# --- stopping


async def test_two_hundred_cancels_leave_no_connection(provider: FakeProvider, agent: OpenAIAgent) -> None:
    for number in range(200):
        gate = Gate()
        stalled = Answer(headers_gate=gate) if number % 2 else Answer(fault=Break(how="stall", gate=gate))
        provider.then(stalled)
        stopped = ThreadOfTest(agent)
        task = asyncio.create_task(stopped.round(stopped.begin("Hello")))
        await gate.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await provider.quiet()
    replies = await asyncio.gather(*(ThreadOfTest(agent).say("Hello") for _ in range(5)))
    assert len(set(replies)) == 1


async def test_closing_the_reply_stops_the_provider(provider: FakeProvider, thread: ThreadOfTest) -> None:
    for _ in range(20):
        provider.then(Answer(fault=Break(how="stall")))
        async with aclosing(thread.agent.reply(thread.begin("Hello"))) as reply:
            async for event in reply:
                if isinstance(event, TextDelta):
                    break
        await provider.quiet()
    assert provider.posts
    assert await thread.say("And now?") == "You said: And now? What would you like to change?"


async def test_a_finished_reply_gives_its_connection_back(provider: FakeProvider, thread: ThreadOfTest) -> None:
    for _ in range(5):
        await thread.say("Hello")
    assert provider.accepted == 1


# --- discretion


async def test_each_failure_is_logged_with_what_the_provider_knows_it_by(
    provider: FakeProvider, thread: ThreadOfTest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    provider.then(
        Answer(output=(Call("goals"),)),
        HttpError(status=503, code="slow_down"),
        Answer(fault=Break(how="eof", after=0)),
        Answer(fault=Break(how="duplicate")),
    )
    await thread.say("Hello")
    logged = [record.getMessage() for record in caplog.records if record.name == "adapters.openai.agent"]
    assert [re.sub("request_id=req_[0-9a-f]+ ", "", line) for line in logged] == [
        "provider fault: reason=PROVIDER_UNAVAILABLE status=503 code=slow_down turn_id=turn-1 round=1 try=0",
        "provider fault: reason=PROVIDER_TRUNCATED status=None code= turn_id=turn-1 round=1 try=1",
        "an odd stream: duplicates=1 turn_id=turn-1",
    ]


async def test_nothing_personal_or_secret_is_logged(
    provider: FakeProvider, thread: ThreadOfTest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    provider.then(
        Answer(output=(Text(text="My heartfelt advice"), Call("goals", '{"arg": "heartfelt"}'))),
        Answer(),
        HttpError(status=400, message="heartfelt", code="heartfelt words"),
        Answer(output=(Text(text="heartfelt"),), ending=Failed("server_error", "heartfelt")),
    )
    await thread.say("My heartfelt story")
    await fails(thread, "My heartfelt story")
    await fails(thread, "My heartfelt story")
    logged = [record.getMessage() for record in caplog.records]
    assert any("reason=PROVIDER_CONFIG status=400" in line and "request_id=req_" in line for line in logged)
    for line in (*logged, *(str(record.exc_text) for record in caplog.records)):
        assert "heartfelt" not in line
        assert KEY not in line
        assert USER_KEY not in line
        assert "ann@example.org" not in line


# --- the older path, and the provider's own types


async def typed_text(client: AsyncOpenAI) -> str:
    """What the SDK's own stream reads."""
    text = ""
    stream = await client.responses.create(model="gpt-6-luna", input="Hello", stream=True)
    async with stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
    return text


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8),
        min_size=1,
        max_size=6,
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    byte_by_byte=st.booleans(),
    unknown_events=st.booleans(),
)
def test_the_lean_path_reads_what_the_sdk_reads(
    pieces: list[str], newline: Any, byte_by_byte: bool, unknown_events: bool
) -> None:
    async def read_both() -> None:
        answer = Answer(
            output=(Text(pieces=tuple(pieces)),),
            newline=newline,
            byte_by_byte=byte_by_byte,
            unknown_events=unknown_events,
        )
        async with FakeProvider([answer, answer]) as provider:
            agent = OpenAIAgent(make_client("", provider.base_url, 2), model="gpt-6-luna", user_key=USER_KEY)
            client = make_client("", provider.base_url, 2)
            assert await ThreadOfTest(agent).say("Hello") == await typed_text(client) == "".join(pieces)
            await agent.aclose()
            await client.close()

    asyncio.run(read_both())


def extras(value: object) -> list[str]:
    """Fields that the SDK's types do not know, anywhere in a model."""
    match value:
        case BaseModel():
            unknown = list(value.model_extra or {})
            return unknown + [extra for name in type(value).model_fields for extra in extras(getattr(value, name))]
        case list():
            return [extra for item in value for extra in extras(item)]
        case _:
            return []


EVENT_TYPES: dict[str, type[BaseModel]] = {
    get_args(variant.model_fields["type"].annotation)[0]: variant
    for variant in get_args(get_args(ResponseStreamEvent)[0])
}


@pytest.mark.parametrize("how", ["plain", "background", "again"])
@pytest.mark.parametrize(
    "answer",
    [
        Answer(output=(Reasoning(), Text(), Call("goals", '{"a": 1}'), Call("goals"))),
        Answer(output=(Text(text="No.", refusal=True),)),
        Answer(ending=Incomplete()),
        Answer(ending=Failed()),
        Answer(ending=ErrorEvent()),
    ],
)
async def test_what_the_provider_sends_fits_the_types_of_the_sdk(
    provider: FakeProvider, thread: ThreadOfTest, client: AsyncOpenAI, answer: Answer, how: str
) -> None:
    await thread.say("Hello")
    provider.then(answer)
    tools: Any = [{"type": "function", "name": "goals", "parameters": {}, "strict": False}]
    streamed = client.responses.with_streaming_response
    call = streamed.create(
        model="gpt-6-luna", input="Hello", tools=tools, background=how != "plain" or openai.omit, stream=True
    )
    async with call as response:
        lines = [line async for line in response.iter_lines()]
    if how == "again":
        async with streamed.retrieve(list(provider.responses)[-1], stream=True) as response:
            assert [line async for line in response.iter_lines()] == lines
    sent = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert len(sent) > 3 or answer.ending != "completed"
    for number, data in enumerate(sent):
        kind = httpx2.Response(200, content=data).json()["type"]
        event = EVENT_TYPES[kind].model_validate_json(data, strict=True)
        assert extras(event) == []
        assert event.model_dump()["sequence_number"] == number


async def test_the_endpoints_of_conversations(provider: FakeProvider, client: AsyncOpenAI) -> None:
    made = await client.conversations.create(metadata={"a": "b"})
    assert (await client.conversations.retrieve(made.id)).metadata == {"a": "b"}
    items: Any = [{"type": "message", "role": "user", "content": f"{number}"} for number in range(20)]
    await client.conversations.items.create(made.id, items=items)
    with pytest.raises(openai.BadRequestError):
        await client.conversations.items.create(made.id, items=[*items, items[0]])
    with pytest.raises(openai.BadRequestError):
        await client.conversations.items.create(made.id, items=[{"type": "message", "role": "nobody"}])  # type: ignore[list-item]
    listed = [item async for item in client.conversations.items.list(made.id, limit=7, order="asc")]
    assert [item.id for item in listed] == [item["id"] for item in provider.conversations[made.id].items]
    newest = await client.conversations.items.list(made.id)
    assert newest.data[0].id == listed[-1].id
    one = await client.conversations.items.retrieve(listed[0].id or "", conversation_id=made.id)
    assert one == listed[0]
    await client.conversations.items.delete(listed[0].id or "", conversation_id=made.id)
    assert (await client.conversations.delete(made.id)).deleted
    assert len(provider.items) == 19
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(made.id)


async def test_the_endpoints_of_responses(provider: FakeProvider, client: AsyncOpenAI) -> None:
    made = await client.responses.create(model="gpt-6-luna", input="Hello")
    assert made.output_text == "You said: Hello What would you like to change?"
    assert (await client.responses.retrieve(made.id)).output_text == made.output_text
    chained = await client.responses.create(model="gpt-6-luna", input="More", previous_response_id=made.id)
    assert chained.usage is not None
    await client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(model="gpt-6-luna", input="Hello", extra_body={"invented": 1})
    answer: Any = [{"type": "function_call_output", "call_id": "x", "output": "y"}]
    with pytest.raises(openai.BadRequestError, match="No tool call found"):
        await client.responses.create(model="gpt-6-luna", input=answer)


async def test_an_aborted_response_leaves_nothing_in_its_conversation(
    provider: FakeProvider, thread: ThreadOfTest, client: AsyncOpenAI
) -> None:
    fault = Break(how="stall")
    provider.then(Answer(fault=fault))
    task = asyncio.create_task(thread.round(thread.begin("Hello")))
    await fault.gate.reached.wait()
    (conversation,) = provider.conversations.values()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="gpt-6-luna", input="Hi", conversation=conversation.id)
    assert caught.value.code == "conversation_locked"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await provider.quiet()
    assert conversation.items == []


# --- models


async def test_the_last_day_of_a_model(provider: FakeProvider, client: AsyncOpenAI) -> None:
    assert await model_sunset(client, "gpt-4o") == date(2027, 1, 14)
    assert await model_sunset(client, "gpt-6-luna") is None
    provider.models["odd"] = "soon"
    assert await model_sunset(client, "odd") is None
    with pytest.raises(ModelMissing):
        await model_sunset(client, "gpt-3")
    wrong = make_client("sk-wrong", provider.base_url, 1)
    with pytest.raises(KeyRefused):
        await model_sunset(wrong, "gpt-4o")
    await wrong.close()


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (HttpError(status=403), KeyRefused),
        (HttpError(status=400, code="model_not_found"), ModelMissing),
        (HttpError(status=410), ProviderFault),
        (HttpError(status=200, body=b"<html>", headers={"content-type": "text/html"}), ProviderFault),
        (HttpError(status=200, body=b"[]"), ProviderFault),
    ],
)
async def test_what_says_nothing_of_a_model_is_no_good_news(
    provider: FakeProvider, client: AsyncOpenAI, answer: HttpError, fault: type[ProviderFault]
) -> None:
    provider.refusals["models"] = [answer]
    with pytest.raises(ProviderFault) as caught:
        await model_sunset(client, "gpt-6-luna")
    assert type(caught.value) is fault
    assert caught.value.reason in (TurnReason.PROVIDER_CONFIG, TurnReason.PROVIDER_PROTOCOL)


@pytest.mark.parametrize(
    ("today", "warning"),
    [
        (date(2026, 11, 15), None),
        (date(2026, 11, 16), "The model gpt-4o leaves the API on 2027-01-14, in 59 days. "),
        (date(2027, 1, 13), "The model gpt-4o leaves the API on 2027-01-14, in 1 day. "),
        (date(2027, 1, 14), "The model gpt-4o leaves the API on 2027-01-14, in 0 days. "),
        (date(2027, 1, 15), "The model gpt-4o left the API on 2027-01-14. "),
    ],
)
def test_the_warning_before_the_last_day(today: date, warning: str | None) -> None:
    said = sunset_warning("gpt-4o", date(2027, 1, 14), today)
    assert said == (warning and warning + "Set OPENAI_MODEL to another one.")
    assert sunset_warning("gpt-6-luna", None, today) is None
