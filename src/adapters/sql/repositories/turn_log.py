"""The repository of turns' logs."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    String,
    Text,
    any_,
    bindparam,
    column,
    delete,
    exists,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.types import TypeEngine

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository
from adapters.sql.repositories.messages import Messages
from adapters.sql.repositories.turns import Turns
from adapters.sql.statement import Statement
from core.model.events import LogEntry, TurnEvent, TurnFinished, attempt_of, extent, place
from core.model.events import after as events_after
from core.ports import turns
from core.ports.store import Conflict
from core.ports.turns import Appended, LogAppend

_c = t.turn_log.c
_turn = t.turns.c
_COLUMNS = ["turn_id", "position", "start", "events"]
_is_running = _turn.state == literal_column("'running'", String)

_ADD = Statement(insert(t.turn_log).inline())
_READ = Statement(
    select(_c.start, _c.events)
    .where(_c.turn_id == bindparam("of_turn"), _c.position > bindparam("behind"))
    .order_by(_c.position)
)
_DELETE = Statement(delete(t.turn_log).where(_c.turn_id == bindparam("of_turn")))

# The fence: who may add to the log's end. The turn is his, and what he adds is what comes next. The turn's own row
# is only looked at; on a server it is locked meanwhile against whoever would claim or end it.
_it = bindparam("of_turn", type_=_turn.id.type)
_position = bindparam("position", type_=BigInteger)
_start = bindparam("start", type_=BigInteger)
_events = bindparam("events", type_=Text)


def _ends_at(turn_id: ColumnElement[str], start: ColumnElement[int]) -> ColumnElement[bool]:
    return select(func.max(_c.position)).where(_c.turn_id == turn_id).scalar_subquery() == start


_open = select(_turn.id).where(
    _turn.id == _it, _turn.epoch == bindparam("of_epoch"), _is_running, _ends_at(_it, _start)
)
_kept_open = _open.with_for_update(read=True).cte("open")
# Nobody waits to hear that it was taken: if it was not, this divides by zero. A row that breaks a rule of its
# table would fail as well, and stand in the server's log as a whole.
_taken = select(func.count()).select_from(_kept_open).scalar_subquery()
_ADD_OR_FAIL = Statement(
    insert(t.turn_log).from_select(
        _COLUMNS, select(select(_kept_open.c.id).scalar_subquery(), _position // _taken, _start, _events)
    )
)
_BEGIN_ATTEMPT = Statement(
    update(t.turns).where(_turn.id == _it).values(attempt=bindparam("new_attempt", type_=Integer))
)

# The same for a whole group in one statement: SQLite. For each statement its thread gives the interpreter away,
# and waits for it again while replies are read.
_of_batch = func.json_each(bindparam("batch", type_=Text)).table_valued("value", name="each")


def _of_each(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    return func.json_extract(_of_batch.c.value, literal_column(f"'$.{name}'"), type_=type_)


_each_id, _each_start = _of_each("of_turn", String()), _of_each("start", BigInteger())
_ADD_IF_OPEN = Statement(
    insert(t.turn_log).from_select(
        _COLUMNS,
        select(_each_id, _of_each("position", BigInteger()), _each_start, _of_each("events", Text())).where(
            exists().where(_turn.id == _each_id, _turn.epoch == _of_each("of_epoch", Integer()), _is_running),
            _ends_at(_each_id, _each_start),
        ),
    )
)

# And without waiting for a lock: PostgreSQL. To look first whether a row is free costs as much as all the rest.
_ids = bindparam("ids", type_=ARRAY(String))
_sets = (
    func.unnest(
        _ids,
        bindparam("epochs", type_=ARRAY(Integer)),
        bindparam("starts", type_=ARRAY(BigInteger)),
        bindparam("positions", type_=ARRAY(BigInteger)),
        bindparam("events", type_=ARRAY(Text)),
    )
    .table_valued(
        column("turn_id", String),
        column("epoch", Integer),
        column("start", BigInteger),
        column("position", BigInteger),
        column("events", Text),
        name="sets",
    )
    .render_derived()
)
_batch = select(_sets).cte("batch")
_free = (
    select(_turn.id, _turn.epoch, _turn.state)
    .where(_turn.id == any_(_ids))
    .order_by(_turn.id)
    .with_for_update(read=True, skip_locked=True)
    .cte("free")
)
_logged = (
    insert(t.turn_log)
    .from_select(
        _COLUMNS,
        select(_batch.c.turn_id, _batch.c.position, _batch.c.start, _batch.c.events)
        .join(_free, _free.c.id == _batch.c.turn_id)
        .where(
            _free.c.epoch == _batch.c.epoch,
            _free.c.state == literal_column("'running'", String),
            _ends_at(_batch.c.turn_id, _batch.c.start),
        ),
    )
    .returning(_c.turn_id)
    .cte("logged")
)
_APPEND = Statement(
    select(_turn.id, _logged.c.turn_id.is_not(None).label("is_in"), _free.c.id.is_not(None).label("is_free"))
    .select_from(
        t.turns.outerjoin(_logged, _logged.c.turn_id == _turn.id).outerjoin(_free, _free.c.id == _turn.id)
    )
    .where(_turn.id == any_(_ids))
)


class TurnLog(Repository, turns.TurnLog):
    """`turn_log`, and the position in `turns` that fences it."""

    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._session.run(_ADD, _first_row(turn_id, events))

    def append(self, batch: Sequence[LogAppend]) -> Appended:
        if not batch:
            return Appended(frozenset())
        values = [_append_values(append) for append in batch]
        if not self._session.is_server:
            appended = self._append_alone(values)
        elif len(batch) == 1 and self._session.hopeful:
            self._session.hoped = True
            self._session.run(_ADD_OR_FAIL, values[0])
            appended = Appended(frozenset({batch[0].turn_id}))
        else:
            appended = self._append_to_free(values)
        for append in batch:
            if append.turn_id in appended.accepted and (attempt := attempt_of(append.events)) is not None:
                self._session.run(_BEGIN_ATTEMPT, {"of_turn": append.turn_id, "new_attempt": attempt})
        self._session.changed.update(appended.accepted)
        return appended

    def _append_to_free(self, values: Sequence[dict[str, Any]]) -> Appended:
        found = self._session.rows(
            _APPEND,
            {
                "ids": [each["of_turn"] for each in values],
                "epochs": [each["of_epoch"] for each in values],
                "starts": [each["start"] for each in values],
                "positions": [each["position"] for each in values],
                "events": [each["events"] for each in values],
            },
        )
        return Appended(
            frozenset(turn_id for turn_id, is_in, _ in found if is_in),
            frozenset(turn_id for turn_id, _, is_free in found if not is_free),
        )

    def _append_alone(self, values: Sequence[dict[str, Any]]) -> Appended:
        """For a writer that has the whole database: nobody is busy."""
        if not self._session.hopeful:
            return Appended(frozenset(each["of_turn"] for each in values if self._add([each])))
        self._session.hoped = True
        if self._add(values) != len(values):
            raise Conflict
        return Appended(frozenset(each["of_turn"] for each in values))

    def _add(self, values: Sequence[dict[str, Any]]) -> int:
        """Adds those that continue the log of an open turn; returns how many they are."""
        return self._session.count(_ADD_IF_OPEN, {"batch": m.encode(values)})

    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        rows = self._session.rows(_READ, {"of_turn": turn_id, "behind": after})
        if not rows:
            return []
        finished = self._finished(turn_id) if rows[-1].events.endswith('["f"]]') else None
        start = rows[0].start  # each row begins where the one before it ends
        entries = place(m.load_events([row.events for row in rows], finished), start)
        return entries if after <= start else events_after(entries, after)

    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._session.run(_DELETE, {"of_turn": turn_id})
        self._session.run(_ADD, _first_row(turn_id, events))
        self._session.changed.add(turn_id)

    def _finished(self, turn_id: str) -> TurnFinished | None:
        turn = Turns(self._session).find(turn_id)
        if turn is None or not turn.state.is_terminal:
            return None
        return TurnFinished(turn, Messages(self._session).reply_of(turn_id))


def _first_row(turn_id: str, events: Sequence[TurnEvent]) -> dict[str, Any]:
    return {"turn_id": turn_id, "position": sum(map(extent, events)), "start": 0, "events": m.dump_events(events)}


def _append_values(append: LogAppend) -> dict[str, Any]:
    return {
        "of_turn": append.turn_id,
        "of_epoch": append.epoch,
        "start": append.position,
        "position": append.position + sum(map(extent, append.events)),
        "events": m.dump_events(append.events),
    }
