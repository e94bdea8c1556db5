"""The repository of turns' logs."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Integer,
    String,
    Text,
    any_,
    bindparam,
    column,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository
from adapters.sql.repositories.messages import Messages
from adapters.sql.repositories.turns import Turns
from adapters.sql.statement import Statement
from core.model.events import AttemptRestarted, LogEntry, TurnEvent, TurnFinished, extent, place
from core.model.events import after as events_after
from core.ports import turns
from core.ports.turns import Appended, LogAppend

_c = t.turn_log.c
_turn = t.turns.c
_is_running = _turn.state == literal_column("'running'", String)

_ADD = Statement(insert(t.turn_log).inline())
_READ = Statement(
    select(_c.start, _c.events)
    .where(_c.turn_id == bindparam("of_turn"), _c.position > bindparam("behind"))
    .order_by(_c.position)
)
_DELETE = Statement(delete(t.turn_log).where(_c.turn_id == bindparam("of_turn")))

_move_on = (
    update(t.turns)
    .where(_turn.epoch == bindparam("of_epoch"), _turn.last_position == bindparam("start"), _is_running)
    .values(attempt=func.coalesce(bindparam("new_attempt", type_=Integer), _turn.attempt))
)
_MOVE_ON = Statement(_move_on.where(_turn.id == bindparam("of_turn")))

# Not FOR UPDATE: that would collide with whoever only adds a row that refers to the turn.
_if_free = (
    select(_turn.id).where(_turn.id == bindparam("of_turn")).with_for_update(key_share=True, skip_locked=True)
)
_moved_one = (
    _move_on.where(_turn.id == _if_free.scalar_subquery())
    .values(last_position=bindparam("position", type_=BigInteger))
    .returning(_turn.id)
    .cte("moved_one")
)
# Nobody waits to hear that it was taken: if it was not, there is no turn for the row, and that fails.
_MOVE_ON_OR_FAIL = Statement(
    insert(t.turn_log).from_select(
        ["turn_id", "position", "start", "events"],
        select(
            select(_moved_one.c.id).scalar_subquery(),
            bindparam("position", type_=BigInteger),
            bindparam("start", type_=BigInteger),
            bindparam("events", type_=Text),
        ),
    )
)

# The same for a whole group in one statement, and without waiting for a lock: PostgreSQL.
_ids = bindparam("ids", type_=ARRAY(String))
_sets = (
    func.unnest(
        _ids,
        bindparam("epochs", type_=ARRAY(Integer)),
        bindparam("starts", type_=ARRAY(BigInteger)),
        bindparam("positions", type_=ARRAY(BigInteger)),
        bindparam("attempts", type_=ARRAY(Integer)),
        bindparam("events", type_=ARRAY(Text)),
    )
    .table_valued(
        column("turn_id", String),
        column("epoch", Integer),
        column("start", BigInteger),
        column("position", BigInteger),
        column("attempt", Integer),
        column("events", Text),
        name="sets",
    )
    .render_derived()
)
_batch = select(_sets).cte("batch")
_free = (
    select(_turn.id)
    .where(_turn.id == any_(_ids))
    .order_by(_turn.id)
    .with_for_update(key_share=True, skip_locked=True)
    .cte("free")
)
_moved = (
    update(t.turns)
    .where(
        _turn.id == _free.c.id,
        _turn.id == _batch.c.turn_id,
        _turn.epoch == _batch.c.epoch,
        _turn.last_position == _batch.c.start,
        _is_running,
    )
    .values(last_position=_batch.c.position, attempt=func.coalesce(_batch.c.attempt, _turn.attempt))
    .returning(_turn.id)
    .cte("moved")
)
_logged = (
    insert(t.turn_log)
    .from_select(
        ["turn_id", "position", "start", "events"],
        select(_batch.c.turn_id, _batch.c.position, _batch.c.start, _batch.c.events).join(
            _moved, _moved.c.id == _batch.c.turn_id
        ),
    )
    .cte("logged")
)
_APPEND = Statement(
    select(_turn.id, _moved.c.id.is_not(None).label("is_in"), _free.c.id.is_not(None).label("is_free"))
    .select_from(t.turns.outerjoin(_moved, _moved.c.id == _turn.id).outerjoin(_free, _free.c.id == _turn.id))
    .where(_turn.id == any_(_ids))
    .add_cte(_logged)
)


class TurnLog(Repository, turns.TurnLog):
    """`turn_log`, and the position in `turns` that fences it."""

    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._session.run(_ADD, _log_row(turn_id, 0, events))

    def append(self, batch: Sequence[LogAppend]) -> Appended:
        if not batch:
            return Appended(frozenset())
        if not self._session.is_server:
            # Where the writer has the whole database, nobody is busy.
            appended = Appended(frozenset(append.turn_id for append in batch if self._append_one(append)))
        elif len(batch) == 1 and self._session.hopeful:
            self._append_or_fail(batch[0])
            appended = Appended(frozenset({batch[0].turn_id}))
        else:
            appended = self._append_to_free(batch)
        self._session.changed.update(appended.accepted)
        return appended

    def _append_to_free(self, batch: Sequence[LogAppend]) -> Appended:
        rows = [_log_row(append.turn_id, append.position, append.events) for append in batch]
        found = self._session.rows(
            _APPEND,
            {
                "ids": [row["turn_id"] for row in rows],
                "epochs": [append.epoch for append in batch],
                "starts": [row["start"] for row in rows],
                "positions": [row["position"] for row in rows],
                "attempts": [_attempt(append.events) for append in batch],
                "events": [row["events"] for row in rows],
            },
        )
        return Appended(
            frozenset(turn_id for turn_id, is_in, _ in found if is_in),
            frozenset(turn_id for turn_id, _, is_free in found if not is_free),
        )

    def _append_or_fail(self, append: LogAppend) -> None:
        row = _log_row(append.turn_id, append.position, append.events)
        values = {
            "of_turn": append.turn_id,
            "of_epoch": append.epoch,
            "start": append.position,
            "position": row["position"],
            "new_attempt": _attempt(append.events),
            "events": row["events"],
        }
        self._session.run(_MOVE_ON_OR_FAIL, values)

    def _append_one(self, append: LogAppend) -> bool:
        row = _log_row(append.turn_id, append.position, append.events)
        moved = {
            "of_turn": append.turn_id,
            "of_epoch": append.epoch,
            "start": append.position,
            "last_position": row["position"],
            "new_attempt": _attempt(append.events),
        }
        is_in = self._session.count(_MOVE_ON, moved) == 1
        if is_in:
            self._session.run(_ADD, row)
        return is_in

    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        rows = self._session.rows(_READ, {"of_turn": turn_id, "behind": after})
        finished = self._finished(turn_id) if rows and rows[-1].events.endswith('["f"]]') else None
        entries: list[LogEntry] = []
        for start, events in rows:
            entries.extend(place(m.load_events(events, finished), start))
        return events_after(entries, after)

    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._session.run(_DELETE, {"of_turn": turn_id})
        self._session.run(_ADD, _log_row(turn_id, 0, events))
        self._session.changed.add(turn_id)

    def _finished(self, turn_id: str) -> TurnFinished | None:
        turn = Turns(self._session).find(turn_id)
        if turn is None or not turn.state.is_terminal:
            return None
        return TurnFinished(turn, Messages(self._session).reply_of(turn_id))


def _log_row(turn_id: str, start: int, events: Sequence[TurnEvent]) -> dict[str, Any]:
    position = start + sum(map(extent, events))
    return {"turn_id": turn_id, "position": position, "start": start, "events": m.dump_events(events)}


def _attempt(events: Sequence[TurnEvent]) -> int | None:
    """The attempt that begins within these events, if one does."""
    return next((event.attempt for event in reversed(events) if isinstance(event, AttemptRestarted)), None)
