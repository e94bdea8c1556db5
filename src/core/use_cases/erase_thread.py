"""Erasing a thread: the one way in which a conversation goes, whoever asked for it."""

from core.model.erasure import ErasedThread
from core.model.errors import LegalHold
from core.model.ledger import line_of
from core.ports.store import Transaction


def erase_thread(tx: Transaction, user_id: str, thread_id: str, *, erasure_id: str = "") -> ErasedThread | None:
    """Erases the user's thread with its messages, turns, logs and request ids, and leaves a tombstone.

    What the provider has of it is due to be erased; what its turns have cost stays in the ledger. None if there is
    no such thread. Raises LegalHold.
    """
    if tx.threads.lock(user_id, thread_id) is None:
        return None
    if tx.users.held(user_id):
        raise LegalHold
    # Locked, so that no process adds to their logs in between.
    unfinished = tuple(turn for each in tx.turns.unfinished(thread_id) if (turn := tx.turns.lock(each.id)))
    now = tx.now()
    counts = tx.threads.delete(thread_id, now, erasure_id=erasure_id, in_use=bool(unfinished))
    for turn in unfinished:
        tx.ledger.enter(line_of(turn, now, all_told=False))
    return ErasedThread(counts, unfinished)
