"""Clients that mean harm: whatever they send, nobody else's call fails, and nothing of them stays."""

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from faults.client import stubs
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, SIZE, chosen, sized
from faults.hostile import ATTACKS
from faults.process import attacked
from faults.scripted import expected
from harness import message, text_of, until

SUITE = "hostile clients"
MANY = sized("HOSTILE_DEEDS", 2_000, 20_000, 200_000)
COUNTS = {
    "header_bombs": MANY // 100,
    "huge_messages": MANY // 100,
    "half_open": min(MANY // 20, 1_000),
    "stalled_readers": 50,
}
"""How often what is no small deed is done."""
LEAST_CALLS = 20
"""Calls of a bystander during an attack."""
MOST_MEMORY = 100
"""MiB that an attack may cost."""

pytestmark = pytest.mark.timeout(120 if SIZE != "large" else 900)


class Bystander:
    """Somebody who has been connected for a while, and goes on with what they do."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.calls = 0

    async def live(self, stop: asyncio.Event | None = None) -> None:
        """Chats, reads and asks after the service's health: once, or until told to stop. Nothing may fail."""
        async with stubs(self._address) as (agents, threads):
            while True:
                asked = f"words:5 {self.calls}"
                call = agents.Chat(message(asked, user="bea"), timeout=DEADLINE)
                events = [response.event async for response in call]
                assert text_of(events) == expected(asked)
                await threads.ListThreads(threads_api.ListThreadsRequest(user_id="bea"), timeout=DEADLINE)
                await agents.ListAgents(api.ListAgentsRequest(), timeout=DEADLINE)
                async with grpc.aio.insecure_channel(
                    self._address, options=[("grpc.use_local_subchannel_pool", 1)]
                ) as fresh:
                    health = health_pb2_grpc.HealthStub(fresh)
                    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                self.calls += 4
                if stop is None or stop.is_set():
                    return


@pytest.mark.parametrize("attack", chosen(list(ATTACKS), "rapid_resets"))
async def test_a_bystander_is_not_harmed(cluster: Cluster, attack: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'vida.db'}"
    server = await cluster.start(url)
    await Bystander(server.address).live()
    memory, before = server.memory, server.sockets
    warm, stop = Bystander(server.address), asyncio.Event()
    living = asyncio.create_task(warm.live(stop))
    await until(lambda: warm.calls or living.done())
    count = COUNTS.get(attack, MANY)
    async with attacked(server.address, attack, count) as done:
        assert done["deeds"] >= count * 0.99, f"the attack did not strike: {done}"
        during = warm.calls
        await until(lambda: warm.calls >= during + LEAST_CALLS or living.done())
        peak = server.memory
    stop.set()
    await living
    # What came with them goes with them, and who comes now is served.
    await until(lambda: server.sockets <= before)
    await Bystander(server.address).live()
    FIGURES.add(f"{SUITE}: {attack}", {**done, "calls of a bystander": warm.calls})
    FIGURES.most(f"{SUITE}: {attack}", "MiB more", max(0, peak - memory))
    assert peak - memory <= MOST_MEMORY
