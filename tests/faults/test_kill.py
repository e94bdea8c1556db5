"""kill -9 of the real server under clients: nothing acknowledged is lost, every turn ends, nobody is blocked."""

import asyncio
import os
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from faults.process import ServerProcess, start
from harness import reason

_SERVING = health_pb2.HealthCheckResponse.SERVING
CLIENTS = 8
CYCLES = int(os.environ.get("VIDA_TEST_KILL_CYCLES", "2"))
DEADLINE = 30.0
TERMINAL = {
    pb.TURN_STATE_COMPLETED,
    pb.TURN_STATE_INCOMPLETE,
    pb.TURN_STATE_CANCELLED,
    pb.TURN_STATE_FAILED,
}


@dataclass
class Told:
    """What a client was told of a turn before the stream broke, or to its end."""

    user: str
    request_id: str
    turn_id: str
    thread_id: str
    text: str = ""
    position: int = 0
    finished: bool = False


@dataclass
class Record:
    """What all clients were told."""

    turns: list[Told] = field(default_factory=list)
    cut: int = 0


async def _converse(address: str, user: str, record: Record, acknowledged: asyncio.Semaphore) -> None:
    """Chats on and on until the connection breaks."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = AgentServiceStub(channel)
        thread_id = ""
        try:
            while True:
                request = api.ChatRequest(
                    user_id=user,
                    thread_id=thread_id,
                    content=[
                        pb.ContentPart(text="I want to change how I work, but I never find the time for it.")
                    ],
                    request_id=uuid.uuid4().hex,
                )
                told: Told | None = None
                async for response in stub.Chat(request, timeout=DEADLINE):
                    event = response.event
                    if told is None:
                        started = event.started
                        told = Told(user, request.request_id, started.turn_id, started.thread_id)
                        record.turns.append(told)
                        acknowledged.release()
                    told.text += event.text_delta.text
                    told.position = event.position
                    told.finished = event.HasField("finished")
                assert told is not None
                assert told.finished, "a stream ended OK without its last event"
                thread_id = told.thread_id
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            record.cut += 1


async def _check(address: str, record: Record) -> None:
    """Everything that was told still holds, and the rest can be read."""
    async with grpc.aio.insecure_channel(address) as channel:
        agents, threads = AgentServiceStub(channel), ThreadServiceStub(channel)
        for told in record.turns:
            follow = api.FollowTurnRequest(user_id=told.user, turn_id=told.turn_id, after_position=told.position)
            text = told.text
            events = [response.event async for response in agents.FollowTurn(follow, timeout=DEADLINE)]
            text += "".join(event.text_delta.text for event in events)
            assert told.finished or events[-1].HasField("finished")
            got = await agents.GetTurn(api.GetTurnRequest(user_id=told.user, turn_id=told.turn_id))
            assert got.turn.state in TERMINAL
            assert "".join(part.text for part in got.reply.content) == text
            if not told.finished and got.turn.state != pb.TURN_STATE_COMPLETED:
                assert got.turn.error.reason == "INTERRUPTED"
                assert got.turn.state == (pb.TURN_STATE_INCOMPLETE if text else pb.TURN_STATE_FAILED)
            lines = await threads.ListMessages(
                threads_api.ListMessagesRequest(user_id=told.user, thread_id=told.thread_id, page_size=200)
            )
            mine = [line.role for line in lines.messages if line.turn_id == told.turn_id]
            assert mine.count(pb.ROLE_USER) == 1
            assert mine.count(pb.ROLE_ASSISTANT) == (1 if text else 0)
        for thread_id, user in {told.thread_id: told.user for told in record.turns}.items():
            answer = await agents.SendMessage(
                api.SendMessageRequest(user_id=user, thread_id=thread_id, content=[pb.ContentPart(text="Go on.")]),
                timeout=DEADLINE,
            )
            assert answer.turn.state == pb.TURN_STATE_COMPLETED, "a thread stays blocked"


async def test_kill_9(database_url: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("VIDA_TEST_SEED", "0")) or random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    log = tmp_path / "server.log"
    settings = {"VIDA_DATABASE_URL": database_url, "VIDA_PRACTICE_WORDS_PER_SECOND": "400"}
    server: ServerProcess = await start(log, **settings)
    try:
        for cycle in range(CYCLES):
            record, acknowledged = Record(), asyncio.Semaphore(0)
            clients = [
                asyncio.create_task(_converse(server.address, f"u{cycle}-{number}", record, acknowledged))
                for number in range(CLIENTS)
            ]
            for _ in range(chance.randrange(CLIENTS, 3 * CLIENTS)):
                await acknowledged.acquire()
            await server.kill()
            await asyncio.gather(*clients)
            server = await start(log, **settings)
            assert len(record.turns) >= CLIENTS, "too little happened for this test to mean anything"
            assert record.cut >= 1
            assert any(not told.finished for told in record.turns), "the kill struck nobody"
            await _check(server.address, record)
        assert await server.terminate() == 0
    finally:
        if server.alive:
            await server.kill()


async def test_a_stop_lets_running_turns_finish(database_url: str, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    settings = {"VIDA_DATABASE_URL": database_url, "VIDA_PRACTICE_WORDS_PER_SECOND": "50"}
    server = await start(log, **settings)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call: Any = AgentServiceStub(channel).Chat(
                api.ChatRequest(user_id="ada", content=[pb.ContentPart(text="I feel stuck in my job")]),
                timeout=DEADLINE,
            )
            assert (await call.read()).event.HasField("started")
            stopping = asyncio.create_task(server.terminate())
            health = health_pb2_grpc.HealthStub(channel)
            watch: Any = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
            while (await watch.read()).status == _SERVING:
                continue
            watch.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await AgentServiceStub(channel).SendMessage(
                    api.SendMessageRequest(user_id="eve", content=[pb.ContentPart(text="Hello")])
                )
            assert (refusal.value.code(), reason(refusal.value)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            last = None
            while (response := await call.read()) is not grpc.aio.EOF:
                last = response
            assert last is not None
            assert last.event.finished.turn.state == pb.TURN_STATE_COMPLETED
        assert await stopping == 0
    finally:
        if server.alive:
            await server.kill()
