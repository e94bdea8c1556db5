"""The operators' report: the ledger of all users, added up and priced."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from core.model.errors import InvalidField
from core.model.ledger import Dimension, Tally, day_of
from core.model.price import PriceList
from core.ports.store import Store, Transaction

_DAYS = 30
"""Days of a report that names no first day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportQuery:
    """What to add up, by what. `since` and `until` are included; unset, they are 30 days that end today."""

    by: tuple[Dimension, ...] = (Dimension.DAY, Dimension.USER)
    user_id: str = ""
    agent_id: str = ""
    since: date | None = None
    until: date | None = None

    def check(self) -> None:
        """Raises InvalidField."""
        if len(set(self.by)) < len(self.by):
            raise InvalidField("by", "must name each thing once")
        if self.since and self.until and self.since > self.until:
            raise InvalidField("since", "must not be after the last day")


@dataclass(frozen=True, slots=True)
class ReportLine:
    """The turns of a group, a value for each thing that was added up by.

    `cost` is that of tokens whose model has a price, `unpriced_tokens` are those of models without one. Where
    there are unmetered turns it is the least that they can have cost.
    """

    group: tuple[str, ...]
    tally: Tally
    cost: Decimal = Decimal(0)
    unpriced_tokens: int = 0

    @property
    def known_cost(self) -> Decimal | None:
        """The cost; None where nothing of it is known."""
        return None if 0 < self.tally.tokens == self.unpriced_tokens else self.cost

    def plus(self, other: "ReportLine") -> "ReportLine":
        """Both together, as the group of this one."""
        return ReportLine(
            self.group,
            self.tally + other.tally,
            self.cost + other.cost,
            self.unpriced_tokens + other.unpriced_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """Lines in the order of their groups, and the days and the currency that hold for all."""

    since: date
    until: date
    currency: str
    lines: Sequence[ReportLine]

    @property
    def total(self) -> ReportLine:
        """All lines together."""
        total = ReportLine((), Tally())
        for line in self.lines:
            total = total.plus(line)
        return total


class ReportUsage:
    """Adds up what turns have cost."""

    def __init__(self, store: Store, prices: PriceList) -> None:
        self._store = store
        self._prices = prices

    async def __call__(self, query: ReportQuery) -> UsageReport:
        """The report, of one moment. Raises InvalidField."""
        query.check()
        return await self._store.read(lambda tx: self._report(tx, query))

    def _report(self, tx: Transaction, query: ReportQuery) -> UsageReport:
        until = query.until or day_of(tx.now())
        since = query.since or date.fromordinal(max(1, until.toordinal() - _DAYS + 1))
        by = query.by if Dimension.MODEL in query.by else (*query.by, Dimension.MODEL)
        model_at = by.index(Dimension.MODEL)
        found: dict[tuple[str, ...], ReportLine] = {}
        for first, last in self._prices.periods(since, until):
            for values, tally in tx.ledger.totals(by, first, last, user_id=query.user_id, agent_id=query.agent_id):
                group = values[: len(query.by)]
                price = self._prices.price(values[model_at], first)
                cost, unpriced = (price.of(tally.usage), 0) if price else (Decimal(0), tally.tokens)
                line = ReportLine(group, tally, cost, unpriced)
                found[group] = found[group].plus(line) if group in found else line
        lines = sorted(found.values(), key=lambda line: line.group)
        return UsageReport(since=since, until=until, currency=self._prices.currency, lines=lines)
