"""The repositories of erasures, and of what providers keep."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Integer, bindparam, delete, exists, func, select, update

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository, insert_if_new
from adapters.sql.statement import Statement
from adapters.sql.tables import UtcDateTime
from core.model.erasure import Copy, Counts, Receipt, user_hash
from core.ports import erasures
from core.ports.erasures import OpenErasure

_e = t.erasures.c
_c = t.copies.c
_erasure_id = bindparam("of_erasure", type_=_e.id.type)
_now = bindparam("now", type_=UtcDateTime)
_limit = bindparam("limit", type_=Integer)

_is_held = exists().where(t.users.c.id == _e.user_id, t.users.c.held_since.is_not(None))
_copies_left = (
    select(func.count())
    .select_from(t.copies.join(t.tombstones, t.tombstones.c.thread_id == _c.thread_id))
    .where(t.tombstones.c.erasure_id == _e.id)
    .scalar_subquery()
)
_receipts = select(t.erasures, _is_held.label("held"), _copies_left.label("copies_left"))

_OPEN = insert_if_new(t.erasures)
_OF_USER = Statement(select(_e.id, _e.user_id).where(_e.user_id == bindparam("of_user")))
_FIND = Statement(_receipts.where(_e.id == _erasure_id))
_NEWEST = Statement(_receipts.order_by(_e.requested_at.desc(), _e.id.desc()).limit(_limit))
_ERASED = Statement(select(_e.erased, _e.finished_at).where(_e.id == _erasure_id).with_for_update())
_CHANGE = Statement(update(t.erasures).where(_e.id == _erasure_id))
_FINISH = Statement(update(t.erasures).where(_e.id == _erasure_id, _e.finished_at.is_(None)))
_LEFT = Statement(
    select(_e.id, _e.user_id)
    .where(_e.user_id.is_not(None), _e.touched_at < bindparam("before", type_=UtcDateTime), ~_is_held)
    .order_by(_e.requested_at, _e.id)
    .limit(_limit)
)


class Erasures(Repository, erasures.Erasures):
    """`erasures`."""

    def open(self, erasure_id: str, user_id: str, now: datetime) -> OpenErasure:
        values = {
            "id": erasure_id,
            "user_id": user_id,
            "user_hash": user_hash(erasure_id, user_id),
            "requested_at": now,
            "touched_at": now,
            "erased": dataclasses.asdict(Counts()),
        }
        self._session.run(_OPEN[self._session.dialect.name], values)
        row = self._session.row(_OF_USER, {"of_user": user_id})
        return OpenErasure(row.id, row.user_id)

    def find(self, erasure_id: str) -> Receipt | None:
        row = self._session.row(_FIND, {"of_erasure": erasure_id})
        return None if row is None else m.receipt_of(row)

    def note(self, erasure_id: str, erased: Counts, now: datetime) -> bool:
        row = self._session.row(_ERASED, {"of_erasure": erasure_id})
        if row.finished_at is not None:
            return False
        counts = dataclasses.asdict(Counts(**row.erased) + erased)
        self._session.run(_CHANGE, {"of_erasure": erasure_id, "erased": counts, "touched_at": now})
        return True

    def finish(self, erasure_id: str, now: datetime) -> None:
        self._session.run(_FINISH, {"of_erasure": erasure_id, "user_id": None, "finished_at": now})

    def left(self, before: datetime, limit: int) -> Sequence[OpenErasure]:
        found = self._session.rows(_LEFT, {"before": before, "limit": limit})
        return [OpenErasure(row.id, row.user_id) for row in found]

    def newest(self, limit: int) -> Sequence[Receipt]:
        return [m.receipt_of(row) for row in self._session.rows(_NEWEST, {"limit": limit})]


_thread_id = bindparam("of_thread", type_=_c.thread_id.type)
_provider = bindparam("of_provider", type_=_c.provider.type)
_one = (_c.provider == _provider, _c.ref == bindparam("of_ref", type_=_c.ref.type))
_due = (_c.provider == _provider, _c.due <= _now)

# Until the transaction ends nobody deletes the thread that is there now.
_IS_THERE = Statement(
    select(t.threads.c.id).where(t.threads.c.id == _thread_id).with_for_update(key_share=True, read=True)
)
_KEEP = insert_if_new(t.copies)
_ANY_DUE = Statement(select(exists().where(*_due).label("are_there")))
_CHOOSE = Statement(
    select(t.copies).where(*_due).order_by(_c.due, _c.ref).limit(_limit).with_for_update(skip_locked=True)
)
_CHANGE_COPY = Statement(update(t.copies).where(*_one))
_ERASED_COPY = Statement(delete(t.copies).where(*_one))
_LEFT_COPIES = Statement(
    select(t.copies).where(_c.due.is_not(None)).order_by(_c.tries.desc(), _c.due, _c.ref).limit(_limit)
)
_COUNT_LEFT = Statement(
    select(_c.provider, func.count().label("left_")).where(_c.due.is_not(None)).group_by(_c.provider)
)


class Copies(Repository, erasures.Copies):
    """`copies`."""

    def keep(self, thread_id: str, provider: str, refs: Collection[str], *, erase: bool = False) -> None:
        if not refs:
            return
        lives = not erase and self._session.row(_IS_THERE, {"of_thread": thread_id}) is not None
        due = None if lives else self._session.now()
        for ref in refs:
            row = {"provider": provider, "ref": ref, "thread_id": thread_id, "due": due, "tries": 0, "reason": ""}
            self._session.run(_KEEP[self._session.dialect.name], row)

    def any_due(self, provider: str) -> bool:
        return bool(self._session.row(_ANY_DUE, {"of_provider": provider, "now": self._session.now()}).are_there)

    def claim(self, provider: str, limit: int, seconds: float) -> Sequence[Copy]:
        now = self._session.now()
        found = self._session.rows(_CHOOSE, {"of_provider": provider, "now": now, "limit": limit})
        copies = [dataclasses.replace(m.copy_of(row), tries=row.tries + 1) for row in found]
        for copy in copies:
            values = {"due": now + timedelta(seconds=seconds), "tries": copy.tries}
            self._session.run(_CHANGE_COPY, {**_this(copy), **values})
        return copies

    def erased(self, copy: Copy) -> None:
        self._session.run(_ERASED_COPY, _this(copy))

    def stays(self, copy: Copy, reason: str, seconds: float) -> None:
        due = self._session.now() + timedelta(seconds=seconds)
        self._session.run(_CHANGE_COPY, {**_this(copy), "due": due, "reason": reason[:128]})

    def left(self, limit: int) -> Sequence[Copy]:
        return [m.copy_of(row) for row in self._session.rows(_LEFT_COPIES, {"limit": limit})]

    def count_left(self) -> Mapping[str, int]:
        return {row.provider: row.left_ for row in self._session.rows(_COUNT_LEFT)}


def _this(copy: Copy) -> m.Values:
    return {"of_provider": copy.provider, "of_ref": copy.ref}
