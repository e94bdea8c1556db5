"""The provider of the tests keeps to the API: what it sends, what it takes, what it keeps, and how it fails."""

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItemList
from openai.types.responses import (
    CompactedResponse,
    InputTokenCountResponse,
    Response,
    ResponseItemList,
    ResponseStreamEvent,
)
from pydantic import BaseModel

from fake_provider import (
    Answer,
    Break,
    Call,
    ErrorEvent,
    Failed,
    FakeProvider,
    HttpError,
    Incomplete,
    Load,
    Reasoning,
    Text,
    fault,
    rendering,
    rule,
)
from fake_provider.dialects import DIALECTS
from fake_provider.faults import BREAKS, ENDINGS, REFUSALS, rule_from
from fake_provider.reading import read_script
from fake_provider.script import Step

TESTS = str(Path(__file__).resolve().parent.parent)
MODEL = "gpt-6-luna"
TEXT = "You said: Hello What would you like to change?"
GOALS: Any = {"type": "function", "name": "goals", "parameters": {"type": "object"}, "strict": False}
PICTURE: Any = {"type": "input_image", "detail": "low", "image_url": "data:image/png;base64,AAAA"}
OUTPUT: Any = {"type": "output_text", "text": "I see", "annotations": []}
REFUSAL: Any = {"type": "refusal", "refusal": "No."}
FILE: Any = {"type": "input_file", "filename": "cv.pdf", "file_data": "data:application/pdf;base64,AAAA"}
THINKS = "reasoning.encrypted_content"


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeProvider() as provider:
        yield provider


@pytest.fixture
async def client(provider: FakeProvider) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="key", base_url=provider.base_url, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(provider: FakeProvider) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=f"http://{provider.address}", timeout=10) as http:
        yield http


def said(text: str, role: str = "user") -> Any:
    """A message."""
    return {"type": "message", "role": role, "content": text}


# --- streams, read without any library in between


@dataclass
class Wire:
    """What arrived: the status (0: not even a header), the frames of the stream, and how it ended."""

    status: int
    headers: dict[str, str]
    frames: list[str]
    end: str

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events that are JSON."""
        data = [line.removeprefix("data: ") for frame in self.frames for line in frame.split("\n")]
        return [json.loads(line) for line in data if line.startswith("{") and line.endswith("}")]

    @property
    def text(self) -> str:
        """The deltas of text."""
        return "".join(event["delta"] for event in self.events if event["type"] == "response.output_text.delta")

    @property
    def numbers(self) -> list[int | None]:
        """The sequence numbers."""
        return [event.get("sequence_number") for event in self.events]


async def ask(provider: FakeProvider, said: Any = "Hello", **more: Any) -> Wire:
    """Asks for a streamed response and reads to the end, which is `whole`, `closed` or `reset`."""
    body = json.dumps({"model": MODEL, "input": said, "stream": True, **more}).encode()
    host, _, port = provider.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/responses HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    wire = Wire(0, {}, [], "whole")
    data = b""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        wire.status = int(head[0].split(" ")[1])
        wire.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head if line)}
        if "content-length" in wire.headers:
            data = await reader.readexactly(int(wire.headers["content-length"]))
        else:
            while size := int(await reader.readline(), 16):
                data += (await reader.readexactly(size + 2))[:-2]
    except ConnectionResetError:
        wire.end = "reset"
    except (asyncio.IncompleteReadError, ValueError):
        wire.end = "closed"
    finally:
        writer.close()
    wire.frames = [frame for frame in data.decode().split("\n\n") if frame]
    return wire


# --- what it sends fits the types of the SDK


EVENT_TYPES: dict[str, type[BaseModel]] = {
    get_args(variant.model_fields["type"].annotation)[0]: variant
    for variant in get_args(get_args(ResponseStreamEvent)[0])
}
EVENTS = {
    "error",
    "response.compaction.compacting",
    "response.completed",
    "response.content_part.added",
    "response.content_part.done",
    "response.created",
    "response.failed",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.in_progress",
    "response.incomplete",
    "response.output_item.added",
    "response.output_item.done",
    "response.output_text.delta",
    "response.output_text.done",
    "response.queued",
    "response.reasoning_summary_part.added",
    "response.reasoning_summary_part.done",
    "response.reasoning_summary_text.delta",
    "response.reasoning_summary_text.done",
    "response.refusal.delta",
    "response.refusal.done",
}
"""All that the provider knows. A new one belongs here, and into a script of the test below."""


def extras(value: object) -> list[str]:
    """Fields that the SDK's types do not know, anywhere in a model."""
    match value:
        case BaseModel():
            unknown = list(value.model_extra or {})
            return unknown + [extra for name in type(value).model_fields for extra in extras(getattr(value, name))]
        case list():
            return [extra for item in value for extra in extras(item)]
        case _:
            return []


def fits(kind: type[BaseModel], data: str | bytes) -> Any:
    """The object, if it is one to the letter."""
    found = kind.model_validate_json(data, strict=True)
    assert extras(found) == []
    return found


