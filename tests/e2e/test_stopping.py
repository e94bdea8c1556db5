"""A service that stops in a storm of calls: nobody is told that they had asked for it themselves."""

import asyncio
from collections import Counter

import grpc
import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from harness import served, until

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
