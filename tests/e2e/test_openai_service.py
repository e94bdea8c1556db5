"""The whole service with OPENAI_BASE_URL at the fake provider: settings, adapter, tools, record."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from hashlib import sha256
from itertools import permutations

import grpc
import pytest
from google.rpc import error_details_pb2

from adapters.openai import retry
from entrypoints.container import Container
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from fake_provider import Answer, Break, Call, FakeProvider, HttpError, Pause, Text
from fake_provider import Gate as ProviderGate
from harness import DEADLINE, Client, detail, message, reason, rest_of, served, text_of, until
from openai_thread import words


@pytest.fixture
async def provider(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeProvider]:
    """A provider that the settings point to, and either database."""
    async with FakeProvider() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
        yield fake


async def test_copies_are_deleted_by_whoever_has_the_key(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served() as client:
        started = (await client.chat("Hello"))[0].event.started
    assert (len(provider.conversations), len(provider.responses)) == (1, 1)
    monkeypatch.setenv("VIDA_PROVIDER", "practice")
    with monkeypatch.context() as without:
        without.delenv("OPENAI_BASE_URL")
        without.delenv("OPENAI_API_KEY")
        async with served() as client:
            await client.threads.DeleteThread(
                threads_api.DeleteThreadRequest(user_id="ada", thread_id=started.thread_id)
            )
            assert (await client.container.erasures()()).waiting == {"openai": 2}
    async with served() as client:
        assert (await client.chat("Hello"))[-1].event.finished.turn.provider == "practice"
        while (await client.container.erasures()()).copies_left:  # noqa: ASYNC110 - no event of ours
            await asyncio.sleep(0.01)
    assert (provider.conversations, provider.items, provider.responses) == ({}, {}, {})


async def test_two_turns_use_one_conversation_and_a_tool_goes_round(provider: FakeProvider) -> None:
    goal = json.dumps({"goal": "find a new job", "commitment": "call Sam"})
    provider.then(
        Answer(output=(Call("set_goal", goal),)),
        Answer(output=(Text(text="Saved. What will Sam be able to tell you?"),)),
        Answer(output=(Call("list_goals", "{}"),)),
        Answer(output=(Text(text="You want to find a new job."),)),
    )
    async with served() as client:
        events = [response.event for response in await client.chat("I want a new job", domain=pb.DOMAIN_CAREER)]
        assert [event.WhichOneof("event") for event in events if not event.HasField("text_delta")] == [
            "started",
            "tool_call",
            "tool_result",
            "finished",
        ]
        assert text_of(events).endswith("tell you?")
        finished = events[-1].finished
        assert finished.turn.state == pb.TURN_STATE_COMPLETED
        assert (finished.turn.provider, finished.turn.model) == ("openai", "gpt-6-luna")
        assert finished.turn.usage.output_tokens > 0
        assert not next(event.tool_result for event in events if event.HasField("tool_result")).is_error

        thread_id = finished.turn.thread_id
        again = [response.event for response in await client.chat("What was my goal?", thread_id=thread_id)]
        result = next(event.tool_result for event in again if event.HasField("tool_result"))
        assert "find a new job" in result.output
        assert again[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
        assert len(provider.conversations) == 1
        listed = await client.threads.ListMessages(
            threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id)
        )
        assert [line.role for line in listed.messages] == [1, 3, 2, 1, 3, 2]


async def test_a_user_is_known_by_a_hash_under_the_key_that_is_set(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known_under(key: str) -> str:
        return hmac.new(key.encode(), b"ada", sha256).hexdigest()

    async with served() as client:
        await client.chat("Hello")
    monkeypatch.setenv("VIDA_USER_HASH_KEY", "kept")
    for key in ("sk-test", "sk-next"):  # whatever becomes of the provider's key
        monkeypatch.setenv("OPENAI_API_KEY", key)
        async with served() as client:
            await client.chat("Hello")
    monkeypatch.delenv("VIDA_USER_HASH_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    async with served() as client:
        await client.chat("Hello")
    assert [post["safety_identifier"] for post in provider.posts] == [
        known_under("sk-test"),
        known_under("kept"),
        known_under("kept"),
        known_under("vida-coach"),
    ]


async def test_of_a_model_that_nobody_knows_the_window_is_what_is_set(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "own-model")
    monkeypatch.setenv("OPENAI_STATE", "stateless")
    provider.models["own-model"] = None
    long = "word " * 3_000
    for tokens, shown in (("100000", True), ("4096", False)):
        monkeypatch.setenv("OPENAI_CONTEXT_TOKENS", tokens)
        async with served() as client:
            thread_id = (await client.chat(long))[0].event.started.thread_id
            await client.chat("And now?", thread_id=thread_id)
        assert (long in json.dumps(provider.posts[-1])) is shown


async def test_after_a_restart_the_same_conversation_goes_on(provider: FakeProvider) -> None:
    async with served() as client:
        thread_id = (await client.chat("one"))[0].event.started.thread_id
    async with served() as client:
        assert (await client.chat("two", thread_id=thread_id))[
            -1
        ].event.finished.turn.state == pb.TURN_STATE_COMPLETED
    assert len(provider.conversations) == 1


async def test_after_a_cut_reply_the_provider_is_told_what_the_user_saw(provider: FakeProvider) -> None:
    provider.then(
        Answer(
            output=(Text(text="half of an answer", pieces=("half of ", "an answer")),),
            fault=Break(how="eof", after=1),
        )
    )
    async with served() as client:
        events = [response.event for response in await client.chat("one")]
        turn = events[-1].finished.turn
        assert (turn.state, turn.error.reason) == (pb.TURN_STATE_INCOMPLETE, "PROVIDER_TRUNCATED")
        assert text_of(events) == "half of "
        after = await client.chat("two", thread_id=turn.thread_id)
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
    (conversation,) = provider.conversations.values()
    assert words(conversation.items)[:3] == ["user: one", "assistant: half of ", "user: two"]


async def shown_and_on_record(
    provider: FakeProvider, client: Client, thread_id: str
) -> tuple[list[str], list[str]]:
    """What the model was shown last, and what is on record up to its answer: messages, without tools."""
    request = threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id, page_size=200)
    listed = (await client.threads.ListMessages(request)).messages
    names = {pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
    record = [
        f"{names[line.role]}: " + "".join(part.text for part in line.content)
        for line in listed
        if line.role in names
    ]
    return words([item for item in provider.shown[-1] if item["type"] == "message"]), record[:-1]


MODES = ("conversation", "response_chain", "stateless", "practice")


def every_order() -> list[str]:
    """A walk in which each follows each other once."""
    walk, left = [MODES[0]], set(permutations(MODES, 2))

    def goes_on() -> bool:
        if not left:
            return True
        for step in sorted(step for step in left if step[0] == walk[-1]):
            left.remove(step)
            walk.append(step[1])
            if goes_on():
                return True
            left.add(step)
            walk.pop()
        return False

    assert goes_on()
    return walk


async def test_a_thread_goes_on_in_every_mode_after_every_other(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = every_order()
    assert len(walk) == 13
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    thread_id = ""
    for number, mode in enumerate(walk):
        monkeypatch.setenv("VIDA_PROVIDER", "practice" if mode == "practice" else "openai")
        if mode != "practice":
            monkeypatch.setenv("OPENAI_STATE", mode)
        async with served() as client:
            if mode != "practice" and number % 2:
                provider.then(Answer(output=(Text(pieces=("half ", "of it")),), fault=Break(how="eof", after=1)))
                cut = (await client.chat(f"cut {number}", thread_id=thread_id))[-1].event.finished.turn
                assert cut.state == pb.TURN_STATE_INCOMPLETE
            for text in (f"first {number}", f"second {number}"):
                finished = (await client.chat(text, thread_id=thread_id))[-1].event.finished
                assert finished.turn.state == pb.TURN_STATE_COMPLETED
                assert finished.turn.provider == ("practice" if mode == "practice" else "openai")
                thread_id = finished.turn.thread_id
                if mode != "practice":
                    shown, record = await shown_and_on_record(provider, client, thread_id)
                    assert shown == record
                    sent = provider.posts[-1]
                    assert ("conversation" in sent, sent["store"]) == (mode == "conversation", mode != "stateless")
            if mode != "practice":
                # The second message finds the copy in step: nothing but itself is sent.
                assert ("previous_response_id" in sent) == (mode == "response_chain")
                assert (len(sent["input"]) == 1) == (mode != "stateless")
    assert provider.script == []


async def test_a_provider_that_is_down_is_spared_and_nothing_is_accepted(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", (0.0, 0.0))
    provider.then(*[HttpError(status=503)] * 5)
    async with served() as client:
        failed = (await client.chat("one"))[-1].event.finished.turn
        assert (failed.state, failed.error.reason) == (pb.TURN_STATE_FAILED, "PROVIDER_UNAVAILABLE")
        assert failed.error.retryable
        second = client.agents.Chat(message("two"), timeout=DEADLINE)
        turn_id = (await second.read()).event.started.turn_id
        await until(lambda: not provider.script)
        await until(lambda: client.container.agent().refusal() is not None)
        for call in (
            client.agents.SendMessage(
                api.SendMessageRequest(user_id="ada", content=[pb.ContentPart(text="three")])
            ),
            client.chat("three"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert reason(refused.value) == "PROVIDER_UNAVAILABLE"
            info = detail(refused.value, error_details_pb2.RetryInfo)
            assert info is not None
            assert 5 < info.retry_delay.seconds <= 10
        listed = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="ada"))
        assert len(listed.threads) == 2
        assert len(provider.posts) == 5
        await client.agents.CancelTurn(api.CancelTurnRequest(user_id="ada", turn_id=turn_id))


async def test_cancel_reaches_the_provider(provider: FakeProvider) -> None:
    gate = ProviderGate()
    provider.then(
        Answer(output=(Text(text="a b", pieces=("a ", "b")),), fault=Break(how="stall", after=1, gate=gate))
    )
    async with served() as client:
        call = client.agents.Chat(message(), timeout=DEADLINE)
        turn_id = (await call.read()).event.started.turn_id
        await gate.reached.wait()
        cancelled = await client.agents.CancelTurn(api.CancelTurnRequest(user_id="ada", turn_id=turn_id))
        assert cancelled.turn.state == pb.TURN_STATE_CANCELLED
        assert (await rest_of(call))[-1].event.finished.turn == cancelled.turn
        await provider.quiet()  # no request is left open there


# --- in the background


REPLY = ("Begin ", "with ", "one ", "call ", "to ", "Sam.")


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies are written in the background, and a process that is gone has lost its turns soon."""
    monkeypatch.setenv("OPENAI_BACKGROUND", "true")
    monkeypatch.setenv("VIDA_LEASE", "0.5")


