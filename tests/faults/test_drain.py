"""Servers are stopped in order: no turn is harmed, and those that have not spoken yet go elsewhere at once."""

import asyncio
import signal
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from faults.checker import Tables, judge
from faults.client import Client, Told, why
from faults.cluster import BUDGET, DEADLINE, Cluster
from faults.figures import FIGURES, chance, sized, stores
from faults.load import CLIENTS, Load, some_message
from harness import until

SUITE = "drain"
RESTARTS = sized("RESTARTS", 1, 4, 100)
"""Of one server each: two make a rolling restart."""
LAST_CALLS = 5.0
"""Seconds that a stop may take beyond its turns."""
WORST_GAP = 2.0
LEASE = "5"
"""Seconds. Nothing here waits for a lease to run out, and none should by mistake on a machine that is busy."""
AT_ONCE = 2.5
"""Seconds within which a turn is handed over: long before its process's lease could have run out."""

_SERVING = health_pb2.HealthCheckResponse.SERVING

pytestmark = pytest.mark.timeout(60 + 40 * RESTARTS)


async def test_a_rolling_restart_harms_no_turn(postgres_url: str, cluster: Cluster) -> None:
    draw, noticed = chance(SUITE), 0
    await asyncio.gather(*(cluster.start(postgres_url, VIDA_LEASE=LEASE) for _ in range(2)))
    load = Load(SUITE, cluster, draw, some_message)
    try:
        for restart in range(1, RESTARTS + 1):
            load.begin()
            await load.acknowledged(2 * CLIENTS)
            leaving = cluster.servers[0]
            asked = time.monotonic()
            leaving.ask_to_stop()
            struck = len(load.unfinished)
            assert await leaving.gone() == 0
            took = time.monotonic() - asked
            cluster.forget(leaving)
            await cluster.start(postgres_url, VIDA_LEASE=LEASE)
            tolds = await load.finish()
            gap = max(told.gap for told in tolds)
            FIGURES.add(SUITE, {"cycles": 1, "turns at work when stopped": struck})
            FIGURES.most(SUITE, "longest stop, ms", round(took * 1000))
            FIGURES.most(SUITE, "longest gap, ms", round(gap * 1000))
            print(f"stopped in {took:.2f} s, longest gap {gap:.2f} s")
            assert struck, "the stop struck nobody"
            noticed += any(told.refusals for told in tolds)
            await judge(SUITE, postgres_url, cluster.addresses, tolds, draw, reasons=())
            assert took <= BUDGET + LAST_CALLS
            assert gap <= WORST_GAP
            FIGURES.progress(SUITE, restart, RESTARTS)
    finally:
        await load.aclose()
    assert noticed >= 0.8 * (RESTARTS - 1), "too few restarts were noticed by any client"


async def test_turns_without_text_are_handed_over_at_once(postgres_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE, "hand-over")
    leaving, peer = await asyncio.gather(*(cluster.start(postgres_url, VIDA_LEASE=LEASE) for _ in range(2)))
    cluster.hide(peer)
    speaking, silent = Told("ada", "words:70 pace:20"), Told("eve", "words:5 slow-start:2")
    chats = [asyncio.create_task(Client(cluster, draw).chat(told)) for told in (speaking, silent)]
    await until(lambda: speaking.text and silent.turn_id)
    cluster.addresses.append(peer.address)
    tables = Tables(postgres_url)
    asked = time.monotonic()
    leaving.ask_to_stop()
    while (await asyncio.to_thread(tables.turns, [silent.turn_id]))[silent.turn_id].turn["attempt"] != 2:
        assert time.monotonic() < asked + AT_ONCE, "the turn was not handed over at once"
    assert leaving.alive
    assert speaking.finished is None
    assert await leaving.gone() == 0
    await asyncio.gather(*chats)
    await judge(SUITE, postgres_url, cluster.addresses[1:], [speaking, silent], draw, reasons=())
    assert (speaking.turn.attempt, silent.turn.attempt) == (1, 2)
    assert silent.gap <= AT_ONCE + 2  # the reply itself takes two seconds to begin


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_a_stop_lets_running_turns_finish(database_url: str, cluster: Cluster, by: signal.Signals) -> None:
    draw = chance(SUITE, "alone")
    server = await cluster.start(database_url)
    speaking, silent = Told("ada", "words:20 pace:20"), Told("eve", "words:5 slow-start:1")
    chats = [asyncio.create_task(Client(cluster, draw).chat(told)) for told in (speaking, silent)]
    await until(lambda: speaking.text and silent.turn_id)
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch: Any = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        assert (await watch.read()).status == _SERVING
        server.ask_to_stop(by)
        while (await watch.read()).status == _SERVING:
            continue
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await AgentServiceStub(channel).SendMessage(
                api.SendMessageRequest(user_id="eve", content=[pb.ContentPart(text="Hello")])
            )
        assert (refusal.value.code(), why(refusal.value)) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    await asyncio.gather(*chats)
    assert await server.gone() == 0
    for told in (speaking, silent):
        assert (told.turn.state, told.cuts) == (pb.TURN_STATE_COMPLETED, [])


async def test_under_nohup_it_outlives_its_terminal(sqlite_url: str, cluster: Cluster) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = await cluster.start(sqlite_url)
    finally:
        signal.signal(signal.SIGHUP, before)
    server.ask_to_stop(signal.SIGHUP)
    told = Told("ada", "words:5 pace:20")
    await Client(cluster, chance(SUITE, "nohup")).chat(told)
    assert told.turn.state == pb.TURN_STATE_COMPLETED
    assert await server.terminate() == 0


@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_the_end_of_the_grace(database_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE, "grace")
    server = await cluster.start(database_url, VIDA_DRAIN="0.5")
    told = Told("ada", "words:100 pace:20")
    chat = asyncio.create_task(Client(cluster, draw).chat(told))
    await until(lambda: told.text)
    asked = time.monotonic()
    assert await server.terminate() == 0
    assert time.monotonic() - asked <= 0.5 + LAST_CALLS
    cluster.forget(server)
    await cluster.start(database_url)
    await chat
    assert (told.turn.state, told.turn.error.reason) == (pb.TURN_STATE_INCOMPLETE, "INTERRUPTED")
    await judge(SUITE, database_url, cluster.addresses, [told], draw)
