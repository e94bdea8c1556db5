"""Exporting all that is kept of a user, piece by piece."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial

from core.model.attachment import FilePart, ImagePart, data_of, is_unread
from core.model.goal import Goal
from core.model.ledger import LedgerKey, LedgerLine
from core.model.message import ContentPart, Message
from core.model.thread import Thread
from core.model.turn import Turn, TurnState
from core.model.user import User, check_user_id
from core.ports.store import Store, Transaction
from core.ports.threads import NewMessage

PIECE = 512 * 1024
"""Bytes of an image or a file in one piece."""
_PAGE = 20
"""Things that are read in one go."""


@dataclass(frozen=True, slots=True)
class ExportedTurn:
    """A turn. `waiting` is its message where that is not in the transcript yet, without the bytes in it."""

    turn: Turn
    waiting: NewMessage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachmentPiece:
    """Bytes of part `number` of the turn's user message, from `offset` on, of `size` in all."""

    turn_id: str
    number: int
    offset: int
    size: int
    data: bytes


Exported = User | Goal | Thread | ExportedTurn | Message | AttachmentPiece | LedgerLine
"""A piece of what is kept of a user."""


class ExportUser:
    """Reads everything of one user, in small reads: nothing is held while somebody waits for the next piece."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pieces(self, user_id: str) -> AsyncGenerator[Exported, None]:
        """The user, goals, each thread with its turns and messages, and the lines of the ledger; the bytes of
        images and files follow what they are attached to, which is without them. Nothing for an unknown user.

        What changes meanwhile is in the export as it was before or after; what was there all the time is complete.
        """
        check_user_id(user_id)
        user = await self._store.read(lambda tx: tx.users.get(user_id))
        if user is None:
            return
        yield user
        after = ""
        while goals := await self._store.read(partial(_goals, user_id, after)):
            for goal in goals:
                yield goal
            after = goals[-1].id
        thread_id = ""
        while ids := await self._store.read(partial(_next_thread, user_id, thread_id)):
            (thread_id,) = ids
            async for piece in self._thread(user_id, thread_id):
                yield piece
        before: LedgerKey | None = None
        while lines := await self._store.read(partial(_usage, user_id, before)):
            for line in lines:
                yield line
            before = lines[-1].key

    async def _thread(self, user_id: str, thread_id: str) -> AsyncGenerator[Exported, None]:
        thread = await self._store.read(lambda tx: tx.threads.get(user_id, thread_id))
        if thread is None:
            return
        yield thread
        after = ""
        while turns := await self._store.read(partial(_turns, thread_id, after)):
            for turn in turns:
                waiting = None
                if turn.state is TurnState.ACCEPTED:
                    waiting = await self._store.read(partial(_waiting, turn.id))
                if waiting is None:
                    yield ExportedTurn(turn, None)
                    continue
                yield ExportedTurn(turn, replace(waiting, content=_bare(waiting.content)))
                for piece in _cut(turn.id, waiting.content):
                    yield piece
            after = turns[-1].id
        index = 0
        while lines := await self._store.read(partial(_lines, thread_id, index)):
            for line in lines:
                yield replace(line, content=_bare(line.content))
                if is_unread(line.content):
                    whole = await self._store.read(partial(_question, line.turn_id))
                    for piece in _cut(line.turn_id, whole.content) if whole is not None else ():
                        yield piece
            index = lines[-1].index


def _goals(user_id: str, after: str, tx: Transaction) -> Sequence[Goal]:
    return tx.goals.of_user(user_id, after, _PAGE)


def _next_thread(user_id: str, after: str, tx: Transaction) -> Sequence[str]:
    return tx.threads.ids_of(user_id, after, 1)


def _usage(user_id: str, before: LedgerKey | None, tx: Transaction) -> Sequence[LedgerLine]:
    return tx.ledger.of_user(user_id, date.min, date.max, before, _PAGE)


def _question(turn_id: str, tx: Transaction) -> Message | None:
    return tx.messages.question_of(turn_id)


def _turns(thread_id: str, after: str, tx: Transaction) -> Sequence[Turn]:
    return tx.turns.of_thread(thread_id, after, _PAGE)


def _waiting(turn_id: str, tx: Transaction) -> NewMessage | None:
    return tx.turns.waiting_message(turn_id)


def _lines(thread_id: str, after: int, tx: Transaction) -> Sequence[Message]:
    return tx.messages.list(thread_id, after=after, newest_first=False, limit=_PAGE)


def _bare(content: tuple[ContentPart, ...]) -> tuple[ContentPart, ...]:
    """The same without bytes: those come in pieces of their own."""
    return tuple(
        replace(part, source=b"")
        if isinstance(part, ImagePart | FilePart) and not isinstance(part.source, str)
        else part
        for part in content
    )


def _cut(turn_id: str, content: tuple[ContentPart, ...]) -> Iterator[AttachmentPiece]:
    for number, data in data_of(content).items():
        for offset in range(0, len(data), PIECE):
            piece = data[offset : offset + PIECE]
            yield AttachmentPiece(turn_id=turn_id, number=number, offset=offset, size=len(data), data=piece)
