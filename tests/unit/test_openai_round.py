"""What a response's events say."""

import json

import pytest

from adapters.openai.round import MAX_CALLS, MAX_TOKENS, RoundReader
from adapters.openai.stream import MAX_ID
from core.model.events import TextDelta, ToolCalled
from core.model.turn import TurnReason, Usage

DELTA = "response.output_text.delta"


def event(kind: str, **fields: object) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


def delta(text: str, number: int | None = None, place: int = 0) -> bytes:
    numbered = {} if number is None else {"sequence_number": number}
    return event(DELTA, delta=text, output_index=place, content_index=0, **numbered)


def test_a_pair_cut_in_two_is_joined() -> None:
    reader = RoundReader()
    assert reader.read([delta("a\ud83d")]) == [TextDelta("a")]
    assert reader.read([delta("\ude00b")]) == [TextDelta("\U0001f600b")]


def test_half_a_pair_that_stays_alone_is_replaced() -> None:
    reader = RoundReader()
    done = event("response.completed", response={})
    assert reader.read([delta("a\ud83d"), done]) == [TextDelta("a\ufffd")]


def test_an_event_sent_twice_counts_once() -> None:
    assert RoundReader().read([delta("a", 4), delta("a", 4), delta("b", 5), delta("a", 4)]) == [TextDelta("ab")]


def test_events_without_numbers_all_count() -> None:
    assert RoundReader().read([delta("a"), delta("a")]) == [TextDelta("aa")]


def test_text_that_comes_only_whole_is_not_lost_and_never_doubled() -> None:
    place = {"output_index": 0, "content_index": 0}
    item = {"type": "message", "content": [{"type": "output_text", "text": "abc"}]}
    wholes = [
        event("response.output_text.done", text="abc", **place),
        event("response.output_item.done", output_index=0, item=item),
        event("response.completed", response={"output": [item]}),
    ]
    for first in range(3):
        assert RoundReader().read(wholes[first:]) == [TextDelta("abc")]
        assert RoundReader().read([delta("a"), *wholes[first:2], delta("")]) == [
            TextDelta("abc" if first < 2 else "a")
        ]


def test_a_lost_delta_is_no_silent_splice() -> None:
    reader = RoundReader()
    reader.read([delta("a"), delta("c"), event("response.output_text.done", text="abc")])
    assert reader.fault is not None
    assert reader.fault.reason is TurnReason.PROVIDER_PROTOCOL


def test_text_before_a_failure_in_the_same_bytes_is_kept() -> None:
    reader = RoundReader()
    assert reader.read([delta("a"), b"{"]) == [TextDelta("a")]
    assert reader.fault is not None


def test_a_second_message_is_set_apart() -> None:
    assert RoundReader().read([delta("a"), delta("b", place=1), delta("c", place=1)]) == [TextDelta("a\n\nbc")]
    assert RoundReader(follows_text=True).read([delta("a")]) == [TextDelta("\n\na")]


def test_text_without_end_is_refused() -> None:
    reader = RoundReader()
    for _ in range(101):
        reader.read([delta("x" * 10_000)])
    assert reader.fault is not None


@pytest.mark.parametrize(
    "broken",
    [
        event(DELTA),
        event(DELTA, delta=None),
        event("response.output_text.done", text=3),
        event("response.completed"),
        event("response.completed", response=None),
        event("response.output_item.done", item=[]),
        event("response.output_item.done", item={"type": "function_call", "name": "x"}),
    ],
)
def test_events_without_their_fields_break_the_protocol(broken: bytes) -> None:
    reader = RoundReader()
    reader.read([broken])
    assert reader.fault is not None
    assert reader.fault.reason is TurnReason.PROVIDER_PROTOCOL


@pytest.mark.parametrize(
    "usage", [None, [], {}, {"input_tokens": None, "input_tokens_details": None}, {"output_tokens_details": {}}]
)
def test_usage_may_be_left_out(usage: object) -> None:
    reader = RoundReader()
    reader.read([event("response.completed", response={"usage": usage})])
    assert reader.end is not None
    assert reader.end.usage.input_tokens == 0


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        (7, 7),
        (0, 0),
        (-1, 0),
        (MAX_TOKENS, MAX_TOKENS),
        (MAX_TOKENS + 1, MAX_TOKENS),
        ("7", 0),
        (7.5, 0),
        (True, 1),
    ],
)
def test_usage_is_counted_as_far_as_it_is_a_count(said: object, counted: int) -> None:
    reader = RoundReader()
    reader.read([event("response.completed", response={"usage": {"output_tokens": said}})])
    assert reader.end is not None
    assert reader.end.usage == Usage(output_tokens=counted)


