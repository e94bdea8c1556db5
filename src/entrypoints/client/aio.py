"""The client for asyncio: the same promises, the same rules."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from types import AsyncGeneratorType, TracebackType
from typing import Any, Self, TypeVar, cast

import grpc

from entrypoints.client.errors import ServiceError
from entrypoints.client.requests import Requests
from entrypoints.client.rules import STREAM_SECONDS, Event, Patience, Reading, Repeats, StreamRequest
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub

R = TypeVar("R")


class AsyncReply:
    """The events of one turn, once, in order, to `TurnFinished`. Use with `async with`.

    `turn_id` and `thread_id` are known from the first event on. Leaving the context, or `close`, stops reading
    and nothing else: the turn goes on without its reader. So does cancelling the task that reads. `cancel` ends
    the turn. Both may be called from any task of the loop while another one iterates.

    Iterating raises ServiceError if the service refuses the message or the thread is deleted meanwhile, and
    ConnectionLost.
    """

    def __init__(self, client: "AsyncCoachClient", reading: Reading) -> None:
        self._client = client
        self._reading = reading
        self._call: Any = None
        self._closed = False
        self._woken = asyncio.Event()
        self._events = cast("AsyncGeneratorType[Event, None]", self._read())

    @property
    def turn_id(self) -> str:
        """The turn, once it is known."""
        return self._reading.turn_id

    @property
    def thread_id(self) -> str:
        """Its thread, once it is known."""
        return self._reading.thread_id

    @property
    def position(self) -> int:
        """Position of the last event."""
        return self._reading.position

    @property
    def request_id(self) -> str:
        """What makes a repeat of the message attach to its turn."""
        return self._reading.request_id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if not self._events.ag_running:  # else: the task that iterates sees that it is closed
            await self._events.aclose()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    def close(self) -> None:
        """Stops reading."""
        self._closed = True
        self._woken.set()
        if self._call is not None:
            self._call.cancel()

    async def cancel(self) -> None:
        """Ends the turn, keeping its partial text; iterate on to read how it ended.

        If the turn is not known yet, it is ended once it is, and a message that can't be delivered is given up.
        Raises ServiceError.
        """
        self._reading.cancelling = True
        if self.turn_id:
            await self._client.cancel(self.turn_id)
        else:
            self._woken.set()

    async def _read(self) -> AsyncGenerator[Event, None]:
        reading, clock = self._reading, self._client.clock
        while not self._closed:
            error = None
            try:
                async with aclosing(self._stream()) as responses:
                    async for response in responses:
                        event = reading.take(response)
                        if isinstance(event, pb.TurnStarted):
                            self._woken.clear()
                        if event is not None:
                            yield event
                        if isinstance(event, pb.TurnStarted) and reading.cancelling:
                            await self._client.cancel(reading.turn_id)
                        if reading.finished:
                            return
            except asyncio.CancelledError as cancelled:
                if self._closed and not _is_being_cancelled():
                    return
                raise _meant(cancelled) from None
            except grpc.RpcError as failure:
                error = ServiceError.of(failure)
            if self._closed:
                return
            resuming = reading.ended(error, clock())
            yield resuming
            with suppress(TimeoutError):
                async with asyncio.timeout(resuming.wait):
                    await self._woken.wait()

    async def _stream(self) -> AsyncGenerator[Any, None]:
        self._call = call = self._client.open(self._reading.request(self._client.clock()))
        try:
            # Not `call.read()`: it forgets what has arrived once the call is over.
            async with aclosing(aiter(call)) as responses:
                async for response in responses:
                    yield response
        finally:
            call.cancel()  # the library need not collect one that is merely dropped


class AsyncCoachClient:
    """Talks to the service for one user. Every method may raise ServiceError; none of them waits for ever.

    Works on any channel of grpc.aio; see `connect_async` for the options that make resuming quick.
    `token` is asked before every call for the user's token, for services that want one; it must not wait.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        user_id: str,
        *,
        patience: Patience | None = None,
        stream_seconds: float = STREAM_SECONDS,
        token: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agents = AgentServiceStub(channel)
        self._threads = ThreadServiceStub(channel)
        self._requests = Requests(user_id, token)
        self._stream_seconds = stream_seconds
        self.user_id = user_id
        self.patience = patience or Patience()
        self.clock = clock

    def say(
        self,
        text: str,
        *,
        thread_id: str = "",
        domain: pb.Domain.ValueType = pb.DOMAIN_UNSPECIFIED,
        request_id: str = "",
        on_busy: pb.BusyPolicy.ValueType = pb.BUSY_POLICY_UNSPECIFIED,
        attachments: Iterable[pb.ContentPart] = (),
    ) -> AsyncReply:
        """Sends a message when the reply is iterated. Without a thread it begins one about `domain`.

        `on_busy` says what to do if the thread has a turn that has not ended. `request_id` is for a message that
        is sent again after ConnectionLost; each other gets one of its own. `attachments` are images and files;
        beside them `text` may be empty.
        """
        message = self._requests.chat(text, thread_id, domain, request_id, on_busy, attachments)
        return AsyncReply(self, Reading(self.patience, self._requests.follow, message=message))

    def follow(self, turn_id: str, after_position: int = 0) -> AsyncReply:
        """Reads a turn that was begun before: what follows the position."""
        reading = Reading(self.patience, self._requests.follow, turn_id=turn_id, position=after_position)
        return AsyncReply(self, reading)

    def open(self, request: StreamRequest) -> Any:
        """One bare stream: `say` and `follow` are what resumes."""
        how: dict[str, Any] = {"timeout": self._stream_seconds, "metadata": self._requests.metadata()}
        if isinstance(request, agents_api.ChatRequest):
            return self._agents.Chat(request, **how)
        return self._agents.FollowTurn(request, **how)

    async def cancel(self, turn_id: str) -> pb.Turn:
        """Ends a turn; returns it as it ended."""
        return (await self._ask(self._agents.CancelTurn, self._requests.cancel(turn_id))).turn

    async def agents(self) -> list[pb.Agent]:
        """The coaches on offer."""
        return list((await self._ask(self._agents.ListAgents, agents_api.ListAgentsRequest())).agents)

    async def thread(self, thread_id: str) -> pb.Thread:
        """One thread."""
        return (await self._ask(self._threads.GetThread, self._requests.thread(thread_id))).thread

    async def threads(self, page_size: int = 0) -> tuple[list[pb.Thread], bool]:
        """The threads with the newest messages, expired ones included, and whether there are more."""
        response = await self._ask(self._threads.ListThreads, self._requests.threads(page_size))
        return list(response.threads), bool(response.next_page_token)

    async def messages(
        self, thread_id: str, page_size: int = 0, *, newest_first: bool = False
    ) -> AsyncGenerator[pb.Message, None]:
        """Every message of a thread, read page by page."""
        request = self._requests.messages(thread_id, page_size, newest_first)
        while True:
            response = await self._ask(self._threads.ListMessages, request)
            for message in response.messages:
                yield message
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_thread(self, thread_id: str) -> None:
        """Deletes a thread for good, with everything in it."""
        repeats = Repeats(self.patience, self.clock())
        try:
            await self._ask(self._threads.DeleteThread, self._requests.delete(thread_id), repeats)
        except ServiceError as error:
            if not repeats.found_gone(error):
                raise

    async def _ask(self, method: Callable[..., Awaitable[R]], request: Any, repeats: Repeats | None = None) -> R:
        """A unary call that may safely be repeated, as all of these may, within one deadline."""
        repeats = repeats or Repeats(self.patience, self.clock())
        while True:
            try:
                seconds = repeats.seconds_left(self.clock())
                return await method(request, timeout=seconds, metadata=self._requests.metadata())
            except asyncio.CancelledError as cancelled:
                raise _meant(cancelled) from None
            except grpc.RpcError as failure:
                wait = repeats.wait(ServiceError.of(failure), self.clock())
            await asyncio.sleep(wait)


def _meant(cancelled: asyncio.CancelledError) -> BaseException:
    """What a cancellation means: the library raises it too, in tasks that nobody cancels, for a closed channel."""
    if _is_being_cancelled():
        return cancelled
    return ServiceError(grpc.StatusCode.CANCELLED, "The channel was closed.")


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
