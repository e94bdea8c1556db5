"""Rules of turns that a client sees only when something else goes wrong, on every store."""

import asyncio
from dataclasses import replace

import pytest

from adapters.system import Ids
from core.model.errors import LeaseLost, RequestIdReused, StoreUnavailable, ThreadNotFound, TurnInProgress
from core.model.events import AttemptRestarted, TextDelta, TurnFinished
from core.model.thread import ProviderState
from core.model.turn import TurnReason, TurnState, Usage
from core.ports.agent import RoundFinished, StateChanged
from core.ports.store import Store
from core.ports.turns import Appended, LogAppend
from core.use_cases.end_turn import Ending, end_turn
from core.use_cases.reply_writer import _save_state
from core.use_cases.turn_engine import TurnLimits
from core.use_cases.turn_log_writer import _append
from doubles import DONE, Gate, ScriptedAgent, Service, service
from harness import until

IDS = Ids()


def places(it: Service) -> int:
    """How many turns may begin now."""
    free = 0
    while it.engine.reserve("probe") is None:
        free += 1
    for _ in range(free):
        it.engine.release("probe")
    return free


async def test_a_place_is_given_back_once_on_every_path(store: Store) -> None:
    gates = [Gate(), Gate()]
    agent = ScriptedAgent(["a", gates[0], DONE], ["b", gates[1], DONE])
    async with service(store, agent, limits=TurnLimits(max_turns=4, max_turns_per_user=4)) as it:
        one, two = await it.say(request_id="r"), await it.say()
        assert places(it) == 2
        assert await it.say(request_id="r") == one
        with pytest.raises(RequestIdReused):
            await it.say("other", request_id="r")
        with pytest.raises(ThreadNotFound):
            await it.say(thread_id=IDS.new())
        turn, _ = await it.threads.turn("ada", one)
        with pytest.raises(TurnInProgress):
            await it.say(thread_id=turn.thread_id)
        assert places(it) == 2
        gates[0].open()
        await it.events(one)
        await until(lambda: one not in it.engine._running)
        await until(lambda: it.engine._places.taken == 1)
        assert places(it) == 3
        await it.cancel("ada", two)
        await until(lambda: not it.engine._running)
        assert places(it) == 4


async def test_an_ending_is_fenced_and_moves_the_epoch_on(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["a", gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        turn, _ = await it.threads.turn("ada", turn_id)
        ending = Ending(reason=TurnReason.INTERRUPTED)
        with pytest.raises(LeaseLost):
            await store.write(lambda tx: end_turn(tx, IDS, turn_id, ending, epoch=turn.epoch - 1))
        assert (await it.threads.turn("ada", turn_id))[0].state is TurnState.RUNNING
        ended = await store.write(lambda tx: end_turn(tx, IDS, turn_id, ending, epoch=turn.epoch))
        assert ended.turn.epoch == turn.epoch + 1
        with pytest.raises(LeaseLost):
            await store.write(lambda tx: _save_state(turn, ProviderState(provider="scripted"), tx))
        assert await store.read(lambda tx: tx.threads.provider_state(turn.thread_id)) is None


async def test_an_attempt_that_begins_with_the_ending_counts(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        ending = Ending(reason=TurnReason.BUDGET_EXCEEDED)
        tail = (TextDelta("old"), AttemptRestarted(2, "PROVIDER_STALLED"), TextDelta("new"))
        ended = await store.write(lambda tx: end_turn(tx, IDS, turn_id, ending, epoch=1, tail=tail))
        turn, _ = await it.threads.turn("ada", turn_id)
        assert turn == ended.turn
        assert turn.attempt == 2


async def test_a_fold_keeps_every_event(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        events = (TextDelta("old"), AttemptRestarted(2, "PROVIDER_STALLED"), TextDelta("new"))
        await store.write(lambda tx: tx.log.append([LogAppend(turn_id, 1, 1, events)]))
        before = await store.read(lambda tx: tx.log.read(turn_id))
        await store.write(lambda tx: end_turn(tx, IDS, turn_id, Ending(reason=TurnReason.INTERRUPTED)))
        after = await store.read(lambda tx: tx.log.read(turn_id))
        assert after[:-1] == before
        _, reply = await it.threads.turn("ada", turn_id)
        assert reply is not None
        assert reply.text == "new"


async def test_a_reply_that_is_not_complete_leaves_the_copy_behind(store: Store) -> None:
    copy = ProviderState(provider="scripted", conversation_id="c", synced_to=0)
    short = RoundFinished(Usage(), TurnReason.OUTPUT_LIMIT, copy=copy)
    gate = Gate()
    async with service(store, ScriptedAgent([StateChanged(copy), "Hi", short], [gate, DONE])) as it:
        turn_id = await it.say()
        await it.events(turn_id)
        turn, _ = await it.threads.turn("ada", turn_id)
        second = await it.say(thread_id=turn.thread_id)
        await gate.reached.wait()
        ending = Ending(reason=TurnReason.INTERRUPTED, copy=copy)
        await store.write(lambda tx: end_turn(tx, IDS, second, ending, tail=[TextDelta("x")]))
        stored = await store.read(lambda tx: tx.threads.provider_state(turn.thread_id))
        assert stored is not None
        assert stored.synced_to == 0


async def test_an_append_of_an_older_epoch_is_never_taken_for_done(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        append = LogAppend(turn_id, 1, 1, (TextDelta("Hi"),))
        await store.write(lambda tx: tx.log.append([append]))
        assert await store.write(lambda tx: _append([append], tx)) == Appended(
            frozenset({turn_id})
        )  # its commit was not answered
        assert await store.write(lambda tx: _append([replace(append, epoch=0)], tx)) == Appended(frozenset())


async def test_recovery_ends_more_than_one_batch(store: Store) -> None:
    limits = TurnLimits(max_turns_per_user=500)
    async with service(store, ScriptedAgent(default=["a", Gate(), DONE]), limits=limits) as it:
        turns = await asyncio.gather(*(it.say() for _ in range(230)))
        for turn_id in turns:
            await it.stream(turn_id, "a")
        await it.kill()
        async with service(store, limits=TurnLimits(max_turns=1)):
            assert await store.read(lambda tx: tx.turns.abandoned(10)) == []
            left = await store.read(lambda tx: {tx.turns.find(turn_id).state for turn_id in turns})  # type: ignore[union-attr]
            assert left == {TurnState.INCOMPLETE}


async def test_an_ending_waits_for_a_store_that_is_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["a", gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        away = 0
        write = store.write

        async def sometimes(change: object) -> object:
            nonlocal away
            if away < 3:
                away += 1
                raise StoreUnavailable
            return await write(change)  # type: ignore[arg-type]

        monkeypatch.setattr(store, "write", sometimes)
        gate.open()
        last = (await it.events(turn_id))[-1].event
        assert isinstance(last, TurnFinished)
        assert last.turn.state is TurnState.COMPLETED
        assert away == 3
