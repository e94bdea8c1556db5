"""A small synchronous client: sends a message, reads its reply to the end across lost connections.

    with connect("127.0.0.1:50051") as channel:
        client = CoachClient(channel, user_id="ada")
        with client.say("I feel stuck in my job", domain=pb.DOMAIN_CAREER) as reply:
            for event in reply:
                match event:
                    case pb.TextDelta():
                        print(event.text, end="", flush=True)
                    case pb.AttemptRestarted():
                        print("\\n(starting over)")  # what was shown of this reply is void
                    case pb.TurnFinished():
                        print("\\n", pb.TurnState.Name(event.turn.state))

What it does that a bare stub leaves to you: a deadline on every unary call; `cancel()` of the stream on the way
out, so that no call outlives its reader; one request id per message, so that a repeated send never makes a second
turn; and after UNAVAILABLE, with backoff and jitter, `FollowTurn` from the last position, so that no text is lost
or shown twice. `pb` is `entrypoints.grpc_api.gen.vidacoach.agents.v1.resources_pb2`.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import ThreadServiceStub

R = TypeVar("R")

UNARY_SECONDS = 10.0
"""Deadline of a unary call, with its repeats."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A peer that is gone without a word is noticed within 25 s. The service allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    # The library's own backoff grows to two minutes, in which every call fails without an attempt.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.max_receive_message_length", 32 * 2**20),
)


def connect(target: str, *options: tuple[str, int]) -> grpc.Channel:
    """A channel to `HOST:PORT` or `unix:PATH` that finds a restarted service soon. Use as a context manager."""
    return grpc.insecure_channel(target, options=[*CHANNEL_OPTIONS, *options])


