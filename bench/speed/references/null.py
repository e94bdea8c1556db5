"""The least that a stream costs in grpc.aio: the service's own API, and nothing behind it.

It answers with as many deltas as the message says, at its pace, each with the time of its sending; at pace 0 as
fast as they are taken, without it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceServicer
from speed.references.serving import serve
from speed.upstream import PIECE


class Null(AgentServiceServicer):
    """Sends a constant text."""

    async def Chat(self, request: api.ChatRequest, _: object) -> AsyncIterator[api.ChatResponse]:  # noqa: N802
        """The deltas, each by itself."""
        words = request.content[0].text.split()
        deltas, pace = int(words[0]), float(words[1])
        loop = asyncio.get_running_loop()
        due = loop.time()
        for number in range(deltas):
            if pace:
                await asyncio.sleep(max(0.0, due - loop.time()))
                due += 1 / pace
                text = f"{time.monotonic_ns():020d} {PIECE}"
            else:
                text = PIECE
            event = pb.TurnEvent(position=number + 1, text_delta=pb.TextDelta(text=text))
            yield api.ChatResponse(event=event)


if __name__ == "__main__":
    asyncio.run(serve(Null()))
