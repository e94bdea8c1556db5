"""Turns: one user message and everything that answers it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class TurnState(StrEnum):
    """Where a turn stands. Terminal states are never left."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    WAITING_FOR_CLIENT = "waiting_for_client"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({TurnState.COMPLETED, TurnState.INCOMPLETE, TurnState.CANCELLED, TurnState.FAILED})


class BusyPolicy(StrEnum):
    """What to do with a message for a thread that has a running turn."""

    REJECT = "reject"
    QUEUE = "queue"
    INTERRUPT = "interrupt"


class TurnReason(StrEnum):
    """Why a turn did not complete. The names are part of the API."""

    PROVIDER_RATE_LIMITED = "PROVIDER_RATE_LIMITED"
    PROVIDER_UNAVAILABLE = "PROVIDER_UNAVAILABLE"
    PROVIDER_CONFIG = "PROVIDER_CONFIG"
    PROVIDER_TIMEOUT = "PROVIDER_TIMEOUT"
    PROVIDER_TRUNCATED = "PROVIDER_TRUNCATED"
    PROVIDER_STALLED = "PROVIDER_STALLED"
    PROVIDER_PROTOCOL = "PROVIDER_PROTOCOL"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    CONTENT_FILTERED = "CONTENT_FILTERED"
    OUTPUT_LIMIT = "OUTPUT_LIMIT"
    TOOL_LIMIT = "TOOL_LIMIT"
    TOOL_OUTCOME_UNKNOWN = "TOOL_OUTCOME_UNKNOWN"
    CLIENT_TOOL_TIMEOUT = "CLIENT_TOOL_TIMEOUT"
    CANCELLED_BY_CALLER = "CANCELLED_BY_CALLER"
    INTERRUPTED = "INTERRUPTED"
    THREAD_DELETED = "THREAD_DELETED"
    SAFETY_STOP = "SAFETY_STOP"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    INTERNAL = "INTERNAL"

    @property
    def message(self) -> str:
        """A fixed sentence for people."""
        return _MESSAGES[self]

    @property
    def retryable(self) -> bool:
        """Whether the same message sent again may succeed."""
        return self in _RETRYABLE


_MESSAGES = {
    TurnReason.PROVIDER_RATE_LIMITED: "The provider is limiting requests.",
    TurnReason.PROVIDER_UNAVAILABLE: "The provider is unavailable.",
    TurnReason.PROVIDER_CONFIG: "The provider refused the service's configuration.",
    TurnReason.PROVIDER_TIMEOUT: "The provider did not answer in time.",
    TurnReason.PROVIDER_TRUNCATED: "The provider's answer broke off.",
    TurnReason.PROVIDER_STALLED: "The provider's answer came to a halt.",
    TurnReason.PROVIDER_PROTOCOL: "The provider's answer could not be read.",
    TurnReason.CONTEXT_TOO_LONG: "The conversation is too long for the model.",
    TurnReason.CONTENT_FILTERED: "The provider filtered the answer.",
    TurnReason.OUTPUT_LIMIT: "The answer reached its length limit.",
    TurnReason.TOOL_LIMIT: "The coach called too many tools.",
    TurnReason.TOOL_OUTCOME_UNKNOWN: "Whether a tool took effect is unknown.",
    TurnReason.CLIENT_TOOL_TIMEOUT: "The client did not answer a tool call in time.",
    TurnReason.CANCELLED_BY_CALLER: "The turn was cancelled.",
    TurnReason.INTERRUPTED: "The turn was interrupted.",
    TurnReason.THREAD_DELETED: "The thread was deleted.",
    TurnReason.SAFETY_STOP: "The answer was stopped for safety.",
    TurnReason.BUDGET_EXCEEDED: "The turn took too long.",
    TurnReason.INTERNAL: "Something went wrong in the service.",
}

_RETRYABLE = frozenset(
    {
        TurnReason.PROVIDER_RATE_LIMITED,
        TurnReason.PROVIDER_UNAVAILABLE,
        TurnReason.PROVIDER_TIMEOUT,
        TurnReason.PROVIDER_TRUNCATED,
        TurnReason.PROVIDER_STALLED,
        TurnReason.PROVIDER_PROTOCOL,
        TurnReason.INTERRUPTED,
        TurnReason.BUDGET_EXCEEDED,
        TurnReason.INTERNAL,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens, as the provider counts them. Those read from its cache and those written to it are parts of the
    input, those spent on reasoning of the output."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            cached_input_tokens=self.cached_input_tokens + other.cached_input_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class Continuation:
    """A round of a reply that the provider writes whether anybody reads it or not.

    `handle` is the provider's name for it, `round` the number of tool rounds before it in its attempt.
    """

    handle: str
    attempt: int
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One user message and everything that answers it.

    `epoch` grows with every claim, every release and with the ending; a write under an older epoch is refused.
    `continuation` is what another process could go on with.
    `attempt` counts fresh starts of the reply. The turn's budget runs from `claimed_at`, the first claim.
    `last_position` is the log's position after its newest committed event. `reason` is set where the turn
    ended otherwise than COMPLETED, and only there.
    """

    id: str
    thread_id: str
    user_id: str
    agent_id: str
    state: TurnState
    attempt: int
    epoch: int
    last_position: int
    usage: Usage
    reason: TurnReason | None
    model: str
    provider: str
    accepted_at: datetime
    claimed_at: datetime | None = None
    finished_at: datetime | None = None
    continuation: Continuation | None = None
