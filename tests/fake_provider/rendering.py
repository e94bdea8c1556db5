"""From a script's answer to the response object and its events, in the order and with the fields of the API."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fake_provider.script import Answer, At, Break, Call, ErrorEvent, Failed, Incomplete, Reasoning, Text
from fake_provider.store import Numbers, schema_example
from fake_provider.wire import Json

HUGE = 20_000_000
"""Characters of the delta that is far too long."""
IN_THE_REPLY = ("unknown", "huge")
"""What goes wrong in the reply itself and not on the way."""

_PIECE = 8
_TEXT_DELTAS = ("response.output_text.delta", "response.refusal.delta")


def is_delta(event: Json) -> bool:
    """Whether an event carries text of the reply as it comes."""
    return event["type"] in _TEXT_DELTAS


def place_of(events: Sequence[Json], at: At) -> int:
    """The number of the event of a whole reply before which a place lies."""
    deltas = [number for number, event in enumerate(events) if is_delta(event)] or [
        number for number, event in enumerate(events) if event["type"] == "response.function_call_arguments.delta"
    ]
    last = len(events) - 1
    match at:
        case "header" | "start":
            return 0
        case "end":
            return last
        case "before_text":
            return deltas[0] if deltas else last
        case "middle":
            return [*deltas, deltas[-1] + 1][(len(deltas) + 1) // 2] if deltas else last
        case "after_text":
            return deltas[-1] + 1 if deltas else last


class Rendering:
    """One response in the making. `response` is what it is in the end, `output` the items that it adds.

    `tokens` is the size of its input. With `compacts`, that has become too much and is summed up first. `strikes`
    are the faults of the script that are parts of the reply.
    """

    def __init__(
        self, request: Json, answer: Answer, words: str, numbers: Numbers, tokens: int, *, compacts: bool = False
    ) -> None:
        self._request = request
        self._answer = answer
        self._words = words
        self._numbers = numbers
        self._tokens = tokens
        self._compacts = compacts
        self.response = _response(request, answer.response_id or numbers.next("resp"))
        self.output: list[Json] = []
        self.strikes: list[str] = []

    def events(self) -> list[Json]:
        """All events, numbered. Afterwards `response` and `output` are final."""
        events = [*self._begin(), *self._items()]
        ending, fault = self._answer.ending, self._answer.fault
        if ending != "completed":
            events = events[: place_of([*events, {"type": "the end"}], ending.at)]
            done = [event["item"]["id"] for event in events if event["type"] == "response.output_item.done"]
            if ending.at != "end":
                self.output = [item for item in self.output if item["id"] in done]
        events.append(self._terminal())
        if fault is not None and fault.how == "unknown":
            self.strikes.append(fault.how)
            novelty = {"type": "response.novelty.delta", "delta": "?", "output_index": 0}
            events.insert(self._place(events, fault), novelty)
        if self._answer.sequence_numbers:
            for number, event in enumerate(events):
                event["sequence_number"] = number
        return events

    def _place(self, events: list[Json], fault: Break) -> int:
        if fault.at is not None:
            return place_of(events, fault.at)
        deltas = [number for number, event in enumerate(events) if is_delta(event)]
        return deltas[min(fault.after, len(deltas)) - 1] + 1 if fault.after and deltas else 0

    def _begin(self) -> Iterator[Json]:
        if self.response["background"]:
            queued = {**self.response, "status": "queued"}
            yield {"type": "response.created", "response": queued}
            yield {"type": "response.queued", "response": queued}
        else:
            yield {"type": "response.created", "response": dict(self.response)}
        yield {"type": "response.in_progress", "response": dict(self.response)}

    def _items(self) -> Iterator[Json]:
        if self._compacts:
            yield from self._compaction()
        for index, output in enumerate(self._answer.output, len(self.output)):
            if self._answer.unknown_events:
                yield {"type": "response.novelty.delta", "delta": "?", "output_index": index}
            match output:
                case Text():
                    yield from self._message(index, output)
                case Call():
                    yield from self._call(index, output)
                case Reasoning():
                    yield from self._reasoning(index, output)

    def _compaction(self) -> Iterator[Json]:
        item = compaction(self._numbers)
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**item, "encrypted_content": ""}}
        yield {"type": "response.compaction.compacting", "output_index": 0, "item_id": item["id"]}
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        self.output.append(item)

    def _message(self, index: int, text: Text) -> Iterator[Json]:
        whole = "".join(text.pieces) if text.pieces is not None else text.text
        if whole is None:
            whole = self._own_words()
        pieces = text.pieces or tuple(whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE))
        fault = self._answer.fault
        if fault is not None and fault.how == "huge" and not self.strikes:
            self.strikes.append(fault.how)
            places = {
                "middle": (len(pieces) + 1) // 2,
                "after_text": len(pieces),
                "end": len(pieces),
                None: fault.after,
            }
            cut = places.get(fault.at, 0)
            pieces = (*pieces[:cut], "x" * HUGE, *pieces[cut:])
            whole = "".join(pieces)
        item_id = self._numbers.next("msg")
        begun: Json = {
            "id": item_id,
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        place: Json = {"item_id": item_id, "output_index": index, "content_index": 0}
        yield {"type": "response.content_part.added", **place, "part": _part("", text.refusal)}
        kind = "refusal" if text.refusal else "output_text"
        logprobs: Json = {} if text.refusal else {"logprobs": []}
        for piece in pieces if text.deltas else ():
            yield {"type": f"response.{kind}.delta", **place, "delta": piece, **logprobs}
        if text.done:
            field = "refusal" if text.refusal else "text"
            yield {"type": f"response.{kind}.done", **place, field: whole, **logprobs}
            yield {"type": "response.content_part.done", **place, "part": _part(whole, text.refusal)}
        item = {**begun, "status": "completed", "content": [_part(whole, text.refusal)]}
        if text.in_item:
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.output.append(item)

    def _own_words(self) -> str:
        wanted = (self._request.get("text") or {}).get("format") or {}
        match wanted.get("type"):
            case "json_schema":
                return json.dumps(schema_example(wanted["schema"]))
            case "json_object":
                return json.dumps({"you_said": self._words})
            case _:
                return f"You said: {self._words} What would you like to change?"

    def _call(self, index: int, call: Call) -> Iterator[Json]:
        item_id = self._numbers.next("fc")
        begun = {
            "id": item_id,
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.call_id or self._numbers.next("call"),
            "name": call.name,
            "arguments": "",
        }
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        place: Json = {"item_id": item_id, "output_index": index}
        for at in range(0, len(call.arguments), _PIECE):
            delta = call.arguments[at : at + _PIECE]
            yield {"type": "response.function_call_arguments.delta", **place, "delta": delta}
        yield {"type": "response.function_call_arguments.done", **place, "arguments": call.arguments}
        item = {**begun, "status": "completed", "arguments": call.arguments}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.output.append(item)

    def _reasoning(self, index: int, reasoning: Reasoning) -> Iterator[Json]:
        item_id = self._numbers.next("rs")
        part = {"type": "summary_text", "text": reasoning.summary}
        begun: Json = {"id": item_id, "type": "reasoning", "summary": []}
        yield {"type": "response.output_item.added", "output_index": index, "item": begun}
        place: Json = {"item_id": item_id, "output_index": index, "summary_index": 0}
        yield {"type": "response.reasoning_summary_part.added", **place, "part": {**part, "text": ""}}
        yield {"type": "response.reasoning_summary_text.delta", **place, "delta": reasoning.summary}
        yield {"type": "response.reasoning_summary_text.done", **place, "text": reasoning.summary}
        yield {"type": "response.reasoning_summary_part.done", **place, "part": part}
        item = {**begun, "summary": [part]}
        if "reasoning.encrypted_content" in (self._request.get("include") or ()):
            item["encrypted_content"] = opaque("reasoning", item_id)
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.output.append(item)

    def _terminal(self) -> Json:
        ending = self._answer.ending
        if isinstance(ending, ErrorEvent):
            facts = {"code": ending.code, "message": ending.message, "param": None}
            self.response.update(status="failed", error={"code": ending.code, "message": ending.message})
            if ending.nested:
                return {"type": "error", "error": {"type": ending.type, **facts}}
            return {"type": "error", **facts}
        self.response["output"] = self.output if self._answer.output_in_terminal else []
        if isinstance(ending, Failed):
            error = {"code": ending.code, "message": ending.message}
            self.response.update(status="failed", error=error)
            return {"type": "response.failed", "response": dict(self.response)}
        self.response["usage"] = usage(self._tokens, len(json.dumps(self.output)) // 4 + 1)
        if isinstance(ending, Incomplete):
            self.response.update(status="incomplete", incomplete_details={"reason": ending.reason})
            return {"type": "response.incomplete", "response": dict(self.response)}
        self.response.update(status="completed", completed_at=1_790_000_001.0)
        return {"type": "response.completed", "response": dict(self.response)}


def compaction(numbers: Numbers) -> Json:
    """An item that stands for everything before it."""
    item_id = numbers.next("cmp")
    return {"id": item_id, "type": "compaction", "encrypted_content": opaque("compaction", item_id)}


def opaque(kind: str, item_id: str) -> str:
    """What only the provider can read."""
    return f"gAAAA-{kind}-{item_id}"


def usage(given: int, made: int) -> Json:
    """The tokens of a response."""
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": given // 2, "cache_write_tokens": given // 4},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }


def _part(text: str, refusal: bool) -> Json:
    if refusal:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _response(request: Json, response_id: str) -> Json:
    conversation: Any = request.get("conversation")
    if isinstance(conversation, str):
        conversation = {"id": conversation}
    text = request.get("text") or {}
    reasoning = request.get("reasoning") or {}
    return {
        "id": response_id,
        "object": "response",
        "created_at": 1_790_000_000.0,
        "status": "in_progress",
        "background": request.get("background") or False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.get("instructions"),
        "max_output_tokens": request.get("max_output_tokens"),
        "model": request["model"],
        "output": [],
        "parallel_tool_calls": request.get("parallel_tool_calls", True),
        "previous_response_id": request.get("previous_response_id"),
        "conversation": conversation,
        "prompt_cache_key": request.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": request.get("safety_identifier"),
        "service_tier": "default",
        "temperature": request.get("temperature", 1.0),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": request.get("tool_choice") or "auto",
        "tools": request.get("tools") or [],
        "top_p": request.get("top_p", 1.0),
        "truncation": request.get("truncation") or "disabled",
        "usage": None,
        "user": None,
        "metadata": request.get("metadata") or {},
    }


def as_bytes(event: Json, answer: Answer) -> bytes:
    """One event on the wire."""
    lines = [f"event: {event['type']}"] if answer.event_names else []
    lines += [f"data: {json.dumps(event)}", "", ""]
    frame = answer.newline.join(lines).encode()
    if answer.twice:
        frame += frame
    if answer.comments:
        frame = f": keep-alive{answer.newline * 2}".encode() + frame
    return frame
