"""The API over real sockets."""

import asyncio
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from core.model.events import ToolCalled
from core.model.turn import TurnReason
from core.ports.agent import AgentFailed
from core.use_cases.places import Places
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.services.agents import Streams
from entrypoints.hosting import hosted
from entrypoints.settings import load_settings
from harness import DEADLINE, detail, message, reason, rest_of, served, text_of, until


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)


async def test_chat_streams_and_the_conversation_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    async with served(ScriptedAgent(["Hello ", "Ada", DONE])) as client:
        responses = await client.chat(domain=pb.DOMAIN_HEALTH, metadata={"k": "v"})
        assert not any(response.attached for response in responses)
        events = [response.event for response in responses]
        started = events[0].started
        assert events[0].position == 1
        assert text_of(events) == "Hello Ada"
        finished = events[-1].finished
        assert finished.turn.state == pb.TURN_STATE_COMPLETED
        assert (finished.turn.model, finished.turn.provider) == ("script-1", "scripted")
        assert finished.reply.content[0].text == "Hello Ada"
        assert not finished.turn.HasField("error")

        got = await client.threads.GetThread(
            threads_api.GetThreadRequest(user_id="ada", thread_id=started.thread_id)
        )
        assert got.thread.domain == pb.DOMAIN_HEALTH
        assert got.thread.agent_id == started.agent_id == "health-v1"
        assert (got.thread.message_count, dict(got.thread.metadata)) == (2, {"k": "v"})
        assert got.thread.state == pb.THREAD_STATE_ACTIVE

        listed = await client.threads.ListMessages(
            threads_api.ListMessagesRequest(user_id="ada", thread_id=started.thread_id)
        )
        assert [(line.role, line.content[0].text) for line in listed.messages] == [
            (pb.ROLE_USER, "Hello"),
            (pb.ROLE_ASSISTANT, "Hello Ada"),
        ]
        turn = await client.agents.GetTurn(api.GetTurnRequest(user_id="ada", turn_id=started.turn_id))
        assert turn.turn == finished.turn
        assert turn.reply == finished.reply

        again = await client.agents.SendMessage(
            api.SendMessageRequest(
                user_id="ada", thread_id=started.thread_id, content=[pb.ContentPart(text="More")]
            )
        )
        assert again.reply.content[0].text == "All right."
        assert not again.attached
    assert "Hello" not in caplog.text


async def test_follow_cuts_exactly_and_ends_at_once_behind_the_end() -> None:
    async with served(ScriptedAgent(["Grüße 👋🏽", DONE])) as client:
        events = [response.event for response in await client.chat()]
        turn_id = events[0].started.turn_id
        last = events[-1].position
        for after in range(last):
            rest = await client.follow(turn_id, after)
            assert text_of(rest) == "Grüße 👋🏽"[max(0, after - 1) :]
            assert rest[-1].finished.turn.id == turn_id
        assert await client.follow(turn_id, last) == []
        for after, code, why in [
            (last + 1, grpc.StatusCode.OUT_OF_RANGE, "POSITION_AHEAD"),
            (2**62, grpc.StatusCode.OUT_OF_RANGE, "POSITION_AHEAD"),
            (-1, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.follow(turn_id, after)
            assert (error.value.code(), reason(error.value)) == (code, why)


async def test_a_refusal_is_streamed_as_text_and_stored_as_a_refusal() -> None:
    from core.model.events import TextDelta

    async with served(ScriptedAgent([TextDelta("I can't.", refusal=True), DONE])) as client:
        events = [response.event for response in await client.chat()]
        assert text_of(events) == "I can't."
        assert events[-1].finished.reply.content[0].refusal == "I can't."


async def test_the_fate_of_a_turn_is_data() -> None:
    agent = ScriptedAgent(["half", AgentFailed(TurnReason.PROVIDER_STALLED)])
    async with served(agent) as client:
        response = await client.agents.SendMessage(
            api.SendMessageRequest(user_id="ada", content=[pb.ContentPart(text="x")])
        )
        assert response.turn.state == pb.TURN_STATE_INCOMPLETE
        assert response.turn.error.reason == "PROVIDER_STALLED"
        assert response.turn.error.retryable
        assert response.reply.partial


async def test_a_turn_takes_no_longer_than_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_TURN_BUDGET", "0.3")
    async with served(ScriptedAgent(["half", Gate(), "never", DONE])) as client:
        events = [response.event for response in await client.chat()]
        assert text_of(events) in {"", "half"}
        assert events[-1].finished.turn.error.reason == "BUDGET_EXCEEDED"


@pytest.mark.parametrize("restarts", [True, False], ids=["restarts", "ends"])
async def test_a_reply_that_was_cut_off_begins_again_where_that_is_set(
    restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_RESTART_INTERRUPTED", str(restarts))
    agent = ScriptedAgent(["half", AgentFailed(TurnReason.PROVIDER_STALLED)], ["whole", DONE])
    async with served(agent) as client:
        events = [response.event for response in await client.chat()]
        turn = events[-1].finished.turn
        restarted = [event.attempt_restarted for event in events if event.HasField("attempt_restarted")]
        if restarts:
            assert restarted == [pb.AttemptRestarted(attempt=2, reason="PROVIDER_STALLED")]
            assert (turn.state, turn.attempt) == (pb.TURN_STATE_COMPLETED, 2)
            assert events[-1].finished.reply.content[0].text == "whole"
        else:
            assert restarted == []
            assert (turn.state, turn.attempt) == (pb.TURN_STATE_INCOMPLETE, 1)


async def test_attach_reject_cancel() -> None:
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, "b", DONE])) as client:
        first = client.agents.Chat(message(request_id="r1"), timeout=DEADLINE)
        started = (await first.read()).event.started
        second = client.agents.Chat(message(request_id="r1"), timeout=DEADLINE)
        joined = await second.read()
        assert joined.attached
        assert joined.event.started == started
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.chat(thread_id=started.thread_id)
        assert (error.value.code(), reason(error.value)) == (grpc.StatusCode.ABORTED, "TURN_IN_PROGRESS")
        info = detail(error.value, error_details_pb2.ErrorInfo)
        assert info is not None
        assert info.metadata["turn_id"] == started.turn_id
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.chat("Other", request_id="r1")
        assert (error.value.code(), reason(error.value)) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_ID_REUSED",
        )
        await gate.reached.wait()
        request = api.CancelTurnRequest(user_id="ada", turn_id=started.turn_id)
        cancelled = await client.agents.CancelTurn(request)
        assert cancelled.turn.state == pb.TURN_STATE_CANCELLED
        assert await client.agents.CancelTurn(request) == cancelled
        for call in (first, second):
            events = [response.event for response in await rest_of(call)]
            assert events[-1].finished.turn == cancelled.turn
            assert text_of(events) in {"", "a"}
        sent = api.SendMessageRequest(user_id="ada", content=[pb.ContentPart(text="Hello")], request_id="r1")
        again = await client.agents.SendMessage(sent, timeout=DEADLINE)
        assert (again.attached, again.turn) == (True, cancelled.turn)
        sent.request_id = "r2"
        assert not (await client.agents.SendMessage(sent, timeout=DEADLINE)).attached


