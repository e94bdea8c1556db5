"""Questions of the service's own, answered in a fixed form."""

import logging
import random
from dataclasses import dataclass, replace
from datetime import date
from enum import StrEnum
from typing import Literal

import pytest
from openai import AsyncOpenAI

from adapters.openai.agent import OpenAIAgent
from adapters.openai.breaker import FAILURES
from adapters.openai.client import make_client
from adapters.openai.form import schema_of
from adapters.practice.agent import PracticeAgent
from core.model.errors import NotSupported
from core.model.turn import TurnReason, Usage
from core.ports.agent import AgentFailed, JsonRequest
from core.ports.telemetry import Unmeasured
from fake_provider import Answer, FakeProvider, Gate, HttpError, Incomplete, Text, rate_limited
from fake_provider.faults import REFUSALS
from openai_thread import KEY, USER_KEY, Naps


class Mood(StrEnum):
    """How somebody feels."""

    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class Step:
    """Something to do."""

    what: str
    due: date | None


@dataclass(frozen=True)
class Insight:
    """What a conversation shows."""

    mood: Mood
    themes: tuple[str, ...]
    steps: tuple[Step, ...] = ()


QUESTION = JsonRequest(user_id="ada", instructions="Sum it up.", text="I will call Bo.", into=Insight)
ANSWER = '{"mood": "good", "themes": ["work"], "steps": [{"what": "Call Bo", "due": "2026-12-01"}]}'
INSIGHT = Insight(Mood.GOOD, ("work",), (Step("Call Bo", date(2026, 12, 1)),))


def said(text: str, *, refusal: bool = False, ending: Literal["completed"] | Incomplete = "completed") -> Answer:
    return Answer(output=(Text(text=text, refusal=refusal),), ending=ending)


@pytest.fixture
def agent(client: AsyncOpenAI, naps: Naps) -> OpenAIAgent:
    return OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, sleep=naps, chance=random.Random(1))


async def test_an_answer_comes_in_its_form(agent: OpenAIAgent, provider: FakeProvider) -> None:
    provider.then(said(ANSWER))
    answer = await agent.complete_json(QUESTION)
    assert answer.value == INSIGHT
    assert answer.usage != Usage()
    (sent,) = provider.posts
    assert sent["store"] is False
    assert sent["text"]["format"]["strict"] is True
    assert sent["text"]["format"]["schema"] == schema_of(Insight)
    assert "ada" not in str(sent)
    assert not provider.rejected


async def test_what_is_asked(agent: OpenAIAgent, provider: FakeProvider) -> None:
    provider.then(said(ANSWER), said(ANSWER))
    await agent.complete_json(QUESTION)
    await agent.complete_json(replace(QUESTION, max_output_tokens=1))
    sent, less = provider.posts
    assert {name: sent[name] for name in ("model", "instructions", "input", "reasoning", "max_output_tokens")} == {
        "model": "gpt-6-luna",
        "instructions": "Sum it up.",
        "input": "I will call Bo.",
        "reasoning": {"effort": "none"},
        "max_output_tokens": 1_000,
    }
    assert len(sent["safety_identifier"]) == 64
    assert less["max_output_tokens"] == 16


async def test_a_model_that_does_not_think_is_not_told_how_much(
    provider: FakeProvider, client: AsyncOpenAI
) -> None:
    provider.then(said(ANSWER))
    answer = await OpenAIAgent(client, model="gpt-4o", user_key=USER_KEY).complete_json(QUESTION)
    assert answer.value == INSIGHT
    assert "reasoning" not in provider.posts[0]


def test_strict_output_takes_the_form() -> None:
    schema = schema_of(Insight)
    assert schema["required"] == ["mood", "themes", "steps"]
    assert schema["additionalProperties"] is False
    step = schema["$defs"]["Step"]
    assert (step["required"], step["additionalProperties"]) == (["what", "due"], False)
    assert "default" not in str(schema)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said("I would say: good."), TurnReason.PROVIDER_PROTOCOL),
        (said('{"mood": "so-so", "themes": [], "steps": []}'), TurnReason.PROVIDER_PROTOCOL),
        (said("I can't.", refusal=True), TurnReason.CONTENT_FILTERED),
        (said(ANSWER[:20], ending=Incomplete()), TurnReason.OUTPUT_LIMIT),
        (said("", ending=Incomplete(reason="content_filter")), TurnReason.CONTENT_FILTERED),
        (REFUSALS["invalid_key"][0], TurnReason.PROVIDER_CONFIG),
        (HttpError(status=200, body=b"{}"), TurnReason.PROVIDER_PROTOCOL),
        (HttpError(status=200, body=b'{"status": ["completed"]}'), TurnReason.PROVIDER_PROTOCOL),
        (HttpError(status=200, body=b'{"status": "in_progress"}'), TurnReason.PROVIDER_PROTOCOL),
    ],
)
async def test_what_is_no_whole_answer_fails(
    agent: OpenAIAgent,
    provider: FakeProvider,
    answer: Answer | HttpError,
    reason: TurnReason,
    caplog: pytest.LogCaptureFixture,
) -> None:
    provider.then(answer)
    with caplog.at_level(logging.DEBUG), pytest.raises(AgentFailed) as failed:
        await agent.complete_json(QUESTION)
    assert failed.value.reason is reason
    assert len(provider.posts) == 1
    assert "so-so" not in caplog.text


