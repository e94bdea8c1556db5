"""What callers may ask of a service at a time: past a bound there is a status, and nobody else notices."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapters.sql.engines import database_file
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.grpc_api import server
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from entrypoints.hosting import hosted
from entrypoints.ownership import socket_path
from entrypoints.settings import load_settings
from harness import DEADLINE, Client, message, reason, rest_of, served, text_of, until

CALLS = 50
STALL = 2.0
LONGEST_TURN = 3_600
"""Seconds; no budget of a turn may be more."""


def stall(sent: threading.Event) -> None:
    """Keeps the event loop, and with it the service, from doing anything."""
    assert sent.wait(timeout=20)
    time.sleep(STALL)


def call(address: str, sent: threading.Event) -> Counter[grpc.StatusCode]:
    """Sends all calls at once; how they ended."""
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
        calls = [
            AgentServiceStub(channel).ListAgents.future(api.ListAgentsRequest(), timeout=20) for _ in range(CALLS)
        ]
        sent.set()
        return Counter(call.code() for call in calls)


async def stalled() -> Counter[grpc.StatusCode]:
    """How calls end that were sent while the service did nothing."""
    async with served() as client:
        sent = threading.Event()
        calls = asyncio.create_task(asyncio.to_thread(call, client.address, sent))
        await asyncio.sleep(0)
        stall(sent)
        return await calls


async def test_calls_that_wait_to_be_picked_up_are_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(server, "_PICKED_UP", 1)
        assert (await stalled())[grpc.StatusCode.CANCELLED] > 0, "the bound did not strike"
    assert server._PICKED_UP > LONGEST_TURN
    assert await stalled() == {grpc.StatusCode.OK: CALLS}


@asynccontextmanager
async def bounded(client: Client, calls: int) -> AsyncIterator[grpc.aio.Channel]:
    """Another server of the same service, which takes so many calls at a time."""
    part = client.container
    other = server.Server(
        agents=part.agent_service(),
        threads=part.thread_service(),
        users=part.user_service(),
        ids=part.ids(),
        access=part.access(),
        bounds=server.Bounds(
            request_bytes=2**20, connections=9, streams=8, calls=calls, stream_seconds=70, connection_seconds=60
        ),
        reflected=False,
    )
    port = await other.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await other.stop(0)


async def test_more_calls_than_allowed_are_refused_and_health_checks_are_not() -> None:
    async with served() as client:
        async with bounded(client, calls=0) as channel:
            for call in (
                AgentServiceStub(channel).ListAgents(api.ListAgentsRequest(), timeout=DEADLINE),
                AgentServiceStub(channel).Chat(message(), timeout=DEADLINE).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert (error.value.code(), reason(error.value)) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert not (await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="ada"))).threads


async def test_as_many_calls_as_allowed_are_taken_and_each_gives_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDA_DRAIN", "0")  # a failure shows at once
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, DONE])) as client, bounded(client, calls=2) as channel:
        agents: Any = AgentServiceStub(channel)

        async def ask(user: str = "ada") -> str:
            try:
                await threads.ListThreads(threads_api.ListThreadsRequest(user_id=user), timeout=DEADLINE)
            except grpc.aio.AioRpcError as error:
                return reason(error)
            return ""

        threads: Any = ThreadServiceStub(channel)
        held = agents.Chat(message(), timeout=DEADLINE)
        turn_id = (await held.read()).event.started.turn_id
        await gate.reached.wait()
        assert [await ask() for _ in range(5)] == [""] * 5
        assert [await ask(user="") for _ in range(5)] == ["INVALID_FIELD"] * 5  # a refused one as well
        left = agents.FollowTurn(api.FollowTurnRequest(user_id="ada", turn_id=turn_id), timeout=DEADLINE)
        await left.read()
        assert await ask() == "OVERLOADED"
        left.cancel()  # and one whose caller leaves
        while await ask() == "OVERLOADED":  # noqa: ASYNC110 - no event of ours
            await asyncio.sleep(0)
        assert await ask() == ""
        gate.open()
        await rest_of(held)


async def test_who_watches_the_services_health_takes_nobodys_place() -> None:
    async with served() as client, bounded(client, calls=1) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await AgentServiceStub(channel).ListAgents(api.ListAgentsRequest(), timeout=DEADLINE)).agents
        for watch in watches:
            watch.cancel()


async def test_what_the_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take minutes to be seen, or a peer whose cable is cut."""
    told: list[dict[str, Any]] = []
    make = grpc.aio.server

    def noted(*, options: list[tuple[str, Any]], **more: Any) -> grpc.aio.Server:
        told.append(dict(options))
        return make(options=options, **more)

    monkeypatch.setattr(grpc.aio, "server", noted)
    async with served() as client, bounded(client, calls=1):
        options = told[-1]
    assert options["grpc.max_receive_message_length"] == 2**20
    assert options["grpc.max_allowed_incoming_connections"] == 9
    assert options["grpc.max_concurrent_streams"] == 8
    assert options["grpc.max_connection_age_ms"] == 60_000
    # Streams that are open on a connection that is to be closed come to their end.
    assert options["grpc.max_connection_age_grace_ms"] >= 70_000
    assert options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"] <= 25_000
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"]
    # A client of ours that asks whether the server is there is not sent away for it.
    assert options["grpc.http2.max_pings_without_data"] == 0
    assert options["grpc.http2.min_recv_ping_interval_without_data_ms"] < 20_000
    assert options["grpc.server.max_pending_requests"] == options["grpc.server.max_pending_requests_hard_limit"]


