"""What the provider accepts: exactly what the SDK's request types allow, within the API's limits.

Each check returns the answer of the API to what is wrong, None where nothing is.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from openai.types.conversations.conversation_create_params import ConversationCreateParams
from openai.types.conversations.conversation_update_params import ConversationUpdateParams
from openai.types.conversations.item_create_params import ItemCreateParams
from openai.types.conversations.item_list_params import ItemListParams
from openai.types.responses.input_item_list_params import InputItemListParams
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_compact_params import ResponseCompactParams
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming,
    ResponseCreateParamsStreaming,
)
from openai.types.responses.response_retrieve_params import (
    ResponseRetrieveParamsNonStreaming,
    ResponseRetrieveParamsStreaming,
)
from pydantic import TypeAdapter
from pydantic_core import ErrorDetails, SchemaValidator, ValidationError

from fake_provider.script import HttpError
from fake_provider.wire import Json


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
_TOKEN_COUNT = _validator(InputTokenCountParams)
_COMPACTION = _validator(ResponseCompactParams)
_INPUT_ITEMS = _validator(InputItemListParams)
_CHAT = _validator(CompletionCreateParamsNonStreaming)
_STREAMED_CHAT = _validator(CompletionCreateParamsStreaming)
_CONVERSATION = _validator(ConversationCreateParams)
_CONVERSATION_UPDATE = _validator(ConversationUpdateParams)
_ITEMS = _validator(ItemCreateParams)
_ITEM_LIST = _validator(ItemListParams)

MAX_ITEMS = 20
MAX_TEXT = 10_485_760
MAX_IMAGE_URL = 20_971_520
MAX_FILE_DATA = 73_400_320
MAX_IMAGES = 1500
_STRING_LIMITS = {"safety_identifier": 64, "prompt_cache_key": 64, "instructions": MAX_TEXT}
_ITEM_LIMITS = {"call_id": 64, "arguments": MAX_TEXT, "output": MAX_TEXT, "content": MAX_TEXT, "name": 128}
_PART_LIMITS = {"text": MAX_TEXT, "image_url": MAX_IMAGE_URL, "file_data": MAX_FILE_DATA}
_IMAGE_URL = re.compile(r"https?://|data:image/(png|jpeg|jpg|webp|gif);base64,")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]+")


def bad(message: str, *, code: str | None = None, param: str | None = None) -> HttpError:
    """The API's answer to a request that is wrong."""
    return HttpError(status=400, message=message, code=code, param=param)


def about_response(body: Json) -> HttpError | None:
    """A request for a response."""
    if not body.get("model"):
        return _missing("model")
    if body.get("background") and body.get("store") is False:
        return bad("Invalid 'store': a background response must be stored.", param="store")
    return (
        _about_source(body)
        or _about_types(_STREAMED_RESPONSE if body.get("stream") else _RESPONSE, body)
        or _below(body, "max_output_tokens", 16)
        or _about_strings(body, _STRING_LIMITS)
        or _about_input(body)
        or _about_tools(body)
        or _about_compaction(body)
        or _about_sampling(body)
        or _about_metadata(body)
    )


def about_retrieval(query: Mapping[str, str]) -> HttpError | None:
    """The query of a request for a response that exists."""
    facts = _typed(query)
    streamed = facts.get("stream") is True
    if "starting_after" in facts and not streamed:
        return bad("Invalid 'starting_after': only a stream begins somewhere.", param="starting_after")
    return _about_types(_STREAMED_RETRIEVAL if streamed else _RETRIEVAL, facts)


def about_token_count(body: Json) -> HttpError | None:
    """A request to count the tokens of an input."""
    return _about_source(body) or _about_types(_TOKEN_COUNT, body) or _about_input(body)


def about_compact(body: Json) -> HttpError | None:
    """A request to compact an input."""
    return _about_types(_COMPACTION, body) or _about_input(body)


def about_chat(body: Json) -> HttpError | None:
    """A request for a completion of a chat."""
    return _about_types(_STREAMED_CHAT if body.get("stream") else _CHAT, body)


def about_conversation(body: Json) -> HttpError | None:
    """A request for a conversation."""
    return (
        _about_count(body)
        or _about_types(_CONVERSATION, body)
        or _about_items("items", body.get("items") or ())
        or _about_metadata(body)
    )


def about_conversation_update(body: Json) -> HttpError | None:
    """A change of a conversation's metadata."""
    return _about_types(_CONVERSATION_UPDATE, body) or _about_metadata(body)


def about_items(body: Json) -> HttpError | None:
    """A request to add items."""
    return _about_count(body) or _about_types(_ITEMS, body) or _about_items("items", body["items"])


