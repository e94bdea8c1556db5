"""The repositories of users, threads and messages."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from core.model.agent import Domain
from core.model.erasure import Counts
from core.model.message import ContentPart, Message, Role, ToolExchange
from core.model.thread import ProviderState, Thread, ThreadState, Tombstone
from core.model.user import User

SETTLE = 60.0
"""Seconds in which a provider finishes what it was at when the connection was closed."""


@dataclass(frozen=True, slots=True)
class ThreadKey:
    """A place in the order of threads by newest message: (`last_message_at`, `id`)."""

    last_message_at: datetime
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewMessage:
    """A message that has no place in its thread yet."""

    id: str
    turn_id: str
    role: Role
    content: tuple[ContentPart, ...]
    created_at: datetime
    partial: bool = False
    tool: ToolExchange | None = None

    def at(self, thread_id: str, index: int) -> Message:
        """The message in its place."""
        return Message(
            id=self.id,
            thread_id=thread_id,
            turn_id=self.turn_id,
            index=index,
            role=self.role,
            content=self.content,
            partial=self.partial,
            created_at=self.created_at,
            tool=self.tool,
        )


@dataclass(frozen=True, slots=True)
class ExpiredBatch:
    """What one batch of expiry did. `last` is the last thread looked at, None when there are no more."""

    expired: int
    last: ThreadKey | None


class Users(Protocol):
    """Users, known by the calling product's own reference."""

    @abstractmethod
    def lock(self, user_id: str) -> None:
        """Has everybody else who locks this user, if there is such a one, wait until the transaction ends. Behind
        a thread's lock, where both are taken."""

    @abstractmethod
    def ensure(self, user_id: str, now: datetime) -> None:
        """Adds a user unless known."""

    @abstractmethod
    def get(self, user_id: str) -> User | None:
        """Reads a user."""

    @abstractmethod
    def held(self, user_id: str) -> bool:
        """Whether a legal hold keeps everything of this user. That stays so until the transaction ends."""

    @abstractmethod
    def hold(self, user_id: str, since: datetime | None) -> None:
        """Puts a known user on hold, or, with None, releases them. A hold from before stays as it is."""

    @abstractmethod
    def belongings(self, user_id: str) -> tuple[Counts, int]:
        """How much there is of a user, and how many objects a provider is known to have of it."""

    @abstractmethod
    def remove(self, user_id: str) -> None:
        """Removes a user who has no thread and no goal. Does nothing for an unknown one. Raises Conflict for one
        who has."""


