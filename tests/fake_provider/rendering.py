"""From a script's answer to the response object and its events, in the order and with the fields of the API."""

import json
from collections.abc import Iterator
from typing import Any

from fake_provider.script import Answer, Call, ErrorEvent, Failed, Incomplete, Reasoning, Text
from fake_provider.store import Numbers
from fake_provider.wire import Json

_PIECE = 8


class Rendering:
    """One response in the making. `response` is what it is in the end, `output` the items that it adds."""

    def __init__(self, request: Json, answer: Answer, words: str, numbers: Numbers, context_size: int) -> None:
        self._answer = answer
        self._words = words
        self._numbers = numbers
        self._context_size = context_size
        self.response = _response(request, answer.response_id or numbers.next("resp"))
        self.output: list[Json] = []

    def events(self) -> list[Json]:
        """All events, numbered. Afterwards `response` and `output` are final."""
        events = list(self._all())
        if self._answer.sequence_numbers:
            for number, event in enumerate(events):
                event["sequence_number"] = number
        return events

    def _all(self) -> Iterator[Json]:
        if self.response["background"]:
            queued = {**self.response, "status": "queued"}
            yield {"type": "response.created", "response": queued}
            yield {"type": "response.queued", "response": queued}
        else:
            yield {"type": "response.created", "response": dict(self.response)}
        yield {"type": "response.in_progress", "response": dict(self.response)}
        for index, output in enumerate(self._answer.output):
            if self._answer.unknown_events:
                yield {"type": "response.novelty.delta", "delta": "?", "output_index": index}
            match output:
                case Text():
                    yield from self._message(index, output)
                case Call():
                    yield from self._call(index, output)
                case Reasoning():
                    yield from self._reasoning(index, output)
        yield self._terminal()

    def _message(self, index: int, text: Text) -> Iterator[Json]:
        whole = "".join(text.pieces) if text.pieces is not None else text.text
        if whole is None:
            whole = f"You said: {self._words} What would you like to change?"
        pieces = text.pieces or tuple(whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE))
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
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
        self.output.append(item)

    def _terminal(self) -> Json:
        ending = self._answer.ending
        if isinstance(ending, ErrorEvent):
            facts = {"code": ending.code, "message": ending.message, "param": None}
            self.response.update(status="failed", error={"code": ending.code, "message": ending.message})
            return (
                {"type": "error", "error": {"type": ending.type, **facts}}
                if ending.nested
                else {
                    "type": "error",
                    **facts,
                }
            )
        self.response["output"] = self.output if self._answer.output_in_terminal else []
        if isinstance(ending, Failed):
            error = {"code": ending.code, "message": ending.message}
            self.response.update(status="failed", error=error)
            return {"type": "response.failed", "response": dict(self.response)}
        self.response["usage"] = _usage(self._context_size, len(json.dumps(self.output)))
        if isinstance(ending, Incomplete):
            self.response.update(status="incomplete", incomplete_details={"reason": ending.reason})
            return {"type": "response.incomplete", "response": dict(self.response)}
        self.response.update(status="completed", completed_at=1_790_000_001.0)
        return {"type": "response.completed", "response": dict(self.response)}


def _part(text: str, refusal: bool) -> Json:
    if refusal:
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _usage(context_size: int, output_size: int) -> Json:
    given, made = context_size // 4 + 1, output_size // 4 + 1
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": given // 2, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + made,
    }


def _response(request: Json, response_id: str) -> Json:
    conversation: Any = request.get("conversation")
    if isinstance(conversation, str):
        conversation = {"id": conversation}
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
        "reasoning": {"effort": (request.get("reasoning") or {}).get("effort"), "summary": None},
        "safety_identifier": request.get("safety_identifier"),
        "service_tier": "default",
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": (request.get("text") or {}).get("verbosity", "medium")},
        "tool_choice": "auto",
        "tools": request.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
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
