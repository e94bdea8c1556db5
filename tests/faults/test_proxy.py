"""Two replicas that clients know by one address, and kill -9 of one every few seconds: every text is told exactly.

Behind HAProxy with the very file that is deployed, and behind a channel that shares out its calls itself.
"""

import asyncio
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from random import Random
from uuid import uuid4

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entrypoints.client.channels import BALANCED, connect_async
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from faults.checker import go_on, judge
from faults.client import STRAIGHT, Client, Told, Way
from faults.cluster import Cluster
from faults.figures import FIGURES, chance, sized
from faults.load import Load
from harness import until

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy.cfg"
STREAMS = sized("PROXY_STREAMS", 8, 40, 200)
KILLS = sized("PROXY_KILLS", 1, 3, 9)
EVERY = 7.0
"""Seconds from one kill to the next: enough for a turn that was struck to be begun again and to end."""
SETTINGS = {"VIDA_LEASE": "2", "VIDA_RESTART_INTERRUPTED": "true"}
_JUDGED_AT_ONCE = 50

BEHIND_PROXY = Way(broken=frozenset({grpc.StatusCode.UNKNOWN}))
"""HAProxy ends the streams of a server that died, without a status."""

pytestmark = pytest.mark.timeout(300 + 4 * STREAMS)


def reply_of_seconds(chance: Random) -> str:
    """A message whose reply takes two to four seconds."""
    return f"words:{chance.randint(16, 32)} pace:8 {uuid4().hex[:8]}"


def port_to_keep(chance: Random) -> int:
    """A port that nobody has, below those that connections get: a server that was killed finds it free again."""
    while True:
        port = chance.randrange(20_000, 30_000)
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port


@asynccontextmanager
async def proxied(folder: Path, listen: str, replicas: list[str]) -> AsyncIterator[None]:
    """HAProxy before two replicas, from when it answers for them."""
    names = {"PROXY_LISTEN": listen, "REPLICA_A": replicas[0], "REPLICA_B": replicas[1]}
    with (folder / "log").open("ab") as sink:
        proxy = await asyncio.create_subprocess_exec(
            *("haproxy", "-db", "-f", str(CONFIGURATION)), stdout=sink, stderr=sink, env={**os.environ, **names}
        )
    try:
        async with connect_async(listen) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=10)
        yield
    finally:
        proxy.kill()
        await proxy.wait()


def _cuts(tolds: Sequence[Told]) -> int:
    return sum(len(told.cuts) for told in tolds)


async def _kill_now_and_then(suite: str, database_url: str, cluster: Cluster, load: Load, draw: Random) -> None:
    """The bar: whatever the kills, each client is told each of its texts whole, and once."""
    try:
        load.begin()
        # A channel's first calls may all go to the replica that it reached first; the next ones are shared out.
        await load.acknowledged(2 * STREAMS)
        for kill in range(1, KILLS + 1):
            victim = draw.choice(cluster.servers)
            at_work = load.unfinished
            before = _cuts(at_work)
            await cluster.kill(victim)
            killed = time.monotonic()
            cluster.hide(await cluster.start(database_url, listen=victim.address, **SETTINGS))
            assert _cuts(at_work) > before, "the kill struck nobody"
            if kill < KILLS:
                await asyncio.sleep(killed + EVERY - time.monotonic())
            FIGURES.add(suite, {"cycles": 1, "turns at work when killed": len(at_work)})
            FIGURES.progress(suite, kill, KILLS)
        tolds = await load.finish()
    finally:
        await load.aclose()
    assert len(tolds) >= 2 * STREAMS, "too little happened for this test to mean anything"
    FIGURES.add(suite, Counter(f"told {reason}" for told in tolds for reason in told.refusals))
    FIGURES.most(suite, "longest gap, ms", round(max(told.gap for told in tolds) * 1000))
    replicas = [server.address for server in cluster.servers]
    for start in range(0, len(tolds), _JUDGED_AT_ONCE):
        some = tolds[start : start + _JUDGED_AT_ONCE]
        await judge(suite, database_url, replicas, some, draw, reasons=(), restarts=True)
        await go_on(replicas[0], some)


async def test_kills_behind_a_proxy(postgres_url: str, cluster: Cluster) -> None:
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    suite = "proxy"
    draw = chance(suite)
    addresses = [f"127.0.0.1:{port_to_keep(draw)}" for _ in range(3)]
    await asyncio.gather(*(cluster.start(postgres_url, listen=each, **SETTINGS) for each in addresses[1:]))
    async with proxied(cluster.folder, addresses[0], addresses[1:]):
        cluster.addresses = addresses[:1]
        load = Load(suite, cluster, draw, reply_of_seconds, clients=STREAMS, way=BEHIND_PROXY)
        await _kill_now_and_then(suite, postgres_url, cluster, load, draw)


async def test_kills_behind_a_channel_that_shares_out_its_calls(postgres_url: str, cluster: Cluster) -> None:
    suite = "client-side balancing"
    draw = chance(suite)
    addresses = [f"127.0.0.1:{port_to_keep(draw)}" for _ in range(2)]
    await asyncio.gather(*(cluster.start(postgres_url, listen=each, **SETTINGS) for each in addresses))
    async with connect_async(f"ipv4:{','.join(addresses)}", BALANCED) as channel:
        one_for_all = nullcontext((AgentServiceStub(channel), ThreadServiceStub(channel)))
        cluster.addresses = ["both"]
        way = Way(stubs=lambda _: one_for_all)
        load = Load(suite, cluster, draw, reply_of_seconds, clients=STREAMS, way=way)
        await _kill_now_and_then(suite, postgres_url, cluster, load, draw)


async def test_a_proxy_sends_nothing_to_a_replica_that_drains(postgres_url: str, cluster: Cluster) -> None:
    if not shutil.which("haproxy"):
        pytest.skip("haproxy is not installed")
    draw = chance("proxy", "drain")
    addresses = [f"127.0.0.1:{port_to_keep(draw)}" for _ in range(3)]
    leaving, _ = await asyncio.gather(
        *(cluster.start(postgres_url, listen=each, VIDA_LEASE="5") for each in addresses[1:])
    )
    async with proxied(cluster.folder, addresses[0], addresses[1:]):
        cluster.addresses = addresses[:1]
        tolds = [Told(f"user-{number}", f"words:32 pace:8 {number}") for number in range(8)]
        chats = [asyncio.create_task(Client(cluster, draw, way=STRAIGHT).chat(told)) for told in tolds]
        await until(lambda: all(told.text for told in tolds))
        leaving.ask_to_stop()
        await until(lambda: b"replicas/a is DOWN" in (cluster.folder / "log").read_bytes())
        assert leaving.alive
        later = [Told(f"later-{number}", f"words:2 {number}") for number in range(8)]
        for told in later:
            await Client(cluster, draw, way=STRAIGHT).chat(told)
        assert [told.refusals for told in later] == [[]] * len(later)
        assert leaving.alive
        await asyncio.gather(*chats)
        assert await leaving.gone() == 0
        await judge("proxy", postgres_url, addresses[2:], [*tolds, *later], draw, reasons=())
    assert [told.cuts for told in tolds] == [[]] * len(tolds)
