"""The repository of the ledger."""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    cast,
    delete,
    func,
    literal,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.dialects import postgresql, sqlite

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository
from adapters.sql.statement import Statement
from core.model.ledger import FORGOTTEN, Dimension, LedgerKey, LedgerLine, Tally
from core.ports import ledger

_c = t.usage.c
_turn = t.turns.c
_LINE: list[Column[Any]] = [_c.user_id, _c.day, _c.agent_id, _c.model]
_KEY = [*_LINE, _c.slot]
_COUNTS: list[Column[int]] = [
    _c.turns,
    _c.unmetered_turns,
    _c.input_tokens,
    _c.cached_input_tokens,
    _c.cache_write_tokens,
    _c.output_tokens,
    _c.reasoning_tokens,
]
_DIMENSIONS: Mapping[Dimension, ColumnElement[Any]] = {
    Dimension.USER: _c.user_id,
    Dimension.AGENT: _c.agent_id,
    Dimension.MODEL: _c.model,
    Dimension.DAY: _c.day,
}

_user_id = bindparam("of_user", type_=_c.user_id.type)
_in_days = and_(_c.day >= bindparam("since", type_=_c.day.type), _c.day <= bindparam("until", type_=_c.day.type))


def _sum(column: ColumnElement[int]) -> ColumnElement[int]:
    return cast(func.coalesce(func.sum(column), literal_column("0", BigInteger)), BigInteger)


def _adding(insert: Any) -> Any:
    """An INSERT that adds to the row with the key of the new one, if that is there."""
    added = {count.name: count + insert.excluded[count.name] for count in _COUNTS}
    return insert.on_conflict_do_update(index_elements=_KEY, set_=added)


_line = select(literal(FORGOTTEN, _c.user_id.type), *_KEY[1:], *_COUNTS).where(_c.user_id == _user_id)
_into = [column.name for column in (*_KEY, *_COUNTS)]
# A process writes on one connection, and so into one slot of 64: a line has about as many as there are processes.
_slot = func.pg_backend_pid(type_=Integer) % literal_column("64", Integer)
_ENTER = {
    "sqlite": Statement(_adding(sqlite.insert(t.usage).values(slot=literal_column("0", Integer))).inline()),
    "postgresql": Statement(_adding(postgresql.insert(t.usage).values(slot=_slot)).inline()),
}
_FORGET = {
    "sqlite": Statement(_adding(sqlite.insert(t.usage).from_select(_into, _line.order_by(*_KEY)))),
    "postgresql": Statement(_adding(postgresql.insert(t.usage).from_select(_into, _line.order_by(*_KEY)))),
}
_DELETE = Statement(delete(t.usage).where(_c.user_id == _user_id))

# In one statement: a turn that ends meanwhile is seen on one side, never on both or none.
_booked = (
    select(*(_sum(count).label(count.name) for count in _COUNTS))
    .where(_c.user_id == _user_id, _c.day == bindparam("on_day", type_=_c.day.type))
    .subquery()
)
_open = (
    select(
        cast(func.count(), BigInteger).label("turns"),
        *(_sum(_turn[count.name]).label(count.name) for count in _COUNTS[2:]),
    )
    .where(_turn.user_id == _user_id, t.unfinished(_turn.state))
    .subquery()
)
_SPENT = Statement(
    select(
        (_booked.c.turns + _open.c.turns).label("turns"),
        _booked.c.unmetered_turns,
        *((_booked.c[count.name] + _open.c[count.name]).label(count.name) for count in _COUNTS[2:]),
    )
)


@cache
def _of_user(*, before: bool) -> Statement:
    sums = [_sum(count).label(count.name) for count in _COUNTS]
    query = select(*_LINE, *sums).where(_c.user_id == _user_id, _in_days).group_by(*_LINE)
    place = tuple_(_c.day, _c.agent_id, _c.model)
    if before:
        names = ("before_day", _c.day), ("before_agent", _c.agent_id), ("before_model", _c.model)
        query = query.where(place < tuple_(*(bindparam(name, type_=column.type) for name, column in names)))
    newest_first = query.order_by(_c.day.desc(), _c.agent_id.desc(), _c.model.desc())
    return Statement(newest_first.limit(bindparam("limit", type_=Integer)))


@cache
def _totals(by: tuple[Dimension, ...], *, of_user: bool, of_agent: bool) -> Statement:
    groups = [_DIMENSIONS[dimension].label(f"by_{dimension.value}") for dimension in by]
    sums = [_sum(count).label(count.name) for count in _COUNTS]
    query: Select[Any] = select(*groups, *sums).where(_in_days).having(func.count() > 0)
    if of_user:
        query = query.where(_c.user_id == _user_id)
    if of_agent:
        query = query.where(_c.agent_id == bindparam("of_agent", type_=_c.agent_id.type))
    return Statement(query.group_by(*(_DIMENSIONS[dimension] for dimension in by)))


class Ledger(Repository, ledger.Ledger):
    """`usage`."""

    def enter(self, line: LedgerLine) -> None:
        self._session.run(_ENTER[self._session.dialect.name], m.ledger_values(line))

    def spent(self, user_id: str, day: date) -> Tally:
        return m.tally_of(self._session.row(_SPENT, {"of_user": user_id, "on_day": day}))

    def of_user(
        self, user_id: str, since: date, until: date, before: LedgerKey | None, limit: int
    ) -> Sequence[LedgerLine]:
        values: m.Values = {"of_user": user_id, "since": since, "until": until, "limit": limit}
        if before is not None:
            values |= {
                "before_day": before.day,
                "before_agent": before.agent_id,
                "before_model": before.model,
            }
        rows = self._session.rows(_of_user(before=before is not None), values)
        return [m.ledger_line_of(row) for row in rows]

    def totals(
        self, by: Sequence[Dimension], since: date, until: date, *, user_id: str = "", agent_id: str = ""
    ) -> Sequence[tuple[tuple[str, ...], Tally]]:
        values: m.Values = {"since": since, "until": until}
        if user_id:
            values["of_user"] = user_id
        if agent_id:
            values["of_agent"] = agent_id
        statement = _totals(tuple(by), of_user=bool(user_id), of_agent=bool(agent_id))
        return [
            (tuple(str(value) for value in row[: len(by)]), m.tally_of(row))
            for row in self._session.rows(statement, values)
        ]

    def forget(self, user_id: str) -> None:
        self._session.run(_FORGET[self._session.dialect.name], {"of_user": user_id})
        self._session.run(_DELETE, {"of_user": user_id})
