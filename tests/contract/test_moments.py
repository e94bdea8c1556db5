"""The moments that the core tells whoever measures: each once, in order, and none for a piece of text."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from core.model.errors import CoreError, InvalidField, QuotaExceeded, RequestIdReused
from core.model.events import TurnStarted
from core.model.trail import trail
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState
from core.ports.agent import AgentFailed, Begun
from core.ports.store import Store
from core.ports.telemetry import UNMEASURED, Telemetry, Unmeasured, Vitals
from core.use_cases.turn_engine import TurnLimits
from doubles import DONE, Gate, ScriptedAgent, service
from harness import until

LEASE = 0.5


class Noted(Unmeasured):
    """Notes what it is told, with a clock that ticks when it is looked at."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.looks = 0
        self.traces: dict[tuple[str, int], str] = {}

    def time(self) -> float:
        self.looks += 1
        return float(self.looks)

    def accepted(self, turn: Turn, seconds: float, *, attached: bool) -> None:
        assert seconds > 0
        self.told.append(("attached" if attached else "accepted", turn))

    def refused(self, error: type[CoreError]) -> None:
        self.told.append(("refused", error))

    def began(self, turn: Turn) -> None:
        self.told.append(("began", turn))
        self.traces[turn.id, turn.epoch] = trail().traceparent

    def spoke(self, turn: Turn, seconds: float) -> None:
        assert seconds > 0
        self.told.append(("spoke", turn))

    def ended(self, turn: Turn) -> None:
        self.told.append(("ended", turn))

    def left(self, turn: Turn) -> None:
        self.told.append(("left", turn))

    def handed_over(self, turn: Turn) -> None:
        self.told.append(("handed over", turn))

    def of(self, turn_id: str) -> list[str]:
        """The moments of a turn."""
        return [moment for moment, about in self.told if isinstance(about, Turn) and about.id == turn_id]

    def last(self, moment: str) -> Turn:
        """What was told last of a kind."""
        turn = [about for told, about in self.told if told == moment][-1]
        assert isinstance(turn, Turn)
        return turn


async def test_a_turn_is_told_from_its_acceptance_to_its_end(store: Store) -> None:
    noted = Noted()
    async with service(store, ScriptedAgent(["Hello ", "there.", DONE]), telemetry=noted) as it:
        turn_id = await it.say(request_id="r1")
        await it.events(turn_id)
        await it.say(request_id="r1")
    told = noted.of(turn_id)
    assert sorted(told) == sorted(["began", "accepted", "spoke", "ended", "left", "attached"])
    assert [moment for moment in told if moment in ("began", "spoke", "ended", "left")] == [
        "began",
        "spoke",
        "ended",
        "left",
    ]
    turn = noted.last("ended")
    assert (turn.state, turn.reason, turn.usage) == (TurnState.COMPLETED, None, DONE.usage)
    assert turn.finished_at is not None
    assert turn.finished_at >= turn.accepted_at
    assert noted.last("began").epoch == 1


async def test_a_turn_without_text_does_not_speak_and_a_broken_one_says_why(store: Store) -> None:
    noted = Noted()
    async with service(store, ScriptedAgent([AgentFailed(TurnReason.PROVIDER_STALLED)]), telemetry=noted) as it:
        turn_id = await it.say()
        await it.events(turn_id)
    assert "spoke" not in noted.of(turn_id)
    assert noted.last("ended").reason is TurnReason.PROVIDER_STALLED


async def test_turns_that_others_end_are_told_once(store: Store) -> None:
    noted = Noted()
    first, second = Gate(), Gate()
    async with service(store, ScriptedAgent(["a", first], ["b", second]), telemetry=noted) as it:
        cancelled = await it.say()
        await it.stream(cancelled, "a")
        await it.cancel("ada", cancelled)
        thread_id = noted.last("ended").thread_id
        interrupted = await it.say(thread_id=thread_id)
        await it.stream(interrupted, "b")
        last = await it.say(thread_id=thread_id, on_busy=BusyPolicy.INTERRUPT)
        await it.events(last)
        await until(lambda: noted.of(last)[-1] == "left")
        await it.cancel("ada", last)
    for turn_id in (cancelled, interrupted, last):
        assert Counter(noted.of(turn_id)) == Counter(["began", "accepted", "spoke", "ended", "left"])


async def test_refusals_are_told_by_their_kind(store: Store) -> None:
    noted = Noted()
    gate = Gate()
    limits = TurnLimits(max_turns_per_user=1)
    async with service(store, ScriptedAgent([gate, "x", DONE]), limits=limits, telemetry=noted) as it:
        turn_id = await it.say(request_id="r1")
        for more, error in (
            ({"text": " "}, InvalidField),
            ({}, QuotaExceeded),
            ({"text": "Other", "request_id": "r1"}, RequestIdReused),
        ):
            with pytest.raises(error):
                await it.say(**more)
            assert noted.told[-1] == ("refused", error)
        gate.open()
        await it.events(turn_id)


async def test_turns_that_move_are_told_where_they_come_from_and_where_they_go(store: Store) -> None:
    leaving, arriving, silent = Noted(), Noted(), Gate()
    async with service(store, ScriptedAgent([silent]), lease=LEASE, telemetry=leaving) as one:
        turn_id = await one.say()
        await silent.reached.wait()
        async with service(store, ScriptedAgent(["Here.", DONE]), lease=LEASE, telemetry=arriving) as two:
            await one.engine.drain(5)
            await two.events(turn_id)
    assert [moment for moment in leaving.of(turn_id) if moment != "accepted"] == ["began", "left", "handed over"]
    assert arriving.of(turn_id) == ["began", "spoke", "ended", "left"]
    assert arriving.last("began").epoch > 1


