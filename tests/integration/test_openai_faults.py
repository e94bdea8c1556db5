"""Every fault of the provider, before the text, in the middle of it and behind it: what becomes of the turn, how
often the provider is asked, and that the next turn finds the provider's copy as the record has it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import pytest

from core.model.errors import ProviderUnavailable, TurnInProgress
from core.model.turn import TurnReason, TurnState
from core.ports.agent import CopyFound, ReplyRequest, StateChanged
from core.use_cases.reconcile_thread import ReconcileThread
from fake_provider import (
    Answer,
    Break,
    Call,
    ErrorEvent,
    Failed,
    Gate,
    HttpError,
    Incomplete,
    Reasoning,
    Text,
    rate_limited,
)
from fake_provider.script import Step
from harness import until
from openai_lab import MODES, lab, outcome, run
from openai_thread import words

COMPLETED, INCOMPLETE, FAILED = TurnState.COMPLETED, TurnState.INCOMPLETE, TurnState.FAILED
R = TurnReason
PIECES = ("One ", "and ", "two.")
LAST = len(PIECES)


def broken(how: Any, after: int) -> Answer:
    return Answer(output=(Text(pieces=PIECES),), fault=Break(how=how, after=after, every=0.5))


def ending(ending: Any, text: str = "") -> Answer:
    return Answer(output=(Text(text=text),) if text else (Reasoning(),), ending=ending)


@dataclass(frozen=True)
class Case:
    """Steps of the provider for one turn, and what the turn comes to: `seconds` is how long it takes at most."""

    name: str
    steps: tuple[Step, ...]
    state: TurnState
    reason: TurnReason | None
    posts: int
    text: str = ""
    seconds: float = 1.0


def before(name: str, step: Step, reason: TurnReason, seconds: float = 0.5) -> list[Case]:
    """What can pass, before the first text: once only the time tells, three times is too often."""
    return [
        Case(f"{name}, once", (step,), COMPLETED, None, 2, seconds=seconds + 0.7),
        Case(f"{name}, thrice", (step, step, step), FAILED, reason, 3, seconds=3 * seconds + 2),
    ]


def at_once(name: str, step: Step, reason: TurnReason) -> Case:
    """What can't pass."""
    return Case(name, (step,), FAILED, reason, 1, seconds=0.01)