async def test_every_event_fits_its_type(provider: FakeProvider) -> None:
    scripts: list[tuple[Answer | Load, dict[str, Any]]] = [
        (Answer(output=(Reasoning(), Text(), Call("goals", '{"a": 1}'), Call("goals"))), {"tools": [GOALS]}),
        (Answer(output=(Reasoning(), Text(text="No.", refusal=True))), {"include": [THINKS]}),
        (Answer(), {"background": True}),
        (Answer(), {"context_management": [{"type": "compaction", "compact_threshold": 1000}]}),
        (Answer(), {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}}),
        (Answer(ending=Incomplete(at="middle")), {"tool_choice": "none", "temperature": 0.5, "model": "gpt-4o"}),
        (Answer(ending=Failed(at="before_text")), {"metadata": {"a": "b"}}),
        (Answer(ending=ErrorEvent(at="after_text")), {}),
        (Load(deltas=2500), {}),
        (Load(deltas=20, pace=10_000, stamps=True), {}),
    ]
    seen = set()
    for step, more in scripts:
        provider.then(step)
        wire = await ask(provider, "Hello " * 1000, **more)
        assert wire.end == "whole"
        assert wire.numbers == list(range(len(wire.frames)))
        for frame in wire.frames:
            name, data = frame.split("\n")
            event = fits(EVENT_TYPES[name.removeprefix("event: ")], data.removeprefix("data: "))
            assert f"event: {event.type}" == name
            seen.add(event.type)
    assert seen == EVENTS
    assert provider.rejected == []


