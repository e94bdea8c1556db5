"""Quotas: whether a user may have another turn today."""

from datetime import datetime

from core.model.errors import QuotaSpent
from core.model.ledger import Quotas, day_after, day_of
from core.ports.store import Transaction


def spent_quota(tx: Transaction, quotas: Quotas, user_id: str, now: datetime) -> QuotaSpent | None:
    """What keeps a user, who exists, from another turn; None if nothing does, or will in this transaction.

    Turns that have not ended count as if they ended now, with what is on record of their cost: no burst of
    messages gets past the number of turns, while the tokens of turns at work come on top. Asks nothing where no
    quota is set.
    """
    if not quotas:
        return None
    tx.users.lock(user_id)
    for standing in quotas.standing(tx.ledger.spent(user_id, day_of(now))):
        if standing.used >= standing.limit:
            return QuotaSpent(standing.name, standing.limit, (day_after(now) - now).total_seconds())
    return None
