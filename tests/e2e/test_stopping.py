"""A service that stops: in a storm of calls, under watchers, with a message on its way in. Nobody is told that
they had asked for it, nothing that came in time is dropped, and nothing goes on listening."""

import asyncio
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import http2
from core.use_cases.accept_message import AcceptMessage
from doubles import Gate
from entrypoints import hosting
from entrypoints.container import Container
from entrypoints.grpc_api.connections import close_connections
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.hosting import hosted
from entrypoints.settings import load_settings
from harness import DEADLINE, message, served, until

CALLERS = 8
STOPS = 10
ENOUGH = 200


@pytest.mark.parametrize("each", ["a call", "a connection"])
async def test_calls_that_meet_a_stop_end_unavailable(each: str) -> None:
    ended: Counter[grpc.StatusCode] = Counter()

    async def storm(address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        while ended.total() == ended[grpc.StatusCode.OK]:
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                while ended.total() == ended[grpc.StatusCode.OK]:
                    call = AgentServiceStub(channel).ListAgents(api.ListAgentsRequest(), timeout=10)
                    ended[await call.code()] += 1
                    if each == "a connection":
                        break

    for _ in range(STOPS):
        ended.clear()
        async with served() as client:
            callers = [asyncio.create_task(storm(client.address)) for _ in range(CALLERS)]
            await until(lambda: ended[grpc.StatusCode.OK] >= ENOUGH)
        await asyncio.gather(*callers)
        assert set(ended) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


@dataclass
class Hosted:
    """A service in a task of its own, and a channel that outlives it."""

    container: Container
    channel: grpc.aio.Channel
    stop: asyncio.Event


@asynccontextmanager
async def stoppable() -> AsyncIterator[Hosted]:
    """A service that a test has stop while it looks on."""
    begun: asyncio.Future[tuple[Container, str | None]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()

    async def serve() -> None:
        async with hosted(load_settings(), "serve", listen="127.0.0.1:0") as made:
            begun.set_result(made)
            await stop.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(serve())
        container, address = await begun
        assert address is not None
        async with grpc.aio.insecure_channel(address) as channel:
            try:
                yield Hosted(container, channel, stop)
            finally:
                stop.set()


async def test_a_message_that_is_being_accepted_gets_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    gate = Gate()
    async with stoppable() as service:
        accept: AcceptMessage = service.container.accept()
        write, settle = service.container.store().write, accept.settle

        async def held(change: Any) -> Any:
            await gate.wait()
            return await write(change)

        async def settled() -> None:
            gate.open()
            await settle()

        monkeypatch.setattr(accept, "_store", SimpleNamespace(write=held))
        monkeypatch.setattr(accept, "settle", settled)
        agents: Any = AgentServiceStub(service.channel)
        call = agents.Chat(message(), timeout=DEADLINE)
        try:
            await gate.reached.wait()
            service.stop.set()
            events = [response.event async for response in call]
        finally:
            gate.open()
        assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED


async def test_who_watches_is_told_that_the_service_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "_LAST_CALLS", DEADLINE)
    async with stoppable() as service:
        health = health_pb2_grpc.HealthStub(service.channel)

        def watch(name: str) -> Any:
            return health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE)

        async def told(call: Any) -> str:
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name((await call.read()).status))

        watched = [watch(name) for name in ("", "vidacoach.agents.v1.AgentService")]
        nobody = watch("nobody")
        assert [await told(call) for call in (*watched, nobody)] == ["SERVING", "SERVING", "SERVICE_UNKNOWN"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=DEADLINE)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        service.stop.set()
        assert [await told(call) for call in watched] == ["NOT_SERVING", "NOT_SERVING"]
        for call in (*watched, nobody):
            call.cancel()


async def alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answered: asyncio.Event) -> None:
    """Answers pings, so that a peer counts as being there; says when the headers of an answer have come."""
    with suppress(asyncio.IncompleteReadError):
        while True:
            high, low, kind, flags, _ = http2.HEAD.unpack(await reader.readexactly(http2.HEAD.size))
            payload = await reader.readexactly(high << 8 | low)
            if kind == http2.PING and not flags & http2.ACK:
                writer.write(http2.frame(http2.PING, http2.ACK, 0, payload))
            if kind == http2.HEADERS:
                answered.set()


async def test_a_watcher_that_takes_nothing_keeps_no_service_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosting, "_LAST_CALLS", 0.0)
    with ExitStack() as kept:
        async with asyncio.timeout(DEADLINE), served() as client:
            host, port = client.address.rsplit(":", 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            kept.callback(writer.close)
            block = http2.request_headers(client.address, "/grpc.health.v1.Health/Watch")
            writer.write(
                http2.PREFACE
                + http2.settings(initial_window_size=0)  # no answer may be sent to it
                + http2.frame(http2.HEADERS, http2.END_HEADERS, 1, block)
                + http2.frame(http2.DATA, http2.END_STREAM, 1, http2.message(b""))
            )
            kept.callback(asyncio.create_task(alive(reader, writer, answered := asyncio.Event())).cancel)
            await answered.wait()


async def test_nothing_listens_where_a_service_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        probes = free.getsockname()
    monkeypatch.setenv("VIDA_HEALTH_LISTEN", f"127.0.0.1:{probes[1]}")
    async with served() as client:
        addresses = [probes, ("127.0.0.1", int(client.address.rpartition(":")[2]))]
        for address in addresses:
            socket.create_connection(address).close()
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)


@contextmanager
def connected(family: int, address: Any) -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A socket that listens, and both ends of a connection to it."""
    with socket.socket(family) as listening, socket.socket(family) as client:
        listening.bind(address)
        listening.listen()
        client.connect(listening.getsockname())
        accepted, _ = listening.accept()
        with accepted:
            client.settimeout(DEADLINE)
            yield listening, accepted, client


@pytest.mark.parametrize("unix", [False, True], ids=["TCP", "Unix"])
def test_connections_are_closed_and_nothing_else_is_or_is_kept(unix: bool, tmp_path: Path) -> None:
    family = socket.AF_UNIX if unix else socket.AF_INET
    ours, others = (str(tmp_path / name) for name in "ab") if unix else [("127.0.0.1", 0)] * 2
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    with connected(family, ours) as (listening, _, client), connected(family, others) as (other, there, here):
        name = listening.getsockname()
        close_connections(Path(name) if unix else name[1])
        assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError), socket.socket(family) as late:
            late.connect(name)
        there.send(b"x")
        assert here.recv(1) == b"x"
        with socket.socket(family) as late:
            late.connect(other.getsockname())
        there.close()
        assert here.recv(1) == b""  # nobody else holds it
        os.close(writes)
        assert os.read(reads, 1) == b""
    os.close(reads)


FEW_FILES = """
import resource, socket
from entrypoints.grpc_api.connections import close_connections

listening = socket.create_server(("127.0.0.1", 0))
clients = [socket.create_connection(listening.getsockname()) for _ in range(20)]
accepted = [listening.accept()[0] for _ in clients]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (accepted[-1].fileno() + 5, hard))
close_connections(listening.getsockname()[1])
for client in clients:
    client.settimeout(20)
    print(client.recv(1))
"""


def test_connections_are_closed_by_a_process_that_may_open_few_more_files() -> None:
    environ = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == ["b''"] * 20, done.stderr
