"""A service too busy to pick calls up: they wait as long as their callers do."""

import asyncio
import threading
import time
from collections import Counter

import grpc
import pytest

from entrypoints.grpc_api import server
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from harness import served

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