async def test_it_is_asked_again_where_that_can_help(
    agent: OpenAIAgent, provider: FakeProvider, naps: Naps
) -> None:
    provider.then(
        REFUSALS["unavailable"][0],
        rate_limited(retry_after="3"),
        said(ANSWER),
    )
    assert (await agent.complete_json(QUESTION)).value == INSIGHT
    assert len(naps.taken) == 2
    assert naps.taken[1] == 3.0


class Counted(Unmeasured):
    """Notes what is asked again."""

    def __init__(self) -> None:
        self.again: list[tuple[str, TurnReason]] = []

    def retried(self, provider: str, reason: TurnReason) -> None:
        self.again.append((provider, reason))


async def test_what_is_asked_again_is_counted_and_every_failure_logged(
    provider: FakeProvider, client: AsyncOpenAI, naps: Naps, caplog: pytest.LogCaptureFixture
) -> None:
    told = Counted()
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, sleep=naps, telemetry=told)
    half = said(ANSWER[:20], ending=Incomplete(reason="steered"))  # for whatever that is: it broke off
    provider.then(REFUSALS["overloaded"][0], half, said(ANSWER))
    assert (await agent.complete_json(QUESTION)).value == INSIGHT
    assert told.again == [
        ("openai", TurnReason.PROVIDER_UNAVAILABLE),
        ("openai", TurnReason.PROVIDER_TRUNCATED),
    ]
    provider.then(REFUSALS["invalid_key"][0])
    with pytest.raises(AgentFailed):
        await agent.complete_json(QUESTION)
    assert len(told.again) == 2
    logged = [record.getMessage() for record in caplog.records if record.name == "adapters.openai.agent"]
    assert [line.partition(" request_id=")[0].removeprefix("provider fault: ") for line in logged] == [
        "reason=PROVIDER_UNAVAILABLE status=503 code=server_is_overloaded",
        "reason=PROVIDER_TRUNCATED status=None code=",
        "reason=PROVIDER_CONFIG status=401 code=invalid_api_key",
    ]
    assert "request_id=req_" in logged[0]


async def test_no_wait_goes_beyond_its_time(agent: OpenAIAgent, provider: FakeProvider, naps: Naps) -> None:
    provider.then(rate_limited("7"), rate_limited("7"), said(ANSWER))
    with pytest.raises(AgentFailed) as failed:
        await agent.complete_json(replace(QUESTION, seconds=6.0))
    assert failed.value.reason is TurnReason.PROVIDER_RATE_LIMITED
    assert (naps.taken, len(provider.posts)) == ([], 1)
    assert (await agent.complete_json(replace(QUESTION, seconds=20.0))).value == INSIGHT
    assert naps.taken == [7.0]


async def test_its_failures_count_for_everybody(agent: OpenAIAgent, provider: FakeProvider) -> None:
    provider.then(*[REFUSALS["unavailable"][0]] * FAILURES)
    for _ in range(2):
        assert agent.refusal() is None
        with pytest.raises(AgentFailed) as failed:
            await agent.complete_json(QUESTION)
        assert failed.value.reason is TurnReason.PROVIDER_UNAVAILABLE
    assert agent.refusal() is not None
    with pytest.raises(AgentFailed) as failed:
        await agent.complete_json(QUESTION)
    assert failed.value.reason is TurnReason.PROVIDER_UNAVAILABLE
    assert len(provider.posts) == FAILURES


async def test_an_answer_ends_a_row_of_failures(agent: OpenAIAgent, provider: FakeProvider) -> None:
    for _ in range(FAILURES):
        provider.then(REFUSALS["unavailable"][0], said(ANSWER))
        await agent.complete_json(QUESTION)
    assert agent.refusal() is None


async def test_what_is_wrong_with_a_question_is_nobody_elses(agent: OpenAIAgent, provider: FakeProvider) -> None:
    for _ in range(FAILURES):
        provider.then(HttpError(status=400))
        with pytest.raises(AgentFailed):
            await agent.complete_json(QUESTION)
    assert agent.refusal() is None


async def test_its_time_is_bounded(provider: FakeProvider, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    provider.then(HttpError(gate=gate))
    agent = OpenAIAgent(
        make_client(KEY, provider.base_url, max_connections=2), model="gpt-6-luna", user_key=USER_KEY
    )
    request = JsonRequest(user_id="ada", instructions="", text="x", into=Insight, seconds=0.1)
    with pytest.raises(AgentFailed) as failed:
        await agent.complete_json(request)
    assert failed.value.reason is TurnReason.PROVIDER_TIMEOUT
    assert "provider fault: reason=PROVIDER_TIMEOUT" in caplog.text
    assert len(provider.posts) == 1
    gate.released.set()
    await agent.aclose()


async def test_the_practice_coach_says_that_it_can_not() -> None:
    with pytest.raises(NotSupported):
        await PracticeAgent(words_per_second=0).complete_json(QUESTION)
