"""What operators see of the record and do to it, on every store."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import pytest

from adapters.system import Ids
from adapters.telemetry.agent import MeasuredAgent
from core.model.agent import Domain
from core.model.errors import InvalidField, ProviderUnavailable, ThreadNotFound, TurnInProgress, TurnNotFound
from core.model.events import TextDelta, TurnStarted
from core.model.thread import UNSYNCED, ProviderState, Thread, ThreadState
from core.model.turn import Turn, TurnReason, TurnState
from core.ports.agent import AgentFailed, CopyFound, ReplyRequest, Standing, StateChanged
from core.ports.store import Store, Transaction
from core.ports.turns import LogAppend
from core.use_cases import oversee
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.oversee import GRACE, MAX_LISTED, Oversee, Stuck, ThreadsQuery, TurnsQuery
from core.use_cases.publish_agents import MAX_DEFINITIONS, Outcome, PublishAgents
from core.use_cases.reconcile_thread import Action, ReconcileThread
from core.use_cases.settle_turn import SettleTurn
from doubles import CATALOG, ScriptedAgent, definition
from records import IDS, NOW, a_line, a_thread, a_turn, request

if TYPE_CHECKING:
    from adapters.telemetry.moments import Moments

BUDGET, LEASE = 100.0, 10.0


@pytest.fixture
async def record(store: Store) -> Store:
    """A store with the catalog's agents."""
    await store.write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    return store


class Settling:
    """The use case, and what it told of."""

    def __init__(self, store: Store, *, alone: bool = False) -> None:
        self.took: list[Ended] = []
        self.settle = SettleTurn(store=store, ids=Ids(), took=self.took.append, alone=alone)


def overseen(store: Store, *, alone: bool = False) -> Oversee:
    return Oversee(store, budget=BUDGET, lease=LEASE, alone=alone)


def put(
    tx: Transaction, thread: Thread, turn: Turn, owner: str = "worker", text: str = "", waits: bool = False
) -> None:
    """Stores a turn of a thread, with some text of its reply."""
    if tx.threads.find(thread.id) is None:
        tx.users.ensure(thread.user_id, NOW)
        tx.threads.add(thread)
    tx.turns.add(turn, request(turn.user_id), owner=owner, waiting=a_line(turn) if waits else None)
    tx.log.begin(turn.id, [TurnStarted(turn.id, thread.id, turn.agent_id)])
    if not waits:
        tx.messages.append(thread.id, [a_line(turn)])
    if text:
        assert tx.log.append([LogAppend(turn.id, turn.epoch, 1, (TextDelta(text),))]).accepted


def waiting(thread: Thread, **changes: object) -> Turn:
    return a_turn(thread, state=TurnState.ACCEPTED, epoch=0, model="", provider="", **changes)


async def test_threads_are_listed_newest_first_and_chosen(record: Store) -> None:
    threads = [
        a_thread("ada"),
        a_thread("ada", domain=Domain.HEALTH, agent_id="health-v1"),
        a_thread("bob", state=ThreadState.INACTIVE),
        a_thread("bob", last_message_at=NOW - timedelta(days=1)),
    ]

    def fill(tx: Transaction) -> None:
        for thread in threads:
            tx.users.ensure(thread.user_id, NOW)
            tx.threads.add(thread)

    await record.write(fill)
    everything = frozenset(ThreadState)
    for chosen, expected in (
        (("", None, everything, 9), threads[::-1]),
        (("", None, everything, 2), threads[:1:-1]),
        (("ada", None, everything, 9), threads[1::-1]),
        (("", Domain.HEALTH, everything, 9), [threads[1]]),
        (("bob", Domain.CAREER, frozenset({ThreadState.ACTIVE}), 9), [threads[3]]),
        (("", None, frozenset({ThreadState.INACTIVE}), 9), [threads[2]]),
        (("eve", None, everything, 9), []),
    ):
        found = await record.read(lambda tx, chosen=chosen: tx.threads.newest(*chosen))  # type: ignore[misc]
        assert list(found) == expected
    assert await record.read(lambda tx: dict(tx.threads.pinned())) == {"career-v1": 3, "health-v1": 1}


