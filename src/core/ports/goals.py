"""The repository of goals."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from core.model.agent import Domain
from core.model.goal import Goal


class Goals(Protocol):
    """Goals of users."""

    @abstractmethod
    def add(self, goal: Goal, key: str) -> Goal:
        """Stores a goal once for each idempotency key; a repeat returns the goal stored first."""

    @abstractmethod
    def list(self, user_id: str, domain: Domain, limit: int) -> Sequence[Goal]:
        """The user's goals in a domain, newest first."""

    @abstractmethod
    def of_user(self, user_id: str, after: str, limit: int) -> Sequence[Goal]:
        """The user's goals in every domain, in the order of their ids, beginning behind the id `after`."""

    @abstractmethod
    def delete_of(self, user_id: str) -> int:
        """Deletes all goals of a user; returns how many."""