async def test_every_object_fits_its_type(provider: FakeProvider, http: httpx2.AsyncClient) -> None:
    async def call(kind: type[BaseModel], method: str, path: str, body: Any = None) -> Any:
        answer = await http.request(method, "/v1" + path, json=body)
        assert answer.status_code == 200, answer.text
        return fits(kind, answer.content)

    parts = [{"type": "input_text", "text": "See"}, PICTURE, FILE]
    items = [
        {"type": "message", "role": "user", "content": parts},
        {"type": "message", "role": "assistant", "status": "completed", "content": [OUTPUT]},
        {"type": "message", "role": "assistant", "status": "incomplete", "content": [REFUSAL]},
        {"type": "message", "role": "developer", "content": "Be kind."},
        {"type": "function_call", "call_id": "a", "name": "goals", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "none"},
        {"type": "function_call", "call_id": "b", "name": "goals", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": parts},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
    ]
    made = await call(Conversation, "POST", "/conversations", {"metadata": {"a": "b"}, "items": items[:1]})
    path = f"/conversations/{made.id}"
    await call(Conversation, "GET", path)
    assert (await call(Conversation, "POST", path, {"metadata": {"c": "d"}})).metadata == {"c": "d"}
    added = await call(ConversationItemList, "POST", f"{path}/items", {"items": items[1:]})
    assert len(added.data) == len(items) - 1
    compacting = {"context_management": [{"type": "compaction", "compact_threshold": 1000}]}
    wanted = {"model": MODEL, "conversation": made.id, "tools": [GOALS], "include": [THINKS], **compacting}
    provider.then(Answer(output=(Reasoning(), Text(), Call("goals", call_id="c"))))
    response = await call(Response, "POST", "/responses", {**wanted, "input": "Well?"})
    assert [item.type for item in response.output] == ["compaction", "reasoning", "message", "function_call"]
    await call(Response, "GET", f"/responses/{response.id}")
    listed = await call(ConversationItemList, "GET", f"{path}/items?limit=100&order=asc")
    assert [item.type for item in listed.data][-4:] == [item.type for item in response.output]
    used = await call(ResponseItemList, "GET", f"/responses/{response.id}/input_items?limit=2")
    assert (used.data[0].content[0].text, used.has_more) == ("Well?", True)
    one = listed.data[0].id
    assert (await http.get(f"/v1{path}/items/{one}")).json() == provider.items[one]
    await call(Conversation, "DELETE", f"{path}/items/{one}")
    await call(ConversationDeletedResource, "DELETE", path)
    counted = await call(InputTokenCountResponse, "POST", "/responses/input_tokens", {"input": "Hello " * 400})
    assert 500 < counted.input_tokens < 800
    compacted = await call(CompactedResponse, "POST", "/responses/compact", {"model": MODEL, "input": "Hello"})
    assert compacted.output[-1].type == "compaction"
    written = await call(Response, "POST", "/responses", {"model": MODEL, "input": "Hello", "background": True})
    assert written.status == "queued"
    await provider.quiet()
    await call(Response, "POST", f"/responses/{written.id}/cancel")
    assert (await call(Model, "GET", "/models/gpt-4o")).shutdown_date == "2027-01-14"
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
    await call(ChatCompletion, "POST", "/chat/completions", asked)
    chunks = (await http.post("/v1/chat/completions", json={**asked, "stream": True})).text.split("\n\n")
    assert chunks[-2:] == ["data: [DONE]", ""]
    for chunk in chunks[:-2]:
        fits(ChatCompletionChunk, chunk.removeprefix("data: "))
    models = (await http.get("/v1/models")).json()["data"]
    assert [fits(Model, json.dumps(model)).id for model in models] == list(provider.models)
    for ending, status in ((Incomplete(), "incomplete"), (Failed(), "failed")):
        provider.then(Answer(ending=ending))
        cut = await call(Response, "POST", "/responses", {"model": MODEL, "input": "Hello"})
        assert cut.status == (await call(Response, "GET", f"/responses/{cut.id}")).status == status
    assert provider.rejected == []


# --- what it takes


LONG = "x" * 65
BAD_REQUESTS: list[tuple[str, dict[str, Any], str | None, str | None]] = [
    ("unknown", {"invented": 1}, "unknown_parameter", "invented"),
    ("unknown inside", {"input": [{**said("a"), "mood": 1}]}, "unknown_parameter", "input[0].mood"),
    ("type", {"store": "perhaps"}, "invalid_type", "store"),
    ("role", {"input": [said("a", "nobody")]}, "invalid_value", "input[0].role"),
    ("choice", {"truncation": "some"}, "invalid_value", "truncation"),
    ("no model", {"model": None}, "missing_required_parameter", "model"),
    ("no strict", {"tools": [{"type": "function", "name": "a", "parameters": {}}]}, None, None),
    ("tool name", {"tools": [{**GOALS, "name": "my goals"}]}, "invalid_value", "tools[0].name"),
    ("too short", {"max_output_tokens": 15}, "integer_below_min_value", "max_output_tokens"),
    ("user", {"safety_identifier": LONG}, "string_above_max_length", "safety_identifier"),
    ("cache key", {"prompt_cache_key": LONG}, "string_above_max_length", "prompt_cache_key"),
    ("metadata key", {"metadata": {LONG: "a"}}, "string_above_max_length", "metadata"),
    ("metadata value", {"metadata": {"a": "x" * 513}}, "string_above_max_length", "metadata.a"),
    ("metadata", {"metadata": {str(n): "" for n in range(17)}}, "object_above_max_properties", "metadata"),
    ("two sources", {"conversation": "c", "previous_response_id": "r"}, "mutually_exclusive_parameters", None),
    ("background", {"background": True, "store": False}, None, "store"),
    ("sampling", {"temperature": 0.1}, "unsupported_parameter", "temperature"),
    (
        "effort",
        {"model": "gpt-4o", "reasoning": {"effort": "low"}},
        "unsupported_parameter",
        "reasoning.effort",
    ),
    (
        "threshold",
        {"context_management": [{"type": "compaction", "compact_threshold": 999}]},
        "integer_below_min_value",
        "context_management[0].compact_threshold",
    ),
    (
        "long text",
        {"input": "x" * 10_485_761},
        "string_above_max_length",
        "input",
    ),
    (
        "long call id",
        {"input": [{"type": "function_call_output", "call_id": LONG, "output": ""}]},
        "string_above_max_length",
        "input[0].call_id",
    ),
    (
        "long image",
        {"input": [said([{**PICTURE, "image_url": "data:image/png;base64," + "A" * 20_971_520}])]},  # type: ignore[arg-type]
        "string_above_max_length",
        "input[0].content[0].image_url",
    ),
    (
        "bad image",
        {"input": [said([{**PICTURE, "image_url": "data:image/tiff;base64,AAAA"}])]},  # type: ignore[arg-type]
        "invalid_value",
        "input[0].content[0].image_url",
    ),
    ("many images", {"input": [said([PICTURE] * 1501)]}, None, "input"),  # type: ignore[arg-type]
    (
        "nameless file",
        {"input": [said([{"type": "input_file", "file_data": "data:text/plain;base64,AAAA"}])]},  # type: ignore[arg-type]
        "missing_required_parameter",
        "input[0].content[0].filename",
    ),
    ("empty file", {"input": [said([{"type": "input_file"}])]}, None, None),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("wrong", "code", "param"), [pytest.param(*row[1:], id=row[0]) for row in BAD_REQUESTS])
async def test_a_wrong_parameter_is_refused_and_remembered(
    provider: FakeProvider, http: httpx2.AsyncClient, wrong: dict[str, Any], code: str | None, param: str | None
) -> None:
    answer = await http.post("/v1/responses", json={"model": MODEL, "input": "Hello", **wrong})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    if (code, param) != (None, None):
        assert (error["code"], error["param"]) == (code, param), error["message"]
    ((request, told),) = provider.rejected
    assert (request.path, told.message) == ("/v1/responses", error["message"])
    assert provider.responses == {}


async def test_wrong_requests_elsewhere(provider: FakeProvider, http: httpx2.AsyncClient) -> None:
    conversation = (await http.post("/v1/conversations", json={})).json()["id"]
    response = (await http.post("/v1/responses", json={"model": MODEL, "input": "Hello"})).json()["id"]
    too_many = {"items": [said("a")] * 21}
    path = f"/v1/conversations/{conversation}"
    wrong: list[tuple[str, str, Any]] = [
        ("POST", "/v1/conversations", too_many),
        ("POST", f"{path}/items", too_many),
        ("POST", f"{path}/items", {}),
        ("POST", path, {}),
        ("GET", f"{path}/items?limit=101", None),
        ("GET", f"{path}/items?order=up", None),
        ("GET", f"{path}/items?page=2", None),
        ("GET", f"/v1/responses/{response}?starting_after=1", None),
        ("GET", f"/v1/responses/{response}/input_items?limit=0", None),
        ("POST", f"/v1/responses/{response}/cancel", {"why": "so"}),
        ("POST", "/v1/responses/input_tokens", {"input": 5}),
        ("POST", "/v1/responses/compact", {"input": "Hello"}),
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": [], "mood": 1}),
    ]
    for number, (method, target, body) in enumerate(wrong, 1):
        assert (await http.request(method, target, json=body)).status_code == 400, target
        assert len(provider.rejected) == number
    for content in (b"{", b"[]"):
        assert (await http.post("/v1/responses", content=content)).status_code == 400
    assert len(provider.rejected) == len(wrong) + 2


# --- what it keeps


async def test_chains(provider: FakeProvider, client: AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input="One")
    second = await client.responses.create(model=MODEL, input="Two", previous_response_id=first.id)
    used: Any = client.responses.input_items.list(second.id, order="asc")
    texts = [item.content[0].text async for item in used]
    assert texts == ["One", "You said: One What would you like to change?", "Two"]
    loose = await client.responses.create(model=MODEL, input="Three", previous_response_id=second.id, store=False)
    await client.responses.delete(second.id)
    for gone in (second.id, loose.id, "resp_x"):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model=MODEL, input="And?", previous_response_id=gone)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
        assert f"Previous response with id '{gone}' not found." in str(caught.value)
        with pytest.raises(openai.NotFoundError, match=f"Response with id '{gone}' not found"):
            await client.responses.retrieve(gone)
    assert (await client.responses.create(model=MODEL, input="And?", previous_response_id=first.id)).output_text


