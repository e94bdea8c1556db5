"""When a request for a reply is repeated, and when nobody asks at all."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.openai.breaker import FAILURES, PAUSE, Breaker
from adapters.openai.errors import ProviderFault, Remedy, classified
from adapters.openai.retry import LOCK_WAITS, MAX_WAIT, RESERVE, SHARE, Patience, Policy, RetryBudget
from core.model.turn import TurnReason


class Time:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.naps: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def policy(time: Time) -> Policy:
    return Policy(time.sleep, time.clock, random.Random(1))


LIMITED = classified(429, "", "", "", retry_after=7.0)
DOWN = classified(503, "", "", "")
LOCKED = classified(400, "conversation_locked", "", "")
SILENT = ProviderFault(TurnReason.PROVIDER_TIMEOUT, Remedy.LOOK)


# --- patience


async def test_a_reply_is_asked_for_twice_more(policy: Policy, time: Time) -> None:
    patience = Patience(policy)
    assert [await patience.wait(fault) for fault in (LIMITED, DOWN, DOWN)] == [True, True, False]
    assert time.naps[0] == 7.0
    assert 0.75 <= time.naps[1] <= 1.25


async def test_a_lock_is_waited_for_ten_seconds_at_most(policy: Policy, time: Time) -> None:
    patience = Patience(policy)
    assert [await patience.wait(LOCKED) for _ in range(5)] == [True, True, True, True, False]
    assert all(0.75 * asked <= slept <= 1.25 * asked for asked, slept in zip(LOCK_WAITS, time.naps, strict=True))
    assert sum(LOCK_WAITS) * 1.25 <= 10
    assert await patience.wait(DOWN)  # a lock is no retry


async def test_those_who_wait_for_the_same_do_not_come_back_together(policy: Policy, time: Time) -> None:
    for fault in (DOWN, LOCKED):
        time.naps.clear()
        for _ in range(5):
            assert await Patience(policy).wait(fault)
        assert len(set(time.naps)) == 5


@pytest.mark.parametrize(
    ("asked", "left", "waits"),
    [(MAX_WAIT, math.inf, True), (MAX_WAIT + 1, math.inf, False), (7.0, 7.5, True), (7.0, 7.0, False)],
)
async def test_a_wait_that_is_too_long_is_not_begun(
    policy: Policy, time: Time, asked: float, left: float, waits: bool
) -> None:
    patience = Patience(policy, time.now + left)
    assert await patience.wait(classified(429, "", "", "", retry_after=asked)) is waits
    assert time.naps == ([asked] if waits else [])
    assert sum(policy.budget.spend() for _ in range(100)) == RESERVE - waits  # what is not begun costs nothing


async def test_no_lock_is_waited_for_beyond_the_deadline(policy: Policy, time: Time) -> None:
    assert not await Patience(policy, time.now + 0.1).wait(LOCKED)
    assert time.naps == []


@pytest.mark.parametrize("remedy", [Remedy.NONE, Remedy.REBUILD, Remedy.SHRINK])
async def test_what_can_not_help_is_not_tried(policy: Policy, time: Time, remedy: Remedy) -> None:
    fault = ProviderFault(TurnReason.PROVIDER_UNAVAILABLE, remedy)
    assert not await Patience(policy).wait(fault)
    assert not await Patience(policy).wait_to_look_again(fault)
    assert time.naps == []


async def test_after_a_silence_one_more_look_is_enough(policy: Policy) -> None:
    patience = Patience(policy)
    assert [await patience.wait_to_look_again(SILENT) for _ in range(2)] == [True, False]
    patience = Patience(policy)
    assert [await patience.wait_to_look_again(DOWN) for _ in range(3)] == [True, True, False]


# --- the budget of the process


async def test_in_an_outage_retries_stay_a_tenth_of_the_requests(policy: Policy) -> None:
    retries = 0
    for _ in range(1_000):
        patience = Patience(policy)
        await patience.admission()
        while await patience.wait(DOWN):
            retries += 1
    assert 100 <= retries <= 110


async def test_looking_again_costs_nothing(policy: Policy) -> None:
    looks = [await Patience(policy).wait_to_look_again(DOWN) for _ in range(100)]
    assert all(looks)


@given(st.lists(st.booleans(), max_size=300))
def test_the_budget_is_never_overdrawn(steps: list[bool]) -> None:
    budget = RetryBudget()
    requests = retries = 0
    for is_request in steps:
        if is_request:
            requests += 1
            budget.earn()
        else:
            retries += budget.spend()
        assert retries <= RESERVE + SHARE * requests + 1e-6


def test_what_long_peace_has_saved_is_the_reserve_and_no_more() -> None:
    budget = RetryBudget()
    for _ in range(1_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1_000)) == RESERVE == 10


async def test_a_reply_earns_once_however_often_it_is_asked_for(policy: Policy) -> None:
    while policy.budget.spend():
        pass
    patience = Patience(policy)
    for _ in range(100):
        await patience.admission()
    assert not policy.budget.spend()
    for _ in range(10):
        await Patience(policy).admission()
    assert policy.budget.spend()


# --- the breaker


def test_it_opens_after_failures_in_a_row_and_a_success_ends_the_row(time: Time) -> None:
    breaker = Breaker(time.clock)
    for _ in range(3):
        for _ in range(FAILURES - 1):
            breaker.failed()
        assert breaker.refusal() is None
        breaker.succeeded()
    for _ in range(FAILURES):
        breaker.failed()
    assert breaker.refusal() == breaker.admit() == PAUSE


def test_half_open_one_request_per_pause_goes_through(time: Time) -> None:
    breaker = Breaker(time.clock)
    for _ in range(FAILURES):
        breaker.failed()
    for _ in range(3):  # nobody says what became of the probes
        time.now += PAUSE
        assert breaker.refusal() is None
        assert [breaker.admit() for _ in range(3)] == [None, PAUSE, PAUSE]
        assert breaker.refusal() == PAUSE


def test_a_probe_decides(time: Time) -> None:
    breaker = Breaker(time.clock)
    for _ in range(FAILURES):
        breaker.failed()
    time.now += PAUSE
    assert breaker.admit() is None
    time.now += 3
    breaker.failed()
    assert breaker.refusal() == PAUSE - 3
    time.now += PAUSE - 3
    assert breaker.admit() is None
    breaker.succeeded()
    assert breaker.refusal() is None
    breaker.failed()
    assert breaker.refusal() is None


async def test_who_is_accepted_waits_for_the_breaker_but_not_for_long(policy: Policy, time: Time) -> None:
    breaker = policy.breaker
    for _ in range(FAILURES):
        breaker.failed()
    begun = time.now
    await Patience(policy).admission()  # the probe
    assert PAUSE <= time.now - begun <= PAUSE + 1.25
    waiting = Patience(policy)
    begun = time.now
    time.now += PAUSE
    assert breaker.admit() is None  # somebody else's, and so on
    for _ in range(2):
        breaker.admit()
    await waiting.admission()
    assert time.now - begun <= 2 * PAUSE + 1.25


async def test_a_breaker_that_stays_open_ends_the_turn(policy: Policy, time: Time) -> None:
    for _ in range(FAILURES):
        policy.breaker.failed()

    async def busy(seconds: float) -> None:
        await time.sleep(seconds)
        policy.breaker.admit()  # others are always faster

    for deadline, longest in ((math.inf, MAX_WAIT), (time.now + 3, 3)):
        begun = time.now
        hurried = Policy(busy, time.clock, random.Random(1))
        hurried.breaker = policy.breaker
        with pytest.raises(ProviderFault) as caught:
            await Patience(hurried, deadline).admission()
        assert (caught.value.reason, caught.value.remedy) == (TurnReason.PROVIDER_UNAVAILABLE, Remedy.NONE)
        assert caught.value.reason.retryable
        assert time.now - begun <= longest