def test_each_kind_of_token_has_its_own_count() -> None:
    usage = {
        "input_tokens": 50,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 10},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 4},
    }
    reader = RoundReader()
    reader.read([event("response.completed", response={"usage": usage})])
    assert reader.end is not None
    assert reader.end.usage == Usage(
        input_tokens=50, cached_input_tokens=20, cache_write_tokens=10, output_tokens=9, reasoning_tokens=4
    )


@pytest.mark.parametrize("where", ["response.output_item.done", "response.completed"])
def test_a_call_that_was_cut_off_is_none(where: str) -> None:
    whole = {"type": "function_call", "call_id": "call_1", "name": "goals", "arguments": "{}"}
    cut = {**whole, "call_id": "call_2", "status": "incomplete"}
    reader = RoundReader()
    if where == "response.completed":
        reader.read([event(where, response={"output": [whole, cut]})])
    else:
        reader.read([event(where, output_index=place, item=item) for place, item in enumerate((whole, cut))])
        reader.read([event("response.completed", response={})])
    assert reader.end is not None
    assert reader.end.calls == (ToolCalled("call_1", "goals", "{}"),)


def test_calls_come_with_the_end_and_once() -> None:
    item = {"type": "function_call", "call_id": "call_1", "name": "goals", "arguments": '{"a": 1}'}
    reader = RoundReader()
    reader.read([event("response.output_item.done", output_index=0, item=item)])
    assert reader.end is None
    reader.read([event("response.completed", response={"output": [item]})])
    assert reader.end is not None
    assert reader.end.calls == (ToolCalled("call_1", "goals", '{"a": 1}'),)


def test_as_many_calls_as_allowed_are_taken_though_the_end_repeats_them() -> None:
    def read(count: int) -> RoundReader:
        facts = {"type": "function_call", "name": "goals", "arguments": "{}"}
        items = [{**facts, "call_id": f"call_{number}"} for number in range(count)]
        reader = RoundReader()
        reader.read(
            event("response.output_item.done", output_index=place, item=item) for place, item in enumerate(items)
        )
        reader.read([event("response.completed", response={"output": items})])
        return reader

    most = read(MAX_CALLS)
    assert most.fault is None
    assert most.end is not None
    assert len(most.end.calls) == MAX_CALLS
    more = read(MAX_CALLS + 1)
    assert more.fault is not None
    assert (more.fault.reason, more.end) == (TurnReason.PROVIDER_PROTOCOL, None)


def test_an_answer_that_falls_short_calls_nothing() -> None:
    item = {"type": "function_call", "call_id": "call_1", "name": "goals", "arguments": "{"}
    reader = RoundReader()
    details = {"reason": "max_output_tokens"}
    reader.read(
        [
            event("response.output_item.done", output_index=0, item=item),
            event("response.incomplete", response={"incomplete_details": details}),
        ]
    )
    assert reader.end is not None
    assert (reader.end.calls, reader.end.shortfall) == ((), TurnReason.OUTPUT_LIMIT)


@pytest.mark.parametrize(
    ("response", "shortfall", "fault"),
    [
        ({"status": "completed"}, None, None),
        ({"status": "in_progress"}, None, None),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            TurnReason.OUTPUT_LIMIT,
            None,
        ),
        ({"status": "incomplete", "incomplete_details": None}, None, TurnReason.PROVIDER_TRUNCATED),
        ({"status": "cancelled"}, None, TurnReason.PROVIDER_TRUNCATED),
        ({"status": "failed", "error": {"code": "server_error"}}, None, TurnReason.PROVIDER_UNAVAILABLE),
    ],
)
def test_what_a_response_says_of_itself_counts_where_its_last_event_is_always_the_same(
    response: object, shortfall: TurnReason | None, fault: TurnReason | None
) -> None:
    reader = RoundReader()
    assert reader.read([delta("a"), event("response.completed", response=response)]) == [TextDelta("a")]
    assert (reader.fault.reason if reader.fault else None) is fault
    assert (reader.end is None) is (fault is not None)
    assert reader.end is None or reader.end.shortfall is shortfall


