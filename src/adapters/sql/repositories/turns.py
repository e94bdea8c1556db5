"""The repository of turns."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

from sqlalchemy import Integer, String, and_, bindparam, case, exists, func, insert, literal_column, select, update

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.attachments import Attachments
from adapters.sql.repositories.base import Repository, each_of
from adapters.sql.session import Session
from adapters.sql.statement import Statement
from adapters.sql.tables import UtcDateTime, accepted, at_work, unfinished
from core.model.attachment import is_unread, with_data
from core.model.message import ContentPart
from core.model.turn import Continuation, Turn, TurnState, Usage
from core.ports import turns
from core.ports.store import UNCLAIMED
from core.ports.threads import NewMessage
from core.ports.turns import Holder, RequestKey

_c = t.turns.c
_other = t.turns.alias("other")
_turn_id = bindparam("of_turn", type_=_c.id.type)
_thread_id = bindparam("of_thread", type_=_c.thread_id.type)
_owner = bindparam("of_owner", type_=_c.owner.type)
_now = bindparam("now", type_=UtcDateTime)
_limit = bindparam("limit", type_=Integer)

# Where a turn stands that has not ended, its log alone tells: an append writes no other row.
_in_log = select(func.max(t.turn_log.c.position)).where(t.turn_log.c.turn_id == _c.id).scalar_subquery()
_stands_at = case((unfinished(_c.state), func.coalesce(_in_log, _c.last_position)), else_=_c.last_position)
_turns = select(*(column for column in _c if column is not _c.last_position), _stands_at.label("last_position"))
_one = _turns.where(_c.id == _turn_id)
_FIND = Statement(_one)
_GET = Statement(_one.where(_c.user_id == bindparam("of_user")))
_LOCK = Statement(select(_c.id).where(_c.id == _turn_id).with_for_update())
_LOCK_THREAD = Statement(
    select(t.threads.c.id)
    .where(t.threads.c.id == select(_c.thread_id).where(_c.id == _turn_id).scalar_subquery())
    .with_for_update()
)
_BY_REQUEST = Statement(
    _turns.where(
        _c.caller == bindparam("caller"),
        _c.user_id == bindparam("of_user"),
        _c.request_id == bindparam("request_id"),
    )
)

_unfinished = and_(_c.thread_id == _thread_id, unfinished(_c.state))
_UNFINISHED = Statement(_turns.where(_unfinished).order_by(accepted(_c.state), _c.place))
_OF_THREAD = Statement(
    _turns.where(_c.thread_id == _thread_id, _c.id > bindparam("after_id", type_=_c.id.type))
    .order_by(_c.id)
    .limit(_limit)
)


@cache
def _open(*, of_user: bool) -> Statement:
    query = _turns.where(unfinished(_c.state), _c.id > bindparam("after_id", type_=_c.id.type))
    if of_user:
        query = query.where(_c.user_id == bindparam("of_user"))
    return Statement(query.order_by(_c.id).limit(_limit))


_places = select(_c.place).where(_unfinished).subquery()
_last_place = select(func.coalesce(func.max(_places.c.place), literal_column("0", Integer))).scalar_subquery()
_ADD = Statement(insert(t.turns).inline())
_QUEUE = Statement(insert(t.turns).inline().values(place=_last_place + literal_column("1", Integer)))

_HOLDER = Statement(
    select(_c.owner, (t.leases.c.lease_until > _now).label("alive"), t.leases.c.lease_until)
    .select_from(t.turns.outerjoin(t.leases, t.leases.c.owner == _c.owner))
    .where(_c.id == _turn_id)
)
_HELD_BY = Statement(select(_c.id, _c.epoch).where(_c.owner == _owner, at_work(_c.state)))
_ABANDONED = Statement(
    select(_c.id)
    .where(at_work(_c.state), ~exists().where(t.leases.c.owner == _c.owner, t.leases.c.lease_until > _now))
    .order_by(_c.accepted_at, _c.id)
    .limit(_limit)
)
_ANY_AT_WORK = Statement(select(exists().where(at_work(_c.state)).label("are_there")))
_unclaimed = (
    select(_c.id)
    .where(
        accepted(_c.state),
        ~exists().where(_other.c.thread_id == _c.thread_id, at_work(_other.c.state)),
        ~exists().where(_other.c.thread_id == _c.thread_id, accepted(_other.c.state), _other.c.place < _c.place),
    )
    .order_by(_c.accepted_at, _c.id)
    .limit(_limit)
)
_UNCLAIMED = {
    dialect: Statement(_unclaimed.where(_c.user_id.not_in(users))) for dialect, users in each_of("but_of").items()
}

_save = update(t.turns).where(_c.id == _turn_id)
_next = (
    select(_other.c.id)
    .where(_other.c.thread_id == _thread_id, accepted(_other.c.state), _other.c.id != _turn_id)
    .order_by(_other.c.place)
    .limit(literal_column("1", Integer))
    .scalar_subquery()
)
_SAVE = Statement(_save)
_SAVE_USAGE = Statement(
    _save.where(_c.epoch == bindparam("of_epoch"), _c.state == literal_column("'running'", String))
)
_END = Statement(_save.returning(_next.label("next_id")))


class Turns(Repository, turns.Turns):
    """`turns`."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._attachments = Attachments(session)

    def add(self, turn: Turn, request: RequestKey, *, owner: str = "", waiting: NewMessage | None = None) -> None:
        values: m.Values = {
            **m.turn_values(turn),
            "owner": owner,
            "caller": request.caller,
            "request_id": request.request_id or None,
            "fingerprint": request.fingerprint if request.request_id else None,
            "waiting": None if waiting is None else m.waiting_values(waiting),
        }
        if turn.state is TurnState.ACCEPTED:
            self._session.run(_QUEUE, {**values, "of_thread": turn.thread_id})
            self._session.changed.add(UNCLAIMED)
        else:
            self._session.run(_ADD, {**values, "place": 0})
        self._session.changed.add(turn.id)

    def attach(self, turn_id: str, content: tuple[ContentPart, ...]) -> None:
        self._attachments.add(turn_id, content)

    def get(self, user_id: str, turn_id: str) -> Turn | None:
        row = self._session.row(_GET, {"of_turn": turn_id, "of_user": user_id})
        return None if row is None else m.turn_of(row)

    def find(self, turn_id: str) -> Turn | None:
        row = self._session.row(_FIND, {"of_turn": turn_id})
        return None if row is None else m.turn_of(row)

    def lock(self, turn_id: str) -> Turn | None:
        if not self._session.is_server:
            return self.find(turn_id)  # whoever writes has the whole database
        # In the order in which everybody locks: two processes never wait for each other. Read by a statement
        # behind the locks, which sees what whoever had them has appended.
        self._session.run(_LOCK_THREAD, {"of_turn": turn_id})
        self._session.run(_LOCK, {"of_turn": turn_id})
        return self.find(turn_id)

    def by_request(self, caller: str, user_id: str, request_id: str) -> tuple[Turn, str] | None:
        key = {"caller": caller, "of_user": user_id, "request_id": request_id}
        row = self._session.row(_BY_REQUEST, key)
        return None if row is None else (m.turn_of(row), row.fingerprint)

    def unfinished(self, thread_id: str) -> Sequence[Turn]:
        return [m.turn_of(row) for row in self._session.rows(_UNFINISHED, {"of_thread": thread_id})]

    def open(self, user_id: str, after: str, limit: int) -> Sequence[Turn]:
        of_user = {"of_user": user_id} if user_id else {}
        found = self._session.rows(_open(of_user=bool(user_id)), {"after_id": after, "limit": limit, **of_user})
        return [m.turn_of(row) for row in found]

    def of_thread(self, thread_id: str, after: str, limit: int) -> Sequence[Turn]:
        found = self._session.rows(_OF_THREAD, {"of_thread": thread_id, "after_id": after, "limit": limit})
        return [m.turn_of(row) for row in found]

    def waiting_message(self, turn_id: str) -> NewMessage | None:
        row = self._session.row(_FIND, {"of_turn": turn_id})
        if row is None or row.waiting is None:
            return None
        waiting = m.waiting_of(row)
        if not is_unread(waiting.content):
            return waiting
        return replace(waiting, content=with_data(waiting.content, self._attachments.of([turn_id])[turn_id]))

    def holder(self, turn_id: str) -> Holder:
        row = self._session.row(_HOLDER, {"of_turn": turn_id, "now": self._session.now()})
        return Holder("", alive=False) if row is None else Holder(row.owner, bool(row.alive), row.lease_until)

    def held_by(self, owner: str) -> Mapping[str, int]:
        held = self._session.rows(_HELD_BY, {"of_owner": owner})
        return {row.id: row.epoch for row in held}

    def unclaimed(self, limit: int, *, but_of: Collection[str] = ()) -> Sequence[str]:
        statement = _UNCLAIMED[self._session.dialect.name]
        found = self._session.rows(statement, {"limit": limit, "but_of": json.dumps(list(but_of))})
        return [row.id for row in found]

    def abandoned(self, limit: int) -> Sequence[str]:
        return [row.id for row in self._session.rows(_ABANDONED, {"limit": limit, "now": self._session.now()})]

    def any_at_work(self) -> bool:
        return bool(self._session.row(_ANY_AT_WORK).are_there)

    def save_claim(self, turn: Turn, owner: str) -> None:
        values = {"of_turn": turn.id, "owner": owner, **m.claim_values(turn)}
        if turn.state is TurnState.ACCEPTED:
            self._session.changed.add(UNCLAIMED)
        else:
            values["waiting"] = None
        self._session.run(_SAVE, values)
        self._session.changed.add(turn.id)

    def save_continuation(self, turn_id: str, continuation: Continuation | None) -> None:
        self._session.run(_SAVE, {"of_turn": turn_id, "continuation": m.continuation_values(continuation)})

    def save_usage(self, turn_id: str, epoch: int, usage: Usage) -> None:
        self._session.run(_SAVE_USAGE, {"of_turn": turn_id, "of_epoch": epoch, **m.usage_values(usage)})

    def save_ending(self, turn: Turn) -> str | None:
        self._session.changed.add(turn.id)
        values = {"of_turn": turn.id, "of_thread": turn.thread_id, "waiting": None, **m.ending_values(turn)}
        next_id: str | None = self._session.row(_END, values).next_id
        if next_id is not None:
            self._session.changed.add(UNCLAIMED)
        if turn.claimed_at is None:
            self._attachments.drop_unused(turn.id)
        return next_id
