"""How much of a thread goes into a request."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseInputItemParam

from adapters.openai import tuning
from adapters.openai.agent import OpenAIAgent
from adapters.openai.context import Context, tokens
from adapters.openai.items import history_items
from core.model.message import Message, Role, TextPart, ToolExchange
from core.ports.agent import ReplyRequest
from openai_thread import COACH, GOALS, ThreadOfTest

Items = list[ResponseInputItemParam]


def request(turns: Sequence[tuple[str, str]]) -> tuple[ReplyRequest, list[Message]]:
    """A thread of questions and answers, and a tool in each turn."""
    thread = ThreadOfTest(cast("OpenAIAgent", None), definition=replace(COACH, max_output_tokens=16), tools=())
    for asked, answered in turns:
        thread.turns += 1
        thread.add(Role.USER, asked)
        thread.add(Role.TOOL, "", ToolExchange("call", "goals", "{}", "none", False))
        thread.add(Role.ASSISTANT, answered)
    before = list(thread.messages)
    return thread.begin("Now?"), before


TURNS = st.lists(st.tuples(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60)), max_size=8)


@given(TURNS, st.integers(0, 1_500))
def test_the_newest_turns_are_kept_whole_as_far_as_there_is_room(
    turns: list[tuple[str, str]], window: int
) -> None:
    asked, lines = request(turns)
    kept = asyncio.run(Context(asked, window).items())
    fits = [
        start
        for start in range(len(turns) + 1)
        if tokens(history_items(lines[3 * start :])) <= max(window - fixed(asked), 0)
    ]
    assert kept == history_items(lines[3 * min(fits) :])


def fixed(asked: ReplyRequest) -> int:
    """What the request costs without a history."""
    low = 0
    while Context(asked, low)._room == 0:
        low += 1
    return low - 1


def test_what_the_answer_may_need_is_set_aside() -> None:
    asked, _ = request([])
    coach = replace(asked.definition, instructions="")
    asked = replace(asked, definition=coach)
    room = Context(asked, 100_000)._room
    for more, taken in (
        (replace(asked, definition=replace(coach, max_output_tokens=16 + 500)), 500),
        (replace(asked, definition=replace(coach, instructions="x" * 300)), 100),
        (replace(asked, tools=(replace(GOALS, description="x" * 3_000),)), 1_000),
        (replace(asked, message=replace(asked.message, content=(TextPart("x" * 3_000),))), 1_000),
    ):
        assert taken - 5 <= room - Context(more, 100_000)._room <= taken + 100


@given(TURNS.filter(lambda turns: len(turns) > 1))
def test_shrinking_halves_what_is_sent_once(turns: list[tuple[str, str]]) -> None:
    asked, _ = request(turns)
    context = Context(asked, 1_000_000)

    async def shrink() -> tuple[Items, bool, Items, bool]:
        whole = await context.items()
        return whole, await context.shrink(), await context.items(), await context.shrink()

    whole, shrunk, rest, again = asyncio.run(shrink())
    assert (shrunk, again) == (True, False)
    assert rest == whole[len(whole) - len(rest) :]
    assert len(rest) < len(whole)
    assert tokens(rest) <= tokens(whole) // 2


async def test_nothing_can_not_be_halved() -> None:
    asked, _ = request([])
    assert not await Context(asked, 1_000_000).shrink()


@pytest.mark.parametrize(
    ("text", "most"), [("a" * 300, 108), ("\u4f60\u597d" * 50, 108), ("\U0001f600" * 30, 48), ("", 8)]
)
def test_the_estimate(text: str, most: int) -> None:
    assert tokens([{"type": "message", "role": "assistant", "content": text}]) == most
    if text:
        assert (
            tokens([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}])
            == most
        )


@pytest.mark.parametrize(
    ("model", "window", "compact_at"),
    [
        ("gpt-6-luna", 922_000, 737_600),
        ("gpt-6-luna-2026-09-22", 922_000, 737_600),
        ("gpt-4o", 128_000, None),
        ("gpt-4.1-mini", 1_000_000, None),
        ("gpt-6.2-sol", None, None),
        ("llama3.2", None, None),
    ],
)
def test_what_is_known_of_models(model: str, window: int | None, compact_at: int | None) -> None:
    assert tuning.window(model) == window
    assert tuning.compact_at(model) == compact_at
