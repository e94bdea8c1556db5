"""Cancelling a turn: whoever asks ends it in the store; its owner learns that it has nothing left to write."""

import asyncio
from functools import partial

from core.model.errors import TurnNotFound
from core.model.turn import Turn, TurnReason
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.use_cases.end_turn import Ending, end_turn
from core.use_cases.turn_engine import TurnEngine


class CancelTurn:
    """Ends turns CANCELLED, keeping the partial text."""

    def __init__(self, *, store: Store, engine: TurnEngine, ids: Ids) -> None:
        self._store = store
        self._engine = engine
        self._ids = ids
        self._tasks: set[asyncio.Task[Turn]] = set()

    async def __call__(self, user_id: str, turn_id: str) -> Turn:
        """The turn in its terminal state, whoever brought it there. Raises TurnNotFound. Idempotent."""
        # A caller who leaves between the commit and the owner's learning of it must not leave the owner at work.
        task = asyncio.create_task(self._end(user_id, turn_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _end(self, user_id: str, turn_id: str) -> Turn:
        turn = await self._store.write(partial(self._cancel, user_id, turn_id))
        self._engine.abandon(turn_id)
        return turn

    def _cancel(self, user_id: str, turn_id: str, tx: Transaction) -> Turn:
        if tx.turns.get(user_id, turn_id) is None:
            raise TurnNotFound
        ending = Ending(reason=TurnReason.CANCELLED_BY_CALLER, cancelled=True)
        return end_turn(tx, self._ids, turn_id, ending).turn
