"""The whole service with OPENAI_BASE_URL at the fake provider: settings, adapter, tools, record."""

import json
from collections.abc import AsyncIterator

import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from fake_provider import Answer, Break, Call, FakeProvider, Text
from fake_provider import Gate as ProviderGate
from harness import DEADLINE, message, rest_of, served, text_of


@pytest.fixture
async def provider(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeProvider]:
    """A provider that the settings point to, and either database."""
    async with FakeProvider() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
        yield fake


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
    assert len(provider.conversations) == 2
    newest = list(provider.conversations.values())[-1]
    assert "half of " in json.dumps(newest.items)


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
