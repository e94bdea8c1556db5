"""Errors that a caller can meet. The reasons are part of the API.

CoreError
├── InvalidField            a field of the request breaks a rule
├── Unauthenticated         nobody knows who calls, or for whom
├── CallerNotAllowed        the caller may not do this, or not for this user
├── NotSupported            named in the API, not built
├── ThreadNotFound, TurnNotFound, AgentNotFound
├── RequestIdReused         same request id, other content
├── TurnInProgress          the thread has a running turn
├── PositionAhead           a cursor beyond the log
├── QueueFull               too many messages wait in the thread
├── QuotaExceeded           the user's own bound
│   └── QuotaSpent          … for the day
├── Overloaded, Draining    this process takes no more
├── ProviderUnavailable     the provider has failed too often just now
├── IdentityUnavailable     there is nothing to check credentials with just now
├── StoreUnavailable        the database does not answer
│   └── StoreBusy           somebody else holds what a write needs
├── LegalHold               the user's data must be kept
├── CleanupRunning          another cleanup is at work
└── LeaseLost               another process owns the turn; never reaches a caller
"""

from typing import ClassVar


class CoreError(Exception):
    """Base of every error that the core raises. `reason` and `message` are static and free of user content."""

    reason: ClassVar[str]
    message: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.message)

    @property
    def details(self) -> dict[str, str]:
        """Machine-readable facts for the caller: ids and field names, never content."""
        return {}


class InvalidField(CoreError):
    """A field breaks a rule. `field` is its path in the request, `problem` a fixed sentence."""

    reason = "INVALID_FIELD"
    message = "A field of the request is invalid."

    def __init__(self, field: str, problem: str) -> None:
        super().__init__()
        self.field = field
        self.problem = problem


class Unauthenticated(CoreError):
    """The call has no credentials, or none that are believed. Which of these it is, only the log says."""

    reason = "UNAUTHENTICATED"
    message = "The call has no valid credentials."


class CallerNotAllowed(CoreError):
    """The caller is known and may not do this, or not for this user."""

    reason = "CALLER_NOT_ALLOWED"
    message = "The caller may not do this."


class NotSupported(CoreError):
    """The API names it, but it is not built. `field` is its path in the request."""

    reason = "NOT_SUPPORTED"
    message = "This is not supported."

    def __init__(self, field: str) -> None:
        super().__init__()
        self.field = field

    @property
    def details(self) -> dict[str, str]:
        return {"field": self.field}


class ThreadNotFound(CoreError):
    """No such thread of this user."""

    reason = "THREAD_NOT_FOUND"
    message = "There is no such thread."


class TurnNotFound(CoreError):
    """No such turn of this user."""

    reason = "TURN_NOT_FOUND"
    message = "There is no such turn."


class AgentNotFound(CoreError):
    """No agent serves this domain."""

    reason = "AGENT_NOT_FOUND"
    message = "There is no agent for this domain."


class RequestIdReused(CoreError):
    """The request id belongs to a message with another thread, domain or content."""

    reason = "REQUEST_ID_REUSED"
    message = "This request id was used for another message."


class TurnInProgress(CoreError):
    """The thread has a turn that has not ended."""

    reason = "TURN_IN_PROGRESS"
    message = "The thread has a turn in progress."

    def __init__(self, turn_id: str) -> None:
        super().__init__()
        self.turn_id = turn_id

    @property
    def details(self) -> dict[str, str]:
        return {"turn_id": self.turn_id}


class PositionAhead(CoreError):
    """The cursor lies beyond the turn's log."""

    reason = "POSITION_AHEAD"
    message = "The position is beyond the end of the turn's log."


class RetryableError(CoreError):
    """Nothing was accepted; the same call may succeed after `retry_after` seconds."""

    retry_after: float = 1.0


class QueueFull(RetryableError):
    """As many messages as allowed wait in the thread."""

    reason = "QUEUE_FULL"
    message = "Too many messages wait in this thread."


class QuotaExceeded(RetryableError):
    """The user has as many turns in flight as allowed."""

    reason = "QUOTA_EXCEEDED"
    message = "The user has too many turns in progress."
    quota = "in_progress"
    """Which bound: here, on what is in flight."""

    @property
    def details(self) -> dict[str, str]:
        return {"quota": self.quota}


class QuotaSpent(QuotaExceeded):
    """The user has used up a quota of the day, which ends in `retry_after` seconds."""

    message = "The user has used up a quota of the day."

    def __init__(self, quota: str, limit: int, retry_after: float) -> None:
        super().__init__()
        self.quota = quota
        self.limit = limit
        self.retry_after = retry_after

    @property
    def details(self) -> dict[str, str]:
        return {"quota": self.quota, "limit": str(self.limit)}


class Overloaded(RetryableError):
    """This process has as much in flight as allowed."""

    reason = "OVERLOADED"
    message = "The service is at its limit."


class Draining(RetryableError):
    """This process is shutting down."""

    reason = "DRAINING"
    message = "The service is shutting down."


class ProviderUnavailable(RetryableError):
    """The provider has failed so often that nobody asks it for the next `retry_after` seconds."""

    reason = "PROVIDER_UNAVAILABLE"
    message = "The provider is unavailable."

    def __init__(self, retry_after: float) -> None:
        super().__init__()
        self.retry_after = retry_after


class IdentityUnavailable(RetryableError):
    """What credentials are checked with can't be had: they are neither good nor bad."""

    reason = "IDENTITY_UNAVAILABLE"
    message = "Credentials can't be checked at this time."


class StoreUnavailable(RetryableError):
    """The database does not answer. Whether a write took effect is unknown."""

    reason = "STORE_UNAVAILABLE"
    message = "The store is unavailable."


class StoreBusy(StoreUnavailable):
    """Somebody else has held what a write needs for too long. The write had no effect; others are not hindered."""


class CleanupRunning(CoreError):
    """Another cleanup is at work on this database."""

    reason = "CLEANUP_RUNNING"
    message = "Another cleanup is running."


class LegalHold(CoreError):
    """The user's data must be kept for now: nothing of it is erased."""

    reason = "LEGAL_HOLD"
    message = "The user's data is on hold and can't be erased."


class LeaseLost(CoreError):
    """The turn has a newer epoch, or has ended: this process may not write to it any more."""

    reason = "LEASE_LOST"
    message = "The turn belongs to another process."
