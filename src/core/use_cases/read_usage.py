"""Reading a user's own usage, and how the user stands to the quotas."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

from core.model.errors import InvalidField
from core.model.ledger import LedgerKey, LedgerLine, Quotas, QuotaStanding, day_after, day_of
from core.model.user import check_user_id
from core.ports.store import Store, Transaction
from core.use_cases.paging import make_token, page_size, read_token


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """Whose usage, from a day to a day, both included."""

    user_id: str
    since: date = date.min
    until: date = date.max


@dataclass(frozen=True, slots=True)
class UsagePage:
    """Lines, newest day first, the token of the next page, empty on the last, and today's quotas."""

    lines: Sequence[LedgerLine]
    next_token: str
    quotas: Sequence[QuotaStanding]
    resets_at: datetime


class ReadUsage:
    """Reads what a user's turns have cost."""

    def __init__(self, store: Store, quotas: Quotas) -> None:
        self._store = store
        self._quotas = quotas

    async def __call__(self, query: UsageQuery, size: int, token: str) -> UsagePage:
        """A page of a user's usage. Raises InvalidField."""
        check_user_id(query.user_id)
        size = page_size(size)
        scope = ["usage", query.user_id, query.since.isoformat(), query.until.isoformat()]
        place = read_token(token, scope, [str, str, str])
        before = None
        if place is not None:
            day, agent_id, model = map(str, place)
            try:
                before = LedgerKey(query.user_id, date.fromisoformat(day), agent_id, model)
            except ValueError as error:
                raise InvalidField("page_token", "is not a token of this query") from error

        def read(tx: Transaction) -> tuple[Sequence[LedgerLine], Sequence[QuotaStanding], datetime]:
            now = tx.now()
            lines = tx.ledger.of_user(query.user_id, query.since, query.until, before, size + 1)
            spent = self._quotas.standing(tx.ledger.spent(query.user_id, day_of(now))) if self._quotas else ()
            return lines, spent, day_after(now)

        lines, quotas, resets_at = await self._store.read(read)
        page = lines[:size]
        key = page[-1].key if len(lines) > size else None
        next_token = make_token(scope, [key.day.isoformat(), key.agent_id, key.model]) if key else ""
        return UsagePage(page, next_token, quotas, resets_at)