async def test_turns_that_wait_or_move_begin_on_the_trail_of_their_message(store: Store) -> None:
    one_trace, other_trace = (f"00-{digit * 32}-{digit * 16}-01" for digit in "12")
    noted, gate, silent = Noted(), Gate(), Gate()
    async with service(store, ScriptedAgent([gate, "x", DONE], [silent]), telemetry=noted) as it:
        first = await it.say()
        thread_id = (await it.threads.turn("ada", first))[0].thread_id
        await gate.reached.wait()
        queue: dict[str, Any] = {"thread_id": thread_id, "on_busy": BusyPolicy.QUEUE}
        waited = await it.say(**queue, traceparent=one_trace)
        another = await it.say(**queue, traceparent=other_trace)
        gate.open()
        await silent.reached.wait()
        assert noted.traces == {(first, 1): "", (waited, 1): one_trace}
        await it.kill()
    async with service(store, telemetry=noted) as it:
        await it.events(another)
    assert noted.traces.pop((waited, 2)) == one_trace
    assert noted.traces.pop((another, 1)) == other_trace
    events = [entry.event for entry in await store.read(lambda tx: tx.log.read(waited))]
    assert isinstance(events[0], TurnStarted)
    assert events[0].traceparent == one_trace


async def test_what_nobody_can_take_over_is_told_as_ended(store: Store) -> None:
    noted, gate = Noted(), Gate()
    async with service(store, ScriptedAgent(["Half", gate]), telemetry=noted) as it:
        turn_id = await it.say()
        await it.stream(turn_id, "Half")
    assert noted.of(turn_id)[-1] == "ended"
    assert (noted.last("ended").state, noted.last("ended").reason) == (
        TurnState.INCOMPLETE,
        TurnReason.INTERRUPTED,
    )


async def test_a_turn_that_can_not_be_claimed_is_told_as_ended(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Gate()
    async with service(store, ScriptedAgent([Begun("h1"), silent])) as it:
        turn_id = await it.say()
        await silent.reached.wait()
        await it.kill()
    messages: Any = type(await store.read(lambda tx: tx.messages))
    monkeypatch.setattr(messages, "question_of", lambda *_: None)  # what it is to answer can't be found
    noted = Noted()
    async with service(store, telemetry=noted) as it:
        await it.events(turn_id)
        assert noted.of(turn_id) == ["ended"]
        assert noted.last("ended").reason is TurnReason.INTERNAL
        await until(lambda: it.agent.stopped == ["h1"])  # nobody will read it


async def test_no_piece_of_text_costs_a_moment_or_a_look_at_the_clock(store: Store) -> None:
    costs = []
    for pieces in (2, 2_000):
        noted = Noted()
        async with service(store, ScriptedAgent([*["word "] * pieces, DONE]), telemetry=noted) as it:
            await it.events(await it.say())
        costs.append((noted.looks, len(noted.told)))
    assert costs[0] == costs[1]
    assert costs[0][1] == 5


def moments() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Every moment, with something to tell."""
    turn: Any = object()
    yield "time", (), {}
    yield "accepted", (turn, 1.0), {"attached": False}
    yield "refused", (QuotaExceeded,), {}
    yield "spoke", (turn, 1.0), {}
    yield "retried", ("openai", TurnReason.INTERNAL), {}
    yield "committed", (1, 1.0), {}
    yield "copies_left", ("openai", 1), {"reached": True}
    yield "called", ("m", "OK", 1.0), {}
    for name in ("began", "ended", "left", "handed_over"):
        yield name, (turn,), {}


def test_who_does_not_measure_makes_and_keeps_nothing() -> None:
    told = list(moments())
    others = {"agent", "tools", "watching"}
    assert {name for name, _, _ in told} | others == {name for name in vars(Telemetry) if not name.startswith("_")}
    calls = [(getattr(UNMEASURED, name), args, more) for name, args, more in told]
    for call, args, more in calls:
        call(*args, **more)
    before = sys.getallocatedblocks()
    for _ in range(1_000):
        for call, args, more in calls:
            call(*args, **more)
    assert sys.getallocatedblocks() - before < 50  # and not one for each of 11,000
    agent, tools = ScriptedAgent(), object()
    assert UNMEASURED.agent(agent) is agent
    assert UNMEASURED.tools(tools) is tools  # type: ignore[arg-type] # it is not looked at


async def test_vitals_follow_what_is_at_work(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["Hello", gate, DONE])) as it:

        def vitals() -> Vitals:
            return Vitals(
                running=it.engine.running, followers=it.feeds.followers(), lag=it.feeds.lag(), refusing=False
            )

        nothing = Vitals(running=0, followers=0, lag=0, refusing=False)
        assert vitals() == nothing
        turn_id = await it.say()
        await it.stream(turn_id, "Hello")
        slow = it.follow.events(turn_id, 0)
        assert (await anext(slow)).position == 1
        # What a follower was handed counts as read once it has come back for more.
        assert vitals() == Vitals(running=1, followers=1, lag=6, refusing=False)
        reader = asyncio.create_task(it.events(turn_id))
        await until(lambda: it.feeds.followers() == 2)
        await slow.aclose()
        await until(lambda: it.feeds.lag() == 0)
        gate.open()
        await reader
        await until(lambda: vitals() == nothing)
    assert {field.name for field in fields(Vitals)} == {"running", "followers", "lag", "refusing"}