async def test_an_old_connection_is_left_without_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_MAX_CONNECTION_AGE", "1")
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, "b", DONE], ["c", DONE])) as client:
        call = client.agents.Chat(message(), timeout=DEADLINE)
        begun = await call.read()
        await gate.reached.wait()
        # The server asks for another connection, in the midst of a reply.
        await client.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        other = await client.chat("Hello again", user="eve")
        assert text_of([response.event for response in other]) == "c"
        gate.open()
        rest = [begun, *await rest_of(call)]
        assert text_of([response.event for response in rest]) == "ab"
        assert await call.code() is grpc.StatusCode.OK


async def test_the_owners_socket_asks_nobody_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_MAX_CONNECTION_AGE", "1")
    settings = load_settings()
    async with hosted(settings, "serve", listen="127.0.0.1:0") as (_, address):
        assert address is not None
        at_home = f"unix:{socket_path(database_file(settings.database))}"
        async with grpc.aio.insecure_channel(at_home) as command, grpc.aio.insecure_channel(address) as caller:
            await command.channel_ready()
            for _ in range(2):  # once may be a tenth of a second too early
                await caller.channel_ready()
                await caller.wait_for_state_change(grpc.ChannelConnectivity.READY)
            assert command.get_state() is grpc.ChannelConnectivity.READY


async def test_headers_beyond_the_bound_are_refused() -> None:
    async with served() as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.agents.ListAgents(
                api.ListAgentsRequest(), metadata=[("x-large", "x" * 20_000)], timeout=DEADLINE
            )
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        known = [("x-fits", "x" * 12_000)]
        assert (await client.agents.ListAgents(api.ListAgentsRequest(), metadata=known, timeout=DEADLINE)).agents


async def test_connections_are_bounded_and_those_that_say_nothing_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDA_MAX_TURNS", "1")
    monkeypatch.setattr(server, "_HANDSHAKE", 500)
    async with served() as client, AsyncExitStack() as stack:
        await client.agents.ListAgents(api.ListAgentsRequest(), timeout=DEADLINE)
        host, port = client.address.rsplit(":", 1)

        async def silent() -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(host, int(port))
            stack.callback(writer.close)
            return reader

        connections = [await silent() for _ in range(150)]
        ends = [asyncio.create_task(connection.read()) for connection in connections]
        await until(lambda: sum(end.done() for end in ends) >= 49)  # as many as there were too many
        # The bystander's own connection is one of those allowed.
        assert await client.agents.ListAgents(api.ListAgentsRequest(), timeout=DEADLINE)
        await asyncio.gather(*ends, return_exceptions=True)
        async with grpc.aio.insecure_channel(
            client.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as fresh:
            assert await AgentServiceStub(fresh).ListAgents(api.ListAgentsRequest(), timeout=DEADLINE)
