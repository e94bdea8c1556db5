"""The rules of a patient client, without a call, a wait or a clock: what to send, and what to do when it fails."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from entrypoints.client.errors import ConnectionLost, ServiceError
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb

UNARY_SECONDS = 10.0
"""Deadline of a unary call, with its repeats."""
STREAM_SECONDS = 240.0
"""Deadline of one streaming call. A turn that takes longer is read by several."""


@dataclass(frozen=True)
class Patience:
    """How long a lost connection is tried again: for `seconds` without a single event, ever more rarely.

    A call that the service held open for that long was no lost connection, even if nothing happened in it.
    """

    seconds: float = 60.0
    first_wait: float = 0.1
    longest_wait: float = 5.0

    def wait(self, failures: int, at_least: float) -> float:
        """Seconds before the next try after so many failures in a row, never fewer than the service asks for."""
        wait = min(self.longest_wait, self.first_wait * 2.0 ** min(failures, 32))
        return max(at_least, wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret


@dataclass(frozen=True)
class Resuming:
    """Not an event of the turn: the connection is lost, and is tried again in `wait` seconds."""

    cause: ServiceError
    wait: float


Event: TypeAlias = (
    pb.TurnStarted | pb.TextDelta | pb.ToolCall | pb.ToolResult | pb.AttemptRestarted | pb.TurnFinished | Resuming
)
StreamRequest: TypeAlias = agents_api.ChatRequest | agents_api.FollowTurnRequest
StreamResponse: TypeAlias = agents_api.ChatResponse | agents_api.FollowTurnResponse


class Reading:
    """One turn, being read: what is known of it, and so what to send next.

    Whoever makes the calls asks `request`, gives every response to `take`, and where a stream ends before the
    turn has `finished` asks `ended` how long to wait before the next `request`. `now` is any clock in seconds.
    """

    def __init__(
        self,
        patience: Patience,
        follow: Callable[[str, int], agents_api.FollowTurnRequest],
        *,
        message: agents_api.ChatRequest | None = None,
        turn_id: str = "",
        position: int = 0,
    ) -> None:
        self._patience = patience
        self._follow = follow
        self._message = message
        self._opened = 0.0
        self._failures = 0
        self._give_up = 0.0
        self.turn_id = turn_id
        self.thread_id = ""
        self.position = position
        self.request_id = message.request_id if message is not None else ""
        self.cancelling = False
        self.finished = False

    def request(self, now: float) -> StreamRequest:
        """What follows the last position; the message itself as long as no turn is known."""
        self._opened = now
        if self._message is not None and not self.turn_id:
            return self._message
        return self._follow(self.turn_id, self.position)

    def take(self, response: StreamResponse) -> Event | None:
        """Notes a response and returns its event; None for one of a later version.

        The position of such an event counts, its meaning is not ours.
        """
        event = response.event
        self._failures = 0
        self.position = event.position
        match event.WhichOneof("event"):
            case "started":
                self.turn_id, self.thread_id = event.started.turn_id, event.started.thread_id
                return event.started
            case "text_delta":
                return event.text_delta
            case "tool_call":
                return event.tool_call
            case "tool_result":
                return event.tool_result
            case "attempt_restarted":
                return event.attempt_restarted
            case "finished":
                self.finished = True
                return event.finished
            case None:
                return None

    def ended(self, error: ServiceError | None, now: float) -> Resuming:
        """How to go on after a stream that ended before the turn did, without an error or with this one.

        Raises the error if it is the service's last word, and ConnectionLost when patience is at its end.
        """
        if error is None:
            error = ServiceError(grpc.StatusCode.UNAVAILABLE, "The stream ended before the turn did.")
        if not _means_resume(error):
            raise error
        if not self._failures or now - self._opened >= self._patience.seconds:
            self._failures = 0
            self._give_up = now + self._patience.seconds
        wait = self._patience.wait(self._failures, error.retry_after)
        undelivered = not self.turn_id and self.cancelling
        if undelivered or now + wait > self._give_up:
            raise ConnectionLost(error, self.turn_id, self.request_id) from error
        self._failures += 1
        return Resuming(error, wait)


class Repeats:
    """The repeats of one unary call that may safely be repeated, all within one deadline."""

    def __init__(self, patience: Patience, now: float) -> None:
        self._patience = patience
        self._deadline = now + UNARY_SECONDS
        self._failures = 0

    def seconds_left(self, now: float) -> float:
        """Deadline of the next call."""
        return max(0.001, self._deadline - now)

    def wait(self, error: ServiceError, now: float) -> float:
        """Seconds before the next call. Raises the error if there is to be none."""
        wait = self._patience.wait(self._failures, error.retry_after)
        if not _is_lost(error) or now + wait >= self._deadline:
            raise error
        self._failures += 1
        return wait

    def found_gone(self, error: ServiceError) -> bool:
        """Whether a deletion failed because an earlier call of it, whose answer was lost, had succeeded."""
        return self._failures > 0 and error.code is grpc.StatusCode.NOT_FOUND


def _means_resume(error: ServiceError) -> bool:
    """A lost connection does. So does a deadline, which is our own: the service's errors have reasons."""
    return _is_lost(error) or (error.code is grpc.StatusCode.DEADLINE_EXCEEDED and not error.reason)


_BROKEN_BY_PROXIES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})
"""What is made of a stream whose server died behind a proxy: HAProxy ends it without a status, nginx resets it."""


def _is_lost(error: ServiceError) -> bool:
    """UNAVAILABLE says so, and where nobody has given a reason, what proxies make of it."""
    return error.code is grpc.StatusCode.UNAVAILABLE or (error.code in _BROKEN_BY_PROXIES and not error.reason)
