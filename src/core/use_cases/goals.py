"""Setting a goal and reading one's goals."""

from collections.abc import Sequence
from datetime import date

from core.model.agent import Domain
from core.model.errors import InvalidField
from core.model.goal import MAX_GOAL, Goal
from core.ports.store import Transaction
from core.use_cases.claim_turn import require_claim

MOST_GOALS = 50
"""As many goals are read at most."""


def set_goal(
    tx: Transaction,
    *,
    goal_id: str,
    key: str,
    turn_id: str,
    epoch: int,
    user_id: str,
    domain: Domain,
    text: str,
    commitment: str = "",
    due: date | None = None,
) -> Goal:
    """Stores a goal once for each idempotency key; a repeat returns the goal that was stored first.

    The user exists. Raises LeaseLost where the turn does not run in this epoch any more, and InvalidField: `goal`
    without text, `goal` or `commitment` with more than MAX_GOAL code points or with U+0000.
    """
    text, commitment = text.strip(), commitment.strip()
    if not text:
        raise InvalidField("goal", "must not be empty")
    for field, value in (("goal", text), ("commitment", commitment)):
        if len(value) > MAX_GOAL:
            raise InvalidField(field, f"must have at most {MAX_GOAL} characters")
        if "\0" in value:
            raise InvalidField(field, "must not contain U+0000")
    require_claim(tx, turn_id, epoch)
    goal = Goal(
        id=goal_id,
        user_id=user_id,
        domain=domain,
        text=text,
        commitment=commitment,
        due=due,
        created_at=tx.now(),
    )
    return tx.goals.add(goal, key)


def list_goals(tx: Transaction, *, user_id: str, domain: Domain, limit: int = MOST_GOALS) -> Sequence[Goal]:
    """The user's goals in a domain, newest first."""
    return tx.goals.list(user_id, domain, max(0, min(limit, MOST_GOALS)))