async def test_a_deleted_conversation_leaves_its_items_and_responses(
    provider: FakeProvider, client: AsyncOpenAI
) -> None:
    made = await client.conversations.create()
    response = await client.responses.create(model=MODEL, input="My secret", conversation=made.id)
    item = (await client.conversations.items.list(made.id, order="asc")).data[0]
    await client.conversations.delete(made.id)
    with pytest.raises(openai.NotFoundError, match=f"Conversation with id '{made.id}' not found"):
        await client.responses.create(model=MODEL, input="Hello", conversation=made.id)
    with pytest.raises(openai.NotFoundError):
        await client.conversations.items.delete(item.id or "", conversation_id=made.id)
    assert "My secret" in json.dumps(provider.items)
    assert (await client.responses.retrieve(response.id)).output_text == response.output_text


async def test_items_are_paged_and_deleted_one_by_one(provider: FakeProvider, client: AsyncOpenAI) -> None:
    made = await client.conversations.create(items=[said(str(n)) for n in range(20)])
    items: Any = client.conversations.items
    await items.create(made.id, items=[said(str(n)) for n in range(20, 25)])
    texts = [item.content[0].text async for item in items.list(made.id, limit=4)]
    assert texts == [str(n) for n in reversed(range(25))]
    with pytest.raises(openai.NotFoundError):
        await items.list(made.id, after="msg_x")
    gone = provider.conversations[made.id].items[3]["id"]
    await items.delete(gone, conversation_id=made.id)
    with pytest.raises(openai.NotFoundError):
        await items.retrieve(gone, conversation_id=made.id)
    assert gone not in provider.items
    assert len(provider.items) == 24


async def test_calls_must_be_answered(provider: FakeProvider, client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    provider.then(Answer(output=(Call("goals", call_id="call_1"), Call("goals", call_id="call_2"))))
    await client.responses.create(model=MODEL, input="Goals?", conversation=made.id, tools=[GOALS])
    one: Any = [{"type": "function_call_output", "call_id": "call_1", "output": "a"}]
    with pytest.raises(openai.BadRequestError, match="No tool output found for function call call_2"):
        await client.responses.create(model=MODEL, input=one, conversation=made.id)
    with pytest.raises(
        openai.BadRequestError, match="No tool call found for function call output with call_id call_1"
    ):
        await client.responses.create(model=MODEL, input=one)
    both: Any = [*one, {**one[0], "call_id": "call_2", "output": "b"}]
    answer = await client.responses.create(model=MODEL, input=both, conversation=made.id)
    assert answer.output_text.startswith("You said: b")
    referred: Any = [{"type": "item_reference", "id": provider.conversations[made.id].items[0]["id"]}]
    again = await client.responses.create(model=MODEL, input=referred)
    assert again.output_text.startswith("You said: Goals?")


async def test_an_input_can_be_too_long(provider: FakeProvider, client: AsyncOpenAI) -> None:
    provider.context_limit = 100
    made = await client.conversations.create(items=[said("word " * 100)])
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model=MODEL, input="Hello", conversation=made.id)
    assert caught.value.code == "context_length_exceeded"
    assert await client.responses.create(model=MODEL, input="Hello", conversation=made.id, truncation="auto")
    provider.context_limit = 1500
    await client.conversations.items.create(made.id, items=[said("word " * 1500)])
    compacting: Any = [{"type": "compaction", "compact_threshold": 1000}]
    compacted = await client.responses.create(
        model=MODEL, input="Hello", conversation=made.id, context_management=compacting
    )
    assert [item.type for item in compacted.output] == ["compaction", "message"]
    after = await client.responses.create(
        model=MODEL, input="Hello", conversation=made.id, context_management=compacting
    )
    assert [item.type for item in after.output] == ["message"]
    assert compacted.usage
    assert after.usage
    assert after.usage.input_tokens < 100 < 1500 < compacted.usage.input_tokens


