"""Reads prices from a TOML file: ours, or an operator's instead."""

import re
import tomllib
from collections import Counter
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from core.model.price import Price, PriceList

SHIPPED = Path(__file__).parent / "prices.toml"

_AMOUNTS = ("input", "cached_input", "cache_write", "output")
_KEYS = frozenset({"model", "since", *_AMOUNTS})


class PricesError(Exception):
    """The prices can't be used. `faults` holds everything that is wrong with them, a sentence each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def load_prices(file: Path | None = None) -> PriceList:
    """The prices of a file, of ours by default. Raises PricesError with all faults."""
    file = file or SHIPPED
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, UnicodeError) as error:
        raise PricesError([f"can't be read ({type(error).__name__})"]) from error
    except tomllib.TOMLDecodeError as error:
        raise PricesError([f"is no TOML: {error}"]) from error
    faults = [f"there is no key {key!r}" for key in sorted(data.keys() - {"currency", "price"})]
    currency = data.get("currency")
    if not isinstance(currency, str) or not re.fullmatch("[A-Z]{3}", currency):
        faults.append("currency: must be three capital letters")
    entries = data.get("price", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise PricesError([*faults, "price: must be a list of tables"])
    for number, entry in enumerate(entries, 1):
        faults += [f"price {number}: {fault}" for fault in _faults(entry)]
    if not faults:
        kept = Counter((entry["model"], entry["since"]) for entry in entries)
        faults = [
            f"{model}: there are {count} prices since {since}"
            for (model, since), count in kept.items()
            if count > 1
        ]
    if faults:
        raise PricesError(faults)
    return PriceList(str(currency), tuple(map(_price, entries)))


def _faults(entry: dict[str, Any]) -> list[str]:
    faults = [f"there is no key {key!r}" for key in sorted(entry.keys() - _KEYS)]
    if not isinstance(entry.get("model"), str) or not entry["model"]:
        faults.append("model: must be a name")
    since = entry.get("since")
    if not isinstance(since, date) or isinstance(since, datetime):
        faults.append("since: must be a day, YYYY-MM-DD without quotes")
    wrong = [name for name in _AMOUNTS if not _is_amount(entry.get(name))]
    return faults + [f"{name}: must be an amount per million tokens, from 0" for name in wrong]


def _is_amount(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return False
    return Decimal(value).is_finite() and 0 <= value < 1_000_000


def _price(entry: dict[str, Any]) -> Price:
    amounts = {name: Decimal(entry[name]) for name in _AMOUNTS}
    return Price(model=entry["model"], since=entry["since"], **amounts)
