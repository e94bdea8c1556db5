"""What a server can do: the fake provider as each of them, and the words of servers as they were measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import httpx2
import pytest
from openai import AsyncOpenAI

from adapters.openai.client import make_client
from adapters.openai.errors import ProviderFault
from adapters.openai.probe import Abilities, Found, abilities
from fake_provider import FakeProvider

YES, NO, UNKNOWN = Found.YES, Found.NO, Found.UNKNOWN


@pytest.mark.parametrize(
    ("like", "found"),
    [
        ("openai", Abilities(responses=YES, conversations=YES, chains=YES)),
        ("vllm", Abilities(responses=YES, conversations=NO)),
        ("lmstudio", Abilities(responses=YES, conversations=NO)),
        ("ollama", Abilities(responses=YES, conversations=NO)),
        ("llamacpp", Abilities(responses=YES, conversations=NO)),
        ("chat-only", Abilities(responses=NO, conversations=NO, chains=NO, chat_completions=YES)),
    ],
)
async def test_each_server_is_known_and_left_as_it_was(like: str, found: Abilities) -> None:
    async with FakeProvider(like=like) as provider, make_client("key", provider.base_url, 1) as client:
        assert await abilities(client) == found
        assert provider.requests
        assert not provider.responses
        assert not provider.conversations
        assert not provider.items
        (refused, _) = provider.rejected[0]  # of the requests that could have been for a reply
        assert refused.method == "POST"


async def test_responses_may_be_kept_where_there_are_no_conversations() -> None:
    async with FakeProvider() as provider, make_client("key", provider.base_url, 1) as client:
        provider.dialect = replace(provider.dialect, conversations=False)
        assert await abilities(client) == Abilities(responses=YES, conversations=NO, chains=YES)


async def test_a_key_that_is_refused_tells_nothing() -> None:
    async with FakeProvider(api_key="right") as provider, make_client("wrong", provider.base_url, 1) as client:
        assert await abilities(client) == Abilities()


async def test_a_server_that_is_away_is_a_fault() -> None:
    async with make_client("key", "http://127.0.0.1:1/v1", 1) as client:
        with pytest.raises(ProviderFault):
            await abilities(client)


# --- in the servers' own words

Handler = Callable[[httpx2.Request], httpx2.Response]


def answers(status: int, body: object) -> httpx2.Response:
    """JSON, or text."""
    text = body if isinstance(body, str) else json.dumps(body)
    return httpx2.Response(status, text=text)


def route_of(request: httpx2.Request) -> str:
    """METHOD path, the part of it that is the same for all servers."""
    return f"{request.method} {request.url.path.rpartition('/v1')[2]}"


def azure(request: httpx2.Request) -> httpx2.Response:
    match route_of(request).split("/")[1:]:
        case ["responses"]:
            return answers(400, {"error": {"message": "Missing required parameter: 'model'.", "code": None}})
        case ["responses", name, "input_items"]:
            return answers(404, {"error": {"message": f"Response with id '{name}' not found.", "code": None}})
    return answers(404, {"error": {"code": "404", "message": "Resource not found"}})


def lm_studio(request: httpx2.Request) -> httpx2.Response:
    if route_of(request) == "POST /responses":
        return answers(400, {"error": {"message": "'input' is required", "type": "invalid_request_error"}})
    method, _, path = route_of(request).partition(" ")
    return answers(200, {"error": f"Unexpected endpoint or method. ({method} /v1{path})"})


def old_lm_studio(request: httpx2.Request) -> httpx2.Response:
    if route_of(request) == "POST /chat/completions":
        return answers(400, {"error": "'messages' field is required"})
    method, _, path = route_of(request).partition(" ")
    return answers(200, {"error": f"Unexpected endpoint or method. ({method} /v1{path})"})


def ollama(request: httpx2.Request) -> httpx2.Response:
    if route_of(request) == "POST /responses":
        return answers(404, {"error": {"message": "model '' not found", "type": "not_found_error", "code": None}})
    return answers(404, "404 page not found")


def llama_cpp(request: httpx2.Request) -> httpx2.Response:
    if route_of(request) == "POST /responses":
        assert "previous_response_id" in json.loads(request.content)
        message = "llama.cpp does not support 'previous_response_id'."
        return answers(400, {"error": {"code": 400, "message": message, "type": "invalid_request_error"}})
    return answers(404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}})


def vllm(request: httpx2.Request) -> httpx2.Response:
    if route_of(request) == "POST /responses":  # it repeats what it was asked
        given = json.loads(request.content)
        message = (
            f"2 validation errors: {{'loc': ('body', 'input'), 'msg': 'Input should be a list', 'input': {given}}}"
        )
        return answers(400, {"error": {"message": message, "type": "Bad Request", "param": None, "code": 400}})
    return answers(404, {"detail": "Not Found"})


def key_without_rights(request: httpx2.Request) -> httpx2.Response:
    if route_of(request).split("/")[1] in ("responses", "conversations"):
        return answers(403, {"error": {"message": "You have insufficient permissions for this operation."}})
    return answers(404, {"error": {"message": f"Invalid URL ({route_of(request)})"}})


def gateway() -> Handler:
    """Has nothing at all, and numbers its answers."""
    numbers = count(1)

    def handle(request: httpx2.Request) -> httpx2.Response:
        number = next(numbers)
        told = {"timestamp": f"2026-11-22T12:00:{number:02}Z", "error": "Not Found", "path": request.url.path}
        return answers(404, {**told, "trace": f"req_{number:032x}"})

    return handle


def busy(status: int) -> Handler:
    """Answers so where it has something, in words of its own."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        if route_of(request).split("/")[1] in ("responses", "conversations"):
            return answers(status, {"error": {"message": "Please come back later."}})
        return answers(404, {"error": {"message": f"Invalid URL ({route_of(request)})"}})

    return handle


