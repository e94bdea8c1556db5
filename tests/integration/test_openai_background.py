"""The OpenAI agent's replies that are written in the background: resumed, found again, stopped."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from adapters.openai import responses
from adapters.openai.agent import OpenAIAgent
from adapters.openai.client import make_client
from adapters.openai.memory import StateMode
from core.model.events import TextDelta, ToolCalled
from core.model.message import Role, ToolExchange
from core.model.thread import UNSYNCED
from core.model.turn import TurnReason, Usage
from core.ports.agent import (
    AgentEvent,
    AgentFailed,
    Begun,
    CannotResume,
    ReplyRequest,
    Resumption,
    RoundFinished,
    StateChanged,
    ToolRound,
)
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
    Pause,
    Reasoning,
    Text,
    rate_limited,
)
from openai_thread import KEY, USER_KEY, Naps, ThreadOfTest, fails, said, words

PIECES = ("I can't ", "say\0 ", "\ud83d", "\ude00, ", "\ud83d", " so: ", "no")
TEXT = "I can't say\ufffd \U0001f600, \ufffd so: no"
TOO_OLD = HttpError(status=400, message="This response can no longer be streamed: it is too old.")


@pytest.fixture
def agent(client: AsyncOpenAI, naps: Naps) -> OpenAIAgent:
    return OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, background=True, sleep=naps)


@dataclass(frozen=True)
class Left:
    """A round that its process has left: what was asked for, and what the next process finds of it."""

    request: ReplyRequest
    handle: str
    text: str

    def at(self, text: str) -> ReplyRequest:
        """What the next process asks for with so much on record."""
        return replace(self.request, resume=Resumption(self.handle, text))


async def left(thread: ThreadOfTest, request: ReplyRequest, length: int = 0) -> Left:
    """Reads at least so much of a round, and leaves it."""
    text, handle = "", ""
    async with aclosing(thread.agent.reply(thread.handed(request))) as reply:
        async for event in reply:
            thread.note(event)
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Begun):
                handle = event.handle
            if handle and len(text) >= length:
                break
    return Left(request, handle, text)


def asked(provider: FakeProvider) -> list[tuple[str, str | None]]:
    """The requests for responses that exist: how, and from where on."""
    return [
        ("stream" if "stream" in request.query else "whole", request.query.get("starting_after"))
        for request in provider.requests
        if request.method == "GET" and request.path.startswith("/v1/responses/")
    ]


def finished(events: Sequence[AgentEvent]) -> RoundFinished:
    """The end of a round."""
    (end,) = [event for event in events if isinstance(event, RoundFinished)]
    assert events[-1] is end
    return end


# --- beginning


async def test_the_handle_comes_before_anything_that_is_said(provider: FakeProvider, thread: ThreadOfTest) -> None:
    pause = Pause(after=0)
    provider.then(Answer(pauses=(pause,)))
    request = thread.begin("Hello")
    async with aclosing(thread.agent.reply(request)) as reply:
        changed, begun = await anext(reply), await anext(reply)
        assert isinstance(changed, StateChanged)
        assert isinstance(begun, Begun)
        assert list(provider.responses) == [begun.handle]
        pause.gate.released.set()
        events = [event async for event in reply]
    assert said(events) == "You said: Hello What would you like to change?"
    assert finished(events).copy is not None
    (body,) = provider.posts
    assert {name: body[name] for name in ("background", "store", "stream")} == dict.fromkeys(
        ("background", "store", "stream"), True
    )
    assert asked(provider) == []


async def test_two_turns_use_one_conversation(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Text(text="Let me look."), Call("goals"))))
    assert await thread.say("One") == "Let me look.\n\nYou said: answer to goals What would you like to change?"
    await thread.say("Two")
    assert len(provider.conversations) == 1
    assert thread.begun == list(provider.responses)
    assert [len(body["input"]) for body in provider.posts] == [1, 1, 1]


async def test_nothing_is_begun_unless_asked_for(provider: FakeProvider, client: AsyncOpenAI) -> None:
    thread = ThreadOfTest(OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY))
    await thread.say("Hello")
    assert thread.begun == []
    assert "background" not in provider.posts[0]


def test_what_is_not_stored_can_not_be_resumed(client: AsyncOpenAI) -> None:
    with pytest.raises(ValueError, match="stored"):
        OpenAIAgent(client, model="m", user_key="k", background=True, state_mode=StateMode.STATELESS)


async def test_a_server_that_gives_no_usable_id_is_read_all_the_same(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(response_id="../../files"))
    assert await thread.say("Hello") == "You said: Hello What would you like to change?"
    assert thread.begun == []


# --- resuming


@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("written", [False, True], ids=["at work", "written"])
@pytest.mark.parametrize("length", range(len(TEXT) + 1))
async def test_a_reply_goes_on_behind_what_is_on_record(
    provider: FakeProvider, thread: ThreadOfTest, length: int, written: bool, refusal: bool
) -> None:
    pause = Pause(after=3)
    answer = Answer(output=(Reasoning(), Text(pieces=PIECES, refusal=refusal)))
    provider.then(answer if written else replace(answer, pauses=(pause,)))
    request = thread.begin("Hello")
    gone = await left(thread, request, 0)
    if written:
        await provider.quiet()
    else:
        await pause.gate.reached.wait()
        asyncio.get_running_loop().call_soon(pause.gate.released.set)
    events = await thread.round(gone.at(TEXT[:length]))
    assert said(events) == TEXT[length:]
    assert all(event.refusal is refusal for event in events if isinstance(event, TextDelta))
    assert finished(events).copy is not None
    assert finished(events).usage.output_tokens > 0
    assert len(provider.posts) == 1
    assert asked(provider) == [("stream", None)]


async def test_the_next_turn_uses_the_conversation_of_a_resumed_one(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(output=(Text(text="One, two."),)))
    gone = await left(thread, thread.begin("Count"), 3)
    copy = finished(await thread.round(gone.at(gone.text))).copy
    assert copy is not None
    thread.add(Role.ASSISTANT, "One, two.")
    thread.state = replace(copy, synced_to=2)
    await thread.say("Go on")
    (conversation,) = provider.conversations.values()
    assert words(conversation.items) == [
        "user: Count",
        "assistant: One, two.",
        "user: Go on",
        "assistant: You said: Go on What would you like to change?",
    ]


async def test_a_copy_in_doubt_stays_in_doubt(provider: FakeProvider, thread: ThreadOfTest) -> None:
    gone = await left(thread, thread.begin("Hello"))
    assert thread.state is not None
    thread.state = replace(thread.state, synced_to=UNSYNCED)
    assert finished(await thread.round(gone.at(""))).copy is None
    assert len(provider.conversations) == 1


@pytest.mark.parametrize("length", range(len("Let me look.") + 1))
async def test_a_resumed_round_calls_its_tools_and_the_turn_goes_on(
    provider: FakeProvider, thread: ThreadOfTest, length: int
) -> None:
    provider.then(
        Answer(output=(Text(text="Let me look."), Call("goals", '{"a": 1}', "call_a"), Call("goals", "{}", "b"))),
        Answer(output=(Text(text="Well."),)),
    )
    request = thread.begin("My goals?")
    gone = await left(thread, request)
    events = await thread.round(gone.at("Let me look."[:length]))
    assert said(events) == "Let me look."[length:]
    assert events[-3:-1] == [ToolCalled("call_a", "goals", '{"a": 1}'), ToolCalled("b", "goals", "{}")]
    exchanges = tuple(ToolExchange(name, "goals", "{}", "none", False) for name in ("call_a", "b"))
    later = await thread.round(replace(request, rounds=(ToolRound("Let me look.", exchanges),)))
    assert said(later) == "\n\nWell."
    (conversation,) = provider.conversations.values()
    assert len(conversation.items) == 7
    assert [len(body["input"]) for body in provider.posts] == [1, 2]


@pytest.mark.parametrize("length", range(len("\n\nWell, none.") + 1))
async def test_a_round_behind_tools_goes_on_behind_what_is_on_record(
    provider: FakeProvider, thread: ThreadOfTest, length: int
) -> None:
    provider.then(
        Answer(output=(Text(text="Let me look."), Call("goals", "{}", "call_a"))),
        Answer(output=(Text(text="Well, none."), Text(text="And now?"))),
    )
    request = thread.begin("My goals?")
    await thread.round(request)
    exchange = ToolExchange("call_a", "goals", "{}", "none", False)
    gone = await left(thread, replace(request, rounds=(ToolRound("Let me look.", (exchange,)),)))
    whole = "\n\nWell, none.\n\nAnd now?"
    events = await thread.round(gone.at(whole[:length]))
    assert said(events) == whole[length:]
    assert finished(events).copy is not None
    assert len(provider.posts) == 2
    assert len(provider.conversations) == 1


@pytest.mark.parametrize("on_record", ["I could", "I can't say!", TEXT + "!", "\n\n" + TEXT])
@pytest.mark.parametrize("written", [False, True], ids=["at work", "written"])
async def test_a_reply_that_has_become_another_one_is_not_continued(
    provider: FakeProvider, thread: ThreadOfTest, on_record: str, written: bool
) -> None:
    provider.then(Answer(output=(Text(pieces=PIECES),)))
    gone = await left(thread, thread.begin("Hello"))
    if written:
        await provider.quiet()
    with pytest.raises(CannotResume):
        await thread.round(gone.at(on_record))
    assert len(provider.posts) == 1


async def test_a_shortfall_is_told_on_resuming_too(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Text(text="Half an"),), ending=Incomplete()))
    gone = await left(thread, thread.begin("Hello"), 1)
    events = await thread.round(gone.at("Ha"))
    assert said(events) == "lf an"
    assert (finished(events).shortfall, finished(events).copy) == (TurnReason.OUTPUT_LIMIT, None)


async def cannot_resume(thread: ThreadOfTest, gone: Left) -> None:
    """Neither with text nor without."""
    for text in ("", gone.text):
        with pytest.raises(CannotResume):
            await thread.round(gone.at(text))


async def test_a_response_that_is_gone_can_not_be_resumed(provider: FakeProvider, thread: ThreadOfTest) -> None:
    gone = await left(thread, thread.begin("Hello"), 3)
    provider.responses.clear()
    await cannot_resume(thread, gone)
    assert len(provider.posts) == 1


async def test_a_response_that_was_cancelled_can_not_be_resumed(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(pauses=(Pause(after=2),)))
    gone = await left(thread, thread.begin("Hello"), 3)
    await thread.agent.stop(gone.handle)
    await cannot_resume(thread, gone)
    assert len(provider.posts) == 1


async def test_a_response_that_is_cancelled_while_it_is_read_ends_the_round(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(pauses=(Pause(after=2),)))

    async def read() -> None:
        async with aclosing(thread.agent.reply(thread.begin("Hello"))) as reply:
            async for event in reply:
                if isinstance(event, Begun):
                    await thread.agent.stop(event.handle)

    with pytest.raises(CannotResume):
        await read()
    assert len(provider.posts) == len(provider.cancelled) == 1


@pytest.mark.parametrize("ending", [Failed(), ErrorEvent(), ErrorEvent(nested=True)])
async def test_a_response_that_failed_fails_as_it_would_have(
    provider: FakeProvider, thread: ThreadOfTest, ending: Any
) -> None:
    provider.then(Answer(output=(Text(text="Well, no"),), ending=ending))
    gone = await left(thread, thread.begin("Hello"), 4)
    with pytest.raises(AgentFailed) as caught:
        await thread.round(gone.at("Well"))
    assert caught.value.reason is TurnReason.PROVIDER_UNAVAILABLE
    assert len(provider.posts) == 1


async def test_a_response_that_failed_without_a_word_is_asked_for_again(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps
) -> None:
    provider.then(Answer(output=(), ending=Failed()))
    gone = await left(thread, thread.begin("Hello"))
    events = await thread.round(gone.at(""))
    assert said(events) == "You said: Hello What would you like to change?"
    assert len(thread.begun) == len(provider.posts) == 2
    assert len(naps.taken) == 1
    provider.then(Answer(output=(), ending=Failed("invalid_prompt")))
    gone = await left(thread, thread.begin("Hello"))
    with pytest.raises(AgentFailed) as caught:
        await thread.round(gone.at(""))
    assert caught.value.reason is TurnReason.CONTENT_FILTERED


@pytest.mark.parametrize("length", [0, 4, len(TEXT)])
@pytest.mark.parametrize("refusal", [False, True])
@pytest.mark.parametrize("status", [400, 404, 409])
async def test_a_response_whose_stream_is_gone_is_read_whole(
    provider: FakeProvider, thread: ThreadOfTest, length: int, refusal: bool, status: int
) -> None:
    provider.then(Answer(output=(Text(pieces=PIECES, refusal=refusal),)))
    gone = await left(thread, thread.begin("Hello"))
    await provider.quiet()
    provider.attachments = [replace(TOO_OLD, status=status)]
    events = await thread.round(gone.at(TEXT[:length]))
    assert said(events) == TEXT[length:]
    assert finished(events).copy is not None
    assert asked(provider) == [("stream", None), ("whole", None)]


async def test_a_failed_response_whose_stream_is_gone_fails(provider: FakeProvider, thread: ThreadOfTest) -> None:
    provider.then(Answer(output=(Text(text="Well"),), ending=Failed("rate_limit_exceeded")))
    gone = await left(thread, thread.begin("Hello"), 4)
    await provider.quiet()
    provider.attachments = [TOO_OLD]
    with pytest.raises(AgentFailed) as caught:
        await thread.round(gone.at("We"))
    assert caught.value.reason is TurnReason.PROVIDER_RATE_LIMITED


async def test_a_response_at_work_that_can_not_be_streamed_can_not_be_resumed(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(Answer(pauses=(Pause(after=2),)))
    gone = await left(thread, thread.begin("Hello"), 3)
    provider.attachments = [TOO_OLD, TOO_OLD]
    await cannot_resume(thread, gone)


async def test_what_is_resumed_without_background_is_still_found(
    provider: FakeProvider, thread: ThreadOfTest, client: AsyncOpenAI
) -> None:
    gone = await left(thread, thread.begin("Hello"), 3)
    thread.agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY)
    events = await thread.round(gone.at(gone.text))
    assert gone.text + said(events) == "You said: Hello What would you like to change?"
    assert len(provider.posts) == 1


# --- found again


CUTS = ("cut", "half", "eof")


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("after", range(1, len(PIECES) + 1))
async def test_a_lost_connection_is_followed_by_another(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps, how: Any, after: int
) -> None:
    provider.then(Answer(output=(Text(pieces=PIECES),), fault=Break(how=how, after=after)))
    events = await thread.round(thread.begin("Hello"))
    assert said(events) == TEXT
    assert finished(events).copy is not None
    assert len(provider.posts) == len(naps.taken) == len(thread.begun) == 1
    ((kind, cursor),) = asked(provider)
    assert (kind, int(cursor or 0)) == ("stream", after + 4)


@pytest.mark.parametrize("how", CUTS)
async def test_any_number_of_connections_may_be_lost_one_after_the_other(
    provider: FakeProvider, thread: ThreadOfTest, how: Any
) -> None:
    provider.then(Answer(output=(Text(pieces=tuple("abcdefgh")),), fault=Break(how=how)))
    provider.attachments = [Break(how=how) for _ in range(6)]
    assert said(await thread.round(thread.begin("Hello"))) == "abcdefgh"
    assert [cursor for _, cursor in asked(provider)] == ["5", "6", "7", "8", "9", "10", "11"]
    assert len(provider.posts) == 1


@pytest.mark.parametrize("how", CUTS)
async def test_a_connection_may_be_lost_while_resuming(
    provider: FakeProvider, thread: ThreadOfTest, how: Any
) -> None:
    provider.then(Answer(output=(Text(pieces=tuple("abcdef")),)))
    gone = await left(thread, thread.begin("Hello"))
    for length in range(7):
        for after in range(1, 7):
            provider.attachments = [Break(how=how, after=after)]
            assert said(await thread.round(gone.at("abcdef"[:length]))) == "abcdef"[length:]
    assert len(provider.posts) == 1


@pytest.mark.parametrize("how", CUTS)
async def test_without_numbers_a_response_is_read_from_its_beginning_again(
    provider: FakeProvider, thread: ThreadOfTest, how: Any
) -> None:
    answer = Answer(output=(Text(pieces=PIECES),), sequence_numbers=False)
    provider.then(replace(answer, fault=Break(how=how, after=4)))
    provider.attachments = [Break(how=how, after=6), Break(how=how, after=7)]
    assert said(await thread.round(thread.begin("Hello"))) == TEXT
    assert asked(provider) == [("stream", None)] * 3


@pytest.mark.parametrize("fault", [Break(how="eof", after=0), Break(how="cut", after=0), HttpError(reset=True)])
async def test_an_answer_that_broke_before_it_had_a_name_is_not_repeated(
    provider: FakeProvider, thread: ThreadOfTest, fault: Any
) -> None:
    provider.then(Answer(fault=fault) if isinstance(fault, Break) else fault)
    reason, text = await fails(thread)
    assert reason in (TurnReason.PROVIDER_TRUNCATED, TurnReason.PROVIDER_UNAVAILABLE)
    assert (text, thread.begun, len(provider.posts)) == ("", [], 1)


@pytest.mark.parametrize("failure", [HttpError(status=500), rate_limited(), Answer(output=(), ending=Failed())])
async def test_what_can_pass_is_tried_again(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps, failure: Answer | HttpError
) -> None:
    provider.then(failure, failure)
    assert await thread.say("Hello") == "You said: Hello What would you like to change?"
    assert len(provider.posts) == 3
    assert len(naps.taken) == 2
    assert thread.begun == list(provider.responses)


@pytest.mark.parametrize("refusal", [rate_limited("7"), HttpError(status=503), HttpError(reset=True)])
async def test_a_provider_that_is_away_for_a_moment_is_waited_for(
    provider: FakeProvider, client: AsyncOpenAI, refusal: HttpError
) -> None:
    pause = Pause(after=3)
    naps = Naps()

    async def sleep(seconds: float) -> None:
        await naps(seconds)
        if len(naps.taken) == 2:
            pause.gate.released.set()

    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, background=True, sleep=sleep)
    provider.then(Answer(fault=Break(how="cut", after=2), pauses=(pause,)))
    provider.attachments = [refusal]
    assert await ThreadOfTest(agent).say("Hello") == "You said: Hello What would you like to change?"
    assert asked(provider) == [("stream", "6"), ("whole", None), ("stream", "6")]
    assert len(naps.taken) == 2
    assert (naps.taken[1] == 7.0) is (refusal.status == 429)
    assert len(provider.posts) == 1


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (HttpError(status=503), TurnReason.PROVIDER_UNAVAILABLE),
        (HttpError(reset=True), TurnReason.PROVIDER_UNAVAILABLE),
        (Break(how="eof", after=0), TurnReason.PROVIDER_TRUNCATED),
        (rate_limited(), TurnReason.PROVIDER_RATE_LIMITED),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
async def test_a_response_out_of_reach_is_given_up_and_not_asked_for_twice(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps, refusal: Any, reason: TurnReason, after: int
) -> None:
    pause = Pause(after=after)
    provider.then(Answer(pauses=(pause,)))
    gone = await left(thread, thread.begin("Hello"))
    await pause.gate.reached.wait()
    provider.attachments = [refusal] * 3
    with pytest.raises(AgentFailed) as caught:
        await thread.round(gone.at(""))
    assert caught.value.reason is reason
    assert len(naps.taken) == 2
    assert len(provider.posts) == 1


async def test_a_silent_connection_is_left_for_another(provider: FakeProvider, client: AsyncOpenAI) -> None:
    agent = OpenAIAgent(
        client, model="gpt-6-luna", user_key=USER_KEY, background=True, first_event=5, idle=0.1, sleep=Naps()
    )
    thread = ThreadOfTest(agent)
    silences: tuple[Any, ...] = ("stall", "comments")
    for how in silences:
        provider.then(Answer(fault=Break(how=how, after=2)))
        assert await thread.say("Hello") == "You said: Hello What would you like to change?"
    assert len(provider.posts) == 2


async def test_silence_has_a_bound(provider: FakeProvider, client: AsyncOpenAI) -> None:
    agent = OpenAIAgent(
        client, model="gpt-6-luna", user_key=USER_KEY, background=True, first_event=0.2, idle=0.1, sleep=Naps()
    )
    provider.then(Answer(pauses=(Pause(after=2),)))
    reason, text = await fails(ThreadOfTest(agent))
    assert reason is TurnReason.PROVIDER_TIMEOUT
    assert text == "You said: Hello "
    assert asked(provider) == [("stream", "6"), ("whole", None)]
    assert len(provider.posts) == 1


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.text(max_size=4) | st.sampled_from(["\ud83d", "\ude00", "\0"]), min_size=1, max_size=8),
    cuts=st.lists(st.tuples(st.sampled_from(CUTS), st.integers(1, 4)), max_size=4),
    share=st.floats(0, 1),
    byte_by_byte=st.booleans(),
    numbered=st.booleans(),
)
def test_wherever_it_is_cut_and_resumed_the_text_is_the_same(
    pieces: list[str], cuts: list[tuple[Any, int]], share: float, byte_by_byte: bool, numbered: bool
) -> None:
    async def run() -> None:
        answer = Answer(output=(Text(pieces=tuple(pieces)),), byte_by_byte=byte_by_byte, sequence_numbers=numbered)
        async with FakeProvider([answer, answer]) as provider:
            agent = OpenAIAgent(
                make_client("", provider.base_url, 2),
                model="gpt-6-luna",
                user_key=USER_KEY,
                background=True,
                sleep=Naps(),
            )
            thread = ThreadOfTest(agent)
            whole = said(await thread.round(thread.begin("Hello")))
            gone = await left(thread, thread.begin("Hello"))
            on_record = whole[: round(share * len(whole))]
            # Without numbers nothing can be gained from a stream that breaks at the same place again.
            provider.attachments = [Break(how=how, after=after) for how, after in (cuts if numbered else cuts[:1])]
            assert on_record + said(await thread.round(gone.at(on_record))) == whole
            await agent.aclose()

    asyncio.run(run())


# --- stopping


async def test_closing_the_reply_leaves_the_provider_at_work_until_it_is_stopped(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    pause = Pause(after=2)
    provider.then(Answer(pauses=(pause,)))
    gone = await left(thread, thread.begin("Hello"), 3)
    await pause.gate.reached.wait()
    assert provider.running == 1
    await thread.agent.stop(gone.handle)
    await thread.agent.stop(gone.handle)
    assert provider.cancelled == [gone.handle]
    assert provider.running == 0
    (conversation,) = provider.conversations.values()
    assert (conversation.items, conversation.busy) == ([], False)


async def test_what_a_cancelled_response_has_used_is_told_where_the_provider_says(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    counts: dict[str, Any] = {
        "input_tokens": 30,
        "input_tokens_details": {"cached_tokens": 10},
        "output_tokens": 7,
    }
    said = {**counts, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 37}
    pause = Pause(after=2)
    provider.then(Answer(pauses=(pause,), used_when_cancelled=said))
    gone = await left(thread, thread.begin("Hello"), 3)
    used = Usage(input_tokens=30, cached_input_tokens=10, output_tokens=7, reasoning_tokens=2)
    for _ in range(2):
        assert await thread.agent.stop(gone.handle) == used
    assert provider.cancelled == [gone.handle]
    provider.then(Answer(pauses=(Pause(after=2),)))  # one that says nothing
    gone = await left(thread, thread.begin("Hello"), 3)
    assert await thread.agent.stop(gone.handle) is None


async def test_what_has_ended_was_not_cut_short(
    provider: FakeProvider, client: AsyncOpenAI, thread: ThreadOfTest
) -> None:
    """Whoever read its end has booked what it has used."""
    await thread.say("Hello")
    (response_id,) = provider.responses
    ended = await client.responses.cancel(response_id)
    assert ended.status == "completed"
    assert ended.usage is not None
    assert await thread.agent.stop(response_id) is None


async def test_two_hundred_that_are_left_keep_no_connection(provider: FakeProvider, agent: OpenAIAgent) -> None:
    async def read(begun: "asyncio.Future[str]") -> None:
        async with aclosing(agent.reply(ThreadOfTest(agent).begin("Hello"))) as reply:
            async for event in reply:
                if isinstance(event, Begun):
                    begun.set_result(event.handle)

    for _ in range(200):
        provider.then(Answer(pauses=(Pause(after=1),)))
        begun = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(read(begun))
        handle = await begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await agent.stop(handle)
    assert len(provider.cancelled) == 200
    await provider.quiet()
    replies = await asyncio.gather(*(ThreadOfTest(agent).say("Hello") for _ in range(5)))
    assert len(set(replies)) == 1


@pytest.mark.parametrize("refusal", [HttpError(status=500), HttpError(reset=True), rate_limited()])
async def test_a_stop_is_tried_again(
    provider: FakeProvider, thread: ThreadOfTest, naps: Naps, refusal: HttpError
) -> None:
    provider.then(Answer(pauses=(Pause(after=2),)))
    gone = await left(thread, thread.begin("Hello"), 3)
    provider.refusals["cancel"] = [refusal, refusal]
    await thread.agent.stop(gone.handle)
    assert provider.cancelled == [gone.handle]
    assert len(naps.taken) == 2


@pytest.mark.parametrize(
    "refusal", [HttpError(status=403), HttpError(status=401), HttpError(status=500, body=b"<html>")]
)
async def test_what_can_not_be_stopped_is_logged_and_left(
    provider: FakeProvider, thread: ThreadOfTest, caplog: pytest.LogCaptureFixture, refusal: HttpError
) -> None:
    provider.then(Answer(output=(Text(text="heartfelt"),), pauses=(Pause(after=1),)))
    gone = await left(thread, thread.begin("heartfelt"), 3)
    provider.refusals["cancel"] = [replace(refusal, message="heartfelt")] * 3
    caplog.set_level(logging.INFO)
    await thread.agent.stop(gone.handle)
    (record,) = [record for record in caplog.records if "can't be stopped" in record.getMessage()]
    assert gone.handle in record.getMessage()
    assert not any("heartfelt" in line.getMessage() + str(line.exc_text) for line in caplog.records)
    caplog.clear()
    await thread.agent.stop("resp_of_nobody")
    assert not any("stopped" in line.getMessage() for line in caplog.records)
    await thread.agent.stop("..")


async def test_a_stop_is_bounded(
    provider: FakeProvider, thread: ThreadOfTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "STOP_SECONDS", 0.5)
    gone = await left(thread, thread.begin("Hello"), 3)
    gate = Gate()
    provider.refusals["cancel"] = [HttpError(gate=gate)]
    await thread.agent.stop(gone.handle)
    assert gate.reached.is_set()


async def test_nobody_to_stop_it(naps: Naps) -> None:
    async with FakeProvider() as gone:
        url = gone.base_url
    agent = OpenAIAgent(make_client("", url, 5), model="gpt-6-luna", user_key=USER_KEY, sleep=naps)
    await agent.stop("resp_1")
    assert len(naps.taken) == 2
    await agent.aclose()


async def test_nothing_said_is_logged(
    provider: FakeProvider, thread: ThreadOfTest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    provider.then(Answer(output=(Text(text="heartfelt advice"),), fault=Break(how="cut", after=1)))
    provider.attachments = [HttpError(status=500, message="heartfelt"), None]
    await thread.say("heartfelt")
    gone = await left(thread, thread.begin("heartfelt"), 3)
    with pytest.raises(CannotResume):
        await thread.round(gone.at("my heartfelt"))
    logged = [record.getMessage() for record in caplog.records]
    assert any("response_id=resp_" in line and "reason=PROVIDER_TRUNCATED" in line for line in logged)
    for line in (*logged, *(str(record.exc_text) for record in caplog.records)):
        assert "heartfelt" not in line
        assert KEY not in line


# --- the provider itself


async def test_the_endpoints_of_background_responses(provider: FakeProvider, client: AsyncOpenAI) -> None:
    pause = Pause(after=2)
    provider.then(Answer(pauses=(pause,)), Answer(), Answer(pauses=(Pause(after=2),)))
    made = await client.responses.create(model="gpt-6-luna", input="Hello", background=True)
    assert made.status == "queued"
    await pause.gate.reached.wait()
    found = await client.responses.retrieve(made.id)
    assert (found.status, found.output) == ("in_progress", [])
    pause.gate.released.set()
    await provider.quiet()
    assert (
        await client.responses.retrieve(made.id)
    ).output_text == "You said: Hello What would you like to change?"
    with pytest.raises(openai.BadRequestError, match="stream=true"):
        await client.responses.retrieve(made.id, stream=True)
    assert (await client.responses.cancel(made.id)).status == "completed"

    plain = await client.responses.create(model="gpt-6-luna", input="Hello")
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(plain.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await client.responses.cancel(plain.id)

    stopped = await client.responses.create(model="gpt-6-luna", input="Hello", background=True)
    assert (await client.responses.cancel(stopped.id)).status == "cancelled"
    assert (await client.responses.cancel(stopped.id)).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        await client.responses.cancel("resp_of_nobody")
    for refused in (
        client.responses.create(model="gpt-6-luna", input="Hello", background=True, store=False),
        client.responses.retrieve(made.id, starting_after=1),
        client.responses.retrieve(made.id, stream=True, extra_query={"starting_after": "x"}),
        client.responses.retrieve(made.id, extra_query={"invented": "1"}),
        client.responses.cancel(made.id, extra_body={"invented": 1}),
    ):
        with pytest.raises(openai.BadRequestError):
            await refused


async def test_a_stream_can_be_read_from_anywhere(provider: FakeProvider, client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="gpt-6-luna", input="Hello", background=True, stream=True)
    async with stream:
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    response_id = next(iter(provider.responses))
    for after in range(-1, len(events)):
        where: Any = {} if after < 0 else {"starting_after": after}
        async with await client.responses.retrieve(response_id, stream=True, **where) as again:
            assert [event async for event in again] == events[after + 1 :]


async def test_a_conversation_is_busy_until_its_background_response_ends(
    provider: FakeProvider, thread: ThreadOfTest, client: AsyncOpenAI
) -> None:
    pause = Pause(after=2)
    provider.then(Answer(pauses=(pause,)))
    await left(thread, thread.begin("Hello"), 3)
    (conversation,) = provider.conversations.values()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="gpt-6-luna", input="Hi", conversation=conversation.id)
    assert caught.value.code == "conversation_locked"
    assert conversation.items == []
    pause.gate.released.set()
    await provider.quiet()
    assert len(conversation.items) == 2
