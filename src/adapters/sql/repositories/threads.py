"""The repositories of users and threads."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache

from sqlalchemy import (
    ColumnElement,
    Integer,
    Table,
    bindparam,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    true,
    tuple_,
    update,
)

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository, insert_if_new
from adapters.sql.repositories.expiry import BEHIND, OLDEST_FIRST, PLACES, idle, one_idle, out_of_use
from adapters.sql.session import Session
from adapters.sql.statement import Statement
from core.model.agent import Domain
from core.model.erasure import Counts
from core.model.thread import ProviderState, Thread, ThreadState, Tombstone
from core.model.user import User
from core.ports import threads
from core.ports.threads import SETTLE, ExpiredBatch, ThreadKey

_u = t.users.c
_user = select(t.users).where(_u.id == bindparam("of_user"))
_its_threads = select(t.threads.c.id).where(t.threads.c.user_id == bindparam("of_user"))
_turns_of_user = select(t.turns.c.id).where(t.turns.c.thread_id.in_(_its_threads))


def _number(name: str, table: Table, condition: ColumnElement[bool]) -> ColumnElement[int]:
    return select(func.count()).select_from(table).where(condition).scalar_subquery().label(name)


_ENSURE = insert_if_new(t.users)
# Not FOR UPDATE: that would collide with whoever only adds a thread that refers to the user.
_LOCK_USER = Statement(
    select(t.users.c.id).where(t.users.c.id == bindparam("of_user")).with_for_update(key_share=True)
)
_GET_USER = Statement(_user)
_HELD = Statement(_user.with_for_update(read=True))
_HOLD = Statement(update(t.users).where(_u.id == bindparam("of_user"), _u.held_since.is_(None)))
_RELEASE = Statement(update(t.users).where(_u.id == bindparam("of_user")))
_REMOVE = Statement(delete(t.users).where(_u.id == bindparam("of_user")))
_BELONGINGS = Statement(
    select(
        _number("threads", t.threads, t.threads.c.user_id == bindparam("of_user")),
        _number("turns", t.turns, t.turns.c.thread_id.in_(_its_threads)),
        _number("messages", t.messages, t.messages.c.thread_id.in_(_its_threads)),
        _number("attachments", t.attachments, t.attachments.c.turn_id.in_(_turns_of_user)),
        _number("goals", t.goals, t.goals.c.user_id == bindparam("of_user")),
        _number("copies", t.copies, t.copies.c.thread_id.in_(_its_threads)),
    )
)


class Users(Repository, threads.Users):
    """`users`."""

    def ensure(self, user_id: str, now: datetime) -> None:
        self._session.run(_ENSURE[self._session.dialect.name], {"id": user_id, "created_at": now})

    def lock(self, user_id: str) -> None:
        if self._session.is_server:  # else: whoever writes has the whole database
            self._session.run(_LOCK_USER, {"of_user": user_id})

    def get(self, user_id: str) -> User | None:
        row = self._session.row(_GET_USER, {"of_user": user_id})
        return None if row is None else m.user_of(row)

    def held(self, user_id: str) -> bool:
        row = self._session.row(_HELD, {"of_user": user_id})
        return row is not None and row.held_since is not None

    def hold(self, user_id: str, since: datetime | None) -> None:
        self._session.run(_RELEASE if since is None else _HOLD, {"of_user": user_id, "held_since": since})

    def belongings(self, user_id: str) -> tuple[Counts, int]:
        row = self._session.row(_BELONGINGS, {"of_user": user_id})
        *counts, copies = row
        return Counts(**dict(zip(row._fields, counts, strict=False))), copies

    def remove(self, user_id: str) -> None:
        self._session.run(_REMOVE, {"of_user": user_id})


_c = t.threads.c
_thread_id = bindparam("of_thread", type_=_c.id.type)
_its_turns = select(t.turns.c.id).where(t.turns.c.thread_id == _thread_id)

_one = select(t.threads).where(_c.id == _thread_id)
_change = update(t.threads).where(_c.id == _thread_id)
_ADD = Statement(insert(t.threads).inline())
_FIND = Statement(_one)
_GET = Statement(_one.where(_c.user_id == bindparam("of_user")))
_LOCK = Statement(_one.where(_c.user_id == bindparam("of_user")).with_for_update())
_CHANGE = Statement(_change)
_TOUCH = Statement(_change.values(is_active=true()))
_STATE = Statement(select(_c.thread_id, _c.provider_state).where(_c.id == _thread_id))
_DELETE_ATTACHMENTS = Statement(delete(t.attachments).where(t.attachments.c.turn_id.in_(_its_turns)))
_DELETE_LOGS = Statement(delete(t.turn_log).where(t.turn_log.c.turn_id.in_(_its_turns)))
_DELETE_MESSAGES = Statement(delete(t.messages).where(t.messages.c.thread_id == _thread_id))
_DELETE_TURNS = Statement(delete(t.turns).where(t.turns.c.thread_id == _thread_id).returning(t.turns.c.id))
_DELETE = Statement(delete(t.threads).where(_c.id == _thread_id))
_BURY = Statement(insert(t.tombstones).inline())
_FREE_COPIES = Statement(update(t.copies).where(t.copies.c.thread_id == _thread_id, t.copies.c.due.is_(None)))
_TOMBSTONE = Statement(select(t.tombstones).where(t.tombstones.c.thread_id == _thread_id))


def _in_states(states: frozenset[ThreadState]) -> Sequence[ColumnElement[bool]]:
    """The condition, if it is one."""
    if len(states) == len(ThreadState):
        return ()
    return [or_(false(), *(_c.is_active.is_(state is ThreadState.ACTIVE) for state in states))]


@cache
def _list(states: frozenset[ThreadState], *, in_domain: bool, before: bool) -> Statement:
    query = select(t.threads).where(_c.user_id == bindparam("of_user"))
    if in_domain:
        query = query.where(_c.domain == bindparam("in_domain"))
    query = query.where(*_in_states(states))
    if before:
        key = tuple_(bindparam("before_time", type_=t.UtcDateTime), bindparam("before_id", type_=_c.id.type))
        query = query.where(_key() < key)
    newest_first = query.order_by(_c.last_message_at.desc(), _c.id.desc())
    return Statement(newest_first.limit(bindparam("limit", type_=Integer)))


@cache
def _newest(states: frozenset[ThreadState], *, of_user: bool, in_domain: bool) -> Statement:
    query = select(t.threads)
    if of_user:
        query = query.where(_c.user_id == bindparam("of_user"))
    if in_domain:
        query = query.where(_c.domain == bindparam("in_domain"))
    query = query.where(*_in_states(states))
    return Statement(query.order_by(_c.id.desc()).limit(bindparam("limit", type_=Integer)))


_PINNED = Statement(select(_c.assistant_id, func.count().label("count_")).group_by(_c.assistant_id))
_IDS_OF = Statement(
    _its_threads.where(_c.id > bindparam("after_id", type_=_c.id.type))
    .order_by(_c.id)
    .limit(bindparam("limit", type_=Integer))
)


@cache
def _forgotten(dialect: str, *, in_domain: bool) -> Statement:
    query = select(_c.user_id, _c.id).where(_c.id > bindparam("after_id", type_=_c.id.type))
    query = query.where(out_of_use(dialect, in_domain=in_domain))
    return Statement(query.order_by(_c.id).limit(bindparam("limit", type_=Integer)))


@cache
def _choose(dialect: str, *, in_domain: bool, after: bool) -> Statement:
    query = select(_c.last_message_at, _c.id).where(idle(dialect, in_domain=in_domain))
    if after:
        query = query.where(BEHIND[dialect])
    oldest_first = query.order_by(*OLDEST_FIRST[dialect]).limit(bindparam("limit", type_=Integer))
    return Statement(oldest_first.with_for_update(skip_locked=True))


@cache
def _expire(*, in_domain: bool) -> Statement:
    return Statement(_change.where(one_idle(in_domain=in_domain)).values(is_active=false()))


@cache
def _count_idle(dialect: str, *, in_domain: bool, limited: bool) -> Statement:
    found = select(_c.id).where(idle(dialect, in_domain=in_domain))
    if limited:  # in this order they come from an index, whatever the planner thinks of how many there are
        found = found.order_by(*OLDEST_FIRST[dialect]).limit(bindparam("limit", type_=Integer))
    return Statement(select(func.count().label("count_")).select_from(found.subquery()))


class Threads(Repository, threads.Threads):
    """`assistant_threads` and `tombstones`."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._places = PLACES[session.dialect.name]

    def add(self, thread: Thread) -> None:
        self._session.run(_ADD, m.thread_values(thread))

    def get(self, user_id: str, thread_id: str) -> Thread | None:
        row = self._session.row(_GET, {"of_user": user_id, "of_thread": thread_id})
        return None if row is None else m.thread_of(row)

    def lock(self, user_id: str, thread_id: str) -> Thread | None:
        row = self._session.row(_LOCK, {"of_user": user_id, "of_thread": thread_id})
        return None if row is None else m.thread_of(row)

    def find(self, thread_id: str) -> Thread | None:
        row = self._session.row(_FIND, {"of_thread": thread_id})
        return None if row is None else m.thread_of(row)

    def touch(self, thread_id: str, now: datetime) -> None:
        self._session.run(_TOUCH, {"of_thread": thread_id, "last_message_at": now})

    def delete(self, thread_id: str, now: datetime, *, erasure_id: str = "", in_use: bool = False) -> Counts:
        this = {"of_thread": thread_id}
        attachments = self._session.count(_DELETE_ATTACHMENTS, this)
        self._session.run(_DELETE_LOGS, this)
        messages = self._session.count(_DELETE_MESSAGES, this)
        turns = [row.id for row in self._session.rows(_DELETE_TURNS, this)]
        self._session.changed.update(turns)
        self._session.run(_DELETE, this)
        self._session.run(_BURY, {"thread_id": thread_id, "erasure_id": erasure_id, "deleted_at": now})
        self._session.run(_FREE_COPIES, {**this, "due": now + timedelta(seconds=SETTLE if in_use else 0)})
        return Counts(threads=1, turns=len(turns), messages=messages, attachments=attachments)

    def ids_of(self, user_id: str, after: str, limit: int) -> Sequence[str]:
        found = self._session.rows(_IDS_OF, {"of_user": user_id, "after_id": after, "limit": limit})
        return [row.id for row in found]

    def forgotten(
        self, cutoff: datetime, domain: Domain | None, after: str, limit: int
    ) -> Sequence[tuple[str, str]]:
        choose = _forgotten(self._session.dialect.name, in_domain=domain is not None)
        found = self._session.rows(choose, {**_due(cutoff, domain), "after_id": after, "limit": limit})
        return [(row.user_id, row.id) for row in found]

    def tombstone(self, thread_id: str) -> Tombstone | None:
        row = self._session.row(_TOMBSTONE, {"of_thread": thread_id})
        return None if row is None else m.tombstone_of(row)

    def list(
        self,
        user_id: str,
        domain: Domain | None,
        states: frozenset[ThreadState],
        before: ThreadKey | None,
        limit: int,
    ) -> Sequence[Thread]:
        parameters: m.Values = {"of_user": user_id, "limit": limit}
        if domain is not None:
            parameters["in_domain"] = domain.value
        if before is not None:
            parameters |= {"before_time": before.last_message_at, "before_id": before.id}
        statement = _list(states, in_domain=domain is not None, before=before is not None)
        return [m.thread_of(row) for row in self._session.rows(statement, parameters)]

    def newest(
        self, user_id: str, domain: Domain | None, states: frozenset[ThreadState], limit: int
    ) -> Sequence[Thread]:
        parameters: m.Values = {"limit": limit}
        if user_id:
            parameters["of_user"] = user_id
        if domain is not None:
            parameters["in_domain"] = domain.value
        statement = _newest(states, of_user=bool(user_id), in_domain=domain is not None)
        return [m.thread_of(row) for row in self._session.rows(statement, parameters)]

    def pinned(self) -> Mapping[str, int]:
        return {row.assistant_id: row.count_ for row in self._session.rows(_PINNED, {})}

    def describe(self, thread_id: str, *, title: str | None, metadata: Mapping[str, str] | None) -> None:
        values: m.Values = {}
        if title is not None:
            values["title"] = title
        if metadata is not None:
            values["metadata_"] = dict(metadata)
        if values:
            self._session.run(_CHANGE, {"of_thread": thread_id, **values})

    def provider_state(self, thread_id: str) -> ProviderState | None:
        row = self._session.row(_STATE, {"of_thread": thread_id})
        return m.provider_state_of(row.thread_id, row.provider_state)

    def save_provider_state(self, thread_id: str, state: ProviderState) -> None:
        self._session.run(_CHANGE, {"of_thread": thread_id, **m.provider_state_values(state)})

    def expire(self, cutoff: datetime, domain: Domain | None, after: ThreadKey | None, limit: int) -> ExpiredBatch:
        due = _due(cutoff, domain)
        behind = {} if after is None else {"after_time": after.last_message_at, "after_id": after.id}
        choose = _choose(self._session.dialect.name, in_domain=domain is not None, after=after is not None)
        found = self._session.rows(choose, {**due, **behind, "limit": limit})
        if not found:
            return ExpiredBatch(0, None)
        # A turn may have begun between the look and the lock; the row as it is now decides.
        expire = _expire(in_domain=domain is not None)
        expired = self._session.count_each(expire, [{"of_thread": row.id, **due} for row in found])
        return ExpiredBatch(expired, ThreadKey(*found[-1]))

    def places(self) -> int:
        return self._places.count(self._session)

    def expire_places(self, cutoff: datetime, domain: Domain | None, first: int, count: int) -> int:
        return self._places.expire(self._session, _due(cutoff, domain), first, count)

    def count_expired(self, cutoff: datetime, domain: Domain | None, limit: int | None = None) -> int:
        count = _count_idle(self._session.dialect.name, in_domain=domain is not None, limited=limit is not None)
        up_to = {} if limit is None else {"limit": limit}
        return int(self._session.row(count, {**_due(cutoff, domain), **up_to}).count_)


def _due(cutoff: datetime, domain: Domain | None) -> m.Values:
    return {"cutoff": cutoff, **({} if domain is None else {"in_domain": domain.value})}


def _key() -> ColumnElement[tuple[datetime, str]]:
    return tuple_(_c.last_message_at, _c.id)
