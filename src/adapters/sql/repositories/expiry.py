"""What expires, and how all that lies next to each other in a database's file expires at once.

Through an index, threads come one by one from all over the table, and that costs several times what the change
itself does. In the order in which the table keeps them it costs what one UPDATE of the whole table would, and can
be done piece by piece.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    String,
    and_,
    any_,
    bindparam,
    cast,
    exists,
    false,
    func,
    literal_column,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.types import ARRAY, UserDefinedType

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.session import Session
from adapters.sql.statement import Statement

_c = t.threads.c

_has_none = ~exists().where(t.turns.c.thread_id == _c.id, t.unfinished(t.turns.c.state))
_of_turns = t.turns.c.thread_id
_is_in_none = and_(
    _c.id.not_in(select(_of_turns).where(t.at_work(t.turns.c.state))),
    _c.id.not_in(select(_of_turns).where(t.accepted(t.turns.c.state))),
)
_FREE = {"sqlite": _has_none, "postgresql": _is_in_none}
"""For each dialect, that a thread has no turn that has not ended, for many threads.

PostgreSQL reads those turns once for all threads, a condition for each partial index. Thread by thread would be
left to its planner, and what that knows of turns that have not ended is always out of date. SQLite does as it is
told, thread by thread.
"""


_row_id = literal_column("assistant_threads.rowid", BigInteger)
# Its constants written out, as the planner knows the index by them.
_day = literal_column("substr(assistant_threads.last_message_at, 1, 10)", String)
_after_id = bindparam("after_id", type_=_c.id.type)


def _day_of(time: str) -> ColumnElement[str]:
    return func.substr(
        bindparam(time, type_=t.UtcDateTime), literal_column("1"), literal_column("10"), type_=String
    )


_IN_REACH = {"sqlite": _day <= _day_of("cutoff"), "postgresql": true()}
"""What the index of active threads has to know of the cutoff.

PostgreSQL's has them by the time of the newest message, and its entries stay when threads expire. From SQLite's an
entry goes with each thread: it has them by day and then by row id, so that those of a batch lie together. By time
each would be on a page of its own, and a batch would write as many pages as threads.
"""
OLDEST_FIRST: Mapping[str, tuple[ColumnElement[Any], ColumnElement[Any]]] = {
    "sqlite": (_day, _row_id),
    "postgresql": (_c.last_message_at, _c.id),
}
"""For each dialect, the order of that index."""
_its_row_id = func.coalesce(select(_row_id).where(_c.id == _after_id).scalar_subquery(), -1)
BEHIND = {
    "sqlite": and_(
        _day >= _day_of("after_time"),  # from there the index is read: the planner makes nothing of the pair
        tuple_(*OLDEST_FIRST["sqlite"]) > tuple_(_day_of("after_time"), _its_row_id),
    ),
    "postgresql": tuple_(*OLDEST_FIRST["postgresql"])
    > tuple_(bindparam("after_time", type_=t.UtcDateTime), _after_id),
}
"""For each dialect, what comes behind a thread in this order; in SQLite behind one that is gone all of its day."""


def one_idle(*, in_domain: bool) -> ColumnElement[bool]:
    """What expires: active, older than the cutoff, without a turn that has not ended. For one thread at a time."""
    return _idle(_c.is_active, _has_none, in_domain=in_domain)


def idle(dialect: str, *, in_domain: bool) -> ColumnElement[bool]:
    """The same, for many threads, by the index of those that are active."""
    return and_(_idle(_c.is_active, _FREE[dialect], in_domain=in_domain), _IN_REACH[dialect])


def out_of_use(dialect: str, *, in_domain: bool) -> ColumnElement[bool]:
    """The same, for threads that are INACTIVE already as well."""
    return _idle(true(), _FREE[dialect], in_domain=in_domain)


def _idle_there(dialect: str, *, in_domain: bool) -> ColumnElement[bool]:
    """The same, written so that no index has it: where to look is said by rows or pages."""
    return _idle(_c.is_active.is_not(false()), _FREE[dialect], in_domain=in_domain)


def _idle(active: ColumnElement[bool], free: ColumnElement[bool], *, in_domain: bool) -> ColumnElement[bool]:
    found = and_(active, _c.last_message_at < bindparam("cutoff", type_=t.UtcDateTime), free)
    return and_(found, _c.domain == bindparam("in_domain")) if in_domain else found


class Places(Protocol):
    """The order in which a database keeps the threads, cut into places of about a page."""

    @abstractmethod
    def count(self, session: Session) -> int:
        """How many there are."""

    @abstractmethod
    def expire(self, session: Session, idle: m.Values, first: int, count: int) -> int:
        """Makes INACTIVE what expires, by the parameters of `idle`, in some places; returns how many threads."""


class Rows(Places):
    """SQLite's: a place is the threads of so many row ids. There is one writer, and it is at this."""

    _PLACE = 64
    """About as many as are on a page of PostgreSQL's."""
    _COUNT = Statement(select(func.coalesce(func.max(_row_id), -1).label("last")).select_from(t.threads))

    def count(self, session: Session) -> int:
        return int(session.row(self._COUNT).last) // self._PLACE + 1

    def expire(self, session: Session, idle: m.Values, first: int, count: int) -> int:
        there = {"first": first * self._PLACE, "end": (first + count) * self._PLACE}
        return session.count(self._expire(in_domain="in_domain" in idle), {**idle, **there})

    @staticmethod
    @cache
    def _expire(*, in_domain: bool) -> Statement:
        there = and_(_row_id >= bindparam("first", type_=BigInteger), _row_id < bindparam("end", type_=BigInteger))
        return Statement(
            update(t.threads).where(there, _idle_there("sqlite", in_domain=in_domain)).values(is_active=false())
        )