class Threads(Protocol):
    """Threads. No method that takes a user returns or counts another user's."""

    @abstractmethod
    def add(self, thread: Thread) -> None:
        """Stores a new thread. Its user and agent exist."""

    @abstractmethod
    def get(self, user_id: str, thread_id: str) -> Thread | None:
        """Reads the user's thread."""

    @abstractmethod
    def lock(self, user_id: str, thread_id: str) -> Thread | None:
        """Reads the user's thread and keeps other writers away from it until the transaction ends."""

    @abstractmethod
    def find(self, thread_id: str) -> Thread | None:
        """Reads a thread of any user, for a caller that has checked whose it is."""

    @abstractmethod
    def touch(self, thread_id: str, now: datetime) -> None:
        """Wakes a thread for a message that is not in the transcript yet, and moves `last_message_at` on."""

    @abstractmethod
    def delete(self, thread_id: str, now: datetime, *, erasure_id: str = "", in_use: bool = False) -> Counts:
        """Deletes a locked thread with its messages, what is attached to them, turns and logs, and leaves a
        tombstone. What is known of it at a provider is due to be erased: at once, or, where it was `in_use`, once
        the provider has had SETTLE seconds to notice that nobody listens any more."""

    @abstractmethod
    def ids_of(self, user_id: str, after: str, limit: int) -> Sequence[str]:
        """Ids of the user's threads in their order, beginning behind `after`."""

    @abstractmethod
    def forgotten(
        self, cutoff: datetime, domain: Domain | None, after: str, limit: int
    ) -> Sequence[tuple[str, str]]:
        """Users and ids of threads, ACTIVE or not, whose newest message is older than `cutoff` and that have no
        turn that has not ended, in the order of their ids, beginning behind the id `after`. Those of users on hold
        are among them."""

    @abstractmethod
    def tombstone(self, thread_id: str) -> Tombstone | None:
        """What is left of a deleted thread."""

    @abstractmethod
    def list(
        self,
        user_id: str,
        domain: Domain | None,
        states: frozenset[ThreadState],
        before: ThreadKey | None,
        limit: int,
    ) -> Sequence[Thread]:
        """The user's threads with one of the states, newest message first, beginning after `before`."""

    @abstractmethod
    def newest(
        self, user_id: str, domain: Domain | None, states: frozenset[ThreadState], limit: int
    ) -> Sequence[Thread]:
        """Threads of a user or (empty) of all, in one of the states, in the order of their ids, backwards."""

    @abstractmethod
    def pinned(self) -> Mapping[str, int]:
        """How many threads are pinned to each agent version that has any. It looks at every thread."""

    @abstractmethod
    def describe(self, thread_id: str, *, title: str | None, metadata: Mapping[str, str] | None) -> None:
        """Replaces what is not None."""

    @abstractmethod
    def provider_state(self, thread_id: str) -> ProviderState | None:
        """What the agent last said of the provider's copy."""

    @abstractmethod
    def save_provider_state(self, thread_id: str, state: ProviderState) -> None:
        """Replaces it."""

    @abstractmethod
    def expire(self, cutoff: datetime, domain: Domain | None, after: ThreadKey | None, limit: int) -> ExpiredBatch:
        """Makes up to `limit` threads INACTIVE: the next ones after `after` whose newest message is older than
        `cutoff` and that have no turn that has not ended; oldest first, to the day. Threads that another process
        holds are left out."""

    @abstractmethod
    def places(self) -> int:
        """How many places the store has for threads, in an order of its own.

        In each lie about as many as on a page of a database. A new thread may take a new place, and a change may
        move a thread to another.
        """

    @abstractmethod
    def expire_places(self, cutoff: datetime, domain: Domain | None, first: int, count: int) -> int:
        """Makes INACTIVE what `expire` would of the threads in `count` places from the `first` (0 or more).

        Returns how many. It looks at every thread there: the way for many threads, as `expire` is for few.
        """

    @abstractmethod
    def count_expired(self, cutoff: datetime, domain: Domain | None, limit: int | None = None) -> int:
        """How many threads `expire` would find, held or not; it stops counting at `limit`."""


class Messages(Protocol):
    """The transcript. Of what is attached to a message it writes no bytes: `Turns.attach` does."""

    @abstractmethod
    def begin(self, thread_id: str, message: NewMessage) -> Message:
        """Writes the first line of a thread that was added in this transaction, already with a count of 1."""

    @abstractmethod
    def append(self, thread_id: str, messages: Sequence[NewMessage]) -> Sequence[Message]:
        """Adds lines to the end of a thread; their indexes are dense. Wakes the thread and moves its
        `last_message_at` and `message_count` on."""

    @abstractmethod
    def list(
        self, thread_id: str, *, after: int | None, newest_first: bool, limit: int | None, data: int = 0
    ) -> Sequence[Message]:
        """Lines of a thread in order of index, beginning behind index `after` in the direction asked for.

        At most `data` bytes of what is attached are read along, line by line in this order; from the first line on
        that would bring more, they are left `Unread`.
        """

    @abstractmethod
    def question_of(self, turn_id: str) -> Message | None:
        """The turn's USER message, bytes and all, once it is in the transcript."""

    @abstractmethod
    def reply_of(self, turn_id: str) -> Message | None:
        """The turn's ASSISTANT message."""