async def test_leaving_does_not_stop_a_turn() -> None:
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, "b", DONE])) as client:
        call = client.agents.Chat(message(), timeout=DEADLINE)
        turn_id = (await call.read()).event.started.turn_id
        await gate.reached.wait()
        call.cancel()
        service = client.container.agent_service()
        await until(lambda: service._streams.open == 0)
        gate.open()
        assert text_of(await client.follow(turn_id)) == "ab"


async def test_many_followers_see_one_history_and_a_stalled_one_delays_nobody() -> None:
    gate = Gate()
    words = [f"word{number} " for number in range(2_000)]
    async with served(ScriptedAgent([*words[:5], gate, *words[5:], DONE])) as client:
        first = client.agents.Chat(message(), timeout=DEADLINE)
        turn_id = (await first.read()).event.started.turn_id
        request = api.FollowTurnRequest(user_id="ada", turn_id=turn_id)
        stalled = [client.agents.FollowTurn(request, timeout=DEADLINE) for _ in range(5)]
        for call in stalled:
            await call.read()
        readers = [asyncio.create_task(client.follow(turn_id)) for _ in range(10)]
        await gate.reached.wait()
        gate.open()
        for reader in readers:
            assert text_of(await reader) == "".join(words)
        for call in [first, *stalled]:
            events = [response.event for response in await rest_of(call)]
            assert "".join(words).endswith(text_of(events))
            assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED


async def test_a_stream_is_bounded_in_time_and_number_and_may_be_resumed() -> None:
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, "b", DONE])) as client:
        service: Any = client.container.agent_service()
        generous = service._streams
        call = client.agents.Chat(message(), timeout=DEADLINE)
        turn_id = (await call.read()).event.started.turn_id
        await gate.reached.wait()
        overloaded = (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        quota = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
        for bound, refusal in (
            (Streams(Places(10, 0), seconds=20), quota),
            (Streams(Places(10, 10), seconds=0.01), overloaded),
            (Streams(Places(0, 10), seconds=20), overloaded),
        ):
            service._streams = bound
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.follow(turn_id)
            assert (error.value.code(), reason(error.value)) == refusal
            assert detail(error.value, error_details_pb2.RetryInfo) is not None
            assert bound.open == 0
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.chat("not accepted", user="eve")
        assert reason(error.value) == "OVERLOADED"
        nothing = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="eve"))
        assert not nothing.threads
        service._streams = generous
        gate.open()
        assert text_of(await client.follow(turn_id)) == "ab"
        assert (await rest_of(call))[-1].event.HasField("finished")


async def test_two_servers_never_share_a_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with served(ScriptedAgent()) as client:
        monkeypatch.setenv("VIDA_LISTEN", client.address)
        monkeypatch.setenv("VIDA_DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")
        with pytest.raises(OSError, match="can't listen"):
            async with hosted(load_settings(), "serve", listen=client.address):
                raise AssertionError("it listens")


