"""kill -9 of real servers under clients: nothing acknowledged is lost, every turn ends, nobody is blocked."""

import asyncio

import pytest

from faults.checker import go_on, judge
from faults.cluster import Cluster
from faults.figures import FIGURES, chance, sized
from faults.load import CLIENTS, Load

SQLITE_CYCLES = sized("KILL_CYCLES", 2, 20, 1_000)
POSTGRESQL_CYCLES = sized("POSTGRESQL_KILL_CYCLES", 1, 20, 500)
REPLICA_CYCLES = sized("REPLICA_KILL_CYCLES", 1, 20, 500)

pytestmark = pytest.mark.timeout(60 + 30 * SQLITE_CYCLES)


async def _kill_and_check(suite: str, cluster: Cluster, database_url: str, servers: int, cycles: int) -> None:
    draw = chance(suite)
    await asyncio.gather(*(cluster.start(database_url) for _ in range(servers)))
    load = Load(suite, cluster, draw)
    cut = 0
    try:
        for cycle in range(1, cycles + 1):
            load.begin()
            await load.acknowledged(draw.randrange(CLIENTS, 3 * CLIENTS))
            await asyncio.sleep(draw.uniform(0, 0.2))  # any moment
            await cluster.kill(draw.choice(cluster.servers))
            struck = len(load.unfinished)
            await cluster.start(database_url)
            tolds = await load.finish()
            assert len(tolds) >= CLIENTS, "too little happened for this test to mean anything"
            assert struck, "the kill struck nobody"
            cut += any(told.cuts for told in tolds)
            await judge(suite, database_url, cluster.addresses, tolds, draw)
            await go_on(cluster.addresses[-1], tolds)
            FIGURES.add(suite, {"cycles": 1, "turns at work when killed": struck})
            FIGURES.progress(suite, cycle, cycles)
    finally:
        await load.aclose()
    assert cut >= 0.9 * cycles, "too few kills cut a stream"
    for server in cluster.servers:
        assert await server.terminate() == 0


async def test_kill_9(database_url: str, cluster: Cluster) -> None:
    cycles = SQLITE_CYCLES if database_url.startswith("sqlite") else POSTGRESQL_CYCLES
    await _kill_and_check(f"kill -9, {database_url.partition(':')[0]}", cluster, database_url, 1, cycles)


async def test_kill_9_of_one_of_two_replicas(postgres_url: str, cluster: Cluster) -> None:
    await _kill_and_check("kill -9, two replicas", cluster, postgres_url, 2, REPLICA_CYCLES)
