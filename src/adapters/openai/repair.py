"""What must be done to a conversation that may have got out of step with the transcript."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from openai.types.responses import ResponseInputItemParam

from adapters.openai.items import history_items
from adapters.openai.stream import clean
from core.model.message import Message, Role

MAX_ITEMS = 20
"""Items that a conversation takes in one call."""
PAGE = 100
"""Items that it lists in one call."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Ids of the items to delete, the newest first, and then the items to add."""

    delete: Sequence[str]
    add: Sequence[ResponseInputItemParam]


@dataclass(slots=True)
class _Question:
    """A user's message and all that answers it, however it is cut into items. Thoughts do not count."""

    asked: str | None
    index: int = 0
    ids: list[str] = field(default_factory=list)
    items: list[ResponseInputItemParam] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def matches(self, other: "_Question") -> bool:
        return (self.asked, self.reply, sorted(self.calls)) == (other.asked, other.reply, sorted(other.calls))

    @property
    def reply(self) -> str:
        return "\n\n".join(self.said)  # as the pieces of a reply are set apart

    def take(self, item: Mapping[str, Any]) -> None:
        match item.get("type"):
            case "message" if words := _words(item):
                self.said.append(words)
            case "function_call":
                self.calls.append(
                    ("call", *(clean(str(item.get(key))) for key in ("call_id", "name", "arguments")))
                )
            case "function_call_output":
                self.calls.append(("answer", *(clean(str(item.get(key))) for key in ("call_id", "output"))))


def repair(
    newest: Sequence[Mapping[str, Any]],
    *,
    is_all: bool,
    lines: Sequence[Message],
    synced_to: int,
    begins_at: int = 1,
) -> Repair | None:
    """Compares the newest items of a conversation, oldest first, with the transcript, question by question.

    What follows the last question that is the same in both is deleted and added as it is on record: a reply that
    was cut off, a call that was never answered, a turn that never arrived. None where that is more than MAX_ITEMS,
    or where nothing is known of the items before these: `is_all` says that there are none, `synced_to` how many
    lines they mirror at least. `begins_at` is the line with which the conversation begins.
    """
    copy = _copied(newest, is_all=is_all)
    record = _recorded(line for line in lines if line.index >= begins_at)
    known = [offset for offset, question in enumerate(record) if question.index - 1 <= synced_to]
    mirrored = sum(question.index <= synced_to for question in record)
    most, start = 0, 0
    for offset in [0] if is_all else known:
        same = _same(copy, islice(record, offset, None))
        # Where a thread repeats itself, a place at which the copy would lack what it mirrors is not the right one.
        if same > most or (same == most and start + most < mirrored):
            most, start = same, offset
    if not most and not is_all:
        return None
    delete = [item_id for question in copy[most:] for item_id in question.ids]
    add = [item for question in record[start + most :] for item in question.items]
    if len(delete) > MAX_ITEMS or len(add) > MAX_ITEMS:
        return None
    return Repair(delete[::-1], add)


def orphaned_calls(newest: Iterable[Mapping[str, Any]]) -> int:
    """How many calls of tools among some items have no answer there."""
    items = list(newest)
    answered = {str(item.get("call_id")) for item in items if item.get("type") == "function_call_output"}
    return sum(item.get("type") == "function_call" and str(item.get("call_id")) not in answered for item in items)


def _same(copy: Iterable[_Question], record: Iterable[_Question]) -> int:
    count = 0
    for theirs, ours in zip(copy, record, strict=False):
        if not theirs.matches(ours):
            break
        count += 1
    return count


def _copied(items: Iterable[Mapping[str, Any]], *, is_all: bool) -> list[_Question]:
    """The questions in a conversation. One of which the beginning is not listed is left out."""
    questions: list[_Question] = []
    for item in items:
        if item.get("type") == "message" and item.get("role") == "user":
            questions.append(_Question(_words(item)))
        elif not questions:
            if not is_all:
                continue
            questions.append(_Question(None))
        questions[-1].ids.append(str(item.get("id")))
        if len(questions[-1].ids) > 1 or questions[-1].asked is None:
            questions[-1].take(item)
    return questions


def _recorded(lines: Iterable[Message]) -> list[_Question]:
    """The questions in a transcript."""
    questions: list[_Question] = []
    for line in lines:
        items = history_items([line])
        if line.role is Role.USER or not questions:
            asked = _words(items[0]) if line.role is Role.USER else None
            questions.append(_Question(asked, line.index))
        questions[-1].items += items
        if line.role is not Role.USER:
            for item in items:
                questions[-1].take(item)
    return questions


def _words(item: Mapping[str, Any]) -> str:
    content = item.get("content")
    if isinstance(content, str):
        return clean(content)
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return clean("".join(str(part.get("text") or part.get("refusal") or "") for part in parts))
