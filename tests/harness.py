"""The real service on real sockets, in this process, for tests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from dependency_injector import providers
from google.rpc import error_details_pb2, status_pb2

from core.ports.agent import Agent
from core.ports.tools import Tools
from doubles import CATALOG, NotedTools
from entrypoints.container import Container
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
from entrypoints.hosting import hosted
from entrypoints.settings import load_settings

D = TypeVar("D")

DEADLINE = 20.0


@dataclass
class Client:
    """Stubs on one channel."""

    channel: grpc.aio.Channel
    agents: Any  # the asynchronous form of AgentServiceStub
    threads: Any
    users: Any
    address: str
    container: Container

    async def chat(self, text: str = "Hello", user: str = "ada", **more: object) -> list[api.ChatResponse]:
        """Chats to the end of the stream."""
        return [response async for response in self.agents.Chat(message(text, user, **more), timeout=DEADLINE)]

    async def follow(self, turn_id: str, after: int = 0, user: str = "ada") -> list[pb.TurnEvent]:
        """Follows to the end of the stream."""
        request = api.FollowTurnRequest(user_id=user, turn_id=turn_id, after_position=after)
        return [response.event async for response in self.agents.FollowTurn(request, timeout=DEADLINE)]


def message(text: str = "Hello", user: str = "ada", **more: object) -> api.ChatRequest:
    """A message of one text part."""
    return api.ChatRequest(user_id=user, content=[pb.ContentPart(text=text)], **more)  # type: ignore[arg-type]


def text_of(events: list[pb.TurnEvent]) -> str:
    """The concatenated text."""
    return "".join(event.text_delta.text for event in events)


@asynccontextmanager
async def served(agent: Agent | None = None, tools: Tools | None = None) -> AsyncIterator[Client]:
    """The service as `serve` runs it, with the settings of the environment; a test may bring its own agent.

    That comes with the tools and the catalog of the doubles.
    """
    overridden: list[Any] = []
    if agent is not None:
        doubles: dict[Any, object] = {
            Container.agent: agent,
            Container.tools: tools or NotedTools(),
            Container.catalog: CATALOG,
        }
        for provider, double in doubles.items():
            provider.override(providers.Object(double))
            overridden.append(provider)
    try:
        async with hosted(load_settings(), "serve", listen="127.0.0.1:0") as (container, address):
            assert address is not None
            async with grpc.aio.insecure_channel(address) as channel:
                stubs = AgentServiceStub(channel), ThreadServiceStub(channel), UserServiceStub(channel)
                yield Client(channel, *stubs, address, container)
    finally:
        for provider in overridden:
            provider.reset_override()


def detail(error: grpc.aio.AioRpcError, kind: type[D]) -> D | None:
    """A typed detail of an error."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            for packed in status_pb2.Status.FromString(value).details:
                found = kind()
                if packed.Unpack(found):
                    return found
    return None


def reason(error: grpc.aio.AioRpcError) -> str:
    """The machine-readable reason of an error."""
    info = detail(error, error_details_pb2.ErrorInfo)
    assert info is not None
    assert info.domain == "agents.vidacoach"
    return str(info.reason)


async def until(condition: Any) -> None:
    """Waits for a state, looking at it between other tasks' steps. The test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - what is waited for is no event of ours
        await asyncio.sleep(0.001)


async def rest_of(call: Any) -> list[Any]:
    """What is left of a stream from which `read` has been called."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses
