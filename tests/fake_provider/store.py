"""What the provider keeps: conversations, their items, responses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fake_provider.wire import Json


class Numbers:
    """Makes ids that say what they are of."""

    def __init__(self) -> None:
        self._last = 0

    def next(self, prefix: str) -> str:
        self._last += 1
        return f"{prefix}_{self._last:032x}"


@dataclass(slots=True)
class Conversation:
    """A conversation. `busy` while a response runs on it."""

    id: str
    metadata: Json
    items: list[Json] = field(default_factory=list)
    busy: bool = False

    def as_json(self) -> Json:
        return {"id": self.id, "object": "conversation", "created_at": 1_790_000_000, "metadata": self.metadata}


PICTURE_TOKENS = 1000
"""What a picture or a file costs here, however large it is."""


def tokens_of(context: Sequence[Json], request: Json) -> int:
    """The size of an input: a token is four characters. What lies before a compaction no longer counts."""
    begin = max((place for place, item in enumerate(context) if item["type"] == "compaction"), default=0)
    size = len(request.get("instructions") or "") // 4 + len(json.dumps(request.get("tools") or [])) // 4
    return 1 + size + sum(_tokens_of_item(item) for item in context[begin:])


def _tokens_of_item(item: Json) -> int:
    content = item.get("content", item.get("output", ""))
    if not isinstance(content, list):
        return (len(str(content)) + len(item.get("arguments", ""))) // 4 + 4
    return 4 + sum(
        PICTURE_TOKENS
        if part["type"] in ("input_image", "input_file")
        else len(part.get("text", part.get("refusal", ""))) // 4
        for part in content
    )


def schema_example(schema: Json) -> Any:
    """The plainest value of a JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    if options := schema.get("anyOf"):
        return schema_example(options[0])
    match schema.get("type"):
        case "object":
            return {name: schema_example(inner) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [schema_example(schema.get("items", {}))]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return "text"


def stored(item: Json, numbers: Numbers) -> Json:
    """An input item as the API gives it back."""
    match item.get("type", "message"):
        case "message":
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            content = item["content"]
            parts = [{"type": kind, "text": content}] if isinstance(content, str) else list(content)
            return {
                "id": item.get("id") or numbers.next("msg"),
                "type": "message",
                "status": item.get("status", "completed"),
                "role": item["role"],
                "content": [_with_lists(part) for part in parts],
            }
        case "function_call":
            return {"status": "completed", **item, "id": item.get("id") or numbers.next("fc")}
        case "function_call_output":
            return {"status": "completed", **item, "id": item.get("id") or numbers.next("fco")}
        case _:
            return {**item, "id": item.get("id") or numbers.next("item")}


def _with_lists(part: Json) -> Json:
    return {"annotations": [], "logprobs": [], **part} if part["type"] == "output_text" else dict(part)


def complaint_about_calls(context: list[Json]) -> str | None:
    """Every call of a function must have its answer, and every answer its call."""
    calls = [item["call_id"] for item in context if item["type"] == "function_call"]
    answers = [item["call_id"] for item in context if item["type"] == "function_call_output"]
    for call_id in answers:
        if call_id not in calls:
            return f"No tool call found for function call output with call_id {call_id}."
    for call_id in calls:
        if call_id not in answers:
            return f"No tool output found for function call {call_id}."
    return None


def last_words(context: list[Json]) -> str:
    """What the newest input says."""
    for item in reversed(context):
        if item["type"] == "function_call_output":
            return str(item["output"])
        if item["type"] == "message" and item["role"] == "user":
            return " ".join(str(part.get("text", "")) for part in item["content"])
    return ""


def page(items: Sequence[Json], limit: int = 20, order: str = "desc", after: str | None = None) -> Json | None:
    """A page of items, newest first unless asked otherwise; None if `after` is none of them."""
    ordered = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        places = [number for number, item in enumerate(ordered) if item["id"] == after]
        if not places:
            return None
        ordered = ordered[places[0] + 1 :]
    data = ordered[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": len(ordered) > limit,
    }
