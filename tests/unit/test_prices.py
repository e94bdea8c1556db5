"""Prices: what holds on a day, what usage costs by it, and every fault of a list at once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest

from adapters.memory.store import MemoryStore
from adapters.prices.loader import PricesError, load_prices
from core.model.errors import InvalidField
from core.model.ledger import Dimension, LedgerKey, LedgerLine, Tally
from core.model.price import Price, PriceList
from core.model.turn import Usage
from core.use_cases.report_usage import ReportQuery, ReportUsage, UsageReport
from doubles import ManualClock

DAY = date(2026, 11, 22)
ONE_DAY = timedelta(days=1)


def price(model: str, since: date, amount: str = "1") -> Price:
    return Price(
        model=model,
        since=since,
        input=Decimal(amount),
        cached_input=Decimal(amount) / 10,
        cache_write=Decimal(amount) * 2,
        output=Decimal(amount) * 5,
    )


LIST = PriceList("USD", (price("a", DAY, "2"), price("a", DAY - 9 * ONE_DAY), price("b", DAY + ONE_DAY)))


def test_a_price_is_exact_and_counts_what_was_cached_once() -> None:
    usage = Usage(input_tokens=1_000_000, cached_input_tokens=400_000, output_tokens=10, reasoning_tokens=9)
    assert price("a", DAY, "0.10").of(usage) == Decimal("0.064005")
    assert price("a", DAY, "0.10").of(replace(usage, cache_write_tokens=100_000)) == Decimal("0.074005")
    assert price("a", DAY).of(Usage(input_tokens=1, cache_write_tokens=9)) == Decimal("0.000002")
    assert price("a", DAY).of(Usage(input_tokens=1, cached_input_tokens=3)) == Decimal("0.0000001")
    assert price("a", DAY).of(Usage()) == 0


def test_the_newest_price_that_has_begun_holds() -> None:
    assert LIST.price("a", DAY - 10 * ONE_DAY) is None
    assert LIST.price("a", DAY - ONE_DAY) == LIST.prices[1]
    assert LIST.price("a", DAY) == LIST.price("a", date.max) == LIST.prices[0]
    assert LIST.price("A", DAY) is None
    assert LIST.price("a-2026", DAY) is None


@pytest.mark.parametrize(
    ("since", "until", "starts"),
    [
        (DAY, DAY, [DAY]),
        (DAY - ONE_DAY, DAY, [DAY - ONE_DAY, DAY]),
        (date.min, date.max, [date.min, DAY - 9 * ONE_DAY, DAY, DAY + ONE_DAY]),
        (DAY + ONE_DAY, date.max, [DAY + ONE_DAY]),
        (DAY, DAY - ONE_DAY, []),
    ],
)
def test_periods_cover_each_day_once_and_change_no_price(since: date, until: date, starts: Sequence[date]) -> None:
    periods = LIST.periods(since, until)
    assert [first for first, _ in periods] == starts
    for (_, last), (first, _) in pairwise(periods):
        assert first == last + ONE_DAY
    if periods:
        assert periods[-1][1] == until
    for first, last in periods:
        assert all(LIST.price(model, first) == LIST.price(model, last) for model in "ab")


def test_the_shipped_prices_are_whole() -> None:
    prices = load_prices()
    luna = prices.price("gpt-6-luna", DAY)
    assert luna is not None
    assert prices.currency == "USD"
    amounts = luna.input, luna.cached_input, luna.cache_write, luna.output
    assert amounts == (Decimal("0.10"), Decimal("0.01"), Decimal("0.125"), Decimal("0.50"))
    practice = prices.price("practice-1", DAY)
    assert practice is not None
    assert practice.of(Usage(input_tokens=9, output_tokens=9)) == 0


GOOD = {
    "model": '"m"',
    "since": "2026-01-01",
    "input": "1.5",
    "cached_input": "0",
    "cache_write": "3",
    "output": "2",
}


def written(folder: Path, entries: Sequence[Mapping[str, str]], head: str = 'currency = "EUR"') -> Path:
    """A list of prices."""
    file = folder / "prices.toml"
    tables = ["\n".join(["[[price]]", *(f"{key} = {value}" for key, value in entry.items())]) for entry in entries]
    file.write_text("\n".join([head, *tables]))
    return file


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    prices = load_prices(written(tmp_path, [GOOD]))
    values = Price(
        model="m",
        since=date(2026, 1, 1),
        input=Decimal("1.5"),
        cached_input=Decimal(0),
        cache_write=Decimal(3),
        output=Decimal(2),
    )
    assert prices == PriceList("EUR", (values,))
    assert load_prices(written(tmp_path, [])).prices == ()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model": '""'}, "model"),
        ({"model": "1"}, "model"),
        ({"since": '"2026-01-01"'}, "since"),
        ({"since": "2026-01-01T00:00:00"}, "since"),
        ({"input": "-1"}, "input"),
        ({"input": "nan"}, "input"),
        ({"output": "inf"}, "output"),
        ({"output": "true"}, "output"),
        ({"cached_input": '"1"'}, "cached_input"),
        ({"batch": "1"}, "batch"),
    ],
    ids=str,
)
def test_a_fault_is_named(change: dict[str, str], fault: str, tmp_path: Path) -> None:
    with pytest.raises(PricesError) as error:
        load_prices(written(tmp_path, [GOOD, GOOD | change]))
    (told,) = error.value.faults
    assert told.startswith("price 2: ")
    assert fault in told


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(PricesError) as error:
        load_prices(written(tmp_path, [{}], head='currency = "euro"\nextra = 1'))
    assert len(error.value.faults) == 8
    with pytest.raises(PricesError, match="2 prices"):
        load_prices(written(tmp_path, [GOOD, GOOD]))
    for text in ("currency = ", 'currency = "USD"\nprice = 1', 'currency = "USD"\nprice = [1]'):
        file = tmp_path / "broken.toml"
        file.write_text(text)
        with pytest.raises(PricesError):
            load_prices(file)
    with pytest.raises(PricesError, match="can't be read"):
        load_prices(tmp_path / "none.toml")


async def report(lines: Sequence[tuple[LedgerKey, Tally]], query: ReportQuery) -> UsageReport:
    """A report on a ledger with these lines, at the prices of LIST."""
    store = MemoryStore(ManualClock())
    for key, tally in lines:
        await store.write(lambda tx, line=LedgerLine(key, tally): tx.ledger.enter(line))  # type: ignore[misc] # noqa: B008
    return await ReportUsage(store, LIST)(query)


async def test_a_report_prices_each_day_as_it_was() -> None:
    million = Tally(turns=1, usage=Usage(input_tokens=1_000_000))
    lines = [
        (LedgerKey("ada", DAY - 30 * ONE_DAY, "x", "a"), million),
        (LedgerKey("ada", DAY - 29 * ONE_DAY, "x", "a"), million),
        (LedgerKey("ada", DAY - ONE_DAY, "x", "a"), million),
        (LedgerKey("ada", DAY, "y", "a"), million),
        (LedgerKey("bob", DAY, "x", "b"), million),
        (LedgerKey("cy", DAY, "x", ""), Tally(turns=1)),
    ]
    told = await report(lines, ReportQuery(by=(Dimension.USER,)))
    assert (told.since, told.until, told.currency) == (DAY - 29 * ONE_DAY, DAY, "USD")
    figures = {line.group: (line.tally.turns, line.known_cost, line.unpriced_tokens) for line in told.lines}
    assert figures == {
        ("ada",): (3, Decimal(3), 1_000_000),  # before its first price, the model had none
        ("bob",): (1, None, 1_000_000),
        ("cy",): (1, Decimal(0), 0),
    }
    total = told.total
    assert (total.tally.turns, total.known_cost, total.unpriced_tokens) == (5, Decimal(3), 2_000_000)
    whole = await report(lines, ReportQuery(by=(), since=date.min, until=date.max))
    assert [(line.group, line.tally.turns) for line in whole.lines] == [((), 6)]
    models = await report(lines, ReportQuery(by=(Dimension.MODEL, Dimension.AGENT), user_id="ada", agent_id="y"))
    assert [(line.group, line.known_cost) for line in models.lines] == [(("a", "y"), Decimal(2))]
    assert (await report([], ReportQuery())).lines == []
    assert (await report([], ReportQuery(until=date.min))).since == date.min


@pytest.mark.parametrize(
    "query",
    [ReportQuery(by=(Dimension.DAY, Dimension.DAY)), ReportQuery(since=DAY, until=DAY - ONE_DAY)],
    ids=["by", "since"],
)
async def test_a_report_that_makes_no_sense_is_refused(query: ReportQuery) -> None:
    with pytest.raises(InvalidField):
        await report([], query)