async def kill(container: Container) -> None:
    """Stops everything that works on turns as kill -9 would: no goodbye to the store, and nobody is told."""
    recover, engine = container.recover(), container.engine()
    tasks = [*recover._tasks, engine._writing, *(run.task for run in engine._running.values())]
    for task in filter(None, tasks):
        task.cancel()
    await asyncio.gather(*filter(None, tasks), return_exceptions=True)


async def begun(client: Client, text: str) -> tuple[str, str]:
    """Chats until so much of the reply is committed; returns the ids of turn and thread."""
    call = client.agents.Chat(message(), timeout=DEADLINE)
    started = (await call.read()).event.started
    said = ""
    while not said.endswith(text):
        said += (await call.read()).event.text_delta.text
    call.cancel()
    return started.turn_id, started.thread_id


def kinds(events: list[pb.TurnEvent]) -> list[str | None]:
    """What happened, besides text."""
    return [event.WhichOneof("event") for event in events if not event.HasField("text_delta")]


def streams_asked_for(provider: FakeProvider) -> int:
    """How often somebody came back to a response."""
    return sum(request.method == "GET" and "stream" in request.query for request in provider.requests)


@pytest.mark.usefixtures("background")
@pytest.mark.parametrize("while_away", ["at work", "written"])
async def test_the_next_process_goes_on_with_the_same_reply(provider: FakeProvider, while_away: str) -> None:
    pause = Pause(after=3)
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(pause,)))
    async with served() as client:
        turn_id, thread_id = await begun(client, "Begin with one ")
        await kill(client.container)
        if while_away == "written":
            pause.gate.released.set()
            await provider.quiet()
    async with served() as client:
        call = client.agents.FollowTurn(api.FollowTurnRequest(user_id="ada", turn_id=turn_id), timeout=DEADLINE)
        pause.gate.released.set()
        events = [response.event async for response in call]
        assert kinds(events) == ["started", "finished"]
        assert text_of(events) == "".join(REPLY)
        turn = events[-1].finished.turn
        assert (turn.state, turn.attempt) == (pb.TURN_STATE_COMPLETED, 1)
        assert turn.usage.output_tokens > 0
        assert len(provider.posts) == streams_asked_for(provider) == 1
        after = await client.chat("And then?", thread_id=thread_id)
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
    (conversation,) = provider.conversations.values()
    assert len(conversation.items) == 4
    assert provider.cancelled == []


