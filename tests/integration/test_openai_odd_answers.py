"""Answers about conversations that are nothing of the sort: they end a turn by its name, or are got around."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx2
import pytest
from openai import AsyncOpenAI

from adapters.openai import OpenAICopies
from adapters.openai.agent import OpenAIAgent
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import TurnReason
from core.ports.provider_copies import CopyStays
from openai_thread import ThreadOfTest, fails

REPLY = b"".join(
    b"data: %s\n\n" % json.dumps(event).encode()
    for event in (
        {"type": "response.output_text.delta", "delta": "Fine."},
        {"type": "response.completed", "response": {"id": "resp_1"}},
    )
)
DEEP = b"[" * 100_000


ANY_KEY = "none"


class Body(httpx2.AsyncByteStream):
    """An answer's body, which holds a connection until it is closed."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._content

    async def aclose(self) -> None:
        self.closed = True


class Odd:
    """A provider with one conversation after another, that answers some requests as told."""

    def __init__(self, *, kind: str = "text/event-stream", **answers: bytes) -> None:
        self.kind = kind
        self.answers = answers
        self.bodies: list[Body] = []
        self.asked: list[str] = []
        self.made = 0
        self.client = AsyncOpenAI(
            api_key=ANY_KEY,
            base_url="http://server/v1",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer)),
        )

    def thread(self, state: ProviderState | None = None) -> ThreadOfTest:
        return ThreadOfTest(OpenAIAgent(self.client, model="m", user_key="k"), state=state)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path.removeprefix("/v1/")
        self.asked.append(f"{request.method} {path}")
        if path == "responses":
            body = Body(self.answers.get("reply", REPLY))
            self.bodies.append(body)
            return httpx2.Response(200, stream=body, headers={"content-type": self.kind} if self.kind else {})
        if (request.method, path) == ("POST", "conversations"):
            self.made += 1
            made = json.dumps({"id": f"conv_{self.made}", "object": "conversation"}).encode()
            return self._json(self.answers.get("made", made))
        if path.endswith("/items"):
            listed = self.answers.get("listed", b'{"data": [], "has_more": false}')
            return self._json(listed if request.method == "GET" else self.answers.get("added", b"{}"))
        return self._json(b"{}")

    @staticmethod
    def _json(content: bytes) -> httpx2.Response:
        return httpx2.Response(200, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("application/json", b'{"id": "resp_1", "object": "response", "status": "completed", "output": []}'),
        ("Application/JSON; charset=utf-8", b"{}"),
        ("text/html; charset=utf-8", b"<!doctype html><title>Sign in</title>"),
    ],
)
async def test_an_answer_that_is_no_stream_is_not_asked_for_again(kind: str, reply: bytes) -> None:
    odd = Odd(kind=kind, reply=reply)
    assert await fails(odd.thread()) == (TurnReason.PROVIDER_PROTOCOL, "")
    assert odd.asked.count("POST responses") == 1
    assert [body.closed for body in odd.bodies] == [True]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/octet-stream"])
async def test_a_stream_is_read_whatever_it_is_called(kind: str) -> None:
    assert await Odd(kind=kind).thread().say("Hello") == "Fine."


@pytest.mark.parametrize(
    "made",
    [
        b'{"id": ""}',
        b'{"id": "conv_\\u0000"}',
        b'{"id": "conv_\\ud800"}',
        b'{"id": "../responses"}',
        b'{"id": "conv_%s"}' % (b"x" * 251),
        b'{"id": ["conv_1"]}',
        DEEP,
    ],
    ids=["empty", "nul", "half a pair", "a path", "long", "a list", "deep"],
)
async def test_a_conversation_without_a_name_is_none(made: bytes) -> None:
    odd = Odd(made=made)
    thread = odd.thread()
    assert await fails(thread) == (TurnReason.PROVIDER_PROTOCOL, "")
    assert odd.asked == ["POST conversations"]
    assert thread.kept == []


@pytest.mark.parametrize(
    "listed",
    [
        b'{"data": [{"id": "msg_1", "type": "message", "role": "user", "content": [null, 3, {"text": 9}]}]}',
        b'{"data": [{"id": 7, "type": "message"}], "has_more": false}',
        b'{"data": [{"id": "", "type": "message"}], "has_more": false}',
        b'{"data": [{"id": "fc_1", "type": "function_call_output", "call_id": ["x"]}], "has_more": 1}',
        DEEP,
    ],
    ids=["no parts", "no name", "an empty name", "no call", "deep"],
)
async def test_a_conversation_that_can_not_be_read_is_made_anew(listed: bytes) -> None:
    odd = Odd(listed=listed)
    lost = ProviderState(provider="openai", conversation_id="conv_0", synced_to=UNSYNCED)
    thread = odd.thread(lost)
    thread.messages = (await answered(odd)).messages
    assert await thread.say("And now?") == "Fine."
    assert thread.state == replace(lost, conversation_id=f"conv_{odd.made}", synced_to=4)
    assert not any(line.startswith("DELETE") for line in odd.asked)


async def test_items_that_can_not_be_added_are_in_a_new_conversation() -> None:
    odd = Odd(added=DEEP)
    thread = await answered(odd)
    assert thread.state is not None
    thread.state = replace(thread.state, synced_to=UNSYNCED)
    assert await thread.say("And now?") == "Fine."
    assert odd.made == 2


async def answered(odd: Odd) -> ThreadOfTest:
    """A thread with a turn."""
    thread = odd.thread()
    assert await thread.say("Hello") == "Fine."
    return thread


@pytest.mark.parametrize("name", ["msg_1", "", "../x"])
async def test_items_that_stay_whatever_is_done_are_not_deleted_for_ever(name: str) -> None:
    odd = Odd(listed=json.dumps({"data": [{"id": name, "type": "message"}], "has_more": False}).encode())
    with pytest.raises(CopyStays):
        await OpenAICopies(odd.client).erase("conv_1")
    assert odd.asked.count("DELETE conversations/conv_1/items/msg_1") == (name == "msg_1")
    assert "DELETE conversations/conv_1" not in odd.asked
