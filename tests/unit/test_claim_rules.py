"""When a provider's round is gone on with, and when a reply may begin again: rules over a turn and its log."""

from dataclasses import replace

import pytest

from core.model.agent import AgentDefinition
from core.model.events import AttemptRestarted, TextDelta, ToolAnswered, ToolCalled, TurnEvent, TurnStarted
from core.model.turn import Continuation, Turn, TurnReason
from core.ports.agent import Resumption
from core.use_cases.claim_turn import MAX_ATTEMPTS, Claimant, resumption, why_not_again
from doubles import definition
from records import a_thread, a_turn

STARTED = TurnStarted("t", "h", "career-v1")
CALL, ANSWER = ToolCalled("c1", "note", "{}"), ToolAnswered("c1", "noted", is_error=False)


def turn(continuation: Continuation | None, **changes: object) -> Turn:
    """A turn whose provider goes on with something."""
    return a_turn(a_thread(), continuation=continuation, **changes)


@pytest.mark.parametrize(
    ("continuation", "events", "found"),
    [
        (None, [STARTED, TextDelta("a")], None),
        (Continuation("h1", 1, 0), [STARTED], Resumption("h1", "")),
        (Continuation("h1", 1, 0), [STARTED, TextDelta("a"), TextDelta("b")], Resumption("h1", "ab")),
        (Continuation("h2", 1, 1), [STARTED, TextDelta("a"), CALL, ANSWER], Resumption("h2", "")),
        (Continuation("h2", 1, 1), [STARTED, CALL, ANSWER, TextDelta("b")], Resumption("h2", "b")),
        # The log has gone on: what is named there is over.
        (Continuation("h1", 1, 0), [STARTED, CALL, ANSWER], None),
        (Continuation("h1", 1, 0), [STARTED, CALL, ANSWER, TextDelta("b")], None),
        # A call has no answer yet: the next round can't have begun.
        (Continuation("h2", 1, 1), [STARTED, CALL], None),
    ],
)
def test_only_the_round_at_which_a_log_stands_is_gone_on_with(
    continuation: Continuation | None, events: list[TurnEvent], found: Resumption | None
) -> None:
    assert resumption(turn(continuation), events, "scripted") == found


def test_neither_another_attempts_round_nor_another_providers_is_gone_on_with() -> None:
    there = turn(Continuation("h1", 1, 0))
    again: list[TurnEvent] = [STARTED, TextDelta("a"), AttemptRestarted(2, "INTERRUPTED")]
    assert resumption(replace(there, attempt=2), again, "scripted") is None
    assert resumption(there, [STARTED, TextDelta("a")], "another") is None


def claimant(*, restart: bool = False, idempotent: bool = False) -> Claimant:
    """A process that would begin a reply again."""

    def of(_: object, __: str) -> AgentDefinition:
        return definition()

    return Claimant(
        owner="me",
        budget=60.0,
        restart=restart,
        is_idempotent=lambda _, __: idempotent,
        served_by=lambda _: ("script-1", "scripted"),
        definition=of,
    )


@pytest.mark.parametrize(
    ("events", "attempt", "restart", "idempotent", "why"),
    [
        ([], 1, False, False, None),
        ([], MAX_ATTEMPTS - 1, False, False, None),
        ([], MAX_ATTEMPTS, False, False, TurnReason.INTERRUPTED),
        ([], MAX_ATTEMPTS, True, True, TurnReason.INTERRUPTED),
        ([TextDelta("a")], 1, False, False, TurnReason.INTERRUPTED),
        ([TextDelta("a")], 1, True, False, None),
        ([TextDelta("a"), AttemptRestarted(2, "INTERRUPTED")], 2, False, False, None),
        ([CALL], 1, False, True, None),
        ([CALL, ANSWER], 1, False, True, None),
        ([CALL], 1, True, False, TurnReason.TOOL_OUTCOME_UNKNOWN),
        ([CALL], MAX_ATTEMPTS, True, False, TurnReason.TOOL_OUTCOME_UNKNOWN),
        ([CALL, ANSWER], 1, True, False, TurnReason.INTERRUPTED),
        ([CALL, ANSWER, AttemptRestarted(2, "INTERRUPTED")], 2, True, False, TurnReason.INTERRUPTED),
    ],
)
def test_what_keeps_a_reply_from_beginning_again(
    events: list[TurnEvent], attempt: int, restart: bool, idempotent: bool, why: TurnReason | None
) -> None:
    who = claimant(restart=restart, idempotent=idempotent)
    assert why_not_again([STARTED, *events], attempt, who, definition()) is why
