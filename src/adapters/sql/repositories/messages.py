"""The repository of messages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, bindparam, insert, select, true, update

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.attachments import Attachments
from adapters.sql.repositories.base import Repository
from adapters.sql.session import Session
from adapters.sql.statement import Statement
from core.model.attachment import is_unread, with_data
from core.model.message import Message, Role, readable
from core.ports import threads
from core.ports.threads import NewMessage

_MOST = 2**31 - 1
_c = t.messages.c


def _list(behind: ColumnElement[bool], order: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
    of_thread = _c.thread_id == bindparam("of_thread")
    return select(t.messages).where(of_thread, behind).order_by(order).limit(bindparam("limit", type_=Integer))


_MOVE_ON = Statement(
    update(t.threads)
    .where(t.threads.c.id == bindparam("of_thread"))
    .values(message_count=t.threads.c.message_count + bindparam("added", type_=Integer), is_active=true())
    .returning(t.threads.c.message_count)
)
_ADD = Statement(insert(t.messages).inline())
_OF_TURN = Statement(select(t.messages).where(_c.turn_id == bindparam("turn_id"), _c.role == bindparam("role")))
_OLDEST_FIRST = Statement(_list(_c.number > bindparam("behind"), _c.number))
_NEWEST_FIRST = Statement(_list(_c.number < bindparam("behind"), _c.number.desc()))


class Messages(Repository, threads.Messages):
    """`messages`."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._attachments = Attachments(session)

    def begin(self, thread_id: str, message: NewMessage) -> Message:
        self._session.run(_ADD, m.message_values(thread_id, 1, message))
        return message.at(thread_id, 1)

    def append(self, thread_id: str, messages: Sequence[NewMessage]) -> Sequence[Message]:
        moved = {"of_thread": thread_id, "added": len(messages), "last_message_at": messages[-1].created_at}
        first = self._session.row(_MOVE_ON, moved).message_count - len(messages) + 1
        for number, message in enumerate(messages, first):
            self._session.run(_ADD, m.message_values(thread_id, number, message))
        return [message.at(thread_id, index) for index, message in enumerate(messages, first)]

    def list(
        self, thread_id: str, *, after: int | None, newest_first: bool, limit: int | None, data: int = 0
    ) -> Sequence[Message]:
        # A thread has at most as many lines as an index can count.
        behind = after if after is not None else _MOST if newest_first else 0
        parameters = {"of_thread": thread_id, "behind": behind, "limit": _MOST if limit is None else limit}
        rows = self._session.rows(_NEWEST_FIRST if newest_first else _OLDEST_FIRST, parameters)
        lines = [m.message_of(row) for row in rows]
        return self._whole(lines, readable(lines, data))

    def question_of(self, turn_id: str) -> Message | None:
        return self._of_turn(turn_id, Role.USER)

    def reply_of(self, turn_id: str) -> Message | None:
        return self._of_turn(turn_id, Role.ASSISTANT)

    def _of_turn(self, turn_id: str, role: Role) -> Message | None:
        row = self._session.row(_OF_TURN, {"turn_id": turn_id, "role": role.value})
        if row is None:
            return None
        line = m.message_of(row)
        return self._whole([line], [turn_id])[0] if is_unread(line.content) else line

    def _whole(self, lines: Sequence[Message], turn_ids: Sequence[str]) -> Sequence[Message]:
        """The lines, those of these turns with what is attached to them."""
        found = self._attachments.of(turn_ids)
        return [
            replace(line, content=with_data(line.content, found[line.turn_id])) if line.turn_id in found else line
            for line in lines
        ]
