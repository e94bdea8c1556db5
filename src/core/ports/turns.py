"""The repositories of turns and their logs."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.model.events import LogEntry, TurnEvent
from core.model.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """Who sent a message, under which request id (empty: none), and a fingerprint of what it said."""

    caller: str
    user_id: str
    request_id: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LogAppend:
    """Events for the end of a turn's log. `position` is the log's position before them."""

    turn_id: str
    epoch: int
    position: int
    events: tuple[TurnEvent, ...]


class Turns(Protocol):
    """Turns. A thread has at most one that is RUNNING or WAITING_FOR_CLIENT: the store itself refuses another."""

    @abstractmethod
    def add(self, turn: Turn, owner: str, request: RequestKey) -> None:
        """Stores a new turn, claimed by process `owner` if it is RUNNING.

        (caller, user, request id) is unique where there is a request id.
        """

    @abstractmethod
    def get(self, user_id: str, turn_id: str) -> Turn | None:
        """Reads the user's turn."""

    @abstractmethod
    def find(self, turn_id: str) -> Turn | None:
        """Reads a turn of any user, for a caller that has checked whose it is."""

    @abstractmethod
    def lock(self, turn_id: str) -> Turn | None:
        """Reads a turn of any user and keeps other writers away from it until the transaction ends."""

    @abstractmethod
    def by_request(self, caller: str, user_id: str, request_id: str) -> tuple[Turn, str] | None:
        """The turn of a request id, and the fingerprint that came with it."""

    @abstractmethod
    def in_the_way(self, thread_id: str) -> Turn | None:
        """The thread's turn that has not ended, if it has one."""

    @abstractmethod
    def unfinished(self, limit: int) -> Sequence[str]:
        """Ids of turns that have not ended, oldest first."""

    @abstractmethod
    def save_ending(self, turn: Turn) -> None:
        """Stores a locked turn's terminal state: epoch, position, usage, reason, time."""


class TurnLog(Protocol):
    """The events of every turn."""

    @abstractmethod
    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        """Writes the first events of a new turn's log."""

    @abstractmethod
    def append(self, batch: Sequence[LogAppend]) -> frozenset[str]:
        """Adds events to the logs of several turns, each at most once in the batch.

        Only where the turn is RUNNING, its epoch is the one given and its log ends at the position given;
        returns the ids of those turns. The others are left untouched: they belong to somebody else.
        """

    @abstractmethod
    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        """The committed events behind position `after`, exactly; text that straddles it is cut."""

    @abstractmethod
    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        """Replaces a turn's log by the same events in one row."""
