"""From lines of the transcript to items of the API."""

import asyncio
from binascii import b2a_base64
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, assert_never, cast

from openai.types.responses import ResponseInputContentParam, ResponseInputItemParam, ResponseOutputMessageParam

from core.model.attachment import FilePart, ImagePart, Unread, data_of
from core.model.media import PDF
from core.model.message import ContentPart, Message, RefusalPart, ReplyPart, Role, TextPart, ToolExchange
from core.ports.agent import ReplyRequest, ToolRound

T = TypeVar("T")

_LARGE = 500_000
"""Bytes attached to some lines from which on their items are made in a thread: the base64 of less takes less than
a millisecond."""
_PIECE = 3 << 16
"""Bytes that become base64 at once, in a third of a millisecond in which no other thread can run either. A
multiple of three, so that the pieces join."""


async def aside(make: Callable[[], T], lines: Iterable[Message]) -> T:
    """Makes something of the items of these lines, without holding up the event loop where much is attached."""
    size = sum(len(data) for line in lines for data in data_of(line.content).values())
    return make() if size < _LARGE else await asyncio.to_thread(make)


def labels(request: ReplyRequest) -> dict[str, str]:
    """What is said at the provider of whose thread this is, to find it again: ids, and nothing of a person."""
    return {
        "thread_id": request.thread_id,
        "agent_id": request.definition.id,
        "domain": request.domain.value,
    }


def history_items(messages: Iterable[Message]) -> list[ResponseInputItemParam]:
    """A transcript, line by line. A line of a tool is two items, a line without text none."""
    items: list[ResponseInputItemParam] = []
    for message in messages:
        match message.role:
            case Role.USER:
                items.append(_user_item(message))
            case Role.ASSISTANT if message.text:
                parts = [part for part in message.content if isinstance(part, ReplyPart)]
                items.append(_assistant_item(parts, partial=message.partial))
            case Role.TOOL if message.tool is not None:
                items += _exchange_items(message.tool)
            case _:
                continue
    return items


def turn_items(request: ReplyRequest) -> list[ResponseInputItemParam]:
    """Everything of the turn so far: the user's message and the rounds that are finished."""
    items = [_user_item(request.message)]
    for finished in request.rounds:
        if finished.text:
            items.append({"type": "message", "role": "assistant", "content": finished.text})
        for exchange in finished.exchanges:
            items += _exchange_items(exchange)
    return items


def output_items(finished: ToolRound) -> list[ResponseInputItemParam]:
    """The answers to the calls of a round."""
    return [_output_item(exchange) for exchange in finished.exchanges]


def _user_item(message: Message) -> ResponseInputItemParam:
    return {"type": "message", "role": "user", "content": [_input_part(part) for part in message.content]}


def _input_part(part: ContentPart) -> ResponseInputContentParam:
    match part:
        case TextPart(text) | RefusalPart(text):
            return {"type": "input_text", "text": text}
        case ImagePart(source, mime_type, detail):
            if isinstance(source, Unread):
                return {"type": "input_text", "text": "(An image was sent here. It is not shown again.)"}
            image = _data_url(source, mime_type) if isinstance(source, bytes) else source
            return {"type": "input_image", "image_url": image, "detail": detail.value}
        case FilePart(source, filename, mime_type):
            if isinstance(source, Unread):
                return {"type": "input_text", "text": "(A file was sent here. It is not shown again.)"}
            if isinstance(source, str):
                return {"type": "input_file", "file_url": source}
            name = filename or ("document.pdf" if mime_type == PDF else "document.txt")
            return {"type": "input_file", "filename": name, "file_data": _data_url(source, mime_type)}
        case _:
            assert_never(part)


def _data_url(data: bytes, mime_type: str) -> str:
    pieces = (b2a_base64(data[at : at + _PIECE], newline=False).decode() for at in range(0, len(data), _PIECE))
    return "".join([f"data:{mime_type};base64,", *pieces])


def _assistant_item(content: Sequence[ReplyPart], *, partial: bool) -> ResponseInputItemParam:
    if not any(isinstance(part, RefusalPart) for part in content):
        return {"type": "message", "role": "assistant", "content": "".join(part.text for part in content)}
    message = {
        "type": "message",
        "role": "assistant",
        "status": "incomplete" if partial else "completed",
        "content": [
            {"type": "refusal", "refusal": part.text}
            if isinstance(part, RefusalPart)
            else {"type": "output_text", "text": part.text, "annotations": []}
            for part in content
        ],
    }
    # The SDK's type asks for an id, the API doesn't: OpenAI's own agents SDK strips it before it adds items.
    return cast("ResponseOutputMessageParam", message)


def _exchange_items(exchange: ToolExchange) -> list[ResponseInputItemParam]:
    return [
        {
            "type": "function_call",
            "call_id": exchange.call_id,
            "name": exchange.name,
            "arguments": exchange.arguments_json,
        },
        _output_item(exchange),
    ]


def _output_item(exchange: ToolExchange) -> ResponseInputItemParam:
    return {"type": "function_call_output", "call_id": exchange.call_id, "output": exchange.output}
