"""Recovery: turns whose process is gone are brought to an end."""

import logging

from core.model.turn import TurnReason
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.use_cases.end_turn import Ending, end_turn

_log = logging.getLogger(__name__)

_BATCH = 100


async def recover_turns(store: Store, ids: Ids) -> int:
    """Ends every turn that has not ended, INCOMPLETE or FAILED `INTERRUPTED`; returns how many.

    For the one process that owns the database, before it takes its first message.
    """

    def settle(tx: Transaction) -> int:
        unfinished = tx.turns.unfinished(_BATCH)
        for turn_id in unfinished:
            end_turn(tx, ids, turn_id, Ending(reason=TurnReason.INTERRUPTED))
        return len(unfinished)

    total = 0
    while count := await store.write(settle):
        total += count
    if total:
        _log.warning("ended %d turns that a stopped process had left", total)
    return total
