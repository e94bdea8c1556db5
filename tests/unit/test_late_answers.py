"""A store's answers that overtake each other: what has ended meanwhile does not begin, and is told as ended."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import pytest

from adapters.memory.store import MemoryStore
from adapters.system import Ids
from core.model.erasure import ErasedThread
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState
from core.ports.agent import AgentFailed, Begun
from core.ports.store import Transaction
from core.ports.telemetry import Unmeasured
from core.use_cases import recover_turns
from core.use_cases.claim_turn import ClaimedTurn
from core.use_cases.end_turn import Ended
from core.use_cases.erase_user import EraseUser
from doubles import DONE, Gate, ManualClock, ScriptedAgent, Service, service, text_of
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


class Told(Unmeasured):
    """Notes the endings that it is told of."""

    def __init__(self) -> None:
        self.endings: list[TurnReason | None] = []

    def ended(self, turn: Turn) -> None:
        self.endings.append(turn.reason)


@pytest.mark.parametrize("by", ["a look at what is held", "a stop"])
async def test_an_ending_that_is_seen_before_it_is_answered_is_told_and_acted_upon(
    clock: ManualClock, by: str
) -> None:
    store, told = LateStore(clock), Told()
    agent = ScriptedAgent([Begun("h1"), "half", AgentFailed(TurnReason.PROVIDER_STALLED)])
    async with service(store, agent, telemetry=told) as it:
        store.is_late = lambda result: isinstance(result, Ended)
        turn_id = await it.say()
        await store.gate.reached.wait()
        if by == "a stop":
            stopping = asyncio.create_task(it.engine.drain(0))
            await until(lambda: it.engine._draining)
            for _ in range(100):  # time for a stop to go wrong in
                await asyncio.sleep(0)
        else:
            stopping = asyncio.create_task(it.recover._take_stock())
            await stopping
        assert told.endings == []
        store.gate.open()
        await stopping
        await until(lambda: not it.engine.knows(turn_id))
        assert told.endings == [TurnReason.PROVIDER_STALLED]
        await until(lambda: agent.stopped == ["h1"])


async def test_an_ending_that_is_seen_before_it_is_answered_lets_the_next_one_run(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_turns, "_LONGEST_PERIOD", 1e6)  # nothing is looked for because time has passed
    store, gate = LateStore(clock), Gate()
    async with service(store, ScriptedAgent([gate, "a", DONE], ["b", DONE]), lease=1e7) as it:
        first, _ = await it.threads.turn("ada", await it.say())
        waiting = await it.say(thread_id=first.thread_id, on_busy=BusyPolicy.QUEUE)
        store.is_late = lambda result: isinstance(result, Ended)
        gate.open()
        await store.gate.reached.wait()
        await it.recover._take_stock()
        store.gate.open()
        async with asyncio.timeout(20):
            assert text_of(await it.events(waiting)) == "b"


async def test_an_erasure_that_is_slow_here_is_not_taken_for_one_that_was_left(clock: ManualClock) -> None:
    store, erased = LateStore(clock), asyncio.Event()
    erase = EraseUser(store=store, ids=Ids(), gone=lambda _: None, erased=erased.set, left_after=-60.0)
    async with service(store) as it:
        for _ in range(2):
            await it.events(await it.say())
        store.is_late = lambda result: isinstance(result, ErasedThread)
        slow = asyncio.create_task(erase("ada"))
        await store.gate.reached.wait()
        await erase.go_on()
        assert len(await store.read(lambda tx: tx.threads.ids_of("ada", "", 9))) == 1
        assert not erased.is_set()
        store.gate.open()
        receipt = await slow
        assert (receipt.state, receipt.erased.threads) == ("done", 2)
