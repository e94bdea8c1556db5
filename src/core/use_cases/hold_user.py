"""Legal hold: while it lasts, nothing of a user is erased, whoever asks."""

from core.model.user import check_user_id
from core.ports.store import Store, Transaction


class HoldUser:
    """Puts users on hold and releases them. Deleting a thread, erasing the user and retention then refuse."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def __call__(self, user_id: str, *, hold: bool) -> None:
        """Returns once it holds, or no more. A user of whom nothing is known yet can be held as well."""
        check_user_id(user_id)

        def change(tx: Transaction) -> None:
            now = tx.now()
            if hold:
                tx.users.ensure(user_id, now)
            tx.users.hold(user_id, now if hold else None)

        await self._store.write(change)
