"""The ledger on PostgreSQL, beside other processes: each turn is booked once, and nothing waits for it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import date
from functools import partial

import psycopg
import pytest

from adapters.sql.pipeline import Pipeline
from adapters.sql.repositories import Ledger, Users
from adapters.sql.store import SqlStore
from core.model.errors import QuotaSpent
from core.model.ledger import Quotas, Tally
from core.model.thread import Thread
from core.model.turn import Turn, Usage
from core.ports.store import Store, Transaction
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.turn_engine import TurnLimits
from doubles import CATALOG, Gate, ManualClock, ScriptedAgent, Service, service
from harness import until
from records import IDS, NOW, a_thread, a_turn, request

USAGE = Usage(input_tokens=3, cached_input_tokens=2, output_tokens=5, reasoning_tokens=1)


@pytest.fixture
async def stores(postgres_url: str, clock: ManualClock) -> AsyncIterator[list[SqlStore]]:
    """Two processes' ways to one database."""
    stores = [SqlStore(postgres_url, clock) for _ in range(2)]
    await stores[0].write(lambda tx: [tx.agents.publish(agent) for agent in CATALOG.agents()])
    yield stores
    for store in stores:
        await store.aclose()


def add(thread: Thread, turn: Turn, tx: Transaction) -> None:
    """A thread with a turn at work."""
    tx.users.ensure(thread.user_id, NOW)
    tx.threads.add(thread)
    tx.turns.add(turn, request(thread.user_id), owner="me")


async def at_work(store: Store, user: str) -> str:
    """The id of a new turn at work."""
    thread = a_thread(user)
    turn = a_turn(thread)
    await store.write(partial(add, thread, turn))
    return turn.id


def end(turn_id: str, tx: Transaction) -> Ended:
    return end_turn(tx, IDS, turn_id, Ending(cancelled=True, usage=USAGE))


async def booked(store: Store) -> dict[str, Tally]:
    """What is in the ledger, by user."""
    with_users = await store.read(
        lambda tx: [(u, tx.ledger.spent(u, tx.now().date())) for u in ("ada", "bob", "cy")]
    )
    return dict(with_users)


async def test_endings_of_the_same_users_on_two_processes_are_all_booked(stores: list[SqlStore]) -> None:
    """Each process commits them in groups, in the opposite order of the other's."""
    users = ["ada", "bob", "cy"]
    turns = [[await at_work(stores[0], user) for user in users * 20] for _ in stores]
    writes = []
    for forth, back in zip(turns[0], reversed(turns[1]), strict=True):
        writes += [stores[0].write(partial(end, forth)), stores[1].write(partial(end, back))]
    async with asyncio.timeout(30):
        ended = await asyncio.gather(*writes)
    assert not any(each.already for each in ended)
    each_users = Tally(turns=40, usage=Usage(**{name: 40 * getattr(USAGE, name) for name in USAGE.__slots__}))
    assert await booked(stores[0]) == dict.fromkeys(users, each_users)


async def test_processes_that_end_turns_of_one_user_do_not_wait_for_each_other(
    stores: list[SqlStore], postgres_url: str
) -> None:
    await stores[1].write(partial(end, await at_work(stores[1], "ada")))
    with psycopg.connect(postgres_url) as holder:
        assert len(holder.execute("SELECT * FROM usage FOR UPDATE").fetchall()) == 1
        await stores[0].write(partial(end, await at_work(stores[0], "ada")))
        holder.rollback()
        # Connections follow each other, and so do their numbers.
        assert len(holder.execute("SELECT DISTINCT slot FROM usage").fetchall()) == 2
    (line,) = await stores[1].read(lambda tx: tx.ledger.of_user("ada", date.min, date.max, None, 9))
    assert line.tally == (await booked(stores[0]))["ada"] == Tally(turns=2, usage=USAGE + USAGE)


