"""Positions: cutting and merging a log changes nothing that anybody can see."""

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.model.events import (
    AttemptRestarted,
    LogEntry,
    Reply,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    after,
    extent,
    merged,
    place,
    reply_of,
    rounds_of,
)
from core.model.message import RefusalPart, TextPart, ToolExchange
from core.model.turn import Turn, TurnState, Usage
from core.use_cases.turn_feed import TurnFeed

TURN = Turn(
    id="t",
    thread_id="th",
    user_id="u",
    agent_id="a",
    state=TurnState.COMPLETED,
    attempt=1,
    epoch=2,
    last_position=9,
    usage=Usage(),
    reason=None,
    model="m",
    provider="p",
    accepted_at=datetime(2026, 1, 1, tzinfo=UTC),
)

# Code points that people, and programs, take for less or more than one character.
texts = st.text(st.sampled_from("ab 👩\u200d🚀🏳\ufe0fe\u0301\u05d0\U0010ffff\n"), min_size=1, max_size=9)
deltas = st.builds(TextDelta, texts, st.booleans())
ids = st.sampled_from(["c1", "c2", "c3"])
events = st.one_of(
    deltas,
    deltas,
    deltas,
    st.builds(ToolCalled, ids, st.just("note"), texts),
    st.builds(ToolAnswered, ids, texts, st.booleans()),
    st.builds(AttemptRestarted, st.integers(2, 3), st.just("PROVIDER_STALLED")),
)
logs = st.lists(events, max_size=12)


def spread(entries: Sequence[LogEntry]) -> list[tuple[int, object]]:
    """A log by positions: every code point and every event at its own."""
    result: list[tuple[int, object]] = []
    for entry in entries:
        if isinstance(entry.event, TextDelta):
            start = entry.position - len(entry.event.text)
            result += [(start + n, (c, entry.event.refusal)) for n, c in enumerate(entry.event.text, start=1)]
        else:
            result.append((entry.position, entry.event))
    return result


@given(logs, st.integers(0, 5))
def test_positions_are_without_gaps_and_advance_by_code_points(log: list[TurnEvent], start: int) -> None:
    entries = place(log, start)
    assert [entry.event for entry in entries] == log
    positions = [position for position, _ in spread(entries)]
    assert positions == list(range(start + 1, start + 1 + sum(map(extent, log))))


@given(logs, st.data())
def test_a_log_cut_anywhere_goes_on_exactly(log: list[TurnEvent], data: st.DataObject) -> None:
    entries = place(log, 0)
    whole = spread(entries)
    cut = data.draw(st.integers(0, len(whole) + 1))
    assert spread(after(entries, cut)) == whole[cut:]
    again = data.draw(st.integers(cut, len(whole) + 1))
    assert after(after(entries, cut), again) == after(entries, again)
    assert all(extent(entry.event) > 0 for entry in after(entries, cut))


@given(logs)
def test_merging_changes_nothing_but_the_number_of_events(log: list[TurnEvent]) -> None:
    few = merged(log)
    assert spread(place(few, 0)) == spread(place(log, 0))
    assert merged(few) == few
    pairs = itertools.pairwise(few)
    assert not any(
        isinstance(a, TextDelta) and isinstance(b, TextDelta) and a.refusal is b.refusal for a, b in pairs
    )


@given(logs, st.data())
def test_a_reply_does_not_depend_on_where_text_was_cut(log: list[TurnEvent], data: st.DataObject) -> None:
    pieces: list[TurnEvent] = []
    for event in log:
        if isinstance(event, TextDelta) and len(event.text) > 1:
            cut = data.draw(st.integers(1, len(event.text) - 1))
            pieces += [TextDelta(event.text[:cut], event.refusal), TextDelta(event.text[cut:], event.refusal)]
        else:
            pieces.append(event)
    assert reply_of(pieces) == reply_of(log) == reply_of(merged(log))
    restarts = [number for number, event in enumerate(log) if isinstance(event, AttemptRestarted)]
    said = log[restarts[-1] + 1 :] if restarts else log
    text = "".join(event.text for event in said if isinstance(event, TextDelta))
    assert "".join(part.text for part in reply_of(log).parts) == text


