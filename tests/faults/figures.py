"""How large a run is, what replays it, and what it found.

The one reader of VIDA_TEST_SIZE (tiny, small or large), VIDA_TEST_SEED and VIDA_TEST_<COUNT>, at import: tests
run without these settings. The one printer of the figures.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SIZE = os.environ.get("VIDA_TEST_SIZE", "tiny")
SEED = int(os.environ.get("VIDA_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)

_SIZES = ("tiny", "small", "large")
_SET = {
    name: int(value) for name, value in os.environ.items() if name.startswith("VIDA_TEST_") and value.isdigit()
}
_STARTED = time.monotonic()

# What no run may have.
BROKEN = ("turns lost", "duplicates", "wrong suffixes", "turns that never ended", "wrong endings")


def sized(name: str, tiny: int, small: int, large: int) -> int:
    """A count: as VIDA_TEST_<NAME> says, else by the size of the run."""
    return _SET.get(f"VIDA_TEST_{name}", dict(zip(_SIZES, (tiny, small, large), strict=True))[SIZE])


def chance(*what: object) -> random.Random:
    """What a test draws its schedule from. The same seed and name give the same schedule."""
    name = ":".join(map(str, (SEED, *what)))
    print(f"replay with VIDA_TEST_SEED={SEED} VIDA_TEST_SIZE={SIZE} ({name})")
    return random.Random(name)


def stores(tiny: str = "") -> list[str]:
    """The stores that a test runs on: both, or the one named where the run is tiny."""
    return [tiny] if tiny and SIZE == "tiny" else ["sqlite", "postgresql"]


def chosen(cases: Sequence[T], *tiny: T) -> list[T]:
    """The cases that a test runs through: all, or those named where the run is tiny."""
    return list(tiny or cases[:1]) if SIZE == "tiny" else list(cases)


class Figures:
    """Counts by suite."""

    def __init__(self) -> None:
        self.suites: dict[str, Counter[str]] = {}

    def add(self, suite: str, counts: dict[str, int]) -> None:
        """Adds to a suite's counts."""
        self.suites.setdefault(suite, Counter()).update(counts)

    def most(self, suite: str, name: str, value: int) -> None:
        """Keeps the largest."""
        counts = self.suites.setdefault(suite, Counter())
        counts[name] = max(counts[name], value)

    def progress(self, suite: str, done: int, of: int) -> None:
        """Says how far a suite is: about fifty times, and only in a run that lasts."""
        if SIZE != "tiny" and (done == of or done % max(1, of // 50) == 0):
            counts = self.suites.get(suite, Counter())
            shown = ", ".join(f"{name} {count}" for name, count in counts.items() if not name.startswith("at "))
            print(f"[{time.monotonic() - _STARTED:6.0f} s] {suite}: {done}/{of}; {shown}", flush=True)

    def report(self) -> list[str]:
        """The table, in text and as one line of JSON."""
        lines = [f"faults: size {SIZE}, seed {SEED}, {time.monotonic() - _STARTED:.0f} s"]
        for suite, counts in self.suites.items():
            lines.append(f"  {suite}")
            lines += [f"    {name:<28}{count:>10,}" for name, count in counts.items()]
        total: Counter[str] = Counter()
        for counts in self.suites.values():
            total.update({name: counts[name] for name in ("cycles", "acknowledged turns", "streams cut", *BROKEN)})
        lines.append("  all")
        lines += [f"    {name:<28}{count:>10,}" for name, count in total.items()]
        lines.append(json.dumps({"size": SIZE, "seed": SEED, "suites": self.suites, "all": total}))
        return lines


FIGURES = Figures()
