"""A conversation out of step: what is done to it makes it say what is on record, or it is built anew."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from adapters.openai.items import history_items
from adapters.openai.repair import MAX_ITEMS, PAGE, repair
from core.model.message import Message, Role, TextPart, ToolExchange
from core.model.thread import UNSYNCED

Json = dict[str, Any]


def line(index: int, role: Role, text: str = "", tool: ToolExchange | None = None) -> Message:
    return Message(
        id=f"m{index}",
        thread_id="t",
        turn_id="u",
        index=index,
        role=role,
        content=(TextPart(text),) if text else (),
        partial=False,
        created_at=datetime(2026, 11, 22, tzinfo=UTC),
        tool=tool,
    )


def question(number: int, text: str, answer: str, tools: int) -> list[tuple[Role, str, ToolExchange | None]]:
    lines: list[tuple[Role, str, ToolExchange | None]] = [(Role.USER, text, None)]
    lines += [
        (Role.TOOL, "", ToolExchange(f"call_{number}_{each}", "goals", "{}", "none", False))
        for each in range(tools)
    ]
    return [*lines, (Role.ASSISTANT, answer, None)] if answer else lines


WORDS = st.sampled_from(["yes", "no", "Hello", "a\n\nb"])
QUESTIONS = st.lists(
    st.tuples(WORDS, st.sampled_from(["", "yes", "a\n\nb", "why?"]), st.integers(0, 2)), max_size=12
)


def transcript(questions: Sequence[tuple[str, str, int]]) -> list[Message]:
    told = [each for number, facts in enumerate(questions) for each in question(number, *facts)]
    return [line(index, *facts) for index, facts in enumerate(told, 1)]


def copied(lines: Sequence[Message]) -> list[Json]:
    """What a conversation holds of a transcript, as the provider writes it: thoughts, and replies in pieces."""
    items: list[Json] = []
    for item in history_items(lines):
        facts: Json = dict(item)
        if facts.get("role") == "assistant":
            items.append({"type": "reasoning", "summary": []})
            pieces = facts["content"].split("\n\n")
            items += [{**facts, "content": [{"type": "output_text", "text": piece}]} for piece in pieces]
        else:
            items.append(facts)
    return [{**item, "id": f"item_{number}"} for number, item in enumerate(items)]


def told(items: Sequence[Json]) -> list[Any]:
    """What a conversation says, question by question."""
    said: list[Any] = []
    for item in items:
        if item.get("role") == "user":
            said.append([item["content"][0]["text"], "", []])
        elif item.get("role") == "assistant":
            content = item["content"]
            words = content if isinstance(content, str) else content[0]["text"]
            said[-1][1] = "\n\n".join(filter(None, [said[-1][1], words]))
        elif item["type"] != "reasoning":
            said[-1][2].append((item["type"], item["call_id"]))
    return said


def repaired(
    conversation: list[Json], lines: Sequence[Message], synced_to: int, begins_at: int = 1
) -> list[Json] | None:
    """Does what is to be done, as the provider would."""
    newest = conversation[-PAGE:]
    todo = repair(newest, is_all=len(conversation) <= PAGE, lines=lines, synced_to=synced_to, begins_at=begins_at)
    if todo is None:
        return None
    assert len(todo.delete) <= MAX_ITEMS
    assert len(todo.add) <= MAX_ITEMS
    for item_id in todo.delete:
        assert conversation[-1]["id"] == item_id  # the newest first
        conversation.pop()
    return [*conversation, *map(dict, todo.add)]


@given(QUESTIONS, st.integers(0, 40), QUESTIONS, st.integers(0, 12))
@example([("yes", "", 0), ("no", "", 0)], 0, [("no", "", 0)], 0)  # what is strange looks like what is not
def test_a_repaired_conversation_says_what_is_on_record(
    questions: Any, kept: int, strange: Any, dropped: int
) -> None:
    lines = transcript(questions)
    offset = min(dropped, len(questions))
    starts = [each.index - 1 for each in lines if each.role is Role.USER]
    begins = [*starts, len(lines)][offset]
    conversation = copied(lines[begins:])[:kept] + [
        {**item, "id": f"strange_{item['id']}"} for item in copied(transcript(strange))
    ]
    result = repaired(conversation, lines, UNSYNCED, begins + 1)
    if result is not None:
        assert told(result) == told(copied(lines))[offset:]


@given(QUESTIONS, st.integers(0, 40))
@example([("yes", "", 1), ("yes", "", 0)], 1)  # a question that is cut off looks like another one
def test_what_is_cut_off_is_always_little_enough_to_repair(questions: Any, kept: int) -> None:
    lines = transcript(questions[:3])
    result = repaired(copied(lines)[:kept], lines, UNSYNCED)
    assert result is not None
    assert told(result) == told(copied(lines))


def test_a_copy_in_step_is_left_alone() -> None:
    lines = transcript([("a", "b\n\nc", 2), ("d", "", 0), ("e", "f", 0)])
    todo = repair(copied(lines), is_all=True, lines=lines, synced_to=0)
    assert todo is not None
    assert (todo.delete, todo.add) == ([], [])


def test_of_a_long_conversation_only_what_is_known_to_be_mirrored_is_trusted() -> None:
    lines = transcript([(f"question {number}", f"answer {number}", 0) for number in range(200)])
    whole = copied(lines)
    cut = whole[:-2]
    for synced_to, helps in ((UNSYNCED, False), (200, False), (398, True), (400, True)):
        result = repaired(list(cut), lines, synced_to)
        assert (result is not None) is helps
        if result is not None:
            assert told(result) == told(whole)


def test_nothing_is_trusted_before_what_is_listed_of_a_copy_of_which_nothing_is_known() -> None:
    lines = transcript([(f"question {number}", f"answer {number}", 0) for number in range(33)])
    page = copied(lines)
    assert len(page) <= PAGE
    for synced_to, helps in ((UNSYNCED, False), (0, True), (66, True)):
        todo = repair(page, is_all=False, lines=lines, synced_to=synced_to)
        assert (todo is not None) is helps


def test_a_thread_that_repeats_itself_is_not_taken_to_lack_what_it_has() -> None:
    lines = transcript([("Are you there?", "yes", 0)] * 35)
    whole = copied(lines)
    assert len(whole) > PAGE
    assert repaired(list(whole), lines, len(lines)) == whole
    result = repaired(whole[:-2], lines, len(lines) - 2)
    assert result is not None
    assert told(result) == told(whole)


def test_a_page_that_begins_in_an_answer_is_read_from_the_next_question_on() -> None:
    lines = transcript([(f"question {number}", "a\n\nb" if number % 2 else "c", 1) for number in range(60)])
    for extra in range(12):
        conversation = copied(lines)
        stray = [
            {"type": "message", "role": "user", "id": f"x{n}", "content": [{"text": "?"}]} for n in range(extra)
        ]
        result = repaired([*conversation, *stray], lines, len(lines))
        assert result is not None
        assert told(result) == told(conversation)


def test_more_than_a_call_takes_is_built_anew() -> None:
    lines = transcript([("question", "answer", 0)] * 11)
    assert repair([], is_all=True, lines=lines[:20], synced_to=0) is not None
    assert repair([], is_all=True, lines=lines[:21], synced_to=0) is None
    stray = [{"type": "message", "role": "user", "id": f"x{n}", "content": [{"text": "?"}]} for n in range(21)]
    assert repair(stray[:20], is_all=True, lines=[], synced_to=0) is not None
    assert repair(stray, is_all=True, lines=[], synced_to=0) is None