async def test_turns_that_have_not_ended_are_paged_by_id(record: Store) -> None:
    ada, bob = a_thread("ada"), a_thread("bob")
    turns = [a_turn(ada), waiting(ada), a_turn(bob)]

    def fill(tx: Transaction) -> None:
        put(tx, ada, turns[0])
        put(tx, ada, turns[1], owner="", waits=True)
        put(tx, bob, turns[2])

    await record.write(fill)
    ids = [turn.id for turn in turns]
    for chosen, expected in (
        (("", "", 9), ids),
        (("", "", 2), ids[:2]),
        (("", ids[0], 9), ids[1:]),
        (("ada", "", 9), ids[:2]),
        (("eve", "", 9), []),
    ):
        found = await record.read(lambda tx, chosen=chosen: tx.turns.open(*chosen))  # type: ignore[misc]
        assert [turn.id for turn in found] == expected
    await record.write(lambda tx: end_turn(tx, IDS, ids[2], Ending(cancelled=True)))
    assert [turn.id for turn in await record.read(lambda tx: tx.turns.open("", "", 9))] == ids[:2]


async def test_a_holder_tells_until_when_its_lease_lasts(record: Store) -> None:
    thread = a_thread()
    turn = a_turn(thread)
    await record.write(lambda tx: put(tx, thread, turn))
    assert (await record.read(lambda tx: tx.turns.holder(turn.id))).until is None
    now = await record.write(lambda tx: (tx.leases.renew("worker", 60), tx.now())[1])
    until = (await record.read(lambda tx: tx.turns.holder(turn.id))).until
    assert until is not None
    assert abs((until - now).total_seconds() - 60) < 5


