"""Places that users take up: so many in all, and so many of one user."""

from collections import Counter

from core.model.errors import Overloaded, QuotaExceeded


class Places:
    """Places for what this process has in hand at a time."""

    def __init__(self, most: int, most_of_a_user: int) -> None:
        self._most = most
        self._most_of_a_user = most_of_a_user
        self._of: Counter[str] = Counter()
        self.taken = 0
        """How many are taken."""

    def refusal(self, user_id: str) -> Overloaded | QuotaExceeded | None:
        """Why there is no place for this user; None if there is one."""
        if self.taken >= self._most:
            return Overloaded()
        if self._of[user_id] >= self._most_of_a_user:
            return QuotaExceeded()
        return None

    def take(self, user_id: str) -> None:
        """Takes a place, also where there is none."""
        self._of[user_id] += 1
        self.taken += 1

    def give_back(self, user_id: str) -> None:
        """Gives a place back."""
        self.taken -= 1
        self._of[user_id] -= 1
        if not self._of[user_id]:
            del self._of[user_id]

    def users_without_room(self) -> frozenset[str]:
        """Users who have as many as allowed."""
        return frozenset(user_id for user_id, places in self._of.items() if places >= self._most_of_a_user)
