"""A thread that is deleted is gone at once, for everybody."""

import asyncio
import sqlite3
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf import field_mask_pb2

from doubles import DONE, Gate, ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import DEADLINE, Client, message, reason, rest_of, served, until
from samples import PNG


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_DRAIN", "0")  # a failure shows at once, whatever turn still waits


async def delete(client: Client, thread_id: str, user: str = "ada") -> threads_api.DeleteThreadResponse:
    """Deletes a thread."""
    request = threads_api.DeleteThreadRequest(user_id=user, thread_id=thread_id)
    answer: threads_api.DeleteThreadResponse = await client.threads.DeleteThread(request, timeout=DEADLINE)
    return answer


async def why(call: Any) -> str:
    """The reason for which there is nothing to be found."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    return reason(error.value)


async def begun(client: Client, text: str = "Hello", **more: Any) -> pb.TurnStarted:
    """A conversation of one turn that has ended."""
    return (await client.chat(text, **more))[0].event.started


async def listed(client: Client, user: str = "ada") -> list[str]:
    """The ids of a user's threads."""
    states = [pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE]
    page = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id=user, states=states))
    return [thread.id for thread in page.threads]


async def nothing_is_left(client: Client, thread_id: str, turn_id: str) -> None:
    """Every call about a thread or its turn finds nothing."""
    thread: dict[str, Any] = {"user_id": "ada", "thread_id": thread_id}
    turn: dict[str, Any] = {"user_id": "ada", "turn_id": turn_id}
    content = [pb.ContentPart(text="x")]
    threads, agents = client.threads, client.agents
    for call in (
        threads.GetThread(threads_api.GetThreadRequest(**thread)),
        threads.ListMessages(threads_api.ListMessagesRequest(**thread)),
        threads.UpdateThread(
            threads_api.UpdateThreadRequest(
                user_id="ada",
                thread=pb.Thread(id=thread_id, title="x"),
                update_mask=field_mask_pb2.FieldMask(paths=["title"]),
            )
        ),
        threads.DeleteThread(threads_api.DeleteThreadRequest(**thread)),
        client.chat(thread_id=thread_id),
        client.chat(thread_id=thread_id, on_busy=pb.BUSY_POLICY_QUEUE),
        client.chat(thread_id=thread_id, on_busy=pb.BUSY_POLICY_INTERRUPT),
        agents.SendMessage(api.SendMessageRequest(**thread, content=content)),
    ):
        assert await why(call) == "THREAD_NOT_FOUND"
    for call in (
        agents.GetTurn(api.GetTurnRequest(**turn)),
        agents.CancelTurn(api.CancelTurnRequest(**turn)),
        client.follow(turn_id),
        client.follow(turn_id, after=1),
    ):
        assert await why(call) == "TURN_NOT_FOUND"


def rows(url: str) -> dict[str, int]:
    """How many rows the tables have that hold what was said."""
    tables = ("assistant_threads", "messages", "attachments", "turns", "turn_log")
    counts = {table: f"SELECT count(*) FROM {table}" for table in tables}
    if url.startswith("sqlite"):
        connection = sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)
        try:
            return {table: connection.execute(count).fetchone()[0] for table, count in counts.items()}
        finally:
            connection.close()
    with psycopg.connect(url) as server:
        return {table: (server.execute(count.encode()).fetchone() or (-1,))[0] for table, count in counts.items()}


async def test_nothing_is_left_of_a_thread_and_everything_of_the_others() -> None:
    async with served(ScriptedAgent()) as client:
        kept, gone = await begun(client), await begun(client, request_id="r1")
        eves = await begun(client, user="eve")
        assert await delete(client, gone.thread_id) == threads_api.DeleteThreadResponse()
        await nothing_is_left(client, gone.thread_id, gone.turn_id)
        assert await listed(client) == [kept.thread_id]
        assert await listed(client, "eve") == [eves.thread_id]
        assert len(await client.follow(kept.turn_id)) == 3
        again = await client.chat(request_id="r1")  # the request id went with its turn
        assert not again[0].attached
        assert again[0].event.started.turn_id != gone.turn_id
        await client.chat("More", thread_id=kept.thread_id)
    async with served(ScriptedAgent()) as client:  # another process
        await nothing_is_left(client, gone.thread_id, gone.turn_id)


