"""A store's answers that overtake each other: what has ended meanwhile does not begin."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from adapters.memory.store import MemoryStore
from core.model.turn import BusyPolicy, TurnReason, TurnState
from core.ports.store import Transaction
from core.use_cases.claim_turn import ClaimedTurn
from doubles import DONE, Gate, ManualClock, ScriptedAgent, Service, service
from harness import until

T = TypeVar("T")


class LateStore(MemoryStore):
    """Does what it is asked at once. The next answer that `is_late` is kept back behind a gate."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.is_late: Callable[[object], bool] = lambda _: False
        self.gate = Gate()

    async def write(self, change: Callable[[Transaction], T]) -> T:
        result = await super().write(change)
        if self.is_late(result):
            self.is_late = lambda _: False
            await self.gate.wait()
        return result


async def has_ended(it: Service, turn_id: str, reason: TurnReason) -> None:
    """Nobody was asked for this turn, and nobody works on it."""
    await it.events(turn_id)
    turn, _ = await it.threads.turn("ada", turn_id)
    assert (turn.state, turn.reason) == (TurnState.CANCELLED, reason)
    await until(lambda: not it.engine.knows(turn_id))


async def test_a_turn_that_ended_before_its_acceptance_was_answered_does_not_run(clock: ManualClock) -> None:
    store = LateStore(clock)
    async with service(store) as it:
        first, _ = await it.threads.turn("ada", await it.say())
        await it.events(first.id)
        store.is_late = lambda _: True
        late = asyncio.create_task(it.say(thread_id=first.thread_id))
        await store.gate.reached.wait()
        newest = await it.say(thread_id=first.thread_id, on_busy=BusyPolicy.INTERRUPT)
        store.gate.open()
        await has_ended(it, await late, TurnReason.INTERRUPTED)
        await it.events(newest)
        assert len(it.agent.requests) == 2


async def test_a_turn_that_ended_before_its_claim_was_answered_does_not_run(clock: ManualClock) -> None:
    store = LateStore(clock)
    speaking = Gate()
    async with service(store, ScriptedAgent(["Hi", speaking, DONE])) as it:
        first, _ = await it.threads.turn("ada", await it.say())
        await speaking.reached.wait()
        waiting = await it.say(thread_id=first.thread_id, on_busy=BusyPolicy.QUEUE)
        store.is_late = lambda result: isinstance(result, ClaimedTurn)
        speaking.open()
        await store.gate.reached.wait()
        assert (await it.cancel("ada", waiting)).state is TurnState.CANCELLED
        store.gate.open()
        await has_ended(it, waiting, TurnReason.CANCELLED_BY_CALLER)
        await it.events(await it.say(thread_id=first.thread_id))
        assert len(it.agent.requests) == 2
