"""Stopping a round that nobody reads any more, and booking what it has used."""

from functools import partial

from core.model.ledger import FORGOTTEN, LedgerKey, LedgerLine, Tally, day_of
from core.model.turn import Turn, Usage
from core.ports.agent import Agent
from core.ports.store import Store, Transaction
from core.use_cases.patience import patiently


async def stop_round(store: Store, agent: Agent, turn: Turn, handle: str) -> None:
    """Stops a round of a turn. What the provider says that it has used goes into the ledger, once for each round.

    The turn itself stays as it ended: what it has cost was said with its end.
    """
    if (usage := await agent.stop(handle)) is not None:
        await patiently(lambda: store.write(partial(_book, turn, handle, usage)))


def _book(turn: Turn, handle: str, usage: Usage, tx: Transaction) -> None:
    current = tx.turns.lock(turn.id)
    if current is not None:
        if current.continuation is None:
            return  # it was stopped, and booked, before
        if current.continuation.handle == handle:
            tx.turns.save_continuation(turn.id, None)
    tx.users.lock(turn.user_id)  # or an erasure might come in between
    user_id = turn.user_id if tx.users.get(turn.user_id) is not None else FORGOTTEN
    ended_at = turn.finished_at
    # Of a turn with one attempt nothing else was unknown.
    told = ended_at is not None and turn.attempt == 1
    key = LedgerKey(user_id, day_of(ended_at or tx.now()), turn.agent_id, turn.model)
    tx.ledger.enter(LedgerLine(key, Tally(unmetered_turns=-int(told), usage=usage)))