async def test_an_ending_whose_line_is_held_is_tried_again_and_booked_once(
    stores: list[SqlStore], postgres_url: str
) -> None:
    first, second, other = [await at_work(stores[0], user) for user in ("ada", "ada", "bob")]
    await stores[0].write(partial(end, first))
    with psycopg.connect(postgres_url) as holder:
        assert len(holder.execute("SELECT * FROM usage FOR UPDATE").fetchall()) == 1
        ending = asyncio.create_task(stores[0].write(partial(end, second)))
        await until(lambda: stores[0]._writer._later)  # it has met the lock, and is put off
        assert not (await stores[0].write(partial(end, other))).already  # nobody waits behind it
        assert not ending.done()
        holder.rollback()
    assert not (await ending).already
    assert {user: tally.turns for user, tally in (await booked(stores[1])).items()} == {
        "ada": 2,
        "bob": 1,
        "cy": 0,
    }


def _limit(it: Service, quotas: Quotas) -> None:
    """Gives a service quotas."""
    it.accept = AcceptMessage(
        store=it.store,
        engine=it.engine,
        catalog=CATALOG,
        definitions=it.accept._definitions,
        ids=IDS,
        quotas=quotas,
    )


@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "both the same"])
async def test_a_burst_on_two_processes_is_counted_exactly(stores: list[SqlStore], *, shared: bool) -> None:
    """Of different messages, and of messages that are sent to both: of those each hears the same from both."""
    gate = Gate()
    limits = TurnLimits(max_turns_per_user=50)
    agents = [ScriptedAgent(default=[gate]) for _ in stores]
    async with (
        service(stores[0], agents[0], limits=limits, lease=30.0) as one,
        service(stores[1], agents[1], limits=limits, lease=30.0) as two,
    ):
        _limit(one, Quotas(turns_per_day=9))
        _limit(two, Quotas(turns_per_day=9))
        asked = [
            it.say(request_id=f"r{number}" if shared else f"{name}{number}")
            for number in range(20)
            for name, it in {"one": one, "two": two}.items()
        ]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert len({outcome for outcome in outcomes if isinstance(outcome, str)}) == 9
        assert {type(outcome) for outcome in outcomes} == {str, QuotaSpent}
        if shared:
            for number in range(20):
                assert len({str(outcome) for outcome in outcomes[2 * number : 2 * number + 2]}) == 1
        assert (await booked(stores[0]))["ada"].turns == 9


async def test_the_ledger_costs_an_ending_no_wait(stores: list[SqlStore], monkeypatch: pytest.MonkeyPatch) -> None:
    store, waits = stores[0], []
    receive = Pipeline._receive

    def counted(pipeline: Pipeline) -> object:
        waits.append(pipeline)
        return receive(pipeline)

    async def waits_of_an_ending() -> int:
        """Word to others may travel with one of several."""
        seen = []
        for _ in range(5):
            turn_id = await at_work(store, "ada")
            waits.clear()
            await store.write(partial(end, turn_id))
            seen.append(len(waits))
        return min(seen)

    await waits_of_an_ending()
    monkeypatch.setattr(Pipeline, "_receive", counted)
    with_it = await waits_of_an_ending()
    monkeypatch.setattr(Ledger, "enter", lambda *_: None)
    assert await waits_of_an_ending() == with_it > 0
    assert (await booked(store))["ada"].turns == 10


async def test_without_quotas_nobody_asks_what_is_spent(
    stores: list[SqlStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Users, "lock", lambda *_: asked.append("lock"))
    spent = Ledger.spent

    def noted(ledger: Ledger, *key: object) -> Tally:
        asked.append("spent")
        return spent(ledger, *key)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "spent", noted)
    async with service(stores[0]) as it:
        turn_id = await it.say()
        await it.events(turn_id)
        turn, _ = await it.threads.turn("ada", turn_id)
        await it.say(thread_id=turn.thread_id)
        assert asked == []
        it.accept._quotas = Quotas(turns_per_day=9)
        await it.say()
        assert asked == ["lock", "spent"]
