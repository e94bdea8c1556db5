"""From the events of one response to what the core is told of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from adapters.openai.errors import ProviderFault, Remedy, fault_in_stream
from adapters.openai.stream import TextCleaner, clean, decoded, identifier
from core.model.events import TextDelta, ToolCalled
from core.model.turn import TurnReason, Usage

MAX_TEXT = 1_000_000
"""Code points of text in one round."""
MAX_CALLS = 128
MAX_TOKENS = 2**40
"""Tokens that a provider may count in one round: more is no count, and no database holds it."""

_SHORTFALLS = {
    "max_output_tokens": TurnReason.OUTPUT_LIMIT,
    "content_filter": TurnReason.CONTENT_FILTERED,
}

Key = tuple[int, int]
"""Which part of which output item."""


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """How the provider ended its response. Nothing that falls short calls tools."""

    usage: Usage
    calls: tuple[ToolCalled, ...]
    shortfall: TurnReason | None


@dataclass(slots=True)
class _Part:
    """Text as it came, to be compared with the whole text at its end."""

    said: StringIO = field(default_factory=StringIO)
    settled: bool = False


class RoundReader:
    """Reads the events of one response.

    Text is handed out as it comes, calls only with the end: before it the provider may still fail. A message
    that follows other text of this reply is set apart from it by an empty line; `follows_text` says that an
    earlier round had some. Events are told apart by their `type` and unknown ones ignored. `response_id` is the
    response's name once it has come, `sequence` the number of the last event, -1 while none had one. `all_said`
    says that every item that was begun is done, and the last was no mere thought.

    Events that come twice are left out, by their numbers. Where numbers are missing nothing is made up for it: the
    whole texts, which come later, show whether text was lost, and then the response has failed. With `again` the
    missing events can be had instead: reading stops before the gap, and `has_gap` says so. A gap that is still
    there when they came again is how that server counts. `duplicates` and `gaps` are counted.
    """

    def __init__(self, *, follows_text: bool = False, again: bool = False) -> None:
        self.end: RoundEnd | None = None
        self.fault: ProviderFault | None = None
        self.response_id: str | None = None
        self.sequence = -1
        self.all_said = False
        self.has_gap = False
        self.duplicates = 0
        self.gaps = 0
        self._again = again
        self._gap_at: int | None = None
        self._unread = 0
        self._open: set[int] = set()
        self._parts: dict[Key, _Part] = {}
        self._calls: dict[str, ToolCalled] = {}
        self._cleaner = TextCleaner()
        self._current: tuple[Key, bool] | None = None
        self._gap_due = follows_text
        self._length = 0
        self._out: list[tuple[list[str], bool]] = []

    def read(self, events: Iterable[bytes]) -> list[TextDelta]:
        """Takes the data of some events and returns the text that they add, in as few deltas as possible.

        Sets `end` with the terminal event, or `fault` with a failed response, an `error` event and whatever
        breaks the protocol; what follows either is not read.
        """
        try:
            for data in events:
                event = decoded(data)
                if event is None:
                    self._unread += 1
                elif self._is_next(event):
                    self._take(event)
                if self.end is not None or self.has_gap:
                    break
        except ProviderFault as fault:
            # Returned beside the text that came before it, which must not depend on how the bytes were cut.
            self.fault = fault
        out, self._out = self._out, []
        return [TextDelta("".join(texts), refusal) for texts, refusal in out]

    def reopen(self) -> None:
        """The events behind `sequence` come again."""
        self.has_gap = False
        self._unread = 0

    def _is_next(self, event: Mapping[str, Any]) -> bool:
        number = event.get("sequence_number")
        if not isinstance(number, int):
            return True  # compatible servers leave it out
        if number <= self.sequence:
            self.duplicates += 1
            return False
        if 0 <= self.sequence < number - 1 - self._unread and self._gap_at != self.sequence:
            self.gaps += 1
            if self._again:
                self.has_gap, self._gap_at = True, self.sequence
                return False
        self.sequence, self._unread = number, 0
        return True

    def _take(self, event: Mapping[str, Any]) -> None:
        match event.get("type"):
            case "response.output_text.delta":
                self._add(_key(event), _string(event, "delta"), refusal=False)
            case "response.refusal.delta":
                self._add(_key(event), _string(event, "delta"), refusal=True)
            case "response.output_text.done":
                self._settle(_key(event), _string(event, "text"), refusal=False)
            case "response.refusal.done":
                self._settle(_key(event), _string(event, "refusal"), refusal=True)
            case "response.output_item.added":
                self._open.add(_number(event, "output_index"))
                self.all_said = False
            case "response.output_item.done":
                index, item = _number(event, "output_index"), _mapping(event, "item")
                self._take_item(index, item)
                self._open.discard(index)
                self.all_said = not self._open and item.get("type") != "reasoning"
            case "response.completed":
                response = _mapping(event, "response")
                # Some servers end each response with this event, and say only in it how it has ended.
                self._finish(str(response.get("status")), response)
            case "response.incomplete":
                self._finish("incomplete", _mapping(event, "response"))
            case "response.failed":
                self._finish("failed", _mapping(event, "response"))
            case "error":
                raise fault_in_stream(event.get("error") or event)
            case None if event.get("error"):
                raise fault_in_stream(event["error"])
            case "response.created":
                self.response_id = _id(event.get("response"))
            case _:
                return

    def _take_item(self, index: int, item: Mapping[str, Any]) -> None:
        if item.get("type") == "function_call":
            if item.get("status") != "incomplete":
                self._call(item)
        elif item.get("type") == "message":
            content = item.get("content")
            for number, part in enumerate(content if isinstance(content, list) else []):
                if isinstance(part, Mapping) and part.get("type") == "output_text":
                    self._settle((index, number), _string(part, "text"), refusal=False)
                elif isinstance(part, Mapping) and part.get("type") == "refusal":
                    self._settle((index, number), _string(part, "refusal"), refusal=True)

    def _call(self, item: Mapping[str, Any]) -> None:
        call = ToolCalled(
            clean(_string(item, "call_id")), clean(_string(item, "name")), clean(_string(item, "arguments"))
        )
        one_too_many = len(self._calls) >= MAX_CALLS and call.call_id not in self._calls
        if not call.call_id or not call.name or one_too_many:
            raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        self._calls.setdefault(call.call_id, call)

    def _add(self, key: Key, text: str, *, refusal: bool) -> None:
        if self._current != (key, refusal):
            self._leave_part()
            if self._length and self._current is not None and self._current[0][0] != key[0]:
                self._gap_due = True
            self._current = (key, refusal)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = _Part()
        part.said.write(text)
        self.all_said = False
        self._say(self._cleaner.feed(text), refusal)

    def _settle(self, key: Key, whole: str, *, refusal: bool) -> None:
        """Adds what the deltas have left out of a part. That is all of it where a server sends no deltas."""
        part = self._parts.setdefault(key, _Part())
        if part.settled:
            return
        part.settled = True
        whole, said = clean(whole), clean(part.said.getvalue())
        if whole.startswith(said):
            if len(whole) > len(said):
                self._add(key, whole[len(said) :], refusal=refusal)
        elif whole.strip() != said.strip():
            # A delta was lost. What was said can't be taken back, and what is missing can't be put in.
            raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)

    def _leave_part(self) -> None:
        if self._current is not None:
            self._say(self._cleaner.flush(), self._current[1])

    def _say(self, text: str, refusal: bool) -> None:
        if not text:
            return
        if self._gap_due:
            text, self._gap_due = "\n\n" + text, False
        self._length += len(text)
        if self._length > MAX_TEXT:
            raise ProviderFault(TurnReason.OUTPUT_LIMIT)
        if self._out and self._out[-1][1] is refusal:
            self._out[-1][0].append(text)
        else:
            self._out.append(([text], refusal))

    def _finish(self, status: str, response: Mapping[str, Any]) -> None:
        shortfall = None
        if status == "failed":
            raise fault_in_stream(response.get("error"))
        if status in ("incomplete", "cancelled"):
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, Mapping) else None
            shortfall = _SHORTFALLS.get(reason) if isinstance(reason, str) else None
            if shortfall is None:
                raise ProviderFault(TurnReason.PROVIDER_TRUNCATED, Remedy.LOOK)
        self.response_id = self.response_id or _id(response)
        output = response.get("output")
        silent = not self._parts
        for index, item in enumerate(output if isinstance(output, list) else []):
            # The list repeats what came before it, at places that not every server numbers alike.
            if isinstance(item, Mapping) and (silent or item.get("type") == "function_call"):
                self._take_item(index, item)
        self._leave_part()
        calls = () if shortfall else tuple(self._calls.values())
        self.end = RoundEnd(usage_of(response.get("usage")), calls, shortfall)


def usage_of(usage: object) -> Usage:
    """What a response has used. What is not said counts as nothing."""
    facts: Mapping[str, Any] = usage if isinstance(usage, Mapping) else {}

    def count(facts: object, name: str) -> int:
        value = facts.get(name) if isinstance(facts, Mapping) else None
        return min(max(int(value), 0), MAX_TOKENS) if isinstance(value, int) else 0

    return Usage(
        input_tokens=count(facts, "input_tokens"),
        cached_input_tokens=count(facts.get("input_tokens_details"), "cached_tokens"),
        cache_write_tokens=count(facts.get("input_tokens_details"), "cache_write_tokens"),
        output_tokens=count(facts, "output_tokens"),
        reasoning_tokens=count(facts.get("output_tokens_details"), "reasoning_tokens"),
    )


def _id(response: object) -> str | None:
    return identifier(response.get("id")) if isinstance(response, Mapping) else None


def _key(event: Mapping[str, Any]) -> Key:
    return _number(event, "output_index"), _number(event, "content_index")


def _number(event: Mapping[str, Any], name: str) -> int:
    value = event.get(name, 0)
    return value if isinstance(value, int) else 0


def _string(event: Mapping[str, Any], name: str) -> str:
    value = event.get(name)
    if not isinstance(value, str):
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
    return value


def _mapping(event: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = event.get(name)
    if not isinstance(value, Mapping):
        raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
    return value