def about_item_list(query: Mapping[str, str], *, of_response: bool = False) -> HttpError | None:
    """The query of a request for a page of items."""
    facts = _typed(query)
    complaint = _about_types(_INPUT_ITEMS if of_response else _ITEM_LIST, facts)
    if complaint is None and not 1 <= facts.get("limit", 20) <= 100:
        return bad("Invalid 'limit': expected a value from 1 to 100.", code="invalid_value", param="limit")
    return complaint


def _typed(query: Mapping[str, str]) -> dict[str, Any]:
    """A query with its values as the SDK's types have them."""
    facts: dict[str, Any] = dict(query)
    for name, value in query.items():
        if name in ("stream", "include_obfuscation") and value in ("true", "false"):
            facts[name] = value == "true"
        elif name in ("starting_after", "limit") and value.isdecimal():
            facts[name] = int(value)
        elif name in ("include", "include[]"):
            del facts[name]
            facts["include"] = value.split(",")
    return facts


def _about_types(validator: SchemaValidator, body: dict[str, Any]) -> HttpError | None:
    """Unknown parameters, missing ones, and ones that have the wrong type or value."""
    try:
        validator.validate_python(body)
    except ValidationError as error:
        found = [(_path(body, details["loc"]), details) for details in error.errors(include_url=False)]
        found = _of_the_meant(_of_the_meant(found, "type"), "role")
        path, details = max(found, key=lambda one: (len(one[0]), _TELLING.get(one[1]["type"], 0)))
        return _type_error(_name(path), details)
    return None


_Found = tuple[list[str | int], ErrorDetails]
"""An error and its place in the body."""

_TELLING = {"literal_error": 3, "extra_forbidden": 2, "missing": 1}
"""Of errors at one place, which says most."""


def _of_the_meant(found: list[_Found], tag: str) -> list[_Found]:
    """Without the errors of those members of a union that bear another tag: they were not meant.

    Where all members do, the tag itself is wrong, and none is left out.
    """
    others = {
        details["loc"][:-1]
        for _, details in found
        if details["type"] == "literal_error" and details["loc"][-1] == tag
    }
    meant: list[_Found] = []
    left_out: list[_Found] = []
    for one in found:
        location = one[1]["loc"]
        is_other = any(location[:size] in others for size in range(1, len(location)))
        (left_out if is_other else meant).append(one)
    if not left_out:
        return found
    is_one_meant = max((len(path) for path, _ in meant), default=0) >= min(len(path) for path, _ in left_out)
    return meant if is_one_meant else found