def nobody_is_in_a_transaction(url: str) -> bool:
    """Whether nothing in the database is held by anyone but us, who look."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
            # Would fail beside a writer, and say so beside a reader.
            return bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
    with psycopg.connect(url) as server:
        others = "SELECT count(xact_start), count(*) FROM pg_stat_activity WHERE datname = current_database()"
        row = server.execute(f"{others} AND pid <> pg_backend_pid()".encode()).fetchone()
        assert row is not None
        assert row[1] < 10, "more connections than threads that work"
        return bool(row[0] == 0)


async def test_nothing_of_the_database_is_held_while_anybody_waits(database_url: str) -> None:
    gates = [Gate() for _ in range(20)]
    scripts = [(ToolCalled(f"c{number}", "note", "{}"), gate, DONE) for number, gate in enumerate(gates)]
    async with served(ScriptedAgent(*scripts)) as client:
        calls = [client.agents.Chat(message(user=f"u{number}"), timeout=DEADLINE) for number in range(20)]
        for call in calls:
            await call.read()
        for gate in gates:
            await gate.reached.wait()
        store = client.container.store()
        for _ in range(10):
            await store.read(lambda tx: tx.now())
        await until(lambda: nobody_is_in_a_transaction(database_url))
        for gate in gates:
            gate.open()
        for call in calls:
            assert (await rest_of(call))[-1].event.HasField("finished")


async def test_threads_are_listed_by_page_newest_first_and_described() -> None:
    async with served(ScriptedAgent()) as client:
        ids = [(await client.chat(f"m{number}"))[0].event.started.thread_id for number in range(5)]
        await client.chat("again", thread_id=ids[1])
        expected = [ids[1], ids[4], ids[3], ids[2], ids[0]]
        await client.chat("mine", user="eve")
        seen: list[str] = []
        token = ""
        while True:
            page = await client.threads.ListThreads(
                threads_api.ListThreadsRequest(user_id="ada", page_size=2, page_token=token)
            )
            assert len(page.threads) <= 2
            seen += [thread.id for thread in page.threads]
            token = page.next_page_token
            if not token:
                break
        assert seen == expected
        lines = await client.threads.ListMessages(
            threads_api.ListMessagesRequest(user_id="ada", thread_id=ids[1], newest_first=True, page_size=3)
        )
        assert [line.content[0].text for line in lines.messages] == ["All right.", "again", "All right."]
        rest = await client.threads.ListMessages(
            threads_api.ListMessagesRequest(
                user_id="ada", thread_id=ids[1], newest_first=True, page_token=lines.next_page_token
            )
        )
        assert [line.content[0].text for line in rest.messages] == ["m1"]

        updated = await client.threads.UpdateThread(
            threads_api.UpdateThreadRequest(
                user_id="ada",
                thread=pb.Thread(id=ids[0], title="My job", metadata={"a": "b"}),
                update_mask=field_mask_pb2.FieldMask(paths=["title"]),
            )
        )
        assert (updated.thread.title, dict(updated.thread.metadata)) == ("My job", {})


async def test_a_page_of_messages_fits_a_default_client() -> None:
    long = "👋" * 65_000
    async with served(ScriptedAgent()) as client:
        thread_id = (await client.chat(long))[0].event.started.thread_id
        for _ in range(19):
            await client.chat(long, thread_id=thread_id)
        seen: list[int] = []
        token = ""
        while True:
            page = await client.threads.ListMessages(
                threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id, page_token=token)
            )
            assert page.ByteSize() < 3 * 2**20
            seen += [len(line.content[0].text) for line in page.messages]
            token = page.next_page_token
            if not token:
                break
        assert seen == [65_000, len("All right.")] * 20


async def test_health_and_agents() -> None:
    async with served(ScriptedAgent()) as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        names = [f"vidacoach.agents.v1.{name}Service" for name in ("Agent", "Thread", "User")]
        for name in ("", *names):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        agents = (await client.agents.ListAgents(api.ListAgentsRequest())).agents
        assert [agent.domain for agent in agents] == [1, 2, 3, 4]
        assert {agent.provider for agent in agents} == {"scripted"}


async def test_an_exceptions_text_reaches_neither_client_nor_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def explode(*_: object) -> None:
        raise ValueError("secret words")

    async with served(ScriptedAgent()) as client:
        service: Any = client.container.agent_service()
        service._threads.turn = explode
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.agents.GetTurn(api.GetTurnRequest(user_id="ada", turn_id="x"))
        assert (error.value.code(), reason(error.value)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        info = detail(error.value, error_details_pb2.RequestInfo)
        assert info is not None
        assert info.request_id in caplog.text
        assert "secret" not in str(error.value) + str(error.value.trailing_metadata())


async def test_a_conversation_survives_a_restart() -> None:
    async with served(ScriptedAgent()) as client:
        thread_id = (await client.chat("before"))[0].event.started.thread_id
    agent = ScriptedAgent()
    async with served(agent) as client:
        await client.chat("after", thread_id=thread_id)
        history = await agent.requests[0].history()
        assert [line.text for line in history] == ["before", "All right."]
