"""The repository of goals."""

import hashlib
from collections.abc import Sequence

from sqlalchemy import Integer, bindparam, delete, select

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository, insert_if_new
from adapters.sql.statement import Statement
from core.model.agent import Domain
from core.model.goal import Goal
from core.ports import goals

_c = t.goals.c
_ADD = insert_if_new(t.goals)
_BY_KEY = Statement(select(t.goals).where(_c.key == bindparam("key")))
_LIST = Statement(
    select(t.goals)
    .where(_c.user_id == bindparam("user_id"), _c.domain == bindparam("domain"))
    .order_by(_c.created_at.desc(), _c.id.desc())
    .limit(bindparam("limit", type_=Integer))
)
_OF_USER = Statement(
    select(t.goals)
    .where(_c.user_id == bindparam("user_id"), _c.id > bindparam("after"))
    .order_by(_c.id)
    .limit(bindparam("limit", type_=Integer))
)
_DELETE = Statement(delete(t.goals).where(_c.user_id == bindparam("user_id")))
_LONGEST_KEY = 255
"""Characters: what the column has room for."""


class Goals(Repository, goals.Goals):
    """`goals`."""

    def add(self, goal: Goal, key: str) -> Goal:
        key = _fitting(key)
        self._session.run(_ADD[self._session.dialect.name], m.goal_values(goal, key))
        return m.goal_of(self._session.row(_BY_KEY, {"key": key}))

    def list(self, user_id: str, domain: Domain, limit: int) -> Sequence[Goal]:
        found = self._session.rows(_LIST, {"user_id": user_id, "domain": domain.value, "limit": limit})
        return [m.goal_of(row) for row in found]

    def of_user(self, user_id: str, after: str, limit: int) -> Sequence[Goal]:
        found = self._session.rows(_OF_USER, {"user_id": user_id, "after": after, "limit": limit})
        return [m.goal_of(row) for row in found]

    def delete_of(self, user_id: str) -> int:
        return self._session.count(_DELETE, {"user_id": user_id})


def _fitting(key: str) -> str:
    """The key, or its digest: a call's id is the provider's, and gateways make ids as long as they like."""
    return key if len(key) <= _LONGEST_KEY else hashlib.sha256(key.encode()).hexdigest()