@pytest.mark.parametrize("details", [None, [], {}, {"reason": ["max_output_tokens"]}, {"reason": "something_new"}])
def test_a_shortfall_without_a_reason_keeps_what_was_said(details: object) -> None:
    reader = RoundReader()
    cut = event("response.incomplete", response={"incomplete_details": details})
    assert reader.read([delta("a"), cut]) == [TextDelta("a")]
    assert reader.fault is not None
    assert reader.fault.reason is TurnReason.PROVIDER_TRUNCATED


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resp_1", True),
        ("r" * MAX_ID, True),
        ("r" * (MAX_ID + 1), False),
        ("", False),
        ("../x", False),
        (7, False),
    ],
)
def test_a_responses_name_is_what_can_be_asked_for_and_kept(name: object, known: bool) -> None:
    reader = RoundReader()
    reader.read([event("response.created", response={"id": name})])
    assert reader.response_id == (name if known else None)


def test_what_follows_the_end_is_not_read() -> None:
    reader = RoundReader()
    assert reader.read([delta("a"), event("response.completed", response={}), delta("b")]) == [TextDelta("a")]


def test_events_that_come_twice_are_counted() -> None:
    reader = RoundReader()
    reader.read([delta("a", 4), delta("a", 4), delta("b", 5), delta("a", 4)])
    assert (reader.duplicates, reader.gaps) == (2, 0)


def test_a_gap_is_counted_and_nothing_is_made_up_for_it() -> None:
    reader = RoundReader()
    assert reader.read([delta("a", 4), delta("c", 6), delta("d", 7)]) == [TextDelta("acd")]
    assert (reader.gaps, reader.has_gap, reader.fault) == (1, False, None)
    reader.read([event("response.output_text.done", text="abcd", output_index=0, content_index=0)])
    assert reader.fault is not None
    assert reader.fault.reason is TurnReason.PROVIDER_PROTOCOL


def test_a_gap_behind_which_nothing_was_said_is_closed_by_the_whole_text() -> None:
    reader = RoundReader()
    whole = event("response.output_text.done", text="abc", output_index=0, content_index=0, sequence_number=9)
    assert reader.read([delta("a", 4), whole]) == [TextDelta("abc")]
    assert (reader.gaps, reader.fault) == (1, None)


def test_events_that_nobody_reads_are_no_gap() -> None:
    reader = RoundReader(again=True)
    assert reader.read([delta("a", 4), b"", b"", delta("b", 7), delta("c", 8)]) == [TextDelta("abc")]
    assert (reader.gaps, reader.has_gap) == (0, False)


def test_where_events_can_be_had_again_reading_stops_before_a_gap() -> None:
    reader = RoundReader(again=True)
    assert reader.read([delta("a", 4), delta("c", 6)]) == [TextDelta("a")]
    assert (reader.has_gap, reader.sequence) == (True, 4)
    reader.reopen()
    assert reader.read([delta("b", 5), delta("c", 6)]) == [TextDelta("bc")]
    assert (reader.has_gap, reader.gaps) == (False, 1)


def test_a_gap_that_is_still_there_is_how_the_server_counts() -> None:
    reader = RoundReader(again=True)
    reader.read([delta("a", 4), delta("c", 6)])
    reader.reopen()
    assert reader.read([delta("c", 6), delta("d", 7)]) == [TextDelta("cd")]
    assert not reader.has_gap


def test_numbers_may_begin_anywhere() -> None:
    reader = RoundReader(again=True)
    assert reader.read([delta("a", 7), delta("b", 8)]) == [TextDelta("ab")]
    assert reader.gaps == 0


def test_all_is_said_when_every_item_is_done_and_the_last_was_no_thought() -> None:
    def added(place: int) -> bytes:
        return event("response.output_item.added", output_index=place, item={})

    def done(place: int, kind: str) -> bytes:
        facts = {"call_id": "c", "name": "n", "arguments": "{}"} if kind == "function_call" else {}
        return event("response.output_item.done", output_index=place, item={"type": kind, **facts})

    reader = RoundReader()
    seen = []
    for step in (
        added(0), done(0, "reasoning"), added(1), delta("a", place=1), done(1, "message"), delta("b", place=2),
        done(2, "message"), added(3), added(4), done(3, "function_call"), done(4, "message"),
    ):  # fmt: skip
        reader.read([step])
        seen.append(reader.all_said)
    assert seen == [False, False, False, False, True, False, True, False, False, False, True]
    assert reader.fault is None