@given(logs)
def test_rounds_hold_all_that_a_reply_says_and_calls(log: list[TurnEvent]) -> None:
    rounds = rounds_of(log)
    again: list[TurnEvent] = []
    for done in rounds:
        again += [*done.said, *done.calls, *done.answers]
    assert reply_of(again).parts == reply_of(log).parts
    assert rounds_of(again) == rounds
    restarts = [number for number, event in enumerate(log) if isinstance(event, AttemptRestarted)]
    last = log[restarts[-1] + 1 :] if restarts else log
    assert [event for event in again if isinstance(event, ToolCalled)] == [
        event for event in last if isinstance(event, ToolCalled)
    ]


@given(logs, st.lists(st.integers(1, 4), max_size=12), st.data())
def test_a_feed_gives_the_same_log_in_whatever_pieces_it_was_committed(
    log: list[TurnEvent], sizes: list[int], data: st.DataObject
) -> None:
    first = LogEntry(1, TurnStarted("t", "th", "a"))
    feed, left, position = TurnFeed([first]), list(log), 1
    for size in [*sizes, len(log)]:
        piece, left = place(left[:size], position), left[size:]
        if piece:
            feed.publish(piece)
            position = piece[-1].position
    whole = [(1, first.event), *spread(place(log, 1))]
    cut = data.draw(st.integers(0, len(whole)))
    assert spread(feed.after(cut)) == whole[cut:]
    assert len(feed.after(1)) == len(merged(log))


@pytest.mark.parametrize(
    ("log", "reply"),
    [
        ([], Reply((), ())),
        ([TurnStarted("t", "th", "a")], Reply((), ())),
        ([TextDelta("a"), TextDelta("b")], Reply((TextPart("ab"),), ())),
        (
            [TextDelta("a"), TextDelta("b", refusal=True), TextDelta("c")],
            Reply((TextPart("a"), RefusalPart("b"), TextPart("c")), ()),
        ),
        (
            [
                TextDelta("a"),
                ToolCalled("c1", "note", "{}"),
                ToolCalled("c2", "note", "{}"),
                ToolAnswered("c1", "ok", is_error=False),
                TextDelta("b"),
                TurnFinished(TURN, None),
            ],
            Reply((TextPart("ab"),), (ToolExchange("c1", "note", "{}", "ok", is_error=False),)),
        ),
        (
            [
                TextDelta("a"),
                ToolCalled("c1", "note", "{}"),
                ToolAnswered("c1", "ok", is_error=False),
                AttemptRestarted(2, "x"),
                TextDelta("b"),
            ],
            Reply((TextPart("b"),), ()),
        ),
        ([ToolAnswered("c9", "nobody asked", is_error=False)], Reply((), ())),
        ([TextDelta("a"), AttemptRestarted(2, "x")], Reply((), ())),
    ],
    ids=["nothing", "started", "text", "refusal", "tools", "restart", "no call", "restart at the end"],
)
def test_replies(log: list[TurnEvent], reply: Reply) -> None:
    assert reply_of(log) == reply


def test_a_feed_holds_a_long_text_in_few_entries() -> None:
    feed = TurnFeed([LogEntry(1, TurnStarted("t", "th", "a"))])
    for number in range(10_000):
        feed.publish([LogEntry(2 + number, TextDelta("x"))])
    feed.publish([LogEntry(10_002, ToolCalled("c", "goals", "{}")), LogEntry(10_003, TextDelta("y"))])
    assert len(feed.events) < 10
    assert [entry.event for entry in feed.after(9_999)] == [
        TextDelta("xx"),
        ToolCalled("c", "goals", "{}"),
        TextDelta("y"),
    ]
