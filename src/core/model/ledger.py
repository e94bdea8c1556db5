"""The ledger: what turns have cost, by user, day, agent and model, and how much of it a user may have a day."""

from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum

from core.model.turn import Turn, Usage

FORGOTTEN = ""
"""Stands in the ledger for every user who has been erased. No user is called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Turns and what they have cost.

    Of `unmetered_turns` the provider never said the whole cost: they were cut off, and `usage` has what it had
    said by then. Nothing is estimated.
    """

    turns: int = 0
    unmetered_turns: int = 0
    usage: Usage = field(default_factory=Usage)

    @property
    def tokens(self) -> int:
        """Tokens read and written; those from a cache and those spent on reasoning are among them."""
        return self.usage.input_tokens + self.usage.output_tokens

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            turns=self.turns + other.turns,
            unmetered_turns=self.unmetered_turns + other.unmetered_turns,
            usage=self.usage + other.usage,
        )


@dataclass(frozen=True, slots=True, order=True)
class LedgerKey:
    """A line's place in the ledger. `day` is the UTC day, by the store's time, in which its turns ended.

    `model` is empty for turns that ended before any model was asked.
    """

    user_id: str
    day: date
    agent_id: str
    model: str


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """What the turns of one place in the ledger have cost."""

    key: LedgerKey
    tally: Tally


class Dimension(StrEnum):
    """By what lines are added up."""

    USER = "user"
    AGENT = "agent"
    MODEL = "model"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What each user may have in a UTC day: turns begun, tokens used up before another turn. None: no bound."""

    turns_per_day: int | None = None
    tokens_per_day: int | None = None

    def __bool__(self) -> bool:
        return self != UNLIMITED

    def standing(self, spent: Tally) -> "list[QuotaStanding]":
        """How a user who has spent this stands to each quota that is set."""
        bounds = {
            "turns_per_day": (self.turns_per_day, spent.turns),
            "tokens_per_day": (self.tokens_per_day, spent.tokens),
        }
        return [QuotaStanding(name, limit, used) for name, (limit, used) in bounds.items() if limit is not None]


UNLIMITED = Quotas()


@dataclass(frozen=True, slots=True)
class QuotaStanding:
    """A quota of a day, and how much of it is used. `used` may be more: turns at work are not stopped."""

    name: str
    limit: int
    used: int

    @property
    def remaining(self) -> int:
        """What is left."""
        return max(0, self.limit - self.used)


def day_of(moment: datetime) -> date:
    """The day of the ledger at a moment."""
    return moment.astimezone(UTC).date()


def day_after(moment: datetime) -> datetime:
    """When the next day begins."""
    return datetime.combine(day_of(moment) + timedelta(days=1), time(), UTC)


def line_of(turn: Turn, ended_at: datetime, *, all_told: bool) -> LedgerLine:
    """What a turn that is over adds to the ledger. `all_told`: the provider has said all that it cost.

    A turn that nobody has ever claimed has cost nothing.
    """
    unmetered = not all_told and turn.claimed_at is not None
    return LedgerLine(
        LedgerKey(turn.user_id, day_of(ended_at), turn.agent_id, turn.model),
        Tally(turns=1, unmetered_turns=int(unmetered), usage=turn.usage),
    )
