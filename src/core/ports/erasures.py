"""The repositories of erasures, and of what providers keep."""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from core.model.erasure import Copy, Counts, Receipt


@dataclass(frozen=True, slots=True)
class OpenErasure:
    """An erasure that is not finished, and whose it is."""

    id: str
    user_id: str


class Erasures(Protocol):
    """Erasures of users. A user has at most one that is not finished: the store itself refuses another."""

    @abstractmethod
    def open(self, erasure_id: str, user_id: str, now: datetime) -> OpenErasure:
        """Begins an erasure, unless one of this user is not finished: returns that one then."""

    @abstractmethod
    def find(self, erasure_id: str) -> Receipt | None:
        """Reads a receipt."""

    @abstractmethod
    def note(self, erasure_id: str, erased: Counts, now: datetime) -> bool:
        """Adds to what an erasure has erased, and says that somebody is at it. False, and nothing is noted, where
        it is finished: what there is of the user now has come since."""

    @abstractmethod
    def finish(self, erasure_id: str, now: datetime) -> None:
        """Says that nothing is left here. The user is named no more. Does nothing where that was so before."""

    @abstractmethod
    def left(self, before: datetime, limit: int) -> Sequence[OpenErasure]:
        """Erasures that are not finished and that nobody has been at since `before`, oldest first. Those of users
        on hold are left out."""

    @abstractmethod
    def newest(self, limit: int) -> Sequence[Receipt]:
        """The newest receipts first."""


class Copies(Protocol):
    """What providers keep, by their own ids: from when it is known until it is deleted there."""

    @abstractmethod
    def keep(self, thread_id: str, provider: str, refs: Collection[str], *, erase: bool = False) -> None:
        """Notes what a provider has of a thread. It is to be erased with the thread; at once if `erase`, or where
        the thread is gone already. Noted before, nothing changes."""

    @abstractmethod
    def any_due(self, provider: str) -> bool:
        """Whether something is to be erased now."""

    @abstractmethod
    def claim(self, provider: str, limit: int, seconds: float) -> Sequence[Copy]:
        """Takes what is to be erased now, the longest due first, each with one more try: for so many seconds
        nobody else is given it. What another process takes at the moment is left out."""

    @abstractmethod
    def erased(self, copy: Copy) -> None:
        """Forgets a copy that is gone."""

    @abstractmethod
    def stays(self, copy: Copy, reason: str, seconds: float) -> None:
        """Says why a copy could not be erased; it is due again after so many seconds."""

    @abstractmethod
    def left(self, limit: int) -> Sequence[Copy]:
        """What is to be erased, of every provider, the most often tried first."""

    @abstractmethod
    def count_left(self) -> Mapping[str, int]:
        """How many there are, by provider; none with none."""
