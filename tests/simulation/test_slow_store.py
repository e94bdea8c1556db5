"""A store that answers late, in simulated time: turns of a dead process are taken over all the same."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from adapters.memory.store import MemoryStore
from core.model.events import TurnFinished
from core.model.turn import TurnState
from core.ports.store import Transaction
from core.use_cases.turn_engine import TurnLimits
from doubles import DONE, Gate, ScriptedAgent, service
from simulation.database import StoreClock
from simulation.loop import simulate

T = TypeVar("T")

LEASE = 15.0


class SlowStore(MemoryStore):
    """Every change takes `seconds`."""

    seconds = 0.0

    async def write(self, change: Callable[[Transaction], T]) -> T:
        await asyncio.sleep(self.seconds)
        return await super().write(change)


@pytest.mark.parametrize("seconds", [0.0, 1.0, 4.0, 8.0])
def test_a_turn_of_a_dead_process_is_taken_over(seconds: float) -> None:
    surprises: list[BaseException] = []

    async def main() -> None:
        store = SlowStore(StoreClock())
        gate = Gate()
        limits = TurnLimits(budget=600.0)
        async with service(store, ScriptedAgent([gate]), limits=limits, lease=LEASE) as dying:
            turn_id = await dying.say()
            await gate.reached.wait()
            await dying.kill()
        killed = asyncio.get_running_loop().time()
        store.seconds = seconds
        async with service(store, ScriptedAgent(["Here", DONE]), limits=limits, lease=LEASE) as other:
            async with asyncio.timeout_at(killed + 2 * LEASE + 8 * seconds):
                last = (await other.events(turn_id))[-1].event
            assert isinstance(last, TurnFinished)
            assert (last.turn.state, last.turn.attempt) == (TurnState.COMPLETED, 2)

    simulate(main(), surprises.append)
    assert not surprises
