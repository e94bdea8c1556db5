"""What the provider accepts: exactly what the SDK's request types allow."""

from collections.abc import Mapping
from typing import Any

from openai.types.conversations.conversation_create_params import ConversationCreateParams
from openai.types.conversations.item_create_params import ItemCreateParams
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from openai.types.responses.response_retrieve_params import (
    ResponseRetrieveParamsNonStreaming,
    ResponseRetrieveParamsStreaming,
)
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator, ValidationError


def _strict(node: Any) -> Any:
    """The same schema, but without unknown keys and without lists that are looked at only when read."""
    if isinstance(node, dict):
        node = {key: _strict(value) for key, value in node.items()}
        if node.get("type") == "typed-dict":
            node["extra_behavior"] = "forbid"
            fields = node["fields"]
            if "content" in fields and "phase" in fields and "id" in fields:
                # An assistant's message. The API takes it without an id, whatever the SDK's type says.
                fields["id"]["required"] = False
        elif node.get("type") == "generator":
            node["type"] = "list"
        return node
    if isinstance(node, list):
        return [_strict(value) for value in node]
    if isinstance(node, tuple):
        return tuple(_strict(value) for value in node)
    return node


def _validator(request_type: Any) -> SchemaValidator:
    return SchemaValidator(_strict(TypeAdapter(request_type).core_schema))


_RESPONSE = _validator(ResponseCreateParamsNonStreaming)
_STREAMED_RESPONSE = _validator(ResponseCreateParamsStreaming)
_RETRIEVAL = _validator(ResponseRetrieveParamsNonStreaming)
_STREAMED_RETRIEVAL = _validator(ResponseRetrieveParamsStreaming)
_CONVERSATION = _validator(ConversationCreateParams)
_ITEMS = _validator(ItemCreateParams)

MAX_ITEMS = 20


def complaint_about_response(body: dict[str, Any]) -> str | None:
    """What is wrong with a request for a response."""
    if body.get("conversation") and body.get("previous_response_id"):
        return "Mutually exclusive parameters: 'conversation' and 'previous_response_id'."
    if not body.get("model"):
        return "Missing required parameter: 'model'."
    if (body.get("max_output_tokens") or 16) < 16:
        return "Invalid 'max_output_tokens': integer below minimum value."
    if len(body.get("safety_identifier") or "") > 64 or len(body.get("prompt_cache_key") or "") > 64:
        return "Invalid identifier: string too long."
    if body.get("background") and body.get("store") is False:
        return "Invalid 'store': a background response must be stored."
    return _complaint(_STREAMED_RESPONSE if body.get("stream") else _RESPONSE, body) or _about_metadata(body)


def complaint_about_retrieval(query: Mapping[str, str]) -> str | None:
    """What is wrong with the query of a request for a response that exists."""
    facts: dict[str, Any] = dict(query)
    for name in ("stream", "include_obfuscation"):
        if facts.get(name) in ("true", "false"):
            facts[name] = facts[name] == "true"
    if str(facts.get("starting_after", "")).isdecimal():
        facts["starting_after"] = int(facts["starting_after"])
    streamed = facts.get("stream") is True
    if "starting_after" in facts and not streamed:
        return "Invalid 'starting_after': only a stream begins somewhere."
    return _complaint(_STREAMED_RETRIEVAL if streamed else _RETRIEVAL, facts)


def complaint_about_conversation(body: dict[str, Any]) -> str | None:
    """What is wrong with a request for a conversation."""
    return _about_count(body.get("items") or []) or _complaint(_CONVERSATION, body) or _about_metadata(body)


def complaint_about_items(body: dict[str, Any]) -> str | None:
    """What is wrong with a request to add items."""
    return _about_count(body.get("items") or []) or _complaint(_ITEMS, body)


def _complaint(validator: SchemaValidator, body: dict[str, Any]) -> str | None:
    try:
        validator.validate_python(body)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        return f"Invalid {first['loc'][0]!r}: {first['msg']} ({error.error_count()} in all)."
    return None


def _about_count(items: list[Any]) -> str | None:
    return f"Too many items: at most {MAX_ITEMS}." if len(items) > MAX_ITEMS else None


def _about_metadata(body: dict[str, Any]) -> str | None:
    metadata = body.get("metadata") or {}
    if len(metadata) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        return "Invalid 'metadata'."
    return None
