"""OpenAI and the servers that speak a part of its API."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a server has. `chains` is `previous_response_id`, `input_items` the list of what went into a response,
    `missing` what it says where it has nothing."""

    responses: bool = True
    conversations: bool = False
    chains: bool = False
    input_items: bool = False
    missing: bytes
    missing_type: str = "application/json"


_DETAIL = b'{"detail":"Not Found"}'

DIALECTS: Mapping[str, Dialect] = {
    "openai": Dialect(
        conversations=True,
        chains=True,
        input_items=True,
        missing=b'{"error":{"message":"Invalid URL","type":"invalid_request_error","param":null,"code":null}}',
    ),
    "vllm": Dialect(missing=_DETAIL),
    "lmstudio": Dialect(chains=True, missing=b'{"error":"Unexpected endpoint or method."}'),
    "ollama": Dialect(missing=b"404 page not found", missing_type="text/plain"),
    "llamacpp": Dialect(missing=b'{"error":{"code":404,"message":"File Not Found","type":"not_found_error"}}'),
    "chat-only": Dialect(responses=False, missing=_DETAIL),
}
