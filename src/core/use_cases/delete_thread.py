"""Deleting a thread: gone at once, whatever runs in it."""

from collections.abc import Callable

from core.model.errors import ThreadNotFound
from core.model.turn import Turn
from core.ports.store import Store
from core.use_cases.detached import Detached
from core.use_cases.erase_thread import erase_thread


class DeleteThread:
    """Deletes threads with their messages, turns and logs.

    `gone` is told of every turn that had not ended, `erased` that something was erased.
    """

    def __init__(self, *, store: Store, gone: Callable[[Turn], None], erased: Callable[[], None]) -> None:
        self._store = store
        self._gone = gone
        self._erased = erased
        self._detached: Detached[None] = Detached()

    async def __call__(self, user_id: str, thread_id: str) -> None:
        """Returns once nothing of the thread can be read any more. Its turns stop; who follows them is told that
        they do not exist. Raises ThreadNotFound and LegalHold."""
        await self._detached.run(self._delete(user_id, thread_id))

    async def _delete(self, user_id: str, thread_id: str) -> None:
        erased = await self._store.write(lambda tx: erase_thread(tx, user_id, thread_id))
        if erased is None:
            raise ThreadNotFound
        for turn in erased.unfinished:
            self._gone(turn)
        self._erased()
