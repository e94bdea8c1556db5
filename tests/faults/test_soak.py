"""Very many turns, one after another: what each of them took is given back."""

import asyncio
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from faults.client import insist, stubs
from faults.cluster import Cluster
from faults.figures import FIGURES, sized
from faults.scripted import expected
from harness import until

SUITE = "soak"
TURNS = sized("SOAK_TURNS", 200, 2_000, 100_000)
SENDERS = 32
TURNS_OF_A_THREAD = 10
SPREAD = 16
"""MiB that a process may hold after all turns more than after the first half of them."""

pytestmark = pytest.mark.timeout(120 + TURNS // 50)


async def test_what_turns_take_is_given_back(cluster: Cluster, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'vida.db'}"
    server = await cluster.start(url, VIDA_MAX_TURNS_PER_USER="100")
    numbers = count(1)
    held: dict[int, int] = {}

    async def send(sender: int, agents: Any, threads: Any) -> None:
        """Talks in thread after thread, and deletes each."""
        user, thread_id, asked = f"ada{sender}", "", 0
        while (number := next(numbers)) <= TURNS:
            text = f"words:5 {number}"
            content = [pb.ContentPart(text=text)]
            request = api.SendMessageRequest(user_id=user, thread_id=thread_id, content=content)
            answer = await insist(agents, request)
            assert answer.turn.state == pb.TURN_STATE_COMPLETED
            assert answer.reply.content[0].text == expected(text)
            thread_id, asked = answer.turn.thread_id, asked + 1
            if asked == TURNS_OF_A_THREAD:
                await threads.DeleteThread(threads_api.DeleteThreadRequest(user_id=user, thread_id=thread_id))
                thread_id, asked = "", 0
            if number in (TURNS // 2, TURNS):
                held[number] = server.memory
            FIGURES.progress(SUITE, number, TURNS)

    async with stubs(server.address) as (agents, threads):
        before = server.sockets
        await asyncio.gather(*(send(sender, agents, threads) for sender in range(SENDERS)))
        assert server.sockets <= before + 1  # the connection itself
    await until(lambda: server.sockets < before + 1)
    FIGURES.add(SUITE, {"acknowledged turns": TURNS, **{f"MiB after {n}": at for n, at in held.items()}})
    assert held[TURNS] <= held[TURNS // 2] + SPREAD
    assert await server.terminate() == 0
