"""Word that other processes have changed turns: acted upon at once, though nobody looks for a long time."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from adapters.memory.store import MemoryStore, Tables
from core.model.events import TurnFinished
from core.model.turn import Turn, TurnState
from core.ports.store import UNCLAIMED, Transaction
from core.use_cases import recover_turns
from doubles import DONE, Gate, ManualClock, ScriptedAgent, kinds, service, text_of
from harness import until

LEASE = 1e7
SOME_LOST: frozenset[str] = frozenset()


class HintedStore(MemoryStore):
    """Shares its tables with others, and passes on what a test says that they have changed."""

    heard: Callable[[frozenset[str]], None]

    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        self.heard = heard
        return True


@pytest.fixture
def stores(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> tuple[MemoryStore, HintedStore]:
    """Two processes' ways to the same record. Nothing is looked for because time has passed."""
    monkeypatch.setattr(recover_turns, "_LONGEST_PERIOD", 1e6)
    tables = Tables()
    return MemoryStore(clock, tables), HintedStore(clock, tables)


@pytest.mark.parametrize("some_lost", [False, True])
async def test_a_follower_looks_at_once_when_it_hears_of_its_turn_or_that_hints_were_lost(
    stores: tuple[MemoryStore, HintedStore], some_lost: bool
) -> None:
    one, two = stores
    agent = ScriptedAgent(["a", Gate()])
    async with service(one, agent, lease=LEASE) as there, service(two, lease=LEASE) as here:
        turn_id = await there.say()
        await there.stream(turn_id, "a")
        here.feeds.poll = 1e6  # nothing is found by looking
        follower = asyncio.create_task(here.events(turn_id))
        await until(lambda: any(news.position == 2 for news in here.feeds._waiting.get(turn_id, ())))
        await there.cancel("ada", turn_id)
        two.heard(SOME_LOST if some_lost else frozenset({turn_id}))
        async with asyncio.timeout(20):
            assert kinds(await follower)[-1] is TurnFinished


@pytest.mark.parametrize("hint", [SOME_LOST, frozenset({UNCLAIMED})], ids=["some lost", "unclaimed"])
async def test_a_turn_that_waits_is_claimed_at_once(
    stores: tuple[MemoryStore, HintedStore], hint: frozenset[str]
) -> None:
    one, two = stores
    silent = Gate()
    agents = ScriptedAgent([silent]), ScriptedAgent(["Here.", DONE])
    async with service(one, agents[0], lease=LEASE) as there, service(two, agents[1], lease=LEASE) as here:
        turn_id = await there.say()
        await silent.reached.wait()
        await there.engine.drain(0)
        turn, _ = await here.threads.turn("ada", turn_id)
        assert turn.state is TurnState.ACCEPTED
        two.heard(hint)
        async with asyncio.timeout(20):
            assert text_of(await here.events(turn_id)) == "Here."


async def test_work_ends_at_once_on_a_turn_that_another_process_has_claimed_and_on_no_other(
    stores: tuple[MemoryStore, HintedStore],
) -> None:
    one, two = stores
    gates = Gate(), Gate()
    agent = ScriptedAgent([gates[0], DONE], [gates[1], "a", DONE])
    async with service(two, agent, lease=LEASE) as here:
        lost, kept = await here.say(), await here.say()
        for gate in gates:
            await gate.reached.wait()

        def claim(tx: Transaction) -> None:
            turn = tx.turns.lock(lost)
            assert isinstance(turn, Turn)
            tx.turns.save_claim(replace(turn, epoch=turn.epoch + 1), "another")

        await one.write(claim)
        two.heard(frozenset({lost, kept}))
        async with asyncio.timeout(20):
            await until(lambda: not here.engine.knows(lost))
        assert here.engine.knows(kept)
        gates[1].open()
        assert text_of(await here.events(kept)) == "a"
        assert (await here.threads.turn("ada", lost))[0].state is TurnState.RUNNING  # whose it is now