LOCKED = HttpError(status=400, code="conversation_locked")
CASES = [
    # 33, 34: limits, outages
    *before("429", rate_limited(), R.PROVIDER_RATE_LIMITED, 1.0),
    *before("429 for 20 s", rate_limited("20"), R.PROVIDER_RATE_LIMITED, 20.0),
    at_once("429 for 21 s", rate_limited("21"), R.PROVIDER_RATE_LIMITED),
    at_once("no quota", HttpError(status=429, code="insufficient_quota"), R.PROVIDER_RATE_LIMITED),
    at_once(
        "too large",
        HttpError(status=429, code="rate_limit_exceeded", message="Request too large for gpt-6-luna."),
        R.PROVIDER_RATE_LIMITED,
    ),
    *before("500", HttpError(status=500), R.PROVIDER_UNAVAILABLE),
    *before("502", HttpError(status=502, body=b"<html>"), R.PROVIDER_UNAVAILABLE),
    *before("503", HttpError(status=503, code="server_is_overloaded"), R.PROVIDER_UNAVAILABLE),
    *before("503 for 5 s", HttpError(status=503, headers={"retry-after": "5"}), R.PROVIDER_UNAVAILABLE, 5.0),
    *before("408", HttpError(status=408), R.PROVIDER_TIMEOUT),
    *before("reset before the header", HttpError(reset=True), R.PROVIDER_UNAVAILABLE),
    # 35: our own fault
    at_once("401", HttpError(status=401, code="invalid_api_key"), R.PROVIDER_CONFIG),
    at_once("403", HttpError(status=403), R.PROVIDER_CONFIG),
    at_once("no model", HttpError(status=400, code="model_not_found", param="model"), R.PROVIDER_CONFIG),
    at_once("a parameter", HttpError(status=400, code="unsupported_parameter"), R.PROVIDER_CONFIG),
    # 39: silence before the first event
    *before("no header", Answer(headers_gate=Gate()), R.PROVIDER_TIMEOUT, 30.0),
    *before("no event", broken("stall", 0), R.PROVIDER_TIMEOUT, 30.0),
    *before("comments only", broken("comments", 0), R.PROVIDER_TIMEOUT, 30.0),
    # 40: silence between events
    Case("a halt", (broken("stall", 1),), INCOMPLETE, R.PROVIDER_STALLED, 1, PIECES[0], 45.0),
    Case("comments", (broken("comments", 1),), INCOMPLETE, R.PROVIDER_STALLED, 1, PIECES[0], 45.01),
    Case("a halt at last", (broken("stall", LAST),), INCOMPLETE, R.PROVIDER_STALLED, 1, "".join(PIECES), 45.0),
    # 41: cut off
    *(
        case
        for how in ("eof", "half", "cut")
        for case in (
            *before(f"{how} at first", broken(how, 0), R.PROVIDER_TRUNCATED),
            Case(how, (broken(how, 1),), INCOMPLETE, R.PROVIDER_TRUNCATED, 1, PIECES[0], 0.0),
            Case(f"{how} at last", (broken(how, LAST),), INCOMPLETE, R.PROVIDER_TRUNCATED, 1, "".join(PIECES)),
        )
    ),
    # 42: not to be read
    at_once("malformed at first", broken("malformed", 0), R.PROVIDER_PROTOCOL),
    Case("malformed", (broken("malformed", 1),), INCOMPLETE, R.PROVIDER_PROTOCOL, 1, PIECES[0], 0.0),
    Case(
        "malformed at last", (broken("malformed", LAST),), INCOMPLETE, R.PROVIDER_PROTOCOL, 1, "".join(PIECES), 0.0
    ),
    Case("unknown events", (Answer(unknown_events=True),), COMPLETED, None, 1),
    # 43: twice
    Case("all twice", (Answer(twice=True),), COMPLETED, None, 1),
    # 45: too much
    at_once(
        "an event of 2 MB", Answer(output=(Text(text="x" * (2 << 20), deltas=False),)), R.OUTPUT_LIMIT
    ),
    Case(
        "an event of 2 MB behind text",
        (Answer(output=(Text(text="Well."), Text(text="x" * (2 << 20), deltas=False))),),
        INCOMPLETE, R.OUTPUT_LIMIT, 1, "Well.",
    ),
    # 46: the provider says that it failed
    Case("incomplete", (ending(Incomplete(), "Half"),), INCOMPLETE, R.OUTPUT_LIMIT, 1, "Half"),
    at_once("incomplete at first", ending(Incomplete()), R.OUTPUT_LIMIT),
    Case("filtered", (ending(Incomplete("content_filter"), "Half"),), INCOMPLETE, R.CONTENT_FILTERED, 1, "Half"),
    at_once("filtered at first", ending(Failed("invalid_prompt")), R.CONTENT_FILTERED),
    *before("failed", ending(Failed()), R.PROVIDER_UNAVAILABLE),
    *before("failed for its load", ending(Failed("rate_limit_exceeded")), R.PROVIDER_RATE_LIMITED),
    *before("error", ending(ErrorEvent()), R.PROVIDER_UNAVAILABLE),
    *before("error, nested", ending(ErrorEvent("server_is_overloaded", nested=True)), R.PROVIDER_UNAVAILABLE),
    at_once("an unknown error", ending(ErrorEvent("novelty")), R.PROVIDER_UNAVAILABLE),
    Case("failed behind text", (ending(Failed(), "Half"),), INCOMPLETE, R.PROVIDER_UNAVAILABLE, 1, "Half"),
    Case("error behind text", (ending(ErrorEvent(), "Half"),), INCOMPLETE, R.PROVIDER_UNAVAILABLE, 1, "Half"),
    Case("nested", (ending(ErrorEvent(nested=True), "Half"),), INCOMPLETE, R.PROVIDER_UNAVAILABLE, 1, "Half"),
    # ours: the context
    Case("too long, once", (HttpError(status=400, code="context_length_exceeded"),), COMPLETED, None, 2),
    Case(
        "too long, twice",
        (HttpError(status=400, code="context_length_exceeded"),) * 2,
        FAILED, R.CONTEXT_TOO_LONG, 2,
    ),
    Case("too long within the stream", (ending(ErrorEvent("context_length_exceeded")),), COMPLETED, None, 2),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault(case: Case, mode: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            assert outcome(await it.say("first")) == (COMPLETED, None)
            # A step may be played more than once: each gets gates of its own.
            it.provider.then(*map(_fresh, case.steps))
            begun = asyncio.get_running_loop().time()
            turn = await it.say("second")
            assert outcome(turn) == (case.state, case.reason)
            assert asyncio.get_running_loop().time() - begun <= case.seconds
            assert len(it.provider.posts) == 1 + case.posts
            assert it.provider.script == []  # every fault struck
            _, reply = await it.it.threads.turn("ada", turn.id)
            if case.state is not COMPLETED:
                assert (reply.text if reply else "") == case.text
            await it.provider.quiet()
            assert outcome(await it.say("third")) == (COMPLETED, None)
            if not case.name.startswith("too long"):  # what was dropped is not missed
                assert not await it.lags_behind("third")
            assert outcome(await it.say("fourth")) == (COMPLETED, None)

    run(main())


def _fresh(step: Step) -> Step:
    if not isinstance(step, Answer):
        return step
    fault = step.fault and replace(step.fault, gate=Gate())
    return replace(step, fault=fault, headers_gate=step.headers_gate and Gate())


# --- 34: nobody there


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("how", "reason", "seconds"), [("refused", R.PROVIDER_UNAVAILABLE, 0), ("mute", R.PROVIDER_TIMEOUT, 5)]
)
def test_nobody_listens(mode: str, how: str, reason: TurnReason, seconds: float) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            await it.say("first")
            loop = asyncio.get_running_loop()
            await it.wire.hang_up()
            it.wire.refusals = [how, how]
            begun = loop.time()
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert 2 * seconds < loop.time() - begun < 2 * seconds + 2.5
            await it.wire.hang_up()
            it.wire.refusals = [how] * 3
            assert outcome(await it.say("third")) == (FAILED, reason)
            assert it.wire.refusals == []
            assert outcome(await it.say("fourth")) == (COMPLETED, None)
            assert not await it.lags_behind("fourth")

    run(main())


# --- 36 to 38: the copy


def test_a_lock_is_waited_for_and_then_left_behind() -> None:
    async def main() -> None:
        async with lab("conversation") as it:
            await it.say("first")
            it.provider.then(LOCKED, LOCKED)
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert len(it.provider.conversations) == 1
            (conversation,) = it.provider.conversations.values()
            conversation.busy = True
            loop, posts = asyncio.get_running_loop(), len(it.provider.posts)
            begun = loop.time()
            assert outcome(await it.say("third")) == (COMPLETED, None)
            assert 0.75 * 7.5 <= loop.time() - begun <= 10
            assert len(it.provider.posts) == posts + 6
            assert len(it.provider.conversations) == 2
            assert not await it.lags_behind("third")

    run(main())


@pytest.mark.parametrize("mode", MODES)
def test_a_provider_that_lost_everything_is_told_again_once(mode: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            await it.say("first")
            it.provider.conversations.clear()
            it.provider.contexts.clear()
            posts = len(it.provider.posts)
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert not await it.lags_behind("second")
            assert len(it.provider.posts) == posts + (1 if mode == "stateless" else 2)
            if mode != "stateless":
                gone = HttpError(status=404, message="Not found.")
                it.provider.then(gone, gone)
                assert outcome(await it.say("third")) == (FAILED, R.PROVIDER_CONFIG)
                assert it.provider.script == []
                assert outcome(await it.say("fourth")) == (COMPLETED, None)
                assert not await it.lags_behind("fourth")

    run(main())


@pytest.mark.parametrize("what", ["conversations", "items"])
def test_a_provider_that_is_silent_about_the_copy_is_asked_again_after_a_minute(what: str) -> None:
    async def main() -> None:
        async with lab("conversation") as it:
            if what == "items":  # a line that the copy lacks
                await it.say("zeroth")
                it.provider.then(HttpError(status=401, code="invalid_api_key"))
                assert outcome(await it.say("first")) == (FAILED, R.PROVIDER_CONFIG)
            it.provider.refusals[what] = [HttpError(gate=Gate())]
            posts, begun = len(it.provider.posts), asyncio.get_running_loop().time()
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert 60 <= asyncio.get_running_loop().time() - begun <= 62
            assert it.provider.refusals[what] == []
            assert len(it.provider.posts) == posts + 1
            assert not await it.lags_behind("second")

    run(main())


@pytest.mark.parametrize("mode", ["conversation", "response_chain"])
@pytest.mark.parametrize("how", ["No tool output found for function call call_1.", "No tool call found for it."])
def test_a_copy_that_the_provider_can_not_use_is_told_again(mode: str, how: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            await it.say("first")
            it.provider.then(HttpError(status=400, message=how, param="input"))
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert len(it.provider.posts) == 3
            assert not await it.lags_behind("second")

    run(main())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["eof", "cut", "stall", "malformed"])
@pytest.mark.parametrize("where", ["call", "answer"])
def test_a_fault_around_a_tool_leaves_no_orphan(mode: str, how: Any, where: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            await it.say("first")
            calls = Answer(output=(Text(text="Let me note that."), Call("note", "{}", "call_1")))
            told = Answer(output=(Text(pieces=PIECES),), fault=Break(how=how, after=2))
            if where == "call":
                calls = replace(calls, fault=Break(how=how, after=1))
            it.provider.then(calls, *([] if where == "call" else [told]))
            turn = await it.say("second")
            assert turn.state is INCOMPLETE
            assert it.provider.script == []
            assert len(it.it.tools.calls) == (where == "answer")
            assert outcome(await it.say("third")) == (COMPLETED, None)
            assert not await it.lags_behind("third")

    run(main())


@pytest.mark.parametrize("mode", MODES)
def test_a_tool_goes_round_and_the_second_round_may_be_tried_again(mode: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            it.provider.then(
                Answer(output=(Call("note", "{}", "call_1"),)),
                HttpError(status=503),
                Answer(fault=Break(how="eof", after=0)),
                Answer(output=(Text(text="Noted."),)),
            )
            assert outcome(await it.say("first")) == (COMPLETED, None)
            assert len(it.it.tools.calls) == 1
            assert it.shown() == ["user: first", "call call_1: note", "answer call_1: noted {}"]
            assert outcome(await it.say("second")) == (COMPLETED, None)
            assert not await it.lags_behind("second")
            assert len(it.provider.conversations) == (mode == "conversation")

    run(main())


# --- 47: an outage


@pytest.mark.parametrize("mode", MODES)
def test_in_an_outage_nothing_is_accepted_until_a_probe_succeeds(mode: str) -> None:
    async def main() -> None:
        async with lab(mode) as it:
            await it.say("first")
            loop = asyncio.get_running_loop()
            down = HttpError(status=503)
            it.provider.then(*[down] * 6)
            begun = loop.time()
            assert outcome(await it.say("second")) == (FAILED, R.PROVIDER_UNAVAILABLE)
            accepted = await it.it.say("third", thread_id=it.thread_id)  # not yet five
            await until(lambda: it.agent.refusal() is not None)
            assert loop.time() - begun < 5
            record = await it.transcript()
            with pytest.raises(ProviderUnavailable) as refused:
                await it.it.say("fourth", user="eve")
            assert 9 < refused.value.retry_after <= 10
            assert await it.transcript() == record
            turn = await it.ended(accepted)  # its last try waits for the breaker, and meets the sixth
            assert outcome(turn) == (FAILED, R.PROVIDER_UNAVAILABLE)
            assert turn.reason is not None
            assert turn.reason.retryable
            assert it.provider.script == []
            with pytest.raises(ProviderUnavailable) as refused:
                await it.it.say("fourth", user="eve")
            await asyncio.sleep(refused.value.retry_after)
            assert outcome(await it.say("fifth")) == (COMPLETED, None)
            assert it.agent.refusal() is None
            assert not await it.lags_behind("fifth")

    run(main())


def test_a_minute_of_outage_costs_little_more_than_the_turns() -> None:
    async def main() -> None:
        async with lab("stateless") as it:
            it.provider.then(*[HttpError(status=500)] * 10_000)
            turns = refused = 0
            for second in range(60):
                for number in range(5):
                    try:
                        await it.it.say("Hello", user=f"user-{second}-{number}")
                        turns += 1
                    except ProviderUnavailable:
                        refused += 1
                await asyncio.sleep(1)
            assert turns + refused == 300
            assert refused > 200
            assert len(it.provider.posts) <= 1.1 * turns + 10
            it.provider.script.clear()
            recovered = asyncio.get_running_loop().time()
            await until(lambda: it.agent.refusal() is None)
            assert outcome(await it.ended(await it.it.say("Hello", user="last"))) == (COMPLETED, None)
            assert asyncio.get_running_loop().time() - recovered <= 20

    run(main())


# --- stopping


@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_cancelled_streams_leave_nothing(mode: str) -> None:
    async def main() -> None:
        async with lab(mode, connections=5) as it:
            await it.say("first")
            for number in range(200):
                gate = Gate()
                stalled = Break(how="stall", after=number % 3, gate=gate)
                it.provider.then(
                    Answer(headers_gate=gate)
                    if number % 4 == 3
                    else Answer(output=(Text(pieces=PIECES),), fault=stalled)
                )
                turn_id = await it.it.say("stop")
                await gate.reached.wait()
                await it.it.cancel("ada", turn_id)
                assert outcome(await it.ended(turn_id)) == (TurnState.CANCELLED, R.CANCELLED_BY_CALLER)
            await it.provider.quiet()
            await until(lambda: not it.it.engine._running)
            assert it.provider.running == 0
            assert it.wire.open <= 1  # the one that is kept for the next request
            tasks = [
                task
                for task in asyncio.all_tasks()
                if "reply" in repr(task.get_coro()) or "turn-" in task.get_name()
            ]
            assert [task.get_name() for task in tasks if task.get_name() != "turn-log-writer"] == []
            it.thread_id = ""
            turns = [await it.it.say("Hello", user=f"user-{number}") for number in range(20)]
            for turn_id in turns:
                assert outcome(await it.ended(turn_id)) == (COMPLETED, None)

    run(main())


def test_a_message_beside_a_reconciliation_has_a_conversation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with lab("conversation") as it:
            await it.say("one")
            (first,) = it.provider.conversations.values()
            del first.items[1:]
            gate, reconcile = Gate(), it.agent.reconcile

            async def slow(
                request: ReplyRequest, *, dry_run: bool
            ) -> AsyncGenerator[CopyFound | StateChanged, None]:
                async with aclosing(reconcile(request, dry_run=dry_run)) as steps:
                    async for step in steps:
                        yield step
                        gate.reached.set()
                        await gate.released.wait()

            monkeypatch.setattr(it.agent, "reconcile", slow)
            operator = asyncio.create_task(ReconcileThread(it.it.store, lambda: it.agent)(it.thread_id))
            await gate.reached.wait()
            turn = await it.say("two")
            assert turn.state is TurnState.COMPLETED
            gate.released.set()
            with pytest.raises(TurnInProgress):
                await operator
            await it.say("three")
            _, second = it.provider.conversations.values()
            assert words(second.items) == await it.transcript()
            assert words(first.items) == (await it.transcript())[:2]

    run(test())
