"""Reading and describing conversations."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from core.model.agent import Domain
from core.model.attachment import is_unread, size_of
from core.model.errors import InvalidField, ThreadNotFound, TurnNotFound
from core.model.message import Message
from core.model.thread import Thread, ThreadState, check_metadata, check_title
from core.model.turn import Turn
from core.model.user import check_user_id
from core.ports.store import Store, Transaction
from core.ports.threads import ThreadKey
from core.use_cases.paging import make_token, page_size, read_token

T = TypeVar("T")

_MAX_INDEX = 2**53
MAX_PAGE_BYTES = 3 * 2**20
"""What people wrote, images and files in a page of more than one thread or message. gRPC clients refuse responses
over 4 MiB unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadQuery:
    """Which of a user's threads: of a domain, in one of the states."""

    user_id: str
    domain: Domain | None = None
    states: frozenset[ThreadState] = frozenset({ThreadState.ACTIVE})


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageQuery:
    """Which messages, in which order."""

    user_id: str
    thread_id: str
    newest_first: bool = False


class ReadThreads:
    """Reads threads, messages and turns of one user at a time; changes what describes a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def thread(self, user_id: str, thread_id: str) -> Thread:
        """Raises ThreadNotFound."""
        check_user_id(user_id)
        return await self._store.read(lambda tx: _thread(tx, user_id, thread_id))

    async def threads(self, query: ThreadQuery, size: int, token: str) -> tuple[Sequence[Thread], str]:
        """A page of threads, newest message first, and the token of the next page, empty on the last."""
        check_user_id(query.user_id)
        size = page_size(size)
        scope = ["threads", query.user_id, query.domain, sorted(query.states)]
        place = read_token(token, scope, [str, str])
        before = None
        if place is not None:
            try:
                at = datetime.fromisoformat(str(place[0])).astimezone(UTC)
                before = ThreadKey(at, str(uuid.UUID(str(place[1]))))
            except (ValueError, OverflowError) as error:
                raise InvalidField("page_token", "is not a token of this query") from error
        found = await self._store.read(
            lambda tx: tx.threads.list(query.user_id, query.domain, query.states, before, size + 1)
        )
        page = _within_bytes(found[:size], _bytes_of_thread)
        if len(found) == len(page):
            return page, ""
        return page, make_token(scope, [page[-1].last_message_at.isoformat(), page[-1].id])

    async def messages(self, query: MessageQuery, size: int, token: str) -> tuple[Sequence[Message], str]:
        """A page of messages, whole ones, and the token of the next page, empty on the last. Raises
        ThreadNotFound."""
        check_user_id(query.user_id)
        size = page_size(size)
        scope = ["messages", query.user_id, query.thread_id, query.newest_first]
        place = read_token(token, scope, [int])
        after = int(place[0]) if place is not None else None
        if after is not None and not 0 <= after <= _MAX_INDEX:
            raise InvalidField("page_token", "is not a token of this query")

        def find(tx: Transaction) -> Sequence[Message]:
            _thread(tx, query.user_id, query.thread_id)
            lines = tx.messages.list(
                query.thread_id,
                after=after,
                newest_first=query.newest_first,
                limit=size + 1,
                data=MAX_PAGE_BYTES,
            )
            if lines and is_unread(lines[0].content):
                whole = tx.messages.question_of(lines[0].turn_id)
                assert whole is not None  # it is in the transcript
                return [whole, *lines[1:]]
            return lines

        found = await self._store.read(find)
        page = _within_bytes(found[:size], _bytes_of_message)
        return page, make_token(scope, [page[-1].index]) if len(found) > len(page) else ""

    async def turn(self, user_id: str, turn_id: str) -> tuple[Turn, Message | None]:
        """A turn, and its reply once it has ended. Raises TurnNotFound."""
        check_user_id(user_id)

        def find(tx: Transaction) -> tuple[Turn, Message | None]:
            turn = tx.turns.get(user_id, turn_id)
            if turn is None:
                raise TurnNotFound
            return turn, tx.messages.reply_of(turn_id)

        return await self._store.read(find)

    async def describe(
        self, user_id: str, thread_id: str, *, title: str | None, metadata: Mapping[str, str] | None
    ) -> Thread:
        """Replaces what is not None and returns the thread as it is then. Raises ThreadNotFound."""
        check_user_id(user_id)
        if title is not None:
            check_title(title, "thread.title")
        if metadata is not None:
            check_metadata(metadata, "thread.metadata")

        def change(tx: Transaction) -> Thread:
            if tx.threads.lock(user_id, thread_id) is None:
                raise ThreadNotFound
            tx.threads.describe(thread_id, title=title, metadata=metadata)
            return _thread(tx, user_id, thread_id)

        return await self._store.write(change)


def _within_bytes(things: Sequence[T], bytes_of: Callable[[T], int]) -> Sequence[T]:
    """As many as a response can hold that clients take without being asked to, and at least one."""
    size = 0
    for number, thing in enumerate(things):
        size += bytes_of(thing)
        if number and size > MAX_PAGE_BYTES:
            return things[:number]
    return things


def _bytes_of_message(message: Message) -> int:
    return len(message.text.encode()) + sum(map(size_of, message.content))


def _bytes_of_thread(thread: Thread) -> int:
    return sum(len(text.encode()) for text in (thread.title, *thread.metadata, *thread.metadata.values()))


def _thread(tx: Transaction, user_id: str, thread_id: str) -> Thread:
    thread = tx.threads.get(user_id, thread_id)
    if thread is None:
        raise ThreadNotFound
    return thread