def same_for_all(status: int) -> Handler:
    return lambda _: answers(status, {"error": {"message": "Come back later."}})


@pytest.mark.parametrize(
    ("handler", "found"),
    [
        (azure, Abilities(responses=YES, conversations=NO, chains=YES)),
        (lm_studio, Abilities(responses=YES, conversations=NO)),
        (old_lm_studio, Abilities(responses=NO, conversations=NO, chains=NO, chat_completions=YES)),
        (ollama, Abilities(responses=YES, conversations=NO)),
        (llama_cpp, Abilities(responses=YES, conversations=NO, chains=NO)),
        (vllm, Abilities(responses=YES, conversations=NO)),
        (key_without_rights, Abilities()),
        (gateway(), Abilities(responses=NO, conversations=NO, chains=NO, chat_completions=NO)),
        *((busy(status), Abilities()) for status in (401, 407, 408, 429, 500, 502)),
        (same_for_all(405), Abilities(responses=NO, conversations=NO, chains=NO, chat_completions=NO)),
        (same_for_all(400), Abilities()),
        (same_for_all(403), Abilities()),
        (same_for_all(503), Abilities()),
    ],
)
async def test_servers_in_their_own_words(handler: Handler, found: Abilities) -> None:
    asked: list[str] = []

    def noted(request: httpx2.Request) -> httpx2.Response:
        asked.append(route_of(request))
        answer = handler(request)
        answer.headers["x-should-retry"] = "false"
        return answer

    transport = httpx2.AsyncClient(transport=httpx2.MockTransport(noted))
    async with AsyncOpenAI(api_key="key", base_url="http://server/v1", http_client=transport) as client:
        assert await abilities(client) == found
    assert "POST /responses" in asked


@pytest.mark.parametrize(
    ("found", "conversation", "chain", "stateless"),
    [
        (Abilities(responses=YES, conversations=YES, chains=YES), YES, YES, YES),
        (Abilities(responses=YES, conversations=NO), NO, UNKNOWN, YES),
        (Abilities(responses=NO, conversations=YES, chains=YES), NO, NO, NO),
        (Abilities(), UNKNOWN, UNKNOWN, UNKNOWN),
    ],
)
def test_what_the_state_modes_need(found: Abilities, conversation: Found, chain: Found, stateless: Found) -> None:
    assert found.supports("conversation") is conversation
    assert found.supports("response_chain") is chain
    assert found.supports("stateless") is stateless
    assert found.supports("another") is (NO if found.responses is NO else UNKNOWN)