def is_serving(channel: grpc.Channel, seconds: float) -> bool:
    """Whether the service answers a health check with SERVING in this time."""
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True)
class Patience:
    """How long a lost connection is tried again: for `seconds` without a single event, ever more rarely."""

    seconds: float = 60.0
    first_wait: float = 0.1
    longest_wait: float = 5.0

    def wait(self, failures: int, at_least: float) -> float:
        """Seconds before the next try after so many failures in a row, never fewer than the service asks for."""
        wait = min(self.longest_wait, self.first_wait * 2.0 ** min(failures, 32))
        return max(at_least, wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret


class ServiceError(Exception):
    """The service did not do what it was asked. Its text is for people.

    `reason` is the API's machine-readable reason, empty where the status carries none; `facts` are the ids that
    come with it; `violations` are pairs of a request's field and what is wrong with it; `retry_after` is 0 where
    the service names no time.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        facts: dict[str, str] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
        retry_after: float = 0.0,
        request_id: str = "",
    ) -> None:
        sentences = [message or "The call failed.", *(f"{name}: {problem}." for name, problem in violations)]
        if request_id:
            sentences.append(f"The service's log knows it as request {request_id}.")
        super().__init__(f"{' '.join(sentences)} [{reason or code.name}]")
        self.code = code
        self.message = message
        self.reason = reason
        self.facts = facts or {}
        self.violations = violations
        self.retry_after = retry_after
        self.request_id = request_id

    @classmethod
    def of(cls, error: grpc.RpcError) -> "ServiceError":
        """Reads a status and its details."""
        found: dict[str, Any] = {}
        for packed in _details(error):
            info = error_details_pb2.ErrorInfo()
            bad = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            request = error_details_pb2.RequestInfo()
            if packed.Unpack(info):
                found.update(reason=info.reason, facts=dict(info.metadata))
            elif packed.Unpack(bad):
                found["violations"] = tuple((one.field, one.description) for one in bad.field_violations)
            elif packed.Unpack(retry):
                found["retry_after"] = retry.retry_delay.ToMilliseconds() / 1_000
            elif packed.Unpack(request):
                found["request_id"] = request.request_id
        return cls(error.code(), error.details() or "", **found)


class ConnectionLost(ServiceError):
    """The service did not come back in time.

    With a `turn_id` the message is safe and its turn goes on: `CoachClient.follow` reads the rest. Without one it
    is unknown whether the message arrived; sent again with the same `request_id` it can't be doubled.
    """

    def __init__(self, cause: ServiceError, turn_id: str, request_id: str) -> None:
        super().__init__(cause.code, cause.message, reason=cause.reason)
        self.turn_id = turn_id
        self.request_id = request_id


@dataclass(frozen=True)
class Resuming:
    """Not an event of the turn: the connection is lost, and is tried again in `wait` seconds."""

    cause: ServiceError
    wait: float


Event: TypeAlias = (
    pb.TurnStarted | pb.TextDelta | pb.ToolCall | pb.ToolResult | pb.AttemptRestarted | pb.TurnFinished | Resuming
)
_Open: TypeAlias = Callable[[], Iterator[Any]]


class Reply:
    """The events of one turn, once, in order, to `TurnFinished`. Use as a context manager.

    `turn_id` and `thread_id` are known from the first event on. Leaving the context, or `close`, stops reading
    and nothing else: the turn goes on without its reader. `cancel` ends the turn. Both may be called from any
    thread while another one iterates.

    Iterating raises ServiceError if the service refuses the message, and ConnectionLost.
    """

    def __init__(
        self,
        client: "CoachClient",
        send: _Open | None,
        *,
        turn_id: str = "",
        position: int = 0,
        request_id: str = "",
    ) -> None:
        self._client = client
        self._send = send
        self._call: Any = None
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._cancelling = False
        self._events = self._read()
        self.turn_id = turn_id
        self.thread_id = ""
        self.position = position
        self.request_id = request_id

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
        self._cancelling = True
        if self.turn_id:
            self._client.cancel(self.turn_id)
        else:
            self._woken.set()

    def _read(self) -> Generator[Event, None, None]:
        patience, clock = self._client.patience, self._client.clock
        failures = 0
        give_up = 0.0
        while not self._closed.is_set():
            try:
                for response in self._stream():
                    failures = 0
                    self.position = response.event.position
                    yield from self._event(response.event)
                    if response.event.HasField("finished"):
                        return
                cause = ServiceError(grpc.StatusCode.UNAVAILABLE, "The stream ended before the turn did.")
            except grpc.RpcError as error:
                if self._closed.is_set():
                    return
                cause = ServiceError.of(error)
                if cause.code is not grpc.StatusCode.UNAVAILABLE:
                    raise cause from error
            now = clock()
            if not failures:
                give_up = now + patience.seconds
            wait = patience.wait(failures, cause.retry_after)
            undelivered = not self.turn_id and self._cancelling
            if undelivered or now + wait > give_up:
                raise ConnectionLost(cause, self.turn_id, self.request_id)
            failures += 1
            yield Resuming(cause, wait)
            self._woken.wait(wait)

    def _stream(self) -> Iterator[Any]:
        """What follows the last position; the message itself as long as no turn is known."""
        if self._send is not None and not self.turn_id:
            self._call = self._send()
        else:
            self._call = self._client.open(self.turn_id, self.position)
        try:
            if not self._closed.is_set():  # else: closed between the look at it and the call
                yield from self._call
        finally:
            self._call.cancel()

    def _event(self, event: pb.TurnEvent) -> Iterator[Event]:
        match event.WhichOneof("event"):
            case "started":
                self.turn_id, self.thread_id = event.started.turn_id, event.started.thread_id
                self._woken.clear()
                yield event.started
                if self._cancelling:
                    self._client.cancel(self.turn_id)
            case "text_delta":
                yield event.text_delta
            case "tool_call":
                yield event.tool_call
            case "tool_result":
                yield event.tool_result
            case "attempt_restarted":
                yield event.attempt_restarted
            case "finished":
                yield event.finished
            case None:
                """An event of a later version. Its position counts, its meaning is not ours."""


class CoachClient:
    """Talks to the service for one user. Every method may raise ServiceError; none of them waits for ever.

    Works on any synchronous channel; see `connect` for the options that make resuming quick.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        user_id: str,
        *,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agents = AgentServiceStub(channel)
        self._threads = ThreadServiceStub(channel)
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
    ) -> Reply:
        """Sends a message when the reply is iterated. Without a thread it begins one about `domain`.

        `request_id` is for a message that is sent again after ConnectionLost; each other gets one of its own.
        """
        request = agents_api.ChatRequest(
            user_id=self.user_id,
            thread_id=thread_id,
            domain=domain,
            content=[pb.ContentPart(text=text)],
            request_id=request_id or str(uuid.uuid4()),
        )
        return Reply(self, lambda: self._agents.Chat(request), request_id=request.request_id)

    def follow(self, turn_id: str, after_position: int = 0) -> Reply:
        """Reads a turn that was begun before: what follows the position."""
        return Reply(self, None, turn_id=turn_id, position=after_position)

    def open(self, turn_id: str, after_position: int) -> Any:
        """The bare stream of a turn's events after a position: `follow` is what resumes."""
        request = agents_api.FollowTurnRequest(
            user_id=self.user_id, turn_id=turn_id, after_position=after_position
        )
        return self._agents.FollowTurn(request)

    def cancel(self, turn_id: str) -> pb.Turn:
        """Ends a turn; returns it as it ended."""
        request = agents_api.CancelTurnRequest(user_id=self.user_id, turn_id=turn_id)
        return self._ask(self._agents.CancelTurn, request).turn

    def agents(self) -> list[pb.Agent]:
        """The coaches on offer."""
        return list(self._ask(self._agents.ListAgents, agents_api.ListAgentsRequest()).agents)

    def thread(self, thread_id: str) -> pb.Thread:
        """One thread."""
        request = threads_api.GetThreadRequest(user_id=self.user_id, thread_id=thread_id)
        return self._ask(self._threads.GetThread, request).thread

    def threads(self, page_size: int = 0) -> tuple[list[pb.Thread], bool]:
        """The threads with the newest messages, expired ones included, and whether there are more."""
        request = threads_api.ListThreadsRequest(
            user_id=self.user_id,
            states=[pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE],
            page_size=page_size,
        )
        response = self._ask(self._threads.ListThreads, request)
        return list(response.threads), bool(response.next_page_token)

    def messages(self, thread_id: str, page_size: int = 0, *, newest_first: bool = False) -> Iterator[pb.Message]:
        """Every message of a thread, read page by page."""
        request = threads_api.ListMessagesRequest(
            user_id=self.user_id, thread_id=thread_id, newest_first=newest_first, page_size=page_size
        )
        while True:
            response = self._ask(self._threads.ListMessages, request)
            yield from response.messages
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def _ask(self, method: Callable[..., R], request: Any) -> R:
        """A unary call that may safely be repeated, as all of these may, within one deadline."""
        deadline = self.clock() + UNARY_SECONDS
        failures = 0
        while True:
            try:
                return method(request, timeout=max(0.001, deadline - self.clock()))
            except grpc.RpcError as error:
                cause = ServiceError.of(error)
                wait = self.patience.wait(failures, cause.retry_after)
                if cause.code is not grpc.StatusCode.UNAVAILABLE or self.clock() + wait >= deadline:
                    raise cause from error
            failures += 1
            time.sleep(wait)


def _details(error: grpc.RpcError) -> Iterator[Any]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status are no help
        return
    if status is not None:
        yield from status.details
