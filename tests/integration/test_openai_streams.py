"""Streams that the provider sends badly, byte by byte: beside the SDK's own reading, and at random."""

import asyncio
import gc
import gzip
import json
import random
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI
from openai.types.responses import ResponseStreamEvent

from adapters.openai.agent import OpenAIAgent
from adapters.openai.round import RoundReader
from adapters.openai.stream import SseSplitter
from core.model.events import TextDelta, ToolCalled
from core.model.message import Message
from core.model.turn import TurnReason, TurnState
from fake_provider import (
    Answer,
    Break,
    Call,
    ErrorEvent,
    Failed,
    HttpError,
    Incomplete,
    Reasoning,
    Text,
    rate_limited,
)
from fake_provider.rendering import Rendering, as_bytes
from fake_provider.script import Step
from fake_provider.store import Numbers
from faults.figures import FIGURES, chance, sized
from mutations import mutated
from openai_lab import MODES, lab, run
from openai_thread import ThreadOfTest, fails
from openai_wire import URL

STREAMS = sized("STREAMS", 150, 3_000, 20_000)
"""Turns with faults at random."""
CUTS = sized("CUTS", 6, 60, 600)
"""Streams that are cut at every byte."""
SPOILT = sized("SPOILT_STREAMS", 1_000, 20_000, 300_000)
"""Streams whose bytes are tampered with."""

# --- the lean path beside the SDK's own


def rendered(answer: Answer) -> list[bytes]:
    """The events of an answer as they travel."""
    request = {"model": "gpt-6-luna"}
    return [as_bytes(event, answer) for event in Rendering(request, answer, "words", Numbers(), 10).events()]


async def typed(data: bytes) -> tuple[str, list[ToolCalled], tuple[int, int], str]:
    """What the SDK's types make of a stream: text, calls, usage and the terminal event."""
    async with AsyncOpenAI(api_key="none", base_url=URL) as client:
        response = httpx2.Response(200, content=data, request=httpx2.Request("POST", "http://provider.test"))
        cast_to: Any = ResponseStreamEvent
        stream: Any = openai.AsyncStream(cast_to=cast_to, response=response, client=client)
        messages: dict[int, str] = {}
        calls, usage, end = [], (0, 0), ""
        async for event in stream:
            match event.type:
                case "response.output_text.delta" | "response.refusal.delta":
                    messages[event.output_index] = messages.get(event.output_index, "") + event.delta
                case "response.output_item.done" if event.item.type == "function_call":
                    calls.append(ToolCalled(event.item.call_id, event.item.name, event.item.arguments))
                case "response.completed" | "response.incomplete":
                    end = event.type
                    usage = (event.response.usage.input_tokens, event.response.usage.output_tokens)
                case "response.failed" | "error":
                    end = event.type
        return "\n\n".join(filter(None, messages.values())), calls, usage, end


def lean(chunks: Iterable[bytes]) -> tuple[str, RoundReader]:
    """What we make of it."""
    splitter, reader, text = SseSplitter(), RoundReader(), ""
    for chunk in chunks:
        text += "".join(delta.text for delta in reader.read(splitter.feed(chunk)))
        if reader.end is not None or reader.fault is not None:
            break
    return text, reader


CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
TEXTS = st.builds(
    lambda pieces, refusal: Text(pieces=tuple(pieces), refusal=refusal),
    st.lists(st.text(CHARACTERS, min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
CALLS = st.builds(Call, st.sampled_from(["goals", "note"]), st.sampled_from(["{}", '{"a": "\\u00e9 b"}']))
ANSWERS = st.builds(
    Answer,
    output=st.lists(TEXTS | CALLS | st.just(Reasoning("Hm.")), min_size=1, max_size=2).map(tuple),
    ending=st.sampled_from(["completed", "completed", Incomplete(), Failed(), ErrorEvent()]),
    newline=st.sampled_from(["\n", "\r\n"]),
    event_names=st.booleans(),
    comments=st.booleans(),
    unknown_events=st.booleans(),
)


@pytest.mark.timeout(60 + 10 * CUTS)
@settings(max_examples=CUTS, deadline=None)
@given(ANSWERS)
def test_wherever_a_stream_is_cut_it_reads_as_the_sdk_reads_it(answer: Answer) -> None:
    data = b"".join(rendered(answer))
    text, calls, usage, end = asyncio.run(typed(data))
    for place in range(len(data) + 1):
        ours, reader = lean([data[:place], data[place:]])
        assert ours == text
        if reader.end is None:
            assert end in ("response.failed", "error")
            assert reader.fault is not None
        else:
            assert end == ("response.incomplete" if reader.end.shortfall else "response.completed")
            assert list(reader.end.calls) == ([] if reader.end.shortfall else calls)
            assert (reader.end.usage.input_tokens, reader.end.usage.output_tokens) == usage


@pytest.mark.timeout(60 + 10 * CUTS)
@settings(max_examples=CUTS, deadline=None)
@given(ANSWERS)
def test_what_ends_before_its_end_has_none_and_says_nothing_else(answer: Answer) -> None:
    events = rendered(answer)
    data = b"".join(events)
    whole, _ = lean([data])
    last = len(data) - len(events[-1])
    for place in range(last + 1):
        text, reader = lean([data[:place]])
        assert reader.end is None
        assert reader.fault is None
        assert whole.startswith(text)


def pieces_of(data: bytes, draw: random.Random) -> list[bytes]:
    """The same bytes, cut anywhere."""
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(6)))
    return [data[start:end] for start, end in pairwise([0, *cuts, len(data)])]


@pytest.mark.timeout(60 + SPOILT // 100)
def test_bytes_that_were_tampered_with_break_nothing_however_they_are_cut() -> None:
    draw = chance("spoilt streams")
    texts = (Text(pieces=("Grüße, ", "👋 ", "und mehr")), Text(text="No.", refusal=True))
    outputs = [(texts[0],), texts, (texts[0], Call("goals", '{"a": "\u00e9 b"}')), (Reasoning("Hm."), texts[1])]
    answers = [
        Answer(output=output, ending=ending, event_names=names)
        for output in outputs
        for ending in ("completed", Incomplete(), Failed(), ErrorEvent())
        for names in (True, False)
    ]
    good = [b"".join(rendered(answer)) for answer in answers]
    ends: Counter[str] = Counter()
    for number in range(SPOILT):
        data = mutated(draw, good[number % len(good)], good)
        text, reader = lean([data])
        again, cut = lean(pieces_of(data, draw))
        assert (again, cut.end) == (text, reader.end), data
        faults = [fault and (fault.reason, fault.code, fault.remedy) for fault in (reader.fault, cut.fault)]
        assert faults[0] == faults[1], data
        assert "\0" not in text
        text.encode()  # no half of a pair
        if reader.end is not None and reader.end.shortfall is None:
            assert b"response.completed" in data
        ends["end" if reader.end else "fault" if reader.fault else "neither"] += 1
    assert ends["end"] > SPOILT / 20
    assert ends["fault"] > SPOILT / 2
    FIGURES.add("malformed", {"spoilt streams": SPOILT})


# --- streams by hand


class Body(httpx2.AsyncByteStream):
    """Chunks, and seconds of silence between them."""

    def __init__(self, steps: Sequence[bytes | float]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self._steps:
            if isinstance(step, bytes):
                yield step
            else:
                await asyncio.sleep(step)


class Player:
    """A provider that plays a stream for each request."""

    def __init__(self, *streams: Sequence[bytes | float], **headers: str) -> None:
        self.streams = list(streams)
        self.headers = {"content-type": "text/event-stream", **headers}
        self.requests: list[httpx2.Request] = []

    def client(self) -> AsyncOpenAI:
        transport = httpx2.MockTransport(self._answer)
        return AsyncOpenAI(
            api_key="none", base_url=URL, max_retries=0, http_client=httpx2.AsyncClient(transport=transport)
        )

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return httpx2.Response(200, headers=self.headers, stream=Body(self.streams.pop(0)), request=request)


def at_player(player: Player, **more: Any) -> ThreadOfTest:
    mode = "response_chain" if more.get("background") else "stateless"
    return ThreadOfTest(OpenAIAgent(player.client(), model="m", user_key="k", state_mode=mode, **more))


ANSWER = Answer(output=(Text(pieces=("One ", "and ", "two.")),))
EVENTS = rendered(ANSWER)


async def test_while_an_answer_is_read_neither_its_request_nor_the_transcript_is_held() -> None:
    player = Player(EVENTS, EVENTS)
    thread = at_player(player)
    await thread.say("Hello")
    request = thread.begin("And now?")
    held: list[weakref.ref[Any]] = []

    class Line(Message):
        """A line of which one can see whether anybody holds it."""

    async def history(data: int = 0) -> Sequence[Message]:
        lines = [
            Line(**{field.name: getattr(line, field.name) for field in fields(line)})
            for line in await request.history(data)
        ]
        held.extend(map(weakref.ref, lines))
        return lines

    async with aclosing(thread.agent.reply(replace(request, history=history))) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
        assert len(json.loads(player.requests[-1].content)["input"]) == 3
        assert len(held) == 2
        held.append(weakref.ref(player.requests.pop()))
        gc.collect()
        assert [each() for each in held] == [None, None, None]


async def test_a_stream_is_read_that_comes_compressed() -> None:
    packed = gzip.compress(b"".join(EVENTS))
    player = Player([packed[:50], packed[50:]], **{"content-encoding": "gzip"})
    assert await at_player(player).say("Hello") == "One and two."


def place_of(kind: str, number: int = 0) -> int:
    """Where an event is."""
    return [place for place, event in enumerate(EVENTS) if f"event: {kind}\n".encode() in event][number]


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        ("response.output_text.delta", 45.0),
        ("response.output_text.done", 45.0),
        ("response.output_item.done", 10.0),
    ],
)
def test_once_all_items_are_done_the_end_must_come_soon(after: str, seconds: float) -> None:
    async def main() -> None:
        place = place_of(after) + 1
        thread = at_player(Player([*EVENTS[:place], seconds + 1, *EVENTS[place:]]))
        assert (await fails(thread))[0] is TurnReason.PROVIDER_STALLED
        assert asyncio.get_running_loop().time() == seconds
        thread = at_player(Player([*EVENTS[:place], seconds - 1, *EVENTS[place:]]))
        assert await thread.say("Hello") == "One and two."

    run(main())


@pytest.mark.parametrize("behind", [b": still here\n\n", b'data: {"type": "response.output_text.delta"}\n\n'])
def test_what_follows_the_end_is_not_waited_for(behind: bytes) -> None:
    async def main() -> None:
        player = Player([*EVENTS, *(step for _ in range(1_000) for step in (0.1, behind))])
        begun = asyncio.get_running_loop().time()
        assert await at_player(player).say("Hello") == "One and two."
        assert asyncio.get_running_loop().time() - begun <= 1.0

    run(main())


def test_a_lost_delta_is_neither_hidden_nor_filled_in() -> None:
    async def main() -> None:
        lost = place_of("response.output_text.delta", 1)
        thread = at_player(Player([*EVENTS[:lost], *EVENTS[lost + 1 :]]))
        assert await fails(thread) == (TurnReason.PROVIDER_PROTOCOL, "One two.")

    run(main())


def test_in_the_background_a_lost_event_is_fetched() -> None:
    async def main() -> None:
        lost = place_of("response.output_text.delta", 1)
        player = Player([*EVENTS[:lost], *EVENTS[lost + 1 :]], EVENTS[lost:])
        thread = at_player(player, background=True)
        assert await thread.say("Hello") == "One and two."
        assert player.requests[1].url.params["starting_after"] == str(lost - 1)

    run(main())


def test_a_server_that_counts_in_its_own_way_is_asked_again_once_per_gap() -> None:
    async def main() -> None:
        kept = [event for event in EVENTS if b"part" not in event.splitlines()[0]]
        place = next(place for place, event in enumerate(kept) if b"output_text.delta" in event)
        player = Player(kept, kept[place:], kept[place + 4 :])
        assert await at_player(player, background=True).say("Hello") == "One and two."

    run(main())


def test_a_delta_of_twenty_megabytes_is_not_kept() -> None:
    async def main() -> None:
        huge = json.dumps({"type": "response.output_text.delta", "delta": "x" * (20 << 20)}).encode()
        chunks = [b"data: " + huge[:1_000], *(huge[at : at + 65_536] for at in range(1_000, len(huge), 65_536))]
        place = place_of("response.output_text.delta") + 1
        thread = at_player(Player([*EVENTS[:place], *chunks]))
        assert await fails(thread) == (TurnReason.OUTPUT_LIMIT, "One ")

    run(main())


# --- at random


HOWS = ("eof", "half", "cut", "malformed", "stall", "comments")


def whim(number: int, random: Any) -> tuple[Step, str | None]:
    """What befalls a request, and the text that is whole if it is answered, None where it must not be."""
    text = f"answer {number} of many words"
    said = (Text(pieces=tuple(f"{word} " for word in text.split())),)
    whole = "".join(said[0].pieces or ())
    match random.randrange(10):
        case 0:
            return random.choice([rate_limited(), HttpError(status=503), HttpError(status=500)]), None
        case 1:
            return random.choice(
                [HttpError(reset=True), HttpError(status=408), HttpError(status=400, code="conversation_locked")]
            ), None
        case 2:
            return HttpError(status=random.choice([400, 401, 404, 429]), code="insufficient_quota"), None
        case 3:
            endings = [Incomplete(), Failed(), ErrorEvent(), ErrorEvent(nested=True), Failed("invalid_prompt")]
            return Answer(output=random.choice([said, ()]), ending=random.choice(endings)), None
        case 4 | 5 | 6 | 7:
            fault = Break(how=random.choice(HOWS), after=random.randrange(7), every=0.1)
            struck = fault.after <= 5
            return Answer(output=said, fault=fault, byte_by_byte=random.random() < 0.1), None if struck else whole
        case _:
            odd = random.choice([Answer(), Answer(twice=True), Answer(comments=True), Answer(unknown_events=True)])
            return replace(odd, output=said, byte_by_byte=random.random() < 0.1), whole


@pytest.mark.timeout(60 + STREAMS)
def test_nothing_is_completed_that_the_provider_did_not_complete() -> None:
    random = chance("streams")

    async def main(mode: str, count: int) -> int:
        completed = 0
        async with lab(mode, first_event=1.0, idle=1.0) as it:
            for number in range(count):
                it.provider.script.clear()
                steps = [whim(number * 10 + each, random) for each in range(6)]
                it.provider.then(*(step for step, _ in steps))
                if number % 8 == 0:
                    it.thread_id = ""
                await asyncio.sleep(it.agent.refusal() or 0)
                turn = await it.say(f"question {number}")
                asked = 6 - len(it.provider.script)
                _, reply = await it.it.threads.turn("ada", turn.id)
                if turn.state is TurnState.COMPLETED:
                    completed += 1
                    assert reply is not None
                    assert reply.text == steps[asked - 1][1], f"{mode} {number}: {steps[asked - 1]}"
                elif reply is not None:
                    assert turn.state is TurnState.INCOMPLETE
                await it.provider.quiet()
                it.provider.script.clear()
        return completed

    completed = sum(run(main(mode, STREAMS // len(MODES))) for mode in MODES)
    assert STREAMS / 10 < completed < STREAMS
    FIGURES.add("streams", {"turns": STREAMS, "completed": completed, "completed without an end": 0})
