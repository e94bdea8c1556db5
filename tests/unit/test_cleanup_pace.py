"""How much a cleanup takes on at a time, in simulated time."""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from adapters.memory import store as memory
from adapters.memory.store import MemoryStore
from core.model.agent import Domain
from core.model.turn import TurnState
from core.ports.store import Transaction
from core.use_cases import clean_up_threads
from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads
from doubles import CATALOG, ManualClock
from records import a_thread, a_turn, request
from simulation.loop import simulate

THREADS = 32 * 200


@dataclass
class Pace:
    """A clock that moves by what a step takes on, and what each took on."""

    seconds: float
    now: float = 0.0
    counts: list[int] = field(default_factory=list)

    def step(self, count: int) -> None:
        """One step."""
        self.counts.append(count)
        self.now += count * self.seconds


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Every place takes a millisecond."""
    made = Pace(seconds=0.001)
    expire = memory.Threads.expire_places

    def expire_places(
        threads: memory.Threads, cutoff: datetime, domain: Domain | None, first: int, count: int
    ) -> int:
        made.step(count)
        return expire(threads, cutoff, domain, first, count)

    monkeypatch.setattr(memory.Threads, "expire_places", expire_places)
    monkeypatch.setattr(clean_up_threads, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def fill(tx: Transaction, state: TurnState | None) -> None:
    """Old threads, and a fresh one with a turn in this state."""
    now = tx.now()
    tx.agents.publish(next(agent for agent in CATALOG.agents() if agent.id == "career-v1"))
    tx.users.ensure("ada", now)
    for number in range(THREADS):
        at = now - timedelta(days=1 if number == 0 else 40)
        thread = a_thread(last_message_at=at, created_at=at)
        tx.threads.add(thread)
        if number == 0 and state is not None:
            tx.turns.add(a_turn(thread, state=state, accepted_at=at), request(), owner="test")


def swept(state: TurnState | None) -> float:
    """Cleans up beside a turn in this state; returns for how many seconds it has rested."""

    async def run() -> float:
        store = MemoryStore(ManualClock())
        await store.write(lambda tx: fill(tx, state))
        report = await CleanUpThreads(store, backlog=THREADS // 2)(Cleanup(ttl_days=30))
        assert report.expired == THREADS - 1
        return asyncio.get_running_loop().time()

    surprises: list[BaseException] = []
    rested = simulate(run(), surprises.append)
    assert not surprises
    return rested


def test_alone_a_step_takes_60_ms_and_none_is_waited_for(pace: Pace) -> None:
    assert swept(None) == 0.0
    assert pace.counts == [8, 32, 60, 60, 60]


@pytest.mark.parametrize("state", [TurnState.RUNNING, TurnState.WAITING_FOR_CLIENT])
def test_beside_turns_a_step_takes_20_ms_and_the_store_is_free_as_long(pace: Pace, state: TurnState) -> None:
    assert swept(state) == pytest.approx(pace.now)
    assert pace.counts == [8, *[20] * 10]


def test_a_turn_that_only_waits_slows_nothing_down(pace: Pace) -> None:
    assert swept(TurnState.ACCEPTED) == 0.0


@pytest.mark.parametrize(
    ("seconds", "counts"),
    [(0.000_001, [8, 32, 128, 256]), (0.1, [8] * 25)],
    ids=["no more than 256 places", "no fewer than 8"],
)
def test_bounds(pace: Pace, seconds: float, counts: list[int]) -> None:
    pace.seconds = seconds
    assert swept(None) == 0.0
    assert pace.counts == counts
