"""A client of the tests' own, so that the product's is not its own judge: it retries, resumes, and remembers."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub
from faults.cluster import DEADLINE, Cluster
from harness import detail

TERMINAL = {pb.TURN_STATE_COMPLETED, pb.TURN_STATE_INCOMPLETE, pb.TURN_STATE_CANCELLED, pb.TURN_STATE_FAILED}

AGAIN = 0.1
"""Seconds before a message that was refused UNAVAILABLE is sent again."""
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 50)]


class BrokenPromise(AssertionError):
    """A client was told what it must never be told."""


@dataclass(eq=False)
class Told:
    """One message, and all that its sender was told of it."""

    user: str
    message: str
    thread_id: str = ""
    sent_to: str | None = None
    """The thread that the request names: none where it began a new one."""
    on_busy: "pb.BusyPolicy.ValueType" = pb.BUSY_POLICY_UNSPECIFIED
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turn_id: str = ""
    position: int = 0
    text: str = ""
    attempt: int = 1
    tools: list[str] = field(default_factory=list)
    finished: pb.TurnFinished | None = None
    cuts: list[int] = field(default_factory=list)
    """The positions at which a stream broke; 0: before anything was told."""
    gap: float = 0.0
    """The longest time in seconds from a break to the next event."""
    refusals: list[str] = field(default_factory=list)
    dropped: str = ""
    """Text that was taken back by restarts."""
    asked_to_end: str = ""
    """The reason for which it may end CANCELLED, because its sender asked for it."""

    def take(self, event: pb.TurnEvent) -> None:
        """Takes an event in. Raises BrokenPromise where it does not follow what was told before."""
        kind = event.WhichOneof("event")
        extent = len(event.text_delta.text) if kind == "text_delta" else 1
        if event.position != self.position + extent:
            raise BrokenPromise(f"position {event.position} after {self.position} and a {kind} of {extent}")
        if self.finished is not None:
            raise BrokenPromise(f"{kind} after finished")
        if (kind == "started") != (self.position == 0):
            raise BrokenPromise(f"{kind} at position {event.position}")
        self.position = event.position
        match kind:
            case "started":
                self.turn_id = event.started.turn_id
                if self.thread_id not in ("", event.started.thread_id):
                    raise BrokenPromise("started in another thread")
                self.thread_id = event.started.thread_id
            case "text_delta":
                self.text += event.text_delta.text
            case "tool_call":
                self.tools.append(event.tool_call.call_id)
            case "attempt_restarted":
                if event.attempt_restarted.attempt <= self.attempt:
                    raise BrokenPromise("an attempt that is not a new one")
                self.attempt = event.attempt_restarted.attempt
                self.dropped += self.text
                self.text = ""
            case "finished":
                self.finished = event.finished

    @property
    def turn(self) -> pb.Turn:
        """The ended turn, as told."""
        assert self.finished is not None
        return self.finished.turn


@asynccontextmanager
async def stubs(address: str) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of AgentService and ThreadService on a channel of their own."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        yield AgentServiceStub(channel), ThreadServiceStub(channel)


@dataclass(frozen=True)
class Way:
    """How clients reach the servers, and how they are told that it broke."""

    stubs: Callable[[str], AbstractAsyncContextManager[tuple[Any, Any]]] = stubs
    broken: frozenset[grpc.StatusCode] = frozenset()
    """Codes that mean so where they come without a reason. UNAVAILABLE always does."""

    def broke(self, error: grpc.aio.AioRpcError) -> bool:
        """Whether it says that the way broke, or that the service can't be asked now."""
        code = error.code()
        nameless = detail(error, error_details_pb2.ErrorInfo) is None
        return code is grpc.StatusCode.UNAVAILABLE or (code in self.broken and nameless)


def why(error: grpc.aio.AioRpcError) -> str:
    """The machine-readable reason of an error; of one that is not the product's, the code's name."""
    info = detail(error, error_details_pb2.ErrorInfo)
    return str(info.reason) if info is not None else error.code().name


STRAIGHT = Way()


class Client:
    """Talks to whichever server of a cluster answers. One message at a time."""

    def __init__(
        self,
        cluster: Cluster,
        chance: random.Random,
        *,
        at: str = "",
        call_timeout: float = DEADLINE,
        way: Way = STRAIGHT,
    ) -> None:
        """With `at` it stays with that address.

        A call that is not over after `call_timeout` seconds is given up and resumed, as if it had broken.
        """
        self._cluster = cluster
        self._at = at
        self._chance = chance
        self._call_timeout = call_timeout
        self._way = way
        self.address = ""

    async def chat(self, told: Told) -> Told:
        """Sends a message and stays with its turn to the end: repeats until it is acknowledged, then resumes.

        Raises AioRpcError for a refusal that is not UNAVAILABLE, and BrokenPromise.
        """
        async with asyncio.timeout(DEADLINE):
            while told.finished is None:
                self.address = self._at or self._cluster.another(self.address, self._chance)
                if self.address:
                    await self._once(told)
                else:
                    await self._back_off()
        return told

    async def _once(self, told: Told) -> None:
        broken_at = time.monotonic() if told.cuts else None
        async with self._way.stubs(self.address) as (agents, _):
            if told.turn_id:
                call = agents.FollowTurn(
                    api.FollowTurnRequest(user_id=told.user, turn_id=told.turn_id, after_position=told.position),
                    timeout=self._call_timeout,
                )
            else:
                call = agents.Chat(chat_request(told), timeout=self._call_timeout)
            try:
                async for response in call:
                    if broken_at is not None:
                        told.gap = max(told.gap, time.monotonic() - broken_at)
                        broken_at = None
                    told.take(response.event)
            except grpc.aio.AioRpcError as error:
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if not self._way.broke(error) and not (late and self._call_timeout < DEADLINE):
                    raise
                told.refusals.append(why(error))
                if told.finished is not None:
                    return  # the connection broke between the last event and the status
                told.cuts.append(told.position)
                await self._back_off()
            else:
                if told.finished is None:
                    raise BrokenPromise("a stream ended OK without its last event")

    async def _back_off(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.01, 0.1))


def chat_request(told: Told) -> api.ChatRequest:
    """The request that sends a message, the same each time."""
    if told.sent_to is None:
        told.sent_to = told.thread_id
    return api.ChatRequest(
        user_id=told.user,
        thread_id=told.sent_to,
        content=[pb.ContentPart(text=told.message)],
        request_id=told.request_id,
        on_busy=told.on_busy,
    )


async def insist(agents: Any, request: api.SendMessageRequest) -> api.SendMessageResponse:
    """Sends a message, again and again while it is refused UNAVAILABLE. Raises AioRpcError."""
    request.request_id = request.request_id or uuid.uuid4().hex
    until = time.monotonic() + DEADLINE
    while True:
        try:
            answer: api.SendMessageResponse = await agents.SendMessage(request, timeout=DEADLINE)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                raise
            await asyncio.sleep(AGAIN)
        else:
            return answer


async def follow(address: str, told: Told, after: int) -> list[pb.TurnEvent]:
    """Follows a turn from a position to its end; from there again where that is refused UNAVAILABLE."""
    until = time.monotonic() + DEADLINE
    async with stubs(address) as (agents, _):
        request = api.FollowTurnRequest(user_id=told.user, turn_id=told.turn_id, after_position=after)
        while True:
            try:
                return [response.event async for response in agents.FollowTurn(request, timeout=DEADLINE)]
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise
                await asyncio.sleep(AGAIN)