class _Tid(UserDefinedType[str]):
    """Where a row is in its table: page and number. Goes in and comes out as text."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "TID"


class Pages(Places):
    """PostgreSQL's: a place is a page of the table.

    What another process holds is left out, so nothing here waits. What is not held is locked first and then looked
    at once more: of a thread that another process has just given free, one statement would see the new row, but of
    its turns only those of before.
    """

    _place = literal_column("assistant_threads.ctid", _Tid)
    _pages = literal_column(
        "pg_relation_size('assistant_threads') / current_setting('block_size')::bigint", BigInteger
    )
    _COUNT = Statement(select(_pages.label("pages")))

    def count(self, session: Session) -> int:
        return int(session.row(self._COUNT).pages)

    def expire(self, session: Session, idle: m.Values, first: int, count: int) -> int:
        in_domain = "in_domain" in idle
        there = {"first": f"({first},0)", "end": f"({first + count},0)"}
        locked = session.row(self._lock(in_domain=in_domain), {**idle, **there}).locked
        return session.count(self._expire(in_domain=in_domain), {**idle, "locked": locked}) if locked else 0

    @staticmethod
    @cache
    def _lock(*, in_domain: bool) -> Statement:
        first, end = (cast(bindparam(name, type_=String), _Tid) for name in ("first", "end"))
        there = select(Pages._place.label("place")).select_from(t.threads)
        there = there.where(
            Pages._place >= first, Pages._place < end, _idle_there("postgresql", in_domain=in_domain)
        )
        found = there.with_for_update(skip_locked=True).subquery()
        return Statement(select(cast(func.array_agg(found.c.place), String).label("locked")))

    @staticmethod
    @cache
    def _expire(*, in_domain: bool) -> Statement:
        locked = Pages._place == any_(cast(bindparam("locked", type_=String), ARRAY(_Tid)))
        return Statement(
            update(t.threads)
            .where(locked, _idle_there("postgresql", in_domain=in_domain))
            .values(is_active=false())
        )


PLACES: Mapping[str, Places] = {"sqlite": Rows(), "postgresql": Pages()}
"""For each dialect."""