@pytest.mark.parametrize("page", [1, 3, 500])
async def test_what_is_stuck_and_why(record: Store, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    monkeypatch.setattr(oversee, "_PAGE", page)  # turns that are looked through in one go
    names = ("fine", "over time", "gone long ago", "just gone", "waits", "unclaimed", "fresh")
    threads = {name: a_thread() for name in names}
    turns: dict[str, Turn] = {}
    longest = BUDGET + LEASE + GRACE

    def fill(tx: Transaction) -> None:
        now = tx.now()

        def at(seconds: float) -> dict[str, object]:
            return {
                "accepted_at": now - timedelta(seconds=seconds),
                "claimed_at": now - timedelta(seconds=seconds),
            }

        tx.leases.renew("alive", 3_600)
        tx.leases.renew("just gone", -1)
        turns.update(
            {
                "fine": a_turn(threads["fine"], **at(longest - 30)),
                "over time": a_turn(threads["over time"], **at(longest + 1)),
                "gone long ago": a_turn(threads["gone long ago"], **at(LEASE + GRACE + 1)),
                "just gone": a_turn(threads["just gone"], **at(LEASE + GRACE + 1)),
                "waits": waiting(threads["fine"], accepted_at=now - timedelta(seconds=longest + 1)),
                "unclaimed": waiting(threads["unclaimed"], accepted_at=now - timedelta(seconds=longest + 1)),
                "fresh": waiting(threads["fresh"], accepted_at=now),
            }
        )
        put(tx, threads["fine"], turns["fine"], "alive")
        put(tx, threads["over time"], turns["over time"], "alive")
        put(tx, threads["gone long ago"], turns["gone long ago"], "without a lease")
        put(tx, threads["just gone"], turns["just gone"], "just gone")
        put(tx, threads["fine"], turns["waits"], "", waits=True)
        put(tx, threads["unclaimed"], turns["unclaimed"], "", waits=True)
        put(tx, threads["fresh"], turns["fresh"], "", waits=True)

    await record.write(fill)
    expected = {
        "over time": Stuck.OVER_TIME,
        "gone long ago": Stuck.OWNER_GONE,
        "unclaimed": Stuck.UNCLAIMED,
    }
    facts = {each.turn.id: each for each in await overseen(record).turns(TurnsQuery())}
    assert {name: facts[turn.id].stuck for name, turn in turns.items()} == {
        name: expected.get(name) for name in turns
    }
    stuck = await overseen(record).turns(TurnsQuery(stuck=True))
    assert {each.turn.id for each in stuck} == {turns[name].id for name in expected}
    assert len(await overseen(record).turns(TurnsQuery(stuck=True, limit=1))) == 1
    fine = facts[turns["fine"].id]
    assert (fine.holder.owner, fine.holder.alive, fine.budget) == ("alive", True, BUDGET)
    assert abs(fine.budget_used - (longest - 30)) < 5
    assert facts[turns["unclaimed"].id].budget_used == 0
    # Where nobody can be at work on the database, whoever holds a turn is gone, whatever its lease says.
    alone = {each.turn.id: each for each in await overseen(record, alone=True).turns(TurnsQuery())}
    assert not alone[turns["fine"].id].holder.alive
    assert alone[turns["fine"].id].stuck is Stuck.OWNER_GONE
    of_thread = await overseen(record).thread(threads["fine"].id)
    assert [each.turn.id for each in of_thread.unfinished] == [turns["fine"].id, turns["waits"].id]
    with pytest.raises(ThreadNotFound):
        await overseen(record).thread(IDS.new())
    for bad in (TurnsQuery(limit=-1), TurnsQuery(limit=MAX_LISTED + 1), TurnsQuery(user_id="x\0")):
        with pytest.raises(InvalidField):
            await overseen(record).turns(bad)
    with pytest.raises(InvalidField):
        await overseen(record).threads(ThreadsQuery(limit=MAX_LISTED + 1))


async def test_a_turn_of_a_living_process_is_settled_only_by_force(record: Store) -> None:
    thread = a_thread()
    turn, behind = a_turn(thread), waiting(thread)

    def fill(tx: Transaction) -> None:
        tx.leases.renew("worker", 3_600)
        put(tx, thread, turn, text="so far")
        put(tx, thread, behind, "", waits=True)

    await record.write(fill)
    it = Settling(record)
    for refused in (turn, behind):  # nor is one that waits for it
        with pytest.raises(TurnInProgress) as error:
            await it.settle.turn(refused.id)
        assert error.value.turn_id == turn.id
    with pytest.raises(TurnInProgress):
        await it.settle.thread(thread.id)
    assert not it.took
    ended = await it.settle.turn(turn.id, force=True)
    assert (ended.turn.state, ended.turn.reason) == (TurnState.INCOMPLETE, TurnReason.INTERRUPTED)
    assert (ended.turn.epoch, ended.next_id) == (turn.epoch + 1, behind.id)
    assert ended.reply is not None
    assert (ended.reply.text, ended.reply.partial) == ("so far", True)
    assert it.took == [ended]
    late = LogAppend(turn.id, turn.epoch, 2, (TextDelta(" too late"),))
    assert not (await record.write(lambda tx: tx.log.append([late]))).accepted


async def test_settling_is_idempotent_and_a_rehearsal_changes_nothing(record: Store) -> None:
    thread = a_thread()
    turn = a_turn(thread)
    await record.write(lambda tx: put(tx, thread, turn, "gone", "so far"))
    it = Settling(record)
    before = await record.read(
        lambda tx: (tx.turns.find(turn.id), tx.threads.find(thread.id), tx.log.read(turn.id))
    )
    rehearsed = await it.settle.turn(turn.id, dry_run=True)
    unlocking = await it.settle.thread(thread.id, dry_run=True)
    assert rehearsed.turn.state is unlocking.turns[0].turn.state is TurnState.INCOMPLETE
    after = await record.read(
        lambda tx: (tx.turns.find(turn.id), tx.threads.find(thread.id), tx.log.read(turn.id))
    )
    assert (before, it.took) == (after, [])
    first = await it.settle.turn(turn.id)
    again = await it.settle.turn(turn.id)
    assert (first.already, again.already) == (False, True)
    assert again.turn == first.turn
    assert again.reply == first.reply
    with pytest.raises(TurnNotFound):
        await it.settle.turn(IDS.new())
    with pytest.raises(ThreadNotFound):
        await it.settle.thread(IDS.new())


async def test_without_text_a_settled_turn_has_failed(record: Store) -> None:
    thread = a_thread()
    turn = a_turn(thread)
    await record.write(lambda tx: put(tx, thread, turn, "gone"))
    ended = await Settling(record).settle.turn(turn.id)
    assert (ended.turn.state, ended.reply) == (TurnState.FAILED, None)


@pytest.mark.parametrize("alone", [False, True])
async def test_unlocking_ends_all_that_nobody_is_at_work_on_and_doubts_the_copy(
    record: Store, alone: bool
) -> None:
    thread = a_thread()
    turns = [a_turn(thread), waiting(thread), waiting(thread)]
    copy = ProviderState(provider="scripted", conversation_id="conv", synced_to=1)

    def fill(tx: Transaction) -> None:
        put(tx, thread, turns[0], text="so far")
        for turn in turns[1:]:
            put(tx, thread, turn, "", waits=True)
        tx.threads.save_provider_state(thread.id, copy)
        if alone:
            tx.leases.renew("worker", 3_600)

    await record.write(fill)
    it = Settling(record, alone=alone)
    unlocked = await it.settle.thread(thread.id)
    assert [ended.turn.id for ended in unlocked.turns] == [turn.id for turn in turns]
    states = [TurnState.INCOMPLETE, TurnState.FAILED, TurnState.FAILED]
    assert [ended.turn.state for ended in unlocked.turns] == states
    assert it.took == list(unlocked.turns)
    assert unlocked.copy_doubted
    assert not await record.read(lambda tx: tx.turns.unfinished(thread.id))
    assert await record.read(lambda tx: tx.threads.provider_state(thread.id)) == replace(copy, synced_to=UNSYNCED)
    again = await it.settle.thread(thread.id)
    assert (again.turns, again.copy_doubted) == ([], True)


async def test_a_catalog_is_compared_with_the_record_and_published_whole(record: Store) -> None:
    publish = PublishAgents(record)
    same, new = CATALOG.by_domain[Domain.CAREER], definition(Domain.HEALTH, version=2, model="large", tools=())
    unheard = definition(Domain.GENERAL, slug="unheard")
    changed = replace(CATALOG.by_domain[Domain.GENERAL], name="other", effort="high")

    async def ids() -> list[str]:
        return [one.definition.id for one in await publish.versions()]

    before = await ids()
    assert before == ["career-v1", "general-v1", "health-v1", "relationship-v1"]
    found = await publish([same, new, changed, unheard])
    assert [(one.outcome, one.fields) for one in found] == [
        (Outcome.UNCHANGED, ()),
        (Outcome.NEW, ("version", "model", "tools")),
        (Outcome.CHANGED, ("name", "effort")),
        (Outcome.NEW, ()),
    ]
    compared = [one.compared_with.id if one.compared_with else "" for one in found]
    assert compared == ["career-v1", "health-v1", "general-v1", ""]
    assert await ids() == before  # all or nothing
    await publish([same, new, unheard], dry_run=True)
    assert await ids() == before
    await publish([same, new, unheard])
    assert await ids() == ["career-v1", "general-v1", "health-v2", "health-v1", "relationship-v1", "unheard-v1"]
    assert [one.outcome for one in await publish([new])] == [Outcome.UNCHANGED]
    (newer,) = await publish([replace(new, version=3, model="larger")], dry_run=True)
    assert (newer.outcome, newer.compared_with, newer.fields) == (Outcome.NEW, new, ("version", "model"))
    with pytest.raises(InvalidField):
        await publish([same] * (MAX_DEFINITIONS + 1))


COPY = ProviderState(provider="scripted", conversation_id="conv", synced_to=1)
OTHER = replace(COPY, conversation_id="other", synced_to=1)


class KeepingAgent(ScriptedAgent):
    """An agent with a copy that stands as the test says, and what happens at the provider meanwhile."""

    def __init__(self, *steps: CopyFound | StateChanged | AgentFailed, failing: bool = False) -> None:
        super().__init__()
        self._failing = failing
        self._steps = steps
        self.asked: list[ReplyRequest] = []
        self.seen: list[int] = []
        self.store: Store | None = None
        self.meanwhile: Turn | None = None
        self.ends = False

    async def reconcile(
        self, request: ReplyRequest, *, dry_run: bool
    ) -> AsyncGenerator[CopyFound | StateChanged, None]:
        self.asked.append(request)
        self.seen = [line.index for line in await request.history()]
        for step in self._steps:
            if isinstance(step, AgentFailed):
                raise step
            if dry_run and isinstance(step, StateChanged):
                return
            yield step
        turn = self.meanwhile
        if self.store is not None and turn is not None:
            thread = await self.store.read(lambda tx: tx.threads.find(turn.thread_id))
            assert thread is not None
            await self.store.write(lambda tx: put(tx, thread, turn, text="and so on"))
            if self.ends:
                ending = Ending(copy=OTHER)
                await self.store.write(lambda tx: end_turn(tx, IDS, turn.id, ending))
        if self._failing:
            raise AgentFailed(TurnReason.PROVIDER_UNAVAILABLE)


async def at_rest(store: Store) -> Thread:
    """A thread with one line and a copy."""
    thread = a_thread()
    turn = a_turn(thread)

    def fill(tx: Transaction) -> None:
        put(tx, thread, turn)
        end_turn(tx, IDS, turn.id, Ending(cancelled=True, reason=TurnReason.CANCELLED_BY_CALLER))
        tx.threads.save_provider_state(thread.id, COPY)

    await store.write(fill)
    return thread


async def copy_of(store: Store, thread: Thread) -> ProviderState | None:
    return await store.read(lambda tx: tx.threads.provider_state(thread.id))


async def test_a_copy_in_step_stays_as_it_is(record: Store) -> None:
    thread = await at_rest(record)
    agent = KeepingAgent(CopyFound(Standing.IN_STEP))
    done = await ReconcileThread(record, lambda: agent)(thread.id)
    assert (done.found.standing, done.action) == (Standing.IN_STEP, Action.NOTHING)
    assert await copy_of(record, thread) == COPY
    (asked,) = agent.asked
    assert (asked.state, asked.message.index, agent.seen) == (COPY, 2, [1])


async def test_a_copy_that_was_rebuilt_is_on_record_and_known_for_erasures(record: Store) -> None:
    thread = await at_rest(record)
    agent = KeepingAgent(CopyFound(Standing.GONE), StateChanged(OTHER))
    rehearsed = await ReconcileThread(record, lambda: agent)(thread.id, dry_run=True)
    assert rehearsed.action is Action.REBUILT
    assert await copy_of(record, thread) == COPY
    done = await ReconcileThread(record, lambda: agent)(thread.id)
    assert (done.found.standing, done.action) == (Standing.GONE, Action.REBUILT)
    assert await copy_of(record, thread) == OTHER
    await record.write(lambda tx: tx.threads.delete(thread.id, tx.now()))
    left = await record.read(lambda tx: tx.copies.left(9))
    assert "other" in {copy.ref for copy in left}


async def test_a_copy_stays_in_doubt_where_reconciling_fails(record: Store) -> None:
    thread = await at_rest(record)
    agent = KeepingAgent(CopyFound(Standing.OUT_OF_STEP, 2, 1), AgentFailed(TurnReason.PROVIDER_UNAVAILABLE))
    with pytest.raises(ProviderUnavailable):
        await ReconcileThread(record, lambda: agent)(thread.id)
    assert await copy_of(record, thread) == replace(COPY, synced_to=UNSYNCED)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_turn_that_begins_meanwhile_has_a_copy_of_its_own(record: Store, ended: bool, fails: bool) -> None:
    thread = await at_rest(record)
    agent = KeepingAgent(CopyFound(Standing.OUT_OF_STEP, 1), failing=fails)
    agent.store, agent.meanwhile, agent.ends = record, a_turn(thread), ended
    with pytest.raises(TurnInProgress) as error:
        await ReconcileThread(record, lambda: agent)(thread.id)
    assert error.value.turn_id == agent.meanwhile.id
    # The turn has found none, and what it has made is not touched.
    aside = ProviderState(provider="scripted", synced_to=UNSYNCED)
    assert await copy_of(record, thread) == (replace(OTHER, synced_to=3) if ended else aside)
    if not ended:
        with pytest.raises(TurnInProgress):
            await ReconcileThread(record, lambda: agent)(thread.id)
        assert len(agent.asked) == 1


async def test_a_measured_agent_reconciles_too(record: Store) -> None:
    thread = await at_rest(record)
    agent = MeasuredAgent(KeepingAgent(CopyFound(Standing.GONE), StateChanged(OTHER)), cast("Moments", None))
    done = await ReconcileThread(record, lambda: agent)(thread.id)
    assert (done.action, await copy_of(record, thread)) == (Action.REBUILT, OTHER)


async def test_another_providers_copy_is_not_looked_at(record: Store) -> None:
    thread = await at_rest(record)
    foreign = replace(COPY, provider="another")
    await record.write(lambda tx: tx.threads.save_provider_state(thread.id, foreign))
    agent = ScriptedAgent()
    done = await ReconcileThread(record, lambda: agent)(thread.id)
    assert (done.found.standing, done.action) == (Standing.NO_COPY, Action.NOTHING)
    assert await copy_of(record, thread) == foreign
    with pytest.raises(ThreadNotFound):
        await ReconcileThread(record, lambda: agent)(IDS.new())
