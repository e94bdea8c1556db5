"""Server-Sent Events read the same, however the bytes arrive."""

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters.openai.errors import ProviderFault
from adapters.openai.stream import SseSplitter, TextCleaner, clean, decoded
from core.model.turn import TurnReason

DELTA = "response.output_text.delta"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


def split(chunks: list[bytes]) -> list[bytes]:
    splitter = SseSplitter()
    return [event for chunk in chunks for event in splitter.feed(chunk)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A stream with all that the format allows, and the texts in its events."""
    newline = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    texts = draw(st.lists(st.text(max_size=12), min_size=1, max_size=5))
    lines: list[str] = []
    for text in texts:
        data = json.dumps({"type": DELTA, "delta": text}, ensure_ascii=draw(st.booleans()))
        if draw(st.booleans()):
            lines += [f"event: {DELTA}"]
        if draw(st.booleans()):
            lines += [": a comment"]
        colon = draw(st.sampled_from(["data: ", "data:"]))
        if draw(st.booleans()):
            data = data.replace('", "', '",\n"', 1)
        lines += [colon + line for line in data.split("\n")]
        lines += [""] * draw(st.integers(1, 3))
        if draw(st.booleans()):
            lines += [": a comment of its own", ""]
    return (newline.join(lines) + newline).encode(), texts


@given(streams(), st.lists(st.integers(min_value=0), max_size=8))
def test_events_cut_anywhere_read_the_same(stream: tuple[bytes, list[str]], places: list[int]) -> None:
    data, texts = stream
    events = [decoded(event) for event in split(cut(data, places))]
    assert [event and event["delta"] for event in events] == texts


@settings(max_examples=25)
@given(streams())
def test_events_byte_by_byte_read_the_same(stream: tuple[bytes, list[str]]) -> None:
    data, texts = stream
    events = [decoded(event) for event in split([data[at : at + 1] for at in range(len(data))])]
    assert [event and event["delta"] for event in events] == texts


def test_half_an_event_at_the_end_is_none() -> None:
    assert split([b"data: 1\n\ndata: 2\n"]) == [b"1"]


def test_an_event_that_nobody_wants_still_counts_but_is_not_read() -> None:
    assert split([b'event: response.novelty\ndata: {"type": \n\n']) == [b""]
    assert decoded(b"") is None


def test_comments_are_no_events() -> None:
    assert split([b": ping\n\n: ping\n\n"]) == []


@given(st.lists(st.integers(min_value=0), max_size=8), st.sampled_from([b"", b"\n\ndata: 3\n\n"]))
@example([], b"")
@example([], b"\n\ndata: 3\n\n")
def test_an_event_that_is_too_long_ends_it_behind_what_came_before(places: list[int], behind: bytes) -> None:
    data = b"data: 1\n\ndata: 2\n\ndata: " + b"x" * 1000 + behind
    splitter = SseSplitter(max_event=1000)
    events = [event for chunk in cut(data, places) for event in splitter.feed(chunk)]
    assert events == [b"1", b"2"]
    assert splitter.fault is not None
    assert splitter.fault.reason is TurnReason.OUTPUT_LIMIT


def test_an_event_as_long_as_allowed_is_read() -> None:
    splitter = SseSplitter(max_event=1000)
    assert splitter.feed(b"data: " + b"x" * 994 + b"\n\n") == [b"x" * 994]
    assert splitter.fault is None


@pytest.mark.parametrize("data", [b"{", b"nonsense", b"[1]", b'"text"', b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_breaks_the_protocol(data: bytes) -> None:
    with pytest.raises(ProviderFault) as caught:
        decoded(data)
    assert caught.value.reason is TurnReason.PROVIDER_PROTOCOL


def test_the_end_mark_of_the_older_api_is_no_event() -> None:
    assert decoded(b"[DONE]") is None


@given(st.text(alphabet=st.characters(exclude_categories=[])), st.lists(st.integers(min_value=0), max_size=5))
def test_cleaning_does_not_depend_on_the_cuts(text: str, places: list[int]) -> None:
    cleaner = TextCleaner()
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    pieces = [cleaner.feed(text[start:end]) for start, end in pairwise(bounds)]
    whole = "".join([*pieces, cleaner.flush()])
    assert whole == clean(text)
    assert "\0" not in whole
    whole.encode()
