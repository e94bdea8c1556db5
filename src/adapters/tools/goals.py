"""The shipped tools: setting a goal, and listing the goals."""

from datetime import date
from typing import Annotated, Any

from pydantic import Field

from adapters.tools.definition import ToolFunction, tool
from core.model.goal import MAX_GOAL, Goal
from core.ports.store import Store
from core.ports.system import Ids
from core.ports.tools import ToolContext
from core.use_cases import goals

SHOWN = 20


def goal_tools(store: Store, ids: Ids) -> list[ToolFunction]:
    """`set_goal` and `list_goals` on a store."""

    @tool(idempotent=True)
    async def set_goal(
        context: ToolContext,
        goal: Annotated[str, Field(max_length=MAX_GOAL, pattern=r"\S")],
        commitment: Annotated[str, Field(max_length=MAX_GOAL)] = "",
        due: date | None = None,
    ) -> dict[str, Any]:
        """Saves a goal that the person has named, with the next step that they commit to.

        Use it once the person has said both in their own words and agrees to have it saved. Not for goals
        that you propose. The goal belongs to this person and this coach's domain.

        Args:
            goal: What the person wants to reach, in their own words.
            commitment: The next step that the person commits to, in their own words. Empty if there is none yet.
            due: The day by which the person wants to have taken the step, as YYYY-MM-DD. Only if they named one.
        """
        goal_id = ids.new()
        saved = await store.write(
            lambda tx: goals.set_goal(
                tx,
                goal_id=goal_id,
                key=context.idempotency_key,
                turn_id=context.turn_id,
                epoch=context.epoch,
                user_id=context.user_id,
                domain=context.domain,
                text=goal,
                commitment=commitment,
                due=due,
            )
        )
        return {"saved": _shown(saved)}

    @tool(idempotent=True)
    async def list_goals(context: ToolContext) -> dict[str, Any]:
        """Lists the goals that the person has saved in this coach's domain, newest first.

        Use it when the person asks for their goals, or comes back and you do not know where they stood.
        """
        found = await store.read(
            lambda tx: goals.list_goals(tx, user_id=context.user_id, domain=context.domain, limit=SHOWN)
        )
        return {"goals": [_shown(goal) for goal in found]}

    return [set_goal, list_goals]


def _shown(goal: Goal) -> dict[str, Any]:
    return {
        "goal": goal.text,
        "commitment": goal.commitment,
        "due": goal.due.isoformat() if goal.due else None,
        "set_on": goal.created_at.date().isoformat(),
    }