async def test_the_rows_are_gone(database_url: str) -> None:
    async with served(ScriptedAgent()) as client:
        await begun(client, user="eve")
        before = rows(database_url)
        mine = await begun(client)
        picture = api.ChatRequest(user_id="ada", thread_id=mine.thread_id)
        picture.content.add().image.data = PNG
        async for _ in client.agents.Chat(picture, timeout=DEADLINE):
            pass
        after = rows(database_url)
        assert all(after[table] > before[table] for table in before)
        await delete(client, mine.thread_id)
        await until(lambda: rows(database_url) == before)


async def test_of_many_deletions_one_succeeds() -> None:
    async with served(ScriptedAgent()) as client:
        gone = await begun(client)
        outcomes = await asyncio.gather(
            *(delete(client, gone.thread_id) for _ in range(8)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {(error.code(), reason(error)) for error in refused} == {
            (grpc.StatusCode.NOT_FOUND, "THREAD_NOT_FOUND")
        }
        assert len(refused) == 7


async def test_another_users_thread_can_not_be_deleted() -> None:
    async with served(ScriptedAgent()) as client:
        mine = await begun(client)
        assert await why(delete(client, mine.thread_id, "eve")) == "THREAD_NOT_FOUND"
        assert await why(delete(client, mine.turn_id)) == "THREAD_NOT_FOUND"
        assert await listed(client) == [mine.thread_id]
        assert len(await client.follow(mine.turn_id)) == 3


async def test_open_streams_of_a_running_turn_end() -> None:
    gate = Gate()
    agent = ScriptedAgent(["half", gate, "never", DONE])
    async with served(agent) as client:
        chat = client.agents.Chat(message(request_id="r1"), timeout=DEADLINE)
        started = (await chat.read()).event.started
        await gate.reached.wait()
        followed = client.agents.FollowTurn(
            api.FollowTurnRequest(user_id="ada", turn_id=started.turn_id), timeout=DEADLINE
        )
        await followed.read()
        content = [pb.ContentPart(text="Hello")]
        sent = client.agents.SendMessage(
            api.SendMessageRequest(user_id="ada", content=content, request_id="r1"), timeout=DEADLINE
        )
        service = client.container.agent_service()
        await until(lambda: service._streams.open == 3)
        await delete(client, started.thread_id)
        await nothing_is_left(client, started.thread_id, started.turn_id)
        for call in (rest_of(chat), rest_of(followed), sent):
            assert await why(call) == "TURN_NOT_FOUND"
        await until(lambda: agent.closed == 1)  # the provider's stream is closed, though nobody opened the gate
        await until(lambda: service._streams.open == 0)
        gate.open()
        await nothing_is_left(client, started.thread_id, started.turn_id)
        assert await listed(client) == []


async def test_waiting_turns_end_and_never_run() -> None:
    gate = Gate()
    agent = ScriptedAgent([gate, DONE])
    async with served(agent) as client:
        chat = client.agents.Chat(message(), timeout=DEADLINE)
        started = (await chat.read()).event.started
        await gate.reached.wait()
        waiting = []
        for _ in range(3):
            request = message(thread_id=started.thread_id, on_busy=pb.BUSY_POLICY_QUEUE)
            call = client.agents.Chat(request, timeout=DEADLINE)
            waiting.append((call, (await call.read()).event.started.turn_id))
        await delete(client, started.thread_id)
        assert await why(rest_of(chat)) == "TURN_NOT_FOUND"
        for call, turn_id in waiting:
            assert await why(rest_of(call)) == "TURN_NOT_FOUND"
            await nothing_is_left(client, started.thread_id, turn_id)
        gate.open()
        await client.chat("another")
        assert len(agent.requests) == 2


async def test_a_place_is_free_again_where_a_running_turn_was_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_MAX_TURNS_PER_USER", "1")
    gate = Gate()
    agent = ScriptedAgent([gate, DONE])
    async with served(agent) as client:
        chat = client.agents.Chat(message(), timeout=DEADLINE)
        started = (await chat.read()).event.started
        await gate.reached.wait()
        await delete(client, started.thread_id)
        assert await why(rest_of(chat)) == "TURN_NOT_FOUND"
        await until(lambda: agent.closed == 1)
        engine = client.container.engine()
        await until(lambda: not engine._running)
        assert (await client.chat())[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