async def test_structured_output(provider: FakeProvider, client: AsyncOpenAI) -> None:
    class Mood(BaseModel):
        mood: str
        days: list[int]
        better: bool

    parsed = await client.responses.parse(model=MODEL, input="Hello", text_format=Mood)
    assert parsed.output_parsed == Mood(mood="text", days=[1], better=True)
    provider.then(Answer(output=(Text(text='{"mood": "low", "days": [], "better": false}'),)))
    parsed = await client.responses.parse(model=MODEL, input="Hello", text_format=Mood)
    assert parsed.output_parsed == Mood(mood="low", days=[], better=False)
    assert provider.rejected == []


@pytest.mark.parametrize("kept", [False, True])
async def test_what_an_aborted_response_leaves(provider: FakeProvider, client: AsyncOpenAI, kept: bool) -> None:
    made = await client.conversations.create()
    stall = Break(how="stall", at="end")
    provider.then(Answer(output=(Call("goals"),), fault=stall, kept_when_aborted=kept))
    asking = asyncio.create_task(ask(provider, "Goals?", conversation=made.id, tools=[GOALS]))
    await stall.gate.reached.wait()
    with pytest.raises(openai.BadRequestError, match="Another process") as caught:
        await client.conversations.items.create(made.id, items=[said("Hello")])
    assert caught.value.code == "conversation_locked"
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await provider.quiet()
    kinds = [item["type"] for item in provider.conversations[made.id].items]
    assert kinds == (["message", "function_call"] if kept else [])


# --- other servers


@pytest.mark.parametrize("like", DIALECTS)
async def test_servers_that_have_less(like: str) -> None:
    async with (
        FakeProvider(like=like) as provider,
        AsyncOpenAI(api_key="key", base_url=provider.base_url, max_retries=0) as client,
    ):
        has = provider.dialect

        async def works(call: Any) -> bool:
            try:
                await call
            except (openai.NotFoundError, openai.BadRequestError):
                return False
            return True

        assert await works(client.models.list())
        chat = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
        assert chat.choices[0].message.content == TEXT
        assert await works(client.conversations.create()) is has.conversations
        assert await works(client.responses.create(model=MODEL, input="Hello")) is has.responses
        if has.responses:
            first = next(iter(provider.responses))
            chained = client.responses.create(model=MODEL, input="More", previous_response_id=first)
            assert await works(chained) is has.chains
            provider.dialect = replace(has, chains=True)
            assert await works(client.responses.create(model=MODEL, input="More", previous_response_id=first))


# --- faults


@pytest.mark.parametrize("name", REFUSALS)
async def test_refusals(provider: FakeProvider, name: str) -> None:
    provider.rules = [rule(name, retry_after=2)]
    wire = await ask(provider)
    assert provider.strikes == {name: 1}
    assert provider.running == 0
    if name == "reset":
        assert (wire.status, wire.end) == (0, "reset")
    else:
        assert (wire.status, wire.headers["retry-after"]) == (REFUSALS[name][0].status, "2")
    assert (await ask(provider)).text == TEXT


