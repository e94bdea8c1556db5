"""Who may claim a turn and who may give it up, on every store: the rules behind all recovery."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from adapters.system import Ids
from core.model.errors import LeaseLost
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState
from core.ports.agent import Begun
from core.ports.store import Store
from core.use_cases.claim_turn import Claimant, ClaimedTurn, Why, claim_turn, release_turn, require_claim
from core.use_cases.end_turn import Ended, Ending, end_turn
from doubles import DONE, Gate, ManualClock, ScriptedAgent, Service, service, text_of
from harness import until

IDS = Ids()
LEASE = 1e6
"""Seconds; nobody renews it."""


@asynccontextmanager
async def at_work(store: Store) -> AsyncIterator[tuple[Service, Turn]]:
    """A turn without text of a process that has just been killed: its lease lasts on."""
    gate = Gate()
    async with service(store, ScriptedAgent([gate]), lease=LEASE) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await it.kill()
        yield it, await found(store, turn_id)


async def found(store: Store, turn_id: str) -> Turn:
    """A turn as it stands."""
    turn = await store.read(lambda tx: tx.turns.find(turn_id))
    assert turn is not None
    return turn


async def claim(store: Store, turn: Turn, who: Claimant, why: Why, **more: bool) -> ClaimedTurn | Ended | None:
    """Tries to claim a turn."""
    return await store.write(
        lambda tx: claim_turn(tx, IDS, turn.id, who, why, has_place=more.get("has_place", True))
    )


async def writes(store: Store, turn: Turn) -> None:
    """Asks for the right to write under a turn's epoch."""
    await store.write(lambda tx: require_claim(tx, turn.id, turn.epoch))


def other(it: Service) -> Claimant:
    """Another process."""
    return replace(it.engine.claimant, owner=IDS.new())


async def test_what_a_living_process_holds_is_nobody_elses(store: Store) -> None:
    async with at_work(store) as (it, turn):
        for who, why in (
            (other(it), Why.ABANDONED),
            (other(it), Why.ORPHANED),
            (other(it), Why.WAITING),
            (it.engine.claimant, Why.WAITING),
            (it.engine.claimant, Why.ABANDONED),
        ):
            assert await claim(store, turn, who, why) is None
        assert await found(store, turn.id) == turn


async def test_a_process_that_is_gone_loses_its_turns_to_the_others(store: Store, clock: ManualClock) -> None:
    async with at_work(store) as (it, turn):
        await store.write(lambda tx: tx.leases.end(it.engine.claimant.owner))
        assert await claim(store, turn, it.engine.claimant, Why.ABANDONED) is None  # its own are ORPHANED
        assert await claim(store, turn, other(it), Why.ORPHANED) is None
        clock.advance(seconds=10)
        assert await claim(store, turn, other(it), Why.ABANDONED, has_place=False) is None
        assert await found(store, turn.id) == turn
        claimed = await claim(store, turn, other(it), Why.ABANDONED)
        assert isinstance(claimed, ClaimedTurn)
        assert (claimed.turn.epoch, claimed.turn.attempt) == (turn.epoch + 1, 2)
        assert claimed.turn == await found(store, turn.id)


async def test_a_budget_is_of_all_claims_together(store: Store, clock: ManualClock) -> None:
    async with at_work(store) as (it, turn):
        who = replace(it.engine.claimant, budget=60.0)
        begun = turn.claimed_at
        for seconds in (10, 20):
            clock.advance(seconds=10)
            claimed = await claim(store, turn, who, Why.ORPHANED)
            assert isinstance(claimed, ClaimedTurn)
            assert claimed.turn.claimed_at == begun
            server = await store.read(lambda tx: tx.now()) > clock.now()  # which has a clock of its own
            assert 0 < claimed.budget_left < (60 if server else 60 - seconds)


async def test_who_has_lost_a_turn_gives_nothing_up_and_who_gives_it_up_has_lost_it(store: Store) -> None:
    async with at_work(store) as (it, turn):
        who = it.engine.claimant
        stale = replace(turn, epoch=turn.epoch - 1)
        assert await store.write(lambda tx: release_turn(tx, IDS, stale, who)) is None
        assert await found(store, turn.id) == turn
        assert await store.write(lambda tx: release_turn(tx, IDS, turn, who)) is None
        waiting = await found(store, turn.id)
        assert (waiting.state, waiting.epoch) == (TurnState.ACCEPTED, turn.epoch + 1)
        for before in (turn, waiting):  # nobody writes while it waits
            with pytest.raises(LeaseLost):
                await writes(store, before)
        claimed = await claim(store, turn, other(it), Why.WAITING)
        assert isinstance(claimed, ClaimedTurn)
        await writes(store, claimed.turn)


async def test_what_waits_is_claimed_in_its_order_and_never_beside_another(store: Store) -> None:
    async with at_work(store) as (it, turn):
        say = partial(it.say, thread_id=turn.thread_id, on_busy=BusyPolicy.QUEUE)
        first, second = [await found(store, await say()) for _ in range(2)]
        for waiting in (first, second):
            assert await claim(store, waiting, other(it), Why.WAITING) is None
        await store.write(lambda tx: end_turn(tx, IDS, turn.id, Ending(reason=TurnReason.INTERRUPTED)))
        assert await claim(store, second, other(it), Why.WAITING) is None
        assert isinstance(await claim(store, first, other(it), Why.WAITING), ClaimedTurn)
        assert await claim(store, second, other(it), Why.WAITING) is None


async def test_what_is_left_of_a_budget_decides_before_anything_begins(store: Store) -> None:
    gates = [Gate(), Gate()]
    agent = ScriptedAgent([Begun("h1"), gates[0]], [Begun("h2"), "half", gates[1]])
    async with service(store, agent, lease=LEASE) as it:
        silent, spoken = await it.say(), await it.say()
        for gate in gates:
            await gate.reached.wait()
        await it.stream(spoken, "half")
        await it.kill()
        who = replace(it.engine.claimant, budget=0.0)
        for turn_id, reason in ((silent, TurnReason.BUDGET_EXCEEDED), (spoken, TurnReason.INTERRUPTED)):
            ended = await claim(store, await found(store, turn_id), who, Why.ORPHANED)
            assert isinstance(ended, Ended)
            assert ended.turn.reason is reason


async def test_a_claim_of_a_turn_that_still_runs_here_takes_its_place(store: Store) -> None:
    before, gate = Gate(), Gate()
    async with service(store, ScriptedAgent([before, "old"], [gate, "new", DONE])) as it:
        turn_id = await it.say()
        await before.reached.wait()
        follower = asyncio.create_task(it.events(turn_id))
        who, turn = it.engine.claimant, await found(store, turn_id)
        await store.write(lambda tx: release_turn(tx, IDS, turn, who))
        assert it.engine.reserve("ada") is None
        claimed = await claim(store, turn, who, Why.WAITING)
        assert isinstance(claimed, ClaimedTurn)
        it.engine.run(claimed)
        await gate.reached.wait()
        await until(lambda: it.engine._places.taken == 1)
        assert it.engine.held() == {turn_id: claimed.turn.epoch}
        feed = it.feeds.get(turn_id)
        assert feed is not None
        assert not feed.closed
        gate.open()
        assert text_of(await follower) == "new"