def _type_error(name: str, details: ErrorDetails) -> HttpError:
    match details["type"]:
        case "extra_forbidden":
            return bad(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
        case "missing":
            return _missing(name)
        case "literal_error":
            message = f"Invalid value for '{name}': supported are {details.get('ctx', {}).get('expected')}."
            return bad(message, code="invalid_value", param=name)
        case _:
            return bad(f"Invalid type for '{name}': {details['msg']}.", code="invalid_type", param=name)


def _missing(name: str) -> HttpError:
    message = f"Missing required parameter: '{name}'."
    return bad(message, code="missing_required_parameter", param=name)


def _path(body: Any, location: Sequence[str | int]) -> list[str | int]:
    """The part of an error's location that names places in the body; the rest names members of unions."""
    path: list[str | int] = []
    here = body
    for step in location:
        is_place = step in here if isinstance(here, dict) else isinstance(here, list) and isinstance(step, int)
        if is_place:
            path.append(step)
            here = here[step]
    if isinstance(here, dict) and isinstance(location[-1], str) and (not path or location[-1] != path[-1]):
        path.append(location[-1])
    return path


def _name(path: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _about_source(body: Json) -> HttpError | None:
    if body.get("conversation") and body.get("previous_response_id"):
        message = "Mutually exclusive parameters: 'conversation' and 'previous_response_id'."
        return bad(message, code="mutually_exclusive_parameters")
    return None


def _about_count(body: Json) -> HttpError | None:
    items = body.get("items")
    if isinstance(items, list) and len(items) > MAX_ITEMS:
        return bad(
            f"Invalid 'items': array too long. Expected an array with maximum length {MAX_ITEMS}, but got an "
            f"array with length {len(items)} instead.",
            code="array_above_max_length",
            param="items",
        )
    return None


def _below(body: Json, name: str, least: int, label: str | None = None) -> HttpError | None:
    value = body.get(name)
    if value is None or value >= least:
        return None
    return bad(
        f"Invalid '{label or name}': integer below minimum value. Expected a value >= {least}, but got {value} "
        f"instead.",
        code="integer_below_min_value",
        param=label or name,
    )


def _about_strings(where: Json, limits: Mapping[str, int], path: str = "") -> HttpError | None:
    for name, limit in limits.items():
        value = where.get(name)
        if isinstance(value, str) and len(value) > limit:
            return bad(
                f"Invalid '{path}{name}': string too long. Expected a string with maximum length {limit}, but got "
                f"a string with length {len(value)} instead.",
                code="string_above_max_length",
                param=path + name,
            )
    return None


def _about_input(body: Json) -> HttpError | None:
    given = body.get("input")
    if isinstance(given, str):
        return _about_strings(body, {"input": MAX_TEXT})
    return _about_items("input", given or ())


def _about_items(field: str, items: Sequence[Json]) -> HttpError | None:
    images = 0
    for number, item in enumerate(items):
        path = f"{field}[{number}]."
        if complaint := _about_strings(item, _ITEM_LIMITS, path):
            return complaint
        for name, part in _parts(item):
            images += part["type"] == "input_image"
            if complaint := _about_part(part, path + name):
                return complaint
    if images > MAX_IMAGES:
        return bad(f"Too many images: at most {MAX_IMAGES} in a request.", param=field)
    return None


def _parts(item: Json) -> Iterator[tuple[str, Json]]:
    for field in ("content", "output"):
        if isinstance(item.get(field), list):
            for number, part in enumerate(item[field]):
                yield f"{field}[{number}].", part


def _about_part(part: Json, path: str) -> HttpError | None:
    if complaint := _about_strings(part, _PART_LIMITS, path):
        return complaint
    if part["type"] == "input_image":
        url = part.get("image_url")
        if bool(url) == bool(part.get("file_id")):
            return bad(f"Give one of '{path}image_url' and '{path}file_id'.", param=path + "image_url")
        if url and not _IMAGE_URL.match(url):
            message = f"Invalid '{path}image_url'. Expected a valid URL, but got a value with an invalid format."
            return bad(message, code="invalid_value", param=path + "image_url")
    if part["type"] == "input_file":
        if sum(bool(part.get(name)) for name in ("file_data", "file_id", "file_url")) != 1:
            return bad(f"Give one of '{path}file_data', file_id and file_url.", param=path + "file_data")
        if part.get("file_data") and not part.get("filename"):
            return _missing(path + "filename")
    return None


def _about_tools(body: Json) -> HttpError | None:
    for number, tool in enumerate(body.get("tools") or ()):
        name, path = tool.get("name"), f"tools[{number}]."
        if tool["type"] == "function" and not _TOOL_NAME.fullmatch(name):
            message = f"Invalid '{path}name': string does not match pattern. Expected '^[a-zA-Z0-9_-]+$'."
            return bad(message, code="invalid_value", param=path + "name")
        if complaint := _about_strings(tool, {"name": 128}, path):
            return complaint
    return None


def _about_compaction(body: Json) -> HttpError | None:
    for number, entry in enumerate(body.get("context_management") or ()):
        path = f"context_management[{number}]."
        if entry["type"] != "compaction":
            return bad(f"Invalid value for '{path}type'.", code="invalid_value", param=path + "type")
        if complaint := _below(entry, "compact_threshold", 1000, path + "compact_threshold"):
            return complaint
    return None


def _about_sampling(body: Json) -> HttpError | None:
    """Reasoning models take sampling parameters only where they do not reason, the others take no effort."""
    model, effort = body["model"], (body.get("reasoning") or {}).get("effort")
    if model.startswith("gpt-4"):
        unfit = ["reasoning.effort"] if effort else []
    elif model.startswith(("gpt-5", "gpt-6")):
        unfit = [name for name in ("temperature", "top_p", "top_logprobs") if name in body and effort != "none"]
    else:
        unfit = []
    for name in unfit:
        message = f"Unsupported parameter: '{name}' is not supported with this model."
        return bad(message, code="unsupported_parameter", param=name)
    return None


def _about_metadata(body: Json) -> HttpError | None:
    metadata = body.get("metadata") or {}
    if len(metadata) > 16:
        message = "Invalid 'metadata': too many properties. Expected an object with at most 16 properties."
        return bad(message, code="object_above_max_properties", param="metadata")
    for key in metadata:
        if len(key) > 64:
            message = "Invalid 'metadata': a key has more than 64 characters."
            return bad(message, code="string_above_max_length", param="metadata")
        if complaint := _about_strings(metadata, {key: 512}, "metadata."):
            return complaint
    return None
