"""The repository of leases. Their time is the database's, never that of the process that asks."""

from datetime import timedelta

from sqlalchemy import bindparam, delete, exists, insert, select, update

from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository
from adapters.sql.statement import Statement
from adapters.sql.tables import UtcDateTime
from core.ports import turns
from core.ports.store import UNCLAIMED

_c = t.leases.c
_owner = bindparam("of_owner", type_=_c.owner.type)
_now = bindparam("now", type_=UtcDateTime)

_LOCK = Statement(select(_c.lease_until).where(_c.owner == _owner).with_for_update())
_ADD = Statement(insert(t.leases))
_RENEW = Statement(update(t.leases).where(_c.owner == _owner))
_END = Statement(delete(t.leases).where(_c.owner == _owner))
_END_OTHERS = Statement(delete(t.leases).where(_c.owner != _owner))
_TIDY = Statement(delete(t.leases).where(_c.lease_until <= _now))
_OTHERS = Statement(select(exists().where(_c.owner != _owner, _c.lease_until > _now).label("are_there")))


class Leases(Repository, turns.Leases):
    """`leases`. A row that has run out counts as none, and goes when the next process comes."""

    def renew(self, owner: str, seconds: float) -> bool:
        earlier = self._session.row(_LOCK, {"of_owner": owner})
        # Asked for behind the lock: whoever waits here must not count with a time from before.
        now = self._session.now()
        until = now + timedelta(seconds=seconds)
        if earlier is None:
            self._session.run(_TIDY, {"now": now})
            self._session.run(_ADD, {"owner": owner, "lease_until": until})
            return False
        self._session.run(_RENEW, {"of_owner": owner, "lease_until": until})
        renewed: bool = earlier.lease_until > now
        return renewed

    def end(self, owner: str) -> None:
        self._session.run(_END, {"of_owner": owner})
        self._session.changed.add(UNCLAIMED)  # perhaps: what it has left is for others to look for

    def end_others(self, owner: str) -> None:
        self._session.run(_END_OTHERS, {"of_owner": owner})

    def others(self, owner: str) -> bool:
        return bool(self._session.row(_OTHERS, {"of_owner": owner, "now": self._session.now()}).are_there)
