"""What a measure found, beside its target; the table of all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A figure of each round and the target for their median. Without figures, `why` says why there are none.

    `at_most` says on which side of the target it must be; None: there is no target, it is told for comparison.
    `detail` is for people, `raw` has everything that was measured.
    """

    measure: str
    what: str
    figures: Sequence[float] = ()
    target: float | None = None
    at_most: bool = True
    unit: str = "x"
    detail: str = ""
    why: str = ""
    raw: Any = field(default=None, repr=False)

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.figures)

    @property
    def is_met(self) -> bool | None:
        """None where there is nothing to say."""
        if not self.figures or self.target is None:
            return None
        return self.median <= self.target if self.at_most else self.median >= self.target

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        names = ("measure", "what", "target", "at_most", "unit", "detail", "why", "raw")
        found = {name: getattr(self, name) for name in names}
        median = self.median if self.figures else None
        return {**found, "figures": list(self.figures), "median": median, "met": self.is_met}

    def line(self) -> str:
        """For people."""
        if not self.figures:
            return f"{self.measure:>12}  {self.what:<72} {'-':>12}  not measured: {self.why}"
        sign = "≤" if self.at_most else "≥"
        wanted = "" if self.target is None else f"{sign} {_number(self.target)} {self.unit}"
        met = {True: "yes", False: "NO", None: ""}[self.is_met]
        spread = f"[{_number(min(self.figures))} to {_number(max(self.figures))}]" if len(self.figures) > 1 else ""
        measured = f"{_number(self.median)} {self.unit}"
        return f"{self.measure:>12}  {self.what:<72} {measured:>12}  {wanted:>12}  {met:<3} {spread}".rstrip()


def table(verdicts: Sequence[Verdict]) -> str:
    """All of them."""
    lines = [f"{'':12}  {'':<72} {'measured':>12}  {'target':>12}  met [lowest to highest round]"]
    for verdict in verdicts:
        lines.append(verdict.line())
        if verdict.detail:
            lines.append(f"{'':12}    {verdict.detail}")
    return "\n".join(lines)


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
