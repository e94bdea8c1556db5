"""How much of a thread a request can hold."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from openai.types.responses import ResponseInputItemParam

from adapters.openai.items import aside, history_items, turn_items
from core.model.attachment import MAX_DATA, unread
from core.model.media import PDF
from core.model.message import Message, Role
from core.ports.agent import ReplyRequest

_BYTES_PER_TOKEN = 3
"""Of UTF-8. English has rather more than four and Chinese about three: this counts too much, not too little."""
_ITEM_TOKENS = 8
"""What an item costs beside its words."""
_PART_TOKENS = 1_500
"""What a part costs that is no text, such as an image. What a document costs depends on its pages."""

_WORDS = ("text", "refusal", "arguments", "output", "name")


def tokens(items: Iterable[ResponseInputItemParam]) -> int:
    """An estimate, on the safe side."""
    return sum(_ITEM_TOKENS + _cost(item) for item in items)


def _cost(item: Any) -> int:
    cost = sum(_length(item[name]) for name in _WORDS if isinstance(item.get(name), str))
    content = item.get("content", ())
    if isinstance(content, str):
        return cost + _length(content)
    for part in content:
        words = [part[name] for name in _WORDS if isinstance(part.get(name), str)]
        cost += sum(map(_length, words)) if words else _attached(part)
    return cost


def _attached(part: Mapping[str, Any]) -> int:
    data = part.get("file_data", f"data:{PDF}")
    # A text is read like any other; four characters of base64 stand for three bytes.
    return _PART_TOKENS if data.startswith(f"data:{PDF}") else len(data) // 4


def _length(text: str) -> int:
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


class Context:
    """The part of a thread's transcript that goes into requests of `window` tokens: the newest turns, each whole.

    What the answer may need, the instructions, the tools and the turn itself are set aside first. As much of what
    is attached goes along as one message may have.
    """

    def __init__(self, request: ReplyRequest, window: int) -> None:
        self._request = request
        self._window = window
        self._used = 0
        self.begins_at = request.message.index
        """The number of the first line in what `items` has given."""
        self._shrunk = False

    @cached_property
    def _room(self) -> int:
        request, definition = self._request, self._request.definition
        tools = json.dumps([dict(spec.parameters) | {"_": spec.description} for spec in request.tools])
        fixed = _length(definition.instructions) + _length(tools) + definition.max_output_tokens
        return max(self._window - fixed - tokens(turn_items(request)), 0)

    @property
    def has_room(self) -> bool:
        """Whether the turn itself leaves room for more."""
        return self._room > 0

    async def lines(self) -> Sequence[Message]:
        """The whole transcript before this turn. What was attached to a question that had no answer is not shown
        again: a picture that the provider refuses would else spoil every turn behind it.

        It is read each time, which is seldom more than once, and not held while the model writes."""
        return _only_answered(await self._request.history(MAX_DATA))

    async def turn(self) -> list[ResponseInputItemParam]:
        """The turn so far."""
        return await aside(partial(turn_items, self._request), [self._request.message])

    async def items(self) -> list[ResponseInputItemParam]:
        """As many of the newest turns as there is room for."""
        lines = await self.lines()
        return await aside(partial(self._fitting, lines), [*lines, self._request.message])

    def _fitting(self, lines: Iterable[Message]) -> list[ResponseInputItemParam]:
        turns = list(_by_turn(lines).values())
        kept: list[list[ResponseInputItemParam]] = []
        self._used, self.begins_at = 0, self._request.message.index
        for turn in reversed(turns):
            items = history_items(turn)
            cost = tokens(items)
            if self._used + cost > self._room:
                break
            self._used += cost
            self.begins_at = turn[0].index
            kept.append(items)
        return [item for items in reversed(kept) for item in items]

    async def shrink(self) -> bool:
        """Halves what `items` gives: the provider counts otherwise. False where that was done, or is nothing."""
        before = len(await self.items())
        if self._shrunk or not before:
            return False
        self._shrunk, self._room = True, self._used // 2
        return True


def _only_answered(lines: Sequence[Message]) -> Sequence[Message]:
    answered = {line.turn_id for line in lines if line.role is Role.ASSISTANT}
    return [line if line.turn_id in answered else replace(line, content=unread(line.content)) for line in lines]


def _by_turn(lines: Iterable[Message]) -> Mapping[str, Sequence[Message]]:
    turns: dict[str, list[Message]] = {}
    for line in lines:
        turns.setdefault(line.turn_id, []).append(line)
    return turns