@pytest.mark.usefixtures("background")
async def test_a_process_that_is_told_to_stop_leaves_its_replies_to_the_next(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DRAIN", "0")
    pause = Pause(after=3)
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(pause,)))
    async with served() as client:
        turn_id, _ = await begun(client, "Begin with one ")
    async with served() as client:
        pause.gate.released.set()
        events = await client.follow(turn_id)
        assert kinds(events) == ["started", "finished"]
        assert text_of(events) == "".join(REPLY)
        assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
    assert len(provider.posts) == 1
    assert provider.cancelled == []


@pytest.mark.usefixtures("background")
async def test_a_reply_goes_on_behind_its_tools(provider: FakeProvider) -> None:
    pause = Pause(after=3)
    provider.then(
        Answer(output=(Text(text="Let me look."), Call("list_goals"))),
        Answer(output=(Text(pieces=REPLY),), pauses=(pause,)),
    )
    async with served() as client:
        turn_id, _ = await begun(client, "\n\nBegin with one ")
        await kill(client.container)
    async with served() as client:
        pause.gate.released.set()
        events = await client.follow(turn_id)
        assert kinds(events) == ["started", "tool_call", "tool_result", "finished"]
        assert text_of(events) == "Let me look.\n\n" + "".join(REPLY)
        turn = events[-1].finished.turn
        assert (turn.state, turn.attempt) == (pb.TURN_STATE_COMPLETED, 1)
    assert len(provider.posts) == 2
    assert len(provider.conversations) == 1


