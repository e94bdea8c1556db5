"""The repositories of turns, their logs, and the leases of the processes that work on them."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from core.model.events import LogEntry, TurnEvent
from core.model.message import ContentPart
from core.model.turn import Continuation, Turn, Usage
from core.ports.threads import NewMessage


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


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a batch: ids of the turns whose events are in, and of those held by a writer just now.

    Whoever is in neither has lost its turn.
    """

    accepted: frozenset[str]
    busy: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that has claimed a turn, empty if none has, and whether its lease is valid; `until` is when that
    runs out or did, None where it has none."""

    owner: str
    alive: bool
    until: datetime | None = field(default=None, compare=False)


class Leases(Protocol):
    """What processes have of the right to work on turns, in the store's own time. One lease for each process."""

    @abstractmethod
    def renew(self, owner: str, seconds: float) -> bool:
        """Makes a process's lease last `seconds` from now. False where it had none, or it had run out."""

    @abstractmethod
    def end(self, owner: str) -> None:
        """Ends a process's lease: what it has claimed may be claimed by others at once."""

    @abstractmethod
    def end_others(self, owner: str) -> None:
        """Ends every other lease, for a process that knows that there is no other."""

    @abstractmethod
    def others(self, owner: str) -> bool:
        """Whether another process has a valid lease."""


class Turns(Protocol):
    """Turns. A thread has at most one that is RUNNING or WAITING_FOR_CLIENT: the store itself refuses another."""

    @abstractmethod
    def add(self, turn: Turn, request: RequestKey, *, owner: str = "", waiting: NewMessage | None = None) -> None:
        """Stores a new turn that has not ended: RUNNING and claimed by process `owner`, or ACCEPTED at the end of
        its thread's queue with the message that it is to answer.

        (caller, user, request id) is unique where there is a request id.
        """

    @abstractmethod
    def attach(self, turn_id: str, content: tuple[ContentPart, ...]) -> None:
        """Stores the bytes in the content of a new turn's user message, once. They go where the message goes."""

    @abstractmethod
    def get(self, user_id: str, turn_id: str) -> Turn | None:
        """Reads the user's turn."""

    @abstractmethod
    def find(self, turn_id: str) -> Turn | None:
        """Reads a turn of any user, for a caller that has checked whose it is."""

    @abstractmethod
    def lock(self, turn_id: str) -> Turn | None:
        """Reads a turn of any user and keeps other writers away from its thread and from it (in this order)
        until the transaction ends."""

    @abstractmethod
    def by_request(self, caller: str, user_id: str, request_id: str) -> tuple[Turn, str] | None:
        """The turn of a request id, and the fingerprint that came with it."""

    @abstractmethod
    def unfinished(self, thread_id: str) -> Sequence[Turn]:
        """The thread's turns that have not ended: the one at work, then those that wait, in order."""

    @abstractmethod
    def open(self, user_id: str, after: str, limit: int) -> Sequence[Turn]:
        """Turns that have not ended, of a user or (empty) of all, in the order of their ids, beginning behind the
        id `after`."""

    @abstractmethod
    def of_thread(self, thread_id: str, after: str, limit: int) -> Sequence[Turn]:
        """The thread's turns, ended or not, in the order of their ids, beginning behind the id `after`."""

    @abstractmethod
    def waiting_message(self, turn_id: str) -> NewMessage | None:
        """The message of a turn that has never been claimed, bytes and all; later it is in the transcript."""

    @abstractmethod
    def holder(self, turn_id: str) -> Holder:
        """Who has claimed a turn that has not ended."""

    @abstractmethod
    def held_by(self, owner: str) -> Mapping[str, int]:
        """Ids and epochs of the turns at work that a process has claimed."""

    @abstractmethod
    def unclaimed(self, limit: int, *, but_of: Collection[str] = ()) -> Sequence[str]:
        """Ids of turns that wait for a process, oldest first: ACCEPTED, first in their thread's queue, and no
        turn of the thread at work. Turns of the users `but_of`, any number of them, are left out."""

    @abstractmethod
    def abandoned(self, limit: int) -> Sequence[str]:
        """Ids of turns at work whose holder has no valid lease, oldest first."""

    @abstractmethod
    def any_at_work(self) -> bool:
        """Whether any turn is RUNNING or WAITING_FOR_CLIENT, of whichever process."""

    @abstractmethod
    def save_claim(self, turn: Turn, owner: str) -> None:
        """Stores a locked turn's state, epoch, attempt, model, provider and time of its first claim, and its
        owner (empty: none). A turn that is at work no longer keeps a waiting message."""

    @abstractmethod
    def save_continuation(self, turn_id: str, continuation: Continuation | None) -> None:
        """Stores what another process could go on with, for a locked turn."""

    @abstractmethod
    def save_usage(self, turn_id: str, epoch: int, usage: Usage) -> None:
        """Stores what a turn has cost so far, if it is RUNNING in this epoch; else nothing."""

    @abstractmethod
    def save_ending(self, turn: Turn) -> str | None:
        """Stores a locked turn's terminal state: epoch, position, usage, reason, time; its waiting message goes,
        with what is attached to it.
        Returns the id of the next turn that waits in its thread."""


class TurnLog(Protocol):
    """The events of every turn."""

    @abstractmethod
    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        """Writes the first events of a new turn's log."""

    @abstractmethod
    def append(self, batch: Sequence[LogAppend]) -> Appended:
        """Adds events to the logs of several turns, each at most once in the batch; waits for no lock.

        Only where the turn is RUNNING, its epoch is the one given and its log ends at the position given.
        The others are left untouched: another writer holds them, or they belong to somebody else.
        """

    @abstractmethod
    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        """The committed events behind position `after`, exactly; text that straddles it is cut."""

    @abstractmethod
    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        """Replaces a turn's log by the same events in one row."""
