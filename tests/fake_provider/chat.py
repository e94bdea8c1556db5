"""Chat Completions, the older API that all servers speak: enough to see who asks for it."""

import json
from typing import TYPE_CHECKING, Any

from fake_provider import validation
from fake_provider.exchange import Exchange

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider


async def serve_chat(provider: "FakeProvider", exchange: Exchange) -> None:
    """Answers a request for a completion with the newest words of the user. Knows no script and no faults."""
    body = exchange.body
    if complaint := validation.about_chat(body):
        return await exchange.reject(complaint)
    text = f"You said: {body['messages'][-1].get('content')} What would you like to change?"
    facts = {"id": provider.numbers.next("chatcmpl"), "created": 1_790_000_000, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        given, made = len(json.dumps(body["messages"])) // 4, len(text) // 4
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return await exchange.answer({**facts, "object": "chat.completion", "choices": [choice], "usage": usage})
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": text}, None),
        ({}, "stop"),
    ]
    await exchange.connection.begin(exchange.headers)
    for delta, reason in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        chunk = {**facts, "object": "chat.completion.chunk", "choices": [choice]}
        await exchange.connection.send(f"data: {json.dumps(chunk)}\n\n".encode())
    await exchange.connection.send(b"data: [DONE]\n\n")
    return await exchange.connection.end()