@pytest.mark.usefixtures("background")
async def test_a_cancel_stops_what_is_written_in_the_background(provider: FakeProvider) -> None:
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(Pause(after=3),)))
    async with served() as client:
        turn_id, thread_id = await begun(client, "Begin with one ")
        request = api.CancelTurnRequest(user_id="ada", turn_id=turn_id)
        assert (await client.agents.CancelTurn(request)).turn.state == pb.TURN_STATE_CANCELLED
        await provider.quiet()
        assert provider.cancelled == list(provider.responses)
        after = await client.chat("And then?", thread_id=thread_id)
        assert after[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
    newest = list(provider.conversations.values())[-1]
    assert "Begin with one " in json.dumps(newest.items)


@pytest.mark.usefixtures("background")
async def test_a_cancel_stops_what_another_process_began(provider: FakeProvider) -> None:
    pause = Pause(after=3)
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(pause,)))
    async with served() as client:
        turn_id, _ = await begun(client, "Begin with one ")
        await kill(client.container)
    async with served() as client:
        request = api.CancelTurnRequest(user_id="ada", turn_id=turn_id)
        assert (await client.agents.CancelTurn(request)).turn.state == pb.TURN_STATE_CANCELLED
        await provider.quiet()
    assert provider.cancelled == list(provider.responses)
    assert len(provider.posts) == 1


@pytest.mark.usefixtures("background")
async def test_a_deleted_thread_stops_what_is_written_for_it(provider: FakeProvider) -> None:
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(Pause(after=3),)))
    async with served() as client:
        _, thread_id = await begun(client, "Begin with one ")
        await client.threads.DeleteThread(threads_api.DeleteThreadRequest(user_id="ada", thread_id=thread_id))
        await provider.quiet()
    assert provider.cancelled == list(provider.responses)


@pytest.mark.usefixtures("background")
async def test_a_reply_that_is_gone_ends_with_what_was_said(provider: FakeProvider) -> None:
    provider.then(Answer(output=(Text(pieces=REPLY),), pauses=(Pause(after=3),)))
    async with served() as client:
        turn_id, _ = await begun(client, "Begin with one ")
        await kill(client.container)
    provider.responses.clear()
    async with served() as client:
        events = await client.follow(turn_id)
        turn = events[-1].finished.turn
        assert (turn.state, turn.error.reason) == (pb.TURN_STATE_INCOMPLETE, "INTERRUPTED")
        assert text_of(events) == "Begin with one "
    assert len(provider.posts) == 1


@pytest.mark.usefixtures("background")
async def test_a_cut_connection_is_not_noticed(provider: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", (0.0, 0.0))
    provider.then(Answer(output=(Text(pieces=REPLY),), fault=Break(how="cut", after=2)))
    provider.attachments = [Break(how="half", after=1), Break(how="eof", after=1)]
    async with served() as client:
        events = [response.event for response in await client.chat("one")]
        assert text_of(events) == "".join(REPLY)
        assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
    assert len(provider.posts) == 1
