"""Deleting a thread: gone at once, whatever runs in it. A tombstone names what the provider keeps of it."""

from collections.abc import Sequence
from functools import partial

from core.model.errors import ThreadNotFound
from core.model.ledger import line_of
from core.model.turn import Turn
from core.ports.store import Store, Transaction
from core.use_cases.detached import Detached
from core.use_cases.turn_engine import TurnEngine


class DeleteThread:
    """Deletes threads with their messages, turns and logs."""

    def __init__(self, *, store: Store, engine: TurnEngine) -> None:
        self._store = store
        self._engine = engine
        self._detached: Detached[None] = Detached()

    async def __call__(self, user_id: str, thread_id: str) -> None:
        """Returns once nothing of the thread can be read any more. Its turns stop; who follows them is told that
        they do not exist. Raises ThreadNotFound."""
        await self._detached.run(self._delete(user_id, thread_id))

    async def _delete(self, user_id: str, thread_id: str) -> None:
        for turn in await self._store.write(partial(_delete, user_id, thread_id)):
            self._engine.abandon(turn.id)
            self._engine.stop_reply(turn)


def _delete(user_id: str, thread_id: str, tx: Transaction) -> Sequence[Turn]:
    if tx.threads.lock(user_id, thread_id) is None:
        raise ThreadNotFound
    # Locked, so that no process adds to their logs in between.
    at_work = [turn for each in tx.turns.unfinished(thread_id) if (turn := tx.turns.lock(each.id))]
    now = tx.now()
    tx.threads.delete(thread_id, now)
    for turn in at_work:
        tx.ledger.enter(line_of(turn, now, all_told=False))
    return at_work
