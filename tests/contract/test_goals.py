"""Goals are written by whoever works on the turn, and by nobody else, on every store."""

import asyncio
from typing import Any

import pytest

from adapters.system import Ids
from adapters.tools.definition import tool
from adapters.tools.goals import goal_tools
from adapters.tools.registry import Registry
from core.model.agent import Domain
from core.model.errors import LeaseLost
from core.model.events import ToolAnswered, ToolCalled, TurnFinished
from core.model.goal import Goal
from core.model.turn import Turn, TurnReason, TurnState
from core.ports.store import Store, Transaction
from core.ports.tools import ToolContext
from core.use_cases.end_turn import Ending, end_turn
from core.use_cases.goals import list_goals, set_goal
from doubles import DONE, Gate, ManualClock, NotedTools, ScriptedAgent, service
from harness import until

IDS = Ids()
LEASE = 0.5


async def goals_of(store: Store, user: str = "ada") -> list[str]:
    """What a user has set."""
    found = await store.read(lambda tx: list_goals(tx, user_id=user, domain=Domain.GENERAL))
    return [goal.text for goal in found]


async def set_in(store: Store, turn: Turn, text: str, key: str) -> Goal:
    """Sets a goal as a tool of this turn does, in the epoch that is given."""

    def change(tx: Transaction) -> Goal:
        return set_goal(
            tx,
            goal_id=IDS.new(),
            key=key,
            turn_id=turn.id,
            epoch=turn.epoch,
            user_id="ada",
            domain=Domain.GENERAL,
            text=text,
        )

    return await store.write(change)


async def test_a_goal_is_written_in_the_epoch_of_its_turn_and_in_no_other(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        mine, _ = await it.threads.turn("ada", turn_id)
        await it.kill()
    assert (await set_in(store, mine, "in time", "k1")).text == "in time"
    gate = Gate()
    async with service(store, ScriptedAgent([gate])) as it:
        await gate.reached.wait()
        theirs, _ = await it.threads.turn("ada", turn_id)
        assert theirs.epoch > mine.epoch
        for key in ("k1", "k2"):
            with pytest.raises(LeaseLost):
                await set_in(store, mine, "late", key)
        assert (await set_in(store, theirs, "once more", "k1")).text == "in time"
        await store.write(lambda tx: end_turn(tx, IDS, turn_id, Ending(reason=TurnReason.INTERRUPTED)))
        ended, _ = await it.threads.turn("ada", turn_id)
        for turn in (theirs, ended):
            with pytest.raises(LeaseLost):
                await set_in(store, turn, "later", "k3")
        await it.delete("ada", ended.thread_id)
        with pytest.raises(LeaseLost):
            await set_in(store, ended, "latest", "k4")
    assert await goals_of(store) == ["in time"]


async def test_a_tool_that_finds_its_turn_taken_writes_nothing_and_ends_the_work_here(
    store: Store, clock: ManualClock
) -> None:
    gate, stopped = Gate(), asyncio.Event()
    shipped, _ = goal_tools(store, IDS)

    @tool(name="note", idempotent=True)
    async def set_late(context: ToolContext, goal: str) -> Any:
        """Sets a goal when the gate opens."""
        if goal == "never":
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
        await gate.wait()
        return await shipped(context, goal)

    calls = [ToolCalled("c1", "note", '{"goal": "late"}'), ToolCalled("c2", "note", '{"goal": "never"}')]
    late, repeat = ScriptedAgent([*calls, DONE]), NotedTools(idempotent=True)
    tools: Any = Registry([set_late])
    async with (
        service(store, late, tools, lease=LEASE) as one,
        service(store, ScriptedAgent(["Noted.", DONE]), repeat, lease=LEASE) as two,
    ):
        turn_id = await one.say()
        await gate.reached.wait()
        for task in one.recover._tasks:
            task.cancel()  # it does not renew its lease
        await asyncio.gather(*one.recover._tasks, return_exceptions=True)
        clock.advance(seconds=2 * LEASE)
        events = await two.events(turn_id)
        assert one.engine.knows(turn_id)
        gate.open()
        await until(lambda: not one.engine._running)
        assert stopped.is_set()
        assert len(late.requests) == 1
        assert await two.events(turn_id) == events
        finished = events[-1].event
        assert isinstance(finished, TurnFinished)
        assert (finished.turn.state, finished.turn.attempt) == (TurnState.COMPLETED, 2)
        answers = [entry.event for entry in events if isinstance(entry.event, ToolAnswered)]
        assert [answer.output.split()[0] for answer in answers] == ["noted", "noted"]
        assert len(repeat.calls) == 2
    assert await goals_of(store) == []
