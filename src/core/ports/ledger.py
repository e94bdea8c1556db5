"""The repository of the ledger."""

from abc import abstractmethod
from collections.abc import Sequence
from datetime import date
from typing import Protocol

from core.model.ledger import Dimension, LedgerKey, LedgerLine, Tally


class Ledger(Protocol):
    """What turns have cost, added up. It outlives the turns: deleting a thread takes nothing out of it."""

    @abstractmethod
    def enter(self, line: LedgerLine) -> None:
        """Adds to the line in the same place."""

    @abstractmethod
    def spent(self, user_id: str, day: date) -> Tally:
        """What a user has in the ledger for a day, together with all turns of theirs that have not ended, each
        once and with what is on record of its cost."""

    @abstractmethod
    def of_user(
        self, user_id: str, since: date, until: date, before: LedgerKey | None, limit: int
    ) -> Sequence[LedgerLine]:
        """A user's lines from a day to a day, both included, those behind `before`: newest day first, then by
        agent and model, descending."""

    @abstractmethod
    def totals(
        self, by: Sequence[Dimension], since: date, until: date, *, user_id: str = "", agent_id: str = ""
    ) -> Sequence[tuple[tuple[str, ...], Tally]]:
        """The lines from a day to a day, both included, of a user or an agent if one is given, added up: a value
        for each of `by`, in its order, days as YYYY-MM-DD."""

    @abstractmethod
    def forget(self, user_id: str) -> None:
        """Adds a user's lines to those of FORGOTTEN and removes them: sums over all users stay what they are.

        Turns of theirs that have not ended will add to the user's lines again: delete them first.
        """
