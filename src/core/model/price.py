"""Prices of models, and what usage costs by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal

from core.model.turn import Usage

_MILLION = Decimal(1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs from a day on, per million tokens."""

    model: str
    since: date
    input: Decimal
    cached_input: Decimal
    cache_write: Decimal
    output: Decimal

    def of(self, usage: Usage) -> Decimal:
        """What this costs, exactly."""
        cached = min(usage.cached_input_tokens, usage.input_tokens)
        written = min(usage.cache_write_tokens, usage.input_tokens - cached)
        return (
            (usage.input_tokens - cached - written) * self.input
            + cached * self.cached_input
            + written * self.cache_write
            + usage.output_tokens * self.output
        ) / _MILLION


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices in one currency. A model's newest price that has begun is the one that holds."""

    currency: str
    prices: tuple[Price, ...]

    def price(self, model: str, day: date) -> Price | None:
        """What a model costs on a day; None where that is not known. The name must be the very one."""
        begun = [price for price in self.prices if price.model == model and price.since <= day]
        return max(begun, key=lambda price: price.since, default=None)

    def periods(self, since: date, until: date) -> Sequence[tuple[date, date]]:
        """The days from `since` to `until` cut into spans in which no price changes, each with its last day."""
        if since > until:
            return []
        starts = sorted({since, *(price.since for price in self.prices if since < price.since <= until)})
        ends = [start - timedelta(days=1) for start in starts[1:]]
        return list(zip(starts, [*ends, until], strict=True))
