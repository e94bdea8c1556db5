"""Deleting what the provider keeps, with the provider's own ways in between."""

import pytest
from openai import AsyncOpenAI

from adapters.openai import OpenAICopies
from adapters.openai.agent import OpenAIAgent
from adapters.openai.client import make_client
from adapters.openai.memory import StateMode
from core.ports.agent import Begun
from core.ports.provider_copies import CopyStays
from fake_provider import Answer, Call, FakeProvider, HttpError, Pause, Text
from openai_thread import KEY, USER_KEY, ThreadOfTest


@pytest.fixture
def copies(client: AsyncOpenAI) -> OpenAICopies:
    return OpenAICopies(client)


def nothing_is_kept(provider: FakeProvider) -> None:
    """The provider has nothing at all."""
    assert (provider.conversations, provider.items, provider.responses) == ({}, {}, {})
    assert (provider.inputs, provider.contexts) == ({}, {})


@pytest.mark.parametrize("mode", ["conversation", "response_chain"])
@pytest.mark.parametrize("background", [False, True])
async def test_what_was_noted_is_all_there_is(
    provider: FakeProvider, client: AsyncOpenAI, copies: OpenAICopies, mode: StateMode, background: bool
) -> None:
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, state_mode=mode, background=background)
    thread = ThreadOfTest(agent)
    provider.then(Answer(output=(Call("goals", "{}", "call_a"),)))
    for text in ("one", "two", "three"):
        await thread.say(text)
    assert len(provider.responses) == 4
    for ref in thread.kept:
        await copies.erase(ref)
    nothing_is_kept(provider)
    assert not provider.rejected


async def test_nothing_is_noted_where_nothing_is_kept(provider: FakeProvider, client: AsyncOpenAI) -> None:
    thread = ThreadOfTest(
        OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, state_mode=StateMode.STATELESS)
    )
    await thread.say("one")
    assert thread.kept == []
    nothing_is_kept(provider)


async def test_a_long_conversation_goes_page_by_page(provider: FakeProvider, copies: OpenAICopies) -> None:
    items = [{"type": "message", "role": "user", "content": f"{number}"} for number in range(20)]
    created = await copies._client.conversations.create(items=items)  # type: ignore[arg-type]
    for _ in range(12):
        await copies._client.conversations.items.create(created.id, items=items)  # type: ignore[arg-type]
    assert len(provider.items) == 260
    await copies.erase(created.id)
    nothing_is_kept(provider)


async def test_what_is_gone_already_is_no_failure(provider: FakeProvider, copies: OpenAICopies) -> None:
    for ref in ("conv_x", "resp_x", "what-a-server-may-call-it"):
        await copies.erase(ref)
    assert [(request.method, request.path) for request in provider.requests] == [
        ("GET", "/v1/conversations/conv_x/items"),
        ("DELETE", "/v1/responses/resp_x"),
        ("DELETE", "/v1/responses/what-a-server-may-call-it"),
        ("GET", "/v1/conversations/what-a-server-may-call-it/items"),
    ]


async def test_a_try_that_was_cut_short_is_gone_on_with(
    provider: FakeProvider, thread: ThreadOfTest, copies: OpenAICopies
) -> None:
    await thread.say("one")
    (conversation,) = provider.conversations
    provider.refusals["deletions"] = [HttpError(status=500)]
    with pytest.raises(CopyStays):
        await copies.erase(conversation)
    assert list(provider.conversations) == [conversation]  # never before its items: they could not be found again
    assert len(provider.items) == 2
    await copies.erase(conversation)
    assert (provider.conversations, provider.items) == ({}, {})


@pytest.mark.parametrize("status", [400, 409])
async def test_a_response_that_is_still_written_is_stopped_first(
    provider: FakeProvider, client: AsyncOpenAI, copies: OpenAICopies, status: int
) -> None:
    provider.then(Answer(output=(Text(text="a b", pieces=("a ", "b")),), pauses=(Pause(),)))
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, background=True)
    thread = ThreadOfTest(agent)
    reply = agent.reply(thread.begin("Hello"))
    async for event in reply:
        thread.note(event)
        if isinstance(event, Begun):
            break
    await reply.aclose()
    provider.refusals["deletions"] = [HttpError(status=status, message="Cannot delete a response in progress.")]
    (response,) = thread.begun
    await copies.erase(response)
    assert provider.cancelled == [response]
    assert not provider.responses


@pytest.mark.parametrize(
    ("status", "code", "refused"),
    [
        (401, "invalid_api_key", True),
        (403, "no_permission", True),
        (405, "", True),
        (408, "", False),
        (429, "rate_limit_exceeded", False),
        (500, "server_error", False),
        (503, "", False),
    ],
)
async def test_why_a_copy_stays_is_said(
    provider: FakeProvider, copies: OpenAICopies, status: int, code: str, refused: bool
) -> None:
    provider.refusals["deletions"] = [HttpError(status=status, code=code or None, message="kanarienvogel")]
    with pytest.raises(CopyStays) as stays:
        await copies.erase("resp_x")
    assert stays.value.refused is refused
    assert stays.value.reason.startswith(f"{status} {code}".strip())
    assert "kanarienvogel" not in stays.value.reason


@pytest.mark.parametrize(("status", "code"), [(400, "conversation_locked"), (409, ""), (425, ""), (429, "")])
async def test_a_conversation_that_is_busy_is_asked_for_again_when_it_says(
    provider: FakeProvider, copies: OpenAICopies, status: int, code: str
) -> None:
    made = await copies._client.conversations.create(items=[{"type": "message", "role": "user", "content": "x"}])
    provider.refusals["deletions"] = [HttpError(status=status, code=code or None, headers={"retry-after": "7"})]
    with pytest.raises(CopyStays) as stays:
        await copies.erase(made.id)
    assert (stays.value.refused, stays.value.retry_after) == (False, 7.0)


async def test_a_provider_that_is_away_is_no_refusal() -> None:
    client = make_client(KEY, "http://127.0.0.1:1/v1", 2)
    with pytest.raises(CopyStays) as stays:
        await OpenAICopies(client).erase("conv_x")
    assert not stays.value.refused
    await client.close()