@pytest.mark.parametrize("at", ["before_text", "middle", "after_text", "end"])
@pytest.mark.parametrize("name", BREAKS)
async def test_breaks(provider: FakeProvider, name: str, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if at != "middle":  # a second for each delta of 20 MB
        monkeypatch.setattr(rendering, "HUGE", 1_000_000)
    whole = await ask(provider)
    half = "".join([event["delta"] for event in whole.events if "delta" in event][:3])
    before = {"before_text": "", "middle": half, "after_text": TEXT, "end": TEXT}[at]
    provider.rules = [rule(name, at=at, seconds=0.02 if name in ("stall", "comments") else None)]
    wire = await ask(provider)
    assert provider.strikes == {name: 1}
    kinds = [event["type"] for event in wire.events]
    ends = kinds[-1:] == ["response.completed"]
    match name:
        case "eof" | "half" | "cut":
            assert (wire.text, ends) == (before, False)
            assert wire.end == ("reset" if name == "cut" else "whole")
            assert len(wire.frames) - len(wire.events) == (0 if name == "eof" else 1)
            assert ("response.output_item.done" in kinds) is (at == "end")
        case "stall" | "comments":
            assert (wire.text, ends, wire.numbers) == (TEXT, True, whole.numbers)
            assert any(frame == ": keep-alive" for frame in wire.frames) is (name == "comments")
        case "malformed":
            assert (wire.numbers, len(wire.frames)) == (whole.numbers, len(whole.frames) + 1)
        case "unknown":
            assert wire.numbers == [*whole.numbers, len(whole.numbers)]
            assert kinds[:-1].count("response.novelty.delta") == 1
        case "duplicate":
            assert len(wire.numbers) == len(whole.numbers) + 1
            assert sorted(set(wire.numbers)) == whole.numbers  # type: ignore[type-var]
        case "gap":
            (missing,) = set(whole.numbers) - set(wire.numbers)
            assert "".join(event.get("delta", "") for event in whole.events[:missing]) == before
        case "unnumbered":
            place = wire.numbers.index(None)
            assert wire.numbers[place:] == [None] * (len(whole.numbers) - place)
            assert "".join(event.get("delta", "") for event in wire.events[:place]) == before
        case "huge":
            (size,) = [len(event["delta"]) for event in wire.events if len(event.get("delta", "")) > 100]
            assert size == (20_000_000 if at == "middle" else 1_000_000)
            assert wire.text.startswith(before)
            assert wire.events[-1]["response"]["output"][0]["content"][0]["text"] == wire.text
        case "slow":
            assert (wire.text, wire.numbers) == (TEXT, whole.numbers)
    assert provider.running == 0
    assert (await ask(provider)).text == TEXT


@pytest.mark.parametrize(
    ("how", "status", "end"), [("eof", 0, "closed"), ("cut", 0, "reset"), ("stall", 200, "whole")]
)
async def test_breaks_before_the_header(provider: FakeProvider, how: Any, status: int, end: str) -> None:
    provider.rules = [rule(how, at="header", seconds=0.02)]
    wire = await ask(provider)
    assert (wire.status, wire.end, provider.strikes) == (status, end, {how: 1})
    with pytest.raises(ValueError, match="before the header"):
        Break(how="gap", at="header")


@pytest.mark.parametrize("at", ["before_text", "middle", "after_text", "end"])
@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("background", [False, True])
async def test_endings(provider: FakeProvider, name: str, at: Any, background: bool) -> None:
    provider.rules = [rule(name, at=at)]
    wire = await ask(provider, background=background)
    assert wire.numbers == list(range(len(wire.frames)))
    last = wire.events[-1]
    assert len(wire.text) == {"before_text": 0, "middle": 24}.get(at, len(TEXT))
    match name:
        case "failed":
            assert last["response"]["status"] == "failed"
            assert last["response"]["error"]["code"] == "server_error"
            assert len(last["response"]["output"]) == (at == "end")
        case "incomplete":
            assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
        case "error":
            assert (last["type"], last["code"]) == ("error", "server_error")
        case "error_nested":
            assert (last["type"], last["error"]["code"]) == ("error", "server_error")
    assert sum(provider.strikes.values()) == 1
    await provider.quiet()


async def test_faults_of_a_reply_that_is_only_a_call(provider: FakeProvider) -> None:
    provider.default = Answer(output=(Call("goals", '{"area": "work", "all": true}'),))
    provider.rules = [rule("eof", at="middle")]
    wire = await ask(provider, tools=[GOALS])
    arguments = "".join(event.get("delta", "") for event in wire.events)
    assert 0 < len(arguments) < len('{"area": "work", "all": true}')
    assert provider.strikes == {"eof": 1}


async def test_a_fault_befalls_the_nth_request_and_as_many_as_it_says(provider: FakeProvider) -> None:
    provider.rules = [rule("server_error", nth=2, times=2), rule("conflict", nth=3, times="all")]
    statuses = [(await ask(provider)).status for _ in range(7)]
    assert statuses == [200, 500, 500, 200, 409, 409, 409]
    assert [(one.seen, one.applied) for one in provider.rules] == [(7, 2), (5, 3)]


async def test_a_fault_befalls_all_of_a_conversation(provider: FakeProvider, client: AsyncOpenAI) -> None:
    made = await client.conversations.create()
    other = await client.conversations.create()
    provider.rules = [rule("server_error", conversation=made.id, times="all")]
    assert [(await ask(provider, conversation=made.id)).status for _ in range(2)] == [500, 500]
    assert (await ask(provider, conversation={"id": made.id})).status == 500
    assert (await ask(provider, conversation=other.id)).status == 200
    provider.rules = [rule("server_error", text="unlucky", nth=2, times="all")]
    assert (await ask(provider, "I am unlucky", conversation=other.id)).status == 200
    assert (await ask(provider, "Hello", conversation=other.id)).status == 500
    assert (await ask(provider, "Hello", conversation=made.id)).status == 200
    assert (await ask(provider, [said("unlucky me"), said("Hello")], store=False)).status == 500
    assert provider.strikes == {"server_error": 5}


async def test_each_stall_has_a_gate_of_its_own(provider: FakeProvider) -> None:
    provider.rules = [rule("stall", times="all")]
    first = asyncio.create_task(ask(provider))
    second = asyncio.create_task(ask(provider))
    async with asyncio.timeout(10):
        while len(provider.gates) < 2:  # noqa: ASYNC110 -- the gates do not exist before the requests come
            await asyncio.sleep(0)
        next(iter(provider.gates)).released.set()
        done, _ = await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == len(provider.gates) == len(provider.streams) == 1
    next(iter(provider.gates)).released.set()
    assert (await first).text == (await second).text == TEXT


@pytest.mark.parametrize(
    "wrong", ["flood", "eof@nowhere", "eof,when=2", "rate_limit@middle", "eof,nth", "gap@header", {"at": "end"}]
)
def test_a_fault_that_there_is_not_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        rule_from(wrong)


def test_faults_have_names() -> None:
    limited = fault("rate_limit", retry_after=2)
    assert isinstance(limited, HttpError)
    assert (limited.status, limited.code, limited.headers["retry-after"]) == (429, "rate_limit_exceeded", "2")
    assert fault("failed", code="x", at="end") == Failed("x")
    stall, cut = rule_from("stall@end,seconds=0.5,times=all"), rule_from({"fault": "cut", "after": 3, "text": "x"})
    assert isinstance(stall.effect, Break)
    assert isinstance(cut.effect, Break)
    assert (stall.effect.how, stall.effect.at, stall.effect.seconds, stall.times) == ("stall", "end", 0.5, None)
    assert (cut.effect.how, cut.effect.at, cut.effect.after, cut.text) == ("cut", None, 3, "x")


# --- long replies


async def test_a_long_reply_says_the_same_whichever_way_it_is_sent(
    provider: FakeProvider, client: AsyncOpenAI
) -> None:
    load = Load(deltas=3210, piece='a "quoted" ü ')
    provider.then(load, load.as_answer())
    fast, slow = await ask(provider), await ask(provider)
    assert fast.text == slow.text == load.piece * load.deltas
    assert fast.numbers == slow.numbers

    def shape(wire: Wire) -> list[str]:
        return [re.sub(r"(resp|msg)_\w+", "", frame) for frame in wire.frames[2:-1]]

    assert shape(fast) == shape(slow)
    kept = next(iter(provider.responses.values()))
    assert kept["output"][0]["content"][0]["text"] == fast.text
    assert kept["usage"]["output_tokens"] == load.deltas
    provider.then(load)
    assert (await client.responses.create(model=MODEL, input="Hello")).output_text == fast.text
    provider.rules = [rule("eof")]
    provider.then(load)
    assert (await ask(provider)).text == load.piece * (load.deltas // 2)


async def test_paced_deltas_come_on_schedule_with_the_time_of_sending(provider: FakeProvider) -> None:
    provider.default = Load(deltas=25, pace=250, stamps=True)
    before = time.monotonic_ns()
    wires = await asyncio.gather(*(ask(provider) for _ in range(4)))
    after = time.monotonic_ns()
    for wire in wires:
        stamps = [int(word) for word in wire.text.split() if word != "word"]
        assert len(stamps) == 25
        assert before < stamps[0] <= stamps[-1] < after
        assert stamps == sorted(stamps)
        # The schedule is never ahead of time: 24 intervals of 4 ms.
        assert stamps[-1] - stamps[0] > 20 * 4_000_000
        assert wire.events[-1]["response"]["output"][0]["content"][0]["text"] == wire.text
    assert provider.lateness.deltas == 100
    assert 0 < provider.lateness.percentile(0.5) <= provider.lateness.percentile(0.99)


async def test_a_reader_who_leaves_ends_a_long_reply(provider: FakeProvider) -> None:
    for load in (Load(deltas=10_000_000), Load(deltas=10_000, pace=100)):
        provider.then(load)
        host, _, port = provider.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"model": MODEL, "input": "Hello", "stream": True}).encode()
        writer.write(b"POST /v1/responses HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"response.output_text.delta")
        assert provider.running == 1
        writer.transport.abort()
        await provider.quiet()
        assert provider.streams == set()


# --- scripts, and control from other processes


def test_scripts_say_what_python_says() -> None:
    script = read_script(
        {
            "steps": [
                {"answer": {"output": [{"text": "Hi"}, {"call": {"name": "goals"}}, {"reasoning": "Hm."}]}},
                {
                    "answer": {
                        "output": [{"text": {"text": "No.", "refusal": True}}],
                        "ending": {"incomplete": "x"},
                    }
                },
                {"http_error": {"status": 418, "headers": {"a": "b"}}},
                "overloaded",
            ],
            "default": {"load": {"deltas": 5, "pace": 25}},
            "faults": ["cut"],
            "settings": {"context_limit": 5},
        }
    )
    steps: list[Step] = [
        Answer(output=(Text(text="Hi"), Call("goals"), Reasoning("Hm."))),
        Answer(output=(Text(text="No.", refusal=True),), ending=Incomplete("x")),
        HttpError(status=418, headers={"a": "b"}),
        fault("overloaded"),  # type: ignore[list-item]
    ]
    assert script.steps == steps
    assert script.default == Load(deltas=5, pace=25)
    assert (script.faults[0].name, script.settings) == ("cut", {"context_limit": 5})
    assert read_script([{"answer": {}}]).steps == [Answer()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": []},
        {"steps": {}},
        ["cut"],
        [{"text": "Hi"}],
        [{"answer": {"mood": "good"}}],
        [{"answer": {"ending": {"failed": {"at": "noon"}}}}],
        [{"answer": {"fault": {"break": "sneeze"}}}],
        [{"load": {"stamps": True}}],
        {"default": "overloaded"},
        "answer",
    ],
)
def test_a_script_that_makes_no_sense_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_script(wrong)


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[httpx2.AsyncClient]:
    """The provider in a process of its own."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fake_provider",
        *arguments,
        env={**os.environ, "PYTHONPATH": TESTS},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert started.stdout is not None
        address = (await started.stdout.readline()).decode().strip()
        async with httpx2.AsyncClient(base_url=address.removesuffix("/v1"), timeout=30) as http:
            yield http
    finally:
        started.terminate()
        await started.wait()


async def test_a_process_of_its_own_is_controlled_over_http(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"steps": [{"answer": {"output": [{"text": "Scripted."}]}}]}), "utf-8")
    async with process("--script", str(script), "--fault", "rate_limit,retry_after=3,nth=2") as http:

        async def control(method: str, path: str, body: Any = None) -> Any:
            answer = await http.request(method, f"/__fake__/{path}", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        async def say(text: str, **more: Any) -> httpx2.Response:
            return await http.post("/v1/responses", json={"model": MODEL, "input": text, **more})

        assert "Scripted." in (await say("One")).text
        refused = await say("Two")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert (await say("Three", mood=1)).status_code == 400
        made = (await http.post("/v1/conversations", json={"items": [said("kept")]})).json()["id"]
        assert [r["path"] for r in (await control("GET", "requests?since=2"))["requests"]][
            -1
        ] == "/v1/conversations"
        assert (await control("GET", "rejected"))["rejected"][0]["message"] == "Unknown parameter: 'mood'."
        (conversation,) = (await control("GET", "conversations"))["conversations"]
        assert (conversation["id"], conversation["items"][0]["content"][0]["text"]) == (made, "kept")
        await http.delete(f"/v1/conversations/{made}")
        assert len((await control("GET", "items"))["items"]) == 1
        assert (await control("GET", "responses"))["responses"][0]["status"] == "completed"

        await control("POST", "script", {"steps": [{"answer": {"output": [{"text": "Scripted again."}]}}]})
        assert "Scripted again." in (await say("Four")).text
        await control("POST", "default", {"default": {"answer": {"output": [{"text": "As ever."}]}}})
        assert "As ever." in (await say("Five")).text
        await control("POST", "settings", {"context_limit": 10, "models": {MODEL: "2027-02-01"}})
        assert (await say("x" * 100)).json()["error"]["code"] == "context_length_exceeded"
        assert (await http.get(f"/v1/models/{MODEL}")).json()["shutdown_date"] == "2027-02-01"

        await control("DELETE", "faults")
        await control("POST", "faults", {"faults": ["stall@middle"]})
        stalled = asyncio.create_task(say("Six", stream=True))
        async with asyncio.timeout(30):
            while not (await control("GET", ""))["stalled"]:  # noqa: ASYNC110 -- another process
                await asyncio.sleep(0)
        (stream,) = (await control("GET", "streams"))["streams"]
        assert (stream["deltas"], (await control("GET", ""))["running"]) == (1, 1)
        await control("POST", "release")
        assert "response.completed" in (await stalled).text
        assert (await control("GET", "faults"))["faults"][0]["applied"] == 1
        assert (await control("GET", ""))["strikes"] == {"rate_limit": 1, "stall": 1}

        for wrong in ({"fault": ["cut"]}, {"faults": ["sneeze"]}):
            assert (await http.post("/__fake__/faults", json=wrong)).status_code == 400
        assert (await http.post("/__fake__/settings", json={"colour": 1})).status_code == 400
        assert (await http.get("/__fake__/nothing")).status_code == 404
        counts = await control("POST", "reset")
        assert (counts["requests"], counts["conversations"], counts["strikes"]) == (0, 0, {})
        assert TEXT in (await say("Hello")).text


async def test_connections_are_refused_for_a_while(provider: FakeProvider, http: httpx2.AsyncClient) -> None:
    assert (await ask(provider)).text == TEXT
    assert (await http.post("/__fake__/refuse", json={"seconds": 0.3})).status_code == 200
    refusals = 0
    async with asyncio.timeout(10):
        while True:
            try:
                wire = await ask(provider)
            except ConnectionRefusedError:
                refusals += 1
            else:
                if refusals:
                    break
    assert wire.text == TEXT


async def test_the_help_teaches_every_fault() -> None:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fake_provider",
        "--help",
        env={**os.environ, "PYTHONPATH": TESTS},
        stdout=asyncio.subprocess.PIPE,
    )
    text = (await started.communicate())[0].decode()
    assert started.returncode == 0
    for name in (*REFUSALS, *BREAKS, *ENDINGS, *DIALECTS):
        assert f" {name} " in text or f"{name}," in text or f"{name}}}" in text
    example = text[text.index('{"steps"') : text.index("One step for each")]
    assert len(read_script(json.loads(example)).steps) == 3
