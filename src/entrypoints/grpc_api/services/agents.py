"""AgentService."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc

from core.model.agent import Catalog
from core.model.errors import Overloaded
from core.model.events import LogEntry, TurnFinished
from core.model.trail import on_turn
from core.model.user import check_user_id
from core.ports.agent import Agent
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.cancel_turn import CancelTurn
from core.use_cases.follow_turn import FollowTurn
from core.use_cases.places import Places
from core.use_cases.read_threads import ReadThreads
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.call import Call
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceServicer

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Streams:
    """Bounds on what followers may hold: places, and for how many seconds each may stay.

    A place is taken before anything is accepted. Where there is none it raises what `Places` says; who has stayed
    too long is told Overloaded, and may resume.
    """

    def __init__(self, places: Places, seconds: float) -> None:
        self._places = places
        self._seconds = seconds

    @property
    def open(self) -> int:
        """How many there are."""
        return self._places.taken

    @contextmanager
    def place(self, user_id: str) -> Iterator[None]:
        """Takes a place for one stream of a user."""
        if (refusal := self._places.refusal(user_id)) is not None:
            raise refusal
        self._places.take(user_id)
        try:
            yield
        finally:
            self._places.give_back(user_id)

    async def send(
        self,
        follow: FollowTurn,
        turn_id: str,
        after_position: int,
        write: Callable[[LogEntry], Any],
    ) -> None:
        """Writes a turn's events to the end, in a place taken before."""
        try:
            async with (
                asyncio.timeout(self._seconds) as bound,
                aclosing(follow.events(turn_id, after_position)) as log,
            ):
                async for entry in log:
                    await write(entry)
        except TimeoutError:
            if not bound.expired():
                raise
            raise Overloaded from None


class AgentService(AgentServiceServicer):
    """Talk to a coach."""

    def __init__(
        self,
        *,
        accept: AcceptMessage,
        follow: FollowTurn,
        cancel: CancelTurn,
        threads: ReadThreads,
        catalog: Catalog,
        agent: Agent,
        streams: Streams,
    ) -> None:
        self._accept = accept
        self._follow = follow
        self._cancel = cancel
        self._threads = threads
        self._catalog = catalog
        self._agent = agent
        self._streams = streams

    async def ListAgents(self, request: api.ListAgentsRequest, context: _Context) -> api.ListAgentsResponse:
        """Lists the agents on offer."""
        agents = [
            mapping.to_agent(definition, self._agent.model(definition), self._agent.provider)
            for definition in self._catalog.agents()
        ]
        return api.ListAgentsResponse(agents=agents)

    # A coroutine that writes, where the stub's type expects a generator: a generator that waits in a `yield`
    # for a slow client is closed from another task, and no time limit can be set on it.
    async def Chat(self, request: api.ChatRequest, context: Call) -> None:  # type: ignore[override]
        """Accept, then follow from 0."""
        with self._streams.place(request.user_id):
            accepted = await self._accept(mapping.incoming_message(request, context.caller))
            on_turn(accepted.turn)

            send = context.write  # looked up once, not for every piece

            async def write(entry: LogEntry) -> None:
                await send(api.ChatResponse(event=mapping.to_event(entry), attached=accepted.attached))

            await self._streams.send(self._follow, accepted.turn.id, 0, write)

    async def SendMessage(  # type: ignore[override] # it needs to know its caller
        self, request: api.SendMessageRequest, context: Call
    ) -> api.SendMessageResponse:
        """Accept, then follow to the end without a word."""
        with self._streams.place(request.user_id):
            accepted = await self._accept(mapping.incoming_message(request, context.caller))
            on_turn(accepted.turn)
            response = api.SendMessageResponse(attached=accepted.attached)

            async def keep(entry: LogEntry) -> None:
                if isinstance(entry.event, TurnFinished):
                    response.turn.CopyFrom(mapping.to_turn(entry.event.turn))
                    if entry.event.reply is not None:
                        response.reply.CopyFrom(mapping.to_message(entry.event.reply))

            await self._streams.send(self._follow, accepted.turn.id, 0, keep)
            return response

    async def FollowTurn(self, request: api.FollowTurnRequest, context: _Context) -> None:  # type: ignore[override]
        """Replay, then live."""
        check_user_id(request.user_id)
        turn_id = mapping.id_of(request.turn_id, "turn_id")
        on_turn(await self._follow.find(request.user_id, turn_id, request.after_position))

        send = context.write

        async def write(entry: LogEntry) -> None:
            await send(api.FollowTurnResponse(event=mapping.to_event(entry)))

        with self._streams.place(request.user_id):
            await self._streams.send(self._follow, turn_id, request.after_position, write)

    async def GetTurn(self, request: api.GetTurnRequest, context: _Context) -> api.GetTurnResponse:
        """Reads a turn."""
        check_user_id(request.user_id)
        turn_id = mapping.id_of(request.turn_id, "turn_id")
        turn, reply = await self._threads.turn(request.user_id, turn_id)
        return api.GetTurnResponse(turn=mapping.to_turn(turn), reply=mapping.to_message(reply) if reply else None)

    async def CancelTurn(self, request: api.CancelTurnRequest, context: _Context) -> api.CancelTurnResponse:
        """Ends a turn."""
        check_user_id(request.user_id)
        turn_id = mapping.id_of(request.turn_id, "turn_id")
        return api.CancelTurnResponse(turn=mapping.to_turn(await self._cancel(request.user_id, turn_id)))
