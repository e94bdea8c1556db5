"""Cancelling a turn: whoever asks ends it in the store; its owner learns that it has nothing left to write."""

from functools import partial

from core.model.errors import TurnNotFound
from core.model.turn import Turn, TurnReason
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.use_cases.detached import Detached
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.turn_engine import TurnEngine


class CancelTurn:
    """Ends turns CANCELLED, keeping the partial text."""

    def __init__(self, *, store: Store, engine: TurnEngine, ids: Ids) -> None:
        self._store = store
        self._engine = engine
        self._ids = ids
        self._detached: Detached[Turn] = Detached()

    async def __call__(self, user_id: str, turn_id: str) -> Turn:
        """The turn in its terminal state, whoever brought it there. Raises TurnNotFound. Idempotent."""
        return await self._detached.run(self._end(user_id, turn_id))

    async def _end(self, user_id: str, turn_id: str) -> Turn:
        ended = await self._store.write(partial(self._cancel, user_id, turn_id))
        self._engine.abandon(turn_id)
        self._engine.ended(ended)
        return ended.turn

    def _cancel(self, user_id: str, turn_id: str, tx: Transaction) -> Ended:
        if tx.turns.get(user_id, turn_id) is None:
            raise TurnNotFound
        ending = Ending(reason=TurnReason.CANCELLED_BY_CALLER, cancelled=True)
        return end_turn(tx, self._ids, turn_id, ending)
