"""What one would write first: grpc.aio, the SDK's typed stream, one message for each delta. It keeps nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceServicer
from speed.references.serving import client, serve
from speed.upstream import MODEL


class Naive(AgentServiceServicer):
    """Relays."""

    def __init__(self) -> None:
        self._client = client()

    async def Chat(self, request: api.ChatRequest, _: object) -> AsyncIterator[api.ChatResponse]:  # noqa: N802
        """The model's deltas, one by one."""
        position = 0
        words = request.content[0].text
        async with await self._client.responses.create(model=MODEL, input=words, stream=True) as events:
            async for event in events:
                if event.type == "response.output_text.delta":
                    position += len(event.delta)
                    piece = pb.TurnEvent(position=position, text_delta=pb.TextDelta(text=event.delta))
                    yield api.ChatResponse(event=piece)


async def main() -> None:
    """Serves."""
    await serve(Naive())


if __name__ == "__main__":
    asyncio.run(main())
