"""The ledger and the quotas, on every store: each turn is booked once, however it ends, and no burst gets past."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import partial

import pytest

from adapters.memory.store import MemoryStore
from adapters.system import Ids
from core.model.errors import QuotaSpent
from core.model.events import ToolCalled
from core.model.ledger import FORGOTTEN, Dimension, LedgerKey, LedgerLine, Quotas, Tally, day_after, day_of
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState, Usage
from core.ports.agent import AgentFailed, Begun, RoundFinished
from core.ports.store import Store, Transaction
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.end_turn import Ending, end_turn
from core.use_cases.erase_user import EraseUser
from core.use_cases.stop_round import stop_round
from core.use_cases.turn_engine import TurnLimits
from doubles import DONE, Gate, ManualClock, NotedTools, ScriptedAgent, Service, service
from harness import until

IDS = Ids()
DAY = date(2026, 11, 22)
ALL = (date.min, date.max)
CALL = ToolCalled("c1", "note", "{}")
ROUND = RoundFinished(
    Usage(input_tokens=100, cached_input_tokens=60, cache_write_tokens=30, output_tokens=20, reasoning_tokens=7)
)


async def booked(store: Store, user: str = "") -> Tally:
    """All that is in the ledger."""
    totals = await store.read(lambda tx: tx.ledger.totals((), *ALL, user_id=user))
    return totals[0][1] if totals else Tally()


async def turns_of(store: Store, turn_ids: Sequence[str]) -> list[Turn]:
    """Turns as they are on record."""
    found = await store.read(lambda tx: [tx.turns.find(turn_id) for turn_id in turn_ids])
    return [turn for turn in found if turn is not None]


def line(user: str, day: date, agent: str, model: str, turns: int = 1, tokens: int = 10) -> LedgerLine:
    return LedgerLine(LedgerKey(user, day, agent, model), Tally(turns=turns, usage=Usage(input_tokens=tokens)))


def _enter(each: LedgerLine, tx: Transaction) -> None:
    tx.ledger.enter(each)


def limited(it: Service, quotas: Quotas) -> Service:
    """The same service with quotas."""
    accept = it.accept
    it.accept = AcceptMessage(
        store=it.store,
        engine=it.engine,
        catalog=accept._catalog,
        definitions=accept._definitions,
        ids=IDS,
        quotas=quotas,
    )
    return it


async def test_every_turn_is_booked_once_however_it_ends(store: Store) -> None:
    """Completed, with a tool, failed, cut short, cancelled, cancelled in the queue, interrupted, and repeated."""
    stuck = [Gate(), Gate(), Gate()]
    agent = ScriptedAgent(
        ["Hi.", DONE],
        [CALL, ROUND],
        ["Noted.", DONE],
        [AgentFailed(TurnReason.PROVIDER_UNAVAILABLE)],
        ["Some", AgentFailed(TurnReason.PROVIDER_TRUNCATED)],
        ["A", RoundFinished(Usage(output_tokens=9), TurnReason.OUTPUT_LIMIT)],
        ["B", stuck[0]],
        ["C", stuck[1]],
        ["D", DONE],
        ["E", stuck[2]],
    )
    async with service(store, agent) as it:
        ids = [await it.say(request_id="r1")]
        await it.events(ids[0])
        assert await it.say(request_id="r1") == ids[0]
        for _ in range(4):
            ids.append(await it.say())
            await it.events(ids[-1])
        cancelled = await it.say()
        await stuck[0].reached.wait()
        (turn,) = await turns_of(store, [cancelled])
        waiting = await it.say(thread_id=turn.thread_id, on_busy=BusyPolicy.QUEUE)
        await it.cancel("ada", waiting)
        await it.cancel("ada", cancelled)
        await it.cancel("ada", cancelled)
        interrupted = await it.say()
        await stuck[1].reached.wait()
        (turn,) = await turns_of(store, [interrupted])
        instead = await it.say(thread_id=turn.thread_id, on_busy=BusyPolicy.INTERRUPT)
        await it.events(instead)
        running = await it.say()
        await stuck[2].reached.wait()
        ids += [cancelled, waiting, interrupted, instead]
        turns = await turns_of(store, [*ids, running])
        assert not turns.pop().state.is_terminal
        assert {turn.state for turn in turns} == {
            TurnState.COMPLETED,
            TurnState.INCOMPLETE,
            TurnState.CANCELLED,
            TurnState.FAILED,
        }
        tally = await booked(store)
        assert tally.turns == len(turns) == 9
        assert tally.usage == sum((turn.usage for turn in turns), Usage())
        assert tally.usage == DONE.usage + ROUND.usage + DONE.usage + Usage(output_tokens=9) + DONE.usage
        # Failed, cut off, cancelled and interrupted; the one in the queue has cost nothing.
        assert tally.unmetered_turns == 4
        for turn in turns:  # whoever ends them once more books nothing
            await store.write(lambda tx, of=turn.id: end_turn(tx, IDS, of, Ending(usage=ROUND.usage)))  # type: ignore[misc]
        assert await booked(store) == tally
        today = await store.read(lambda tx: day_of(tx.now()))
        lines = await store.read(lambda tx: tx.ledger.of_user("ada", today, today, None, 10))
        assert {(each.key.agent_id, each.key.model) for each in lines} == {
            ("general-v1", "script-1"),
            ("general-v1", ""),
        }


async def test_what_a_round_has_cost_outlives_its_process(store: Store) -> None:
    gate = Gate()
    tools = NotedTools(idempotent=True, gate=gate)
    async with service(store, ScriptedAgent([CALL, ROUND]), tools) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        (turn,) = await turns_of(store, [turn_id])
        assert (turn.state, turn.usage) == (TurnState.RUNNING, ROUND.usage)
        await it.kill()
    async with service(store, ScriptedAgent(["Done.", DONE]), NotedTools(idempotent=True)) as it:
        await it.events(turn_id)
    (turn,) = await turns_of(store, [turn_id])
    assert (turn.state, turn.attempt, turn.usage) == (TurnState.COMPLETED, 2, ROUND.usage + DONE.usage)
    # Whether the lost process had asked for more than it could note is not known.
    assert await booked(store) == Tally(turns=1, unmetered_turns=1, usage=ROUND.usage + DONE.usage)


async def test_a_turn_that_is_cut_off_keeps_what_its_rounds_have_cost(store: Store) -> None:
    for how in ("cancelled", "left by its process"):
        gate = Gate()
        agent = ScriptedAgent([CALL, ROUND], ["Well", gate])
        async with service(store, agent) as it:
            turn_id = await it.say()
            await it.stream(turn_id, "Well")
            if how == "cancelled":
                await it.cancel("ada", turn_id)
            else:
                await it.kill()
        async with service(store) as it:
            await it.events(turn_id)
        (turn,) = await turns_of(store, [turn_id])
        assert turn.usage == ROUND.usage
    assert await booked(store) == Tally(turns=2, unmetered_turns=2, usage=ROUND.usage + ROUND.usage)


USED = Usage(input_tokens=40, output_tokens=11)


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
async def test_what_a_stopped_round_has_used_is_booked_once(store: Store, how: str) -> None:
    agent = ScriptedAgent([CALL, ROUND], [Begun("h1"), "Well", Gate()])
    agent.used["h1"] = USED
    async with service(store, agent) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "Well")
        (turn,) = await turns_of(store, [turn_id])
        if how == "cancelled":
            await it.cancel("ada", turn_id)
        else:
            await it.delete("ada", turn.thread_id)
    assert agent.stopped == ["h1"]
    # Of a turn that is gone with its thread nothing is left to say whether the rest of it is known.
    tally = Tally(turns=1, unmetered_turns=int(how == "deleted"), usage=ROUND.usage + USED)
    assert await booked(store, "ada") == tally
    if how == "cancelled":
        (ended,) = await turns_of(store, [turn_id])
        assert (ended.usage, ended.continuation) == (ROUND.usage, None)
        await stop_round(store, agent, turn, "h1")
        assert await booked(store, "ada") == tally


async def test_what_a_round_had_used_before_its_turn_began_again_is_booked_too(store: Store) -> None:
    agent = ScriptedAgent([Begun("h1"), AgentFailed(TurnReason.INTERRUPTED)], [Begun("h2"), "Well", DONE])
    agent.used["h1"] = USED
    async with service(store, agent) as it:
        turn_id = await it.say()
        await it.events(turn_id)
    (turn,) = await turns_of(store, [turn_id])
    assert (turn.state, turn.attempt, turn.usage) == (TurnState.COMPLETED, 2, DONE.usage)
    assert await booked(store) == Tally(turns=1, unmetered_turns=1, usage=DONE.usage + USED)


async def test_what_a_turn_that_began_again_has_cost_stays_unknown_whatever_is_stopped(store: Store) -> None:
    agent = ScriptedAgent([Begun("h1"), AgentFailed(TurnReason.INTERRUPTED)], [Begun("h2"), "Well", Gate()])
    agent.used = {"h1": USED, "h2": DONE.usage}
    async with service(store, agent) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "Well")
        await it.cancel("ada", turn_id)
    assert agent.stopped == ["h1", "h2"]
    assert await booked(store) == Tally(turns=1, unmetered_turns=1, usage=USED + DONE.usage)


async def test_what_a_round_has_used_of_a_user_who_is_gone_is_nobodys(store: Store) -> None:
    agent = ScriptedAgent([Begun("h1"), "Well", Gate()])
    async with service(store, agent) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "Well")
        (turn,) = await turns_of(store, [turn_id])
    agent.used["h1"] = USED
    await EraseUser(store=store, ids=IDS, gone=lambda _: None, erased=lambda: None)("ada")
    await stop_round(store, agent, turn, "h1")
    assert await booked(store, "ada") == Tally()
    assert (await booked(store)).usage == USED


async def test_usage_is_noted_in_the_epoch_of_its_turn_and_in_no_other(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()
        await store.write(lambda tx: tx.turns.save_usage(turn_id, 1, ROUND.usage))
        await store.write(lambda tx: tx.turns.save_usage(turn_id, 2, DONE.usage))
        assert [turn.usage for turn in await turns_of(store, [turn_id])] == [ROUND.usage]
        await it.cancel("ada", turn_id)
        (ended,) = await turns_of(store, [turn_id])
        await store.write(lambda tx: tx.turns.save_usage(turn_id, ended.epoch, DONE.usage))
        assert [turn.usage for turn in await turns_of(store, [turn_id])] == [ROUND.usage]


async def test_deleting_a_thread_takes_nothing_out_of_the_ledger(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["Hi.", DONE], [CALL, ROUND], [gate])) as it:
        first = await it.say()
        await it.events(first)
        (turn,) = await turns_of(store, [first])
        await it.say(thread_id=turn.thread_id)
        await gate.reached.wait()
        await it.say(thread_id=turn.thread_id, on_busy=BusyPolicy.QUEUE)
        await it.delete("ada", turn.thread_id)
        await until(lambda: not it.engine._running)
        assert await turns_of(store, [first]) == []
        assert await booked(store) == Tally(turns=3, unmetered_turns=1, usage=DONE.usage + ROUND.usage)


async def test_the_line_is_written_in_the_transaction_of_the_ending(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        turn_id = await it.say()
        await gate.reached.wait()

        def change(tx: Transaction) -> None:
            end_turn(tx, IDS, turn_id, Ending(reason=TurnReason.INTERRUPTED))
            raise KeyError(turn_id)

        with pytest.raises(KeyError):
            await store.write(change)
        assert await booked(store) == Tally()
        (turn,) = await turns_of(store, [turn_id])
        assert turn.state is TurnState.RUNNING


async def test_lines_are_added_up_and_read_newest_first(store: Store) -> None:
    tomorrow = DAY + timedelta(days=1)
    lines = [
        line("ada", DAY, "career-v1", "m1", tokens=1),
        line("ada", DAY, "career-v1", "m2", tokens=2),
        line("ada", DAY, "health-v1", "", tokens=4),
        line("ada", tomorrow, "career-v1", "m1", tokens=8),
        line("bob", DAY, "career-v1", "m1", tokens=16),
    ]
    for each in (*lines, *lines):
        await store.write(partial(_enter, each))
    doubled = [replace(each, tally=each.tally + each.tally) for each in lines]
    read = await store.read(lambda tx: tx.ledger.of_user("ada", DAY, tomorrow, None, 10))
    assert list(read) == [doubled[3], doubled[2], doubled[1], doubled[0]]
    behind = await store.read(lambda tx: tx.ledger.of_user("ada", DAY, tomorrow, read[1].key, 1))
    assert list(behind) == [doubled[1]]
    assert await store.read(lambda tx: tx.ledger.of_user("ada", *ALL[:1], DAY - timedelta(days=1), None, 9)) == []

    async def totals(*by: Dimension, **only: str) -> dict[tuple[str, ...], int]:
        rows = await store.read(lambda tx: tx.ledger.totals(by, DAY, tomorrow, **only))
        assert all(tally.turns >= 2 for _, tally in rows)
        return {group: tally.tokens for group, tally in rows}

    assert await totals() == {(): 62}
    assert await totals(Dimension.USER) == {("ada",): 30, ("bob",): 32}
    assert await totals(Dimension.DAY, Dimension.USER, user_id="ada") == {
        ("2026-11-22", "ada"): 14,
        ("2026-11-23", "ada"): 16,
    }
    assert await totals(Dimension.MODEL, agent_id="career-v1") == {("m1",): 50, ("m2",): 4}
    assert await totals(Dimension.AGENT, user_id="bob", agent_id="health-v1") == {}
    assert await totals(user_id="nobody") == {}


async def test_a_forgotten_users_lines_become_nobodys_and_sums_stay(store: Store) -> None:
    for user in ("ada", "bob", "cy"):
        for agent in ("career-v1", "health-v1"):
            await store.write(partial(_enter, line(user, DAY, agent, "m")))
    before = await booked(store)
    for user in ("ada", "bob", "ada", "nobody"):
        await store.write(lambda tx, user=user: tx.ledger.forget(user))  # type: ignore[misc]
    rows = await store.read(lambda tx: tx.ledger.totals((Dimension.USER, Dimension.AGENT), *ALL))
    assert {group: tally.turns for group, tally in rows} == {
        (FORGOTTEN, "career-v1"): 2,
        (FORGOTTEN, "health-v1"): 2,
        ("cy", "career-v1"): 1,
        ("cy", "health-v1"): 1,
    }
    assert await booked(store) == before


async def test_a_burst_on_two_processes_gets_no_further_than_the_quota(store: Store) -> None:
    quotas, limits = Quotas(turns_per_day=7), TurnLimits(max_turns_per_user=20)
    gates = [Gate(), Gate()]
    agents = [ScriptedAgent(["Hi.", DONE], default=[gate, DONE]) for gate in gates]
    async with (
        service(store, agents[0], limits=limits, lease=30.0) as one,
        service(store, agents[1], limits=limits, lease=30.0) as two,
    ):
        for it in (limited(one, quotas), limited(two, quotas)):
            await it.events(await it.say())  # one ended turn each
        burst = [(one, two)[n % 2].say(request_id=f"r{n}") for n in range(12)]
        outcomes = await asyncio.gather(*burst, return_exceptions=True)
        accepted = [outcome for outcome in outcomes if isinstance(outcome, str)]
        refusals = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        assert (len(accepted), len(set(accepted)), len(refusals)) == (5, 5, 7)
        now = await store.read(lambda tx: tx.now())
        left = (day_after(now) - now).total_seconds()
        for refusal in refusals:
            assert isinstance(refusal, QuotaSpent)
            assert refusal.details == {"quota": "turns_per_day", "limit": "7"}
            assert abs(refusal.retry_after - left) < 60
        # What is refused leaves nothing, what was accepted is found again, and others have a day of their own.
        assert await store.read(lambda tx: tx.ledger.spent("ada", day_of(now)).turns) == 7
        again = await asyncio.gather(
            *((two, one)[n % 2].say(request_id=f"r{n}") for n in range(12)), return_exceptions=True
        )
        assert {str(each) for each in again if isinstance(each, str)} == set(accepted)
        (turn,) = await turns_of(store, accepted[:1])
        for policy in BusyPolicy:
            with pytest.raises(QuotaSpent):
                await one.say(thread_id=turn.thread_id, on_busy=policy)
        (turn,) = await turns_of(store, accepted[:1])
        assert turn.state is TurnState.RUNNING
        await one.say(user="bob")
        for gate in gates:
            gate.open()


async def test_one_message_sent_to_two_processes_at_once_attaches_beyond_the_quota(store: Store) -> None:
    gate = Gate()
    agents = ScriptedAgent(default=[gate, DONE]), ScriptedAgent(default=[gate, DONE])
    async with service(store, agents[0], lease=30.0) as one, service(store, agents[1], lease=30.0) as two:
        both = [limited(one, Quotas(turns_per_day=1)), limited(two, Quotas(turns_per_day=1))]
        assert len(set(await asyncio.gather(*(it.say(request_id="r") for it in both * 4)))) == 1
        gate.open()


async def test_tokens_that_are_used_up_keep_from_the_next_turn(store: Store) -> None:
    gate = Gate()
    agent = ScriptedAgent(["Hi.", DONE], [CALL, ROUND], [gate, DONE])
    async with service(store, agent) as it:
        limited(it, Quotas(tokens_per_day=100, turns_per_day=100))
        await it.events(await it.say())
        turn_id = await it.say()  # 8 of 100 are used
        await gate.reached.wait()
        with pytest.raises(QuotaSpent) as refused:  # the turn at work has taken 120 so far
            await it.say()
        assert refused.value.details == {"quota": "tokens_per_day", "limit": "100"}
        gate.open()
        await it.events(turn_id)
        assert (await booked(store)).tokens == 136


async def test_a_new_day_begins_at_midnight_utc(clock: ManualClock) -> None:
    store = MemoryStore(clock)
    gate = Gate()
    async with service(store, ScriptedAgent(["Hi.", DONE], [gate, DONE])) as it:
        limited(it, Quotas(turns_per_day=2))
        await it.events(await it.say())
        late = await it.say()
        with pytest.raises(QuotaSpent) as refused:
            await it.say()
        clock.advance(seconds=refused.value.retry_after)
        gate.open()
        await it.events(late)  # it ends on the second day, and counts there
        await it.events(await it.say())
        with pytest.raises(QuotaSpent):
            await it.say()
    rows = await store.read(lambda tx: tx.ledger.totals((Dimension.DAY,), *ALL))
    assert {group: tally.turns for group, tally in rows} == {("2026-11-22",): 1, ("2026-11-23",): 2}
