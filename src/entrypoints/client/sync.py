"""The synchronous client."""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from entrypoints.client.errors import ServiceError
from entrypoints.client.requests import Requests
from entrypoints.client.rules import STREAM_SECONDS, Event, Patience, Reading, Repeats, StreamRequest
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub

R = TypeVar("R")


class Reply:
    """The events of one turn, once, in order, to `TurnFinished`. Use as a context manager.

    `turn_id` and `thread_id` are known from the first event on. Leaving the context, or `close`, stops reading
    and nothing else: the turn goes on without its reader. `cancel` ends the turn. Both may be called from any
    thread while another one iterates.

    Iterating raises ServiceError if the service refuses the message or the thread is deleted meanwhile, and
    ConnectionLost.
    """

    def __init__(self, client: "CoachClient", reading: Reading) -> None:
        self._client = client
        self._reading = reading
        self._call: Any = None
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._events = self._read()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def close(self) -> None:
        """Stops reading."""
        self._closed.set()
        self._woken.set()
        if self._call is not None:
            self._call.cancel()

    def cancel(self) -> None:
        """Ends the turn, keeping its partial text; iterate on to read how it ended.

        If the turn is not known yet, it is ended once it is, and a message that can't be delivered is given up.
        Raises ServiceError.
        """
        self._reading.cancelling = True
        if self.turn_id:
            self._client.cancel(self.turn_id)
        else:
            self._woken.set()

    def _read(self) -> Generator[Event, None, None]:
        reading, clock = self._reading, self._client.clock
        while not self._closed.is_set():
            error = None
            try:
                for response in self._stream():
                    event = reading.take(response)
                    if isinstance(event, pb.TurnStarted):
                        self._woken.clear()
                    if event is not None:
                        yield event
                    if isinstance(event, pb.TurnStarted) and reading.cancelling:
                        self._client.cancel(reading.turn_id)
                    if reading.finished:
                        return
            except grpc.RpcError as failure:
                error = ServiceError.of(failure)
            if self._closed.is_set():
                return
            resuming = reading.ended(error, clock())
            yield resuming
            self._woken.wait(resuming.wait)

    def _stream(self) -> Iterator[Any]:
        self._call = self._client.open(self._reading.request(self._client.clock()))
        try:
            if not self._closed.is_set():  # else: closed between the look at it and the call
                yield from self._call
        finally:
            self._call.cancel()


class CoachClient:
    """Talks to the service for one user. Every method may raise ServiceError; none of them waits for ever.

    Works on any synchronous channel; see `connect` for the options that make resuming quick.
    `token` is asked before every call for the user's token, for services that want one.
    """

    def __init__(
        self,
        channel: grpc.Channel,
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
    ) -> Reply:
        """Sends a message when the reply is iterated. Without a thread it begins one about `domain`.

        `on_busy` says what to do if the thread has a turn that has not ended. `request_id` is for a message that
        is sent again after ConnectionLost; each other gets one of its own. `attachments` are images and files;
        beside them `text` may be empty.
        """
        message = self._requests.chat(text, thread_id, domain, request_id, on_busy, attachments)
        return Reply(self, Reading(self.patience, self._requests.follow, message=message))

    def follow(self, turn_id: str, after_position: int = 0) -> Reply:
        """Reads a turn that was begun before: what follows the position."""
        reading = Reading(self.patience, self._requests.follow, turn_id=turn_id, position=after_position)
        return Reply(self, reading)

    def open(self, request: StreamRequest) -> Any:
        """One bare stream: `say` and `follow` are what resumes."""
        how: dict[str, Any] = {"timeout": self._stream_seconds, "metadata": self._requests.metadata()}
        if isinstance(request, agents_api.ChatRequest):
            return self._agents.Chat(request, **how)
        return self._agents.FollowTurn(request, **how)

    def cancel(self, turn_id: str) -> pb.Turn:
        """Ends a turn; returns it as it ended."""
        return self._ask(self._agents.CancelTurn, self._requests.cancel(turn_id)).turn

    def agents(self) -> list[pb.Agent]:
        """The coaches on offer."""
        return list(self._ask(self._agents.ListAgents, agents_api.ListAgentsRequest()).agents)

    def thread(self, thread_id: str) -> pb.Thread:
        """One thread."""
        return self._ask(self._threads.GetThread, self._requests.thread(thread_id)).thread

    def threads(self, page_size: int = 0) -> tuple[list[pb.Thread], bool]:
        """The threads with the newest messages, expired ones included, and whether there are more."""
        response = self._ask(self._threads.ListThreads, self._requests.threads(page_size))
        return list(response.threads), bool(response.next_page_token)

    def messages(self, thread_id: str, page_size: int = 0, *, newest_first: bool = False) -> Iterator[pb.Message]:
        """Every message of a thread, read page by page."""
        request = self._requests.messages(thread_id, page_size, newest_first)
        while True:
            response = self._ask(self._threads.ListMessages, request)
            yield from response.messages
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def delete_thread(self, thread_id: str) -> None:
        """Deletes a thread for good, with everything in it."""
        repeats = Repeats(self.patience, self.clock())
        try:
            self._ask(self._threads.DeleteThread, self._requests.delete(thread_id), repeats)
        except ServiceError as error:
            if not repeats.found_gone(error):
                raise

    def _ask(self, method: Callable[..., R], request: Any, repeats: Repeats | None = None) -> R:
        """A unary call that may safely be repeated, as all of these may, within one deadline."""
        repeats = repeats or Repeats(self.patience, self.clock())
        while True:
            try:
                seconds = repeats.seconds_left(self.clock())
                return method(request, timeout=seconds, metadata=self._requests.metadata())
            except grpc.RpcError as failure:
                wait = repeats.wait(ServiceError.of(failure), self.clock())
            time.sleep(wait)
