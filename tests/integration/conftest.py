"""The OpenAI agent and its provider on loopback; a module that needs another agent or thread brings its own."""

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from adapters.openai.agent import OpenAIAgent
from adapters.openai.client import make_client
from fake_provider import FakeProvider
from openai_thread import KEY, USER_KEY, Naps, ThreadOfTest


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with FakeProvider(api_key=KEY) as provider:
        yield provider


@pytest.fixture
async def client(provider: FakeProvider) -> AsyncIterator[AsyncOpenAI]:
    client = make_client(KEY, provider.base_url, 5)
    yield client
    await client.close()


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
def agent(client: AsyncOpenAI, naps: Naps) -> OpenAIAgent:
    return OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, sleep=naps)


@pytest.fixture
def thread(agent: OpenAIAgent) -> ThreadOfTest:
    return ThreadOfTest(agent)
