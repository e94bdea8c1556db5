"""The agent whose replies OpenAI writes."""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import sha256
from itertools import count
from typing import cast

from openai import AsyncOpenAI, omit
from openai.types.responses import FunctionToolParam, ResponseTextConfigParam
from openai.types.shared_params import Reasoning

from adapters.openai import tuning
from adapters.openai.errors import ProviderFault, Remedy
from adapters.openai.items import labels
from adapters.openai.memory import PROVIDER, ConversationMemory, Memory, StatelessMemory, StateMode
from adapters.openai.reading import Reading
from adapters.openai.responses import Call, Responses
from adapters.openai.retry import Patience, Sleep
from core.model.agent import DEFAULT_MODEL, AgentDefinition
from core.model.events import TextDelta, ToolCalled
from core.model.turn import TurnReason
from core.ports.agent import Agent, AgentEvent, Begun, CannotResume, ReplyRequest, Resumption, RoundFinished
from core.ports.tools import ToolSpec

MIN_OUTPUT_TOKENS = 16

_OUTCOME_UNKNOWN = frozenset(
    {
        TurnReason.PROVIDER_PROTOCOL,
        TurnReason.PROVIDER_STALLED,
        TurnReason.PROVIDER_TIMEOUT,
        TurnReason.PROVIDER_TRUNCATED,
    }
)
"""After these the provider may or may not have added the turn to its copy."""

logger = logging.getLogger(__name__)


class OpenAIAgent(Agent):
    """Writes replies through the Responses API.

    `model` serves the definitions that name none. `user_key` is the secret under which users are known to the
    provider: it sees their hash. A provider may be silent for `first_event` seconds before its first event
    and for `idle` seconds between two. What is logged of a failure is its reason, status, code and ids.

    With `background` the provider writes each response to its end, read or not: a lost connection is followed by
    another one, and another process can resume. That needs a state mode that keeps something there.
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        *,
        model: str,
        user_key: bytes | str,
        state_mode: StateMode | str = StateMode.CONVERSATION,
        background: bool = False,
        first_event: float = 30.0,
        idle: float = 45.0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._client = client
        self._model = model
        self._user_key = user_key.encode() if isinstance(user_key, str) else user_key
        self._state_mode = StateMode(state_mode)
        if background and self._state_mode is StateMode.STATELESS:
            raise ValueError("what is to be resumed must be stored")
        self._background = background
        self._sleep = sleep
        self._responses = Responses(client, first_event=first_event, idle=idle, sleep=sleep)

    @property
    def provider(self) -> str:
        return PROVIDER

    def model(self, definition: AgentDefinition) -> str:
        return self._model if definition.model == DEFAULT_MODEL else definition.model

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        patience = Patience(self._sleep)
        memory = self._memory(request)
        resume = request.resume
        for number in count():
            visible = resume is not None and resume.text != ""
            try:
                if resume is None:
                    async with aclosing(memory.prepare()) as changes:
                        async for change in changes:
                            yield change
                async with aclosing(self._round(request, memory, number, resume)) as events:
                    async for event in events:
                        visible = visible or not isinstance(event, Begun)
                        yield event
            except CannotResume:
                logger.warning(
                    "a reply can't be resumed: turn_id=%s round=%d", request.turn_id, len(request.rounds)
                )
                raise
            except ProviderFault as fault:
                _log(fault, request, number)
                if visible or not await _worth_another_try(fault, memory, patience):
                    if fault.reason in _OUTCOME_UNKNOWN and (doubt := memory.doubt()):
                        yield doubt
                    raise
                resume = None
            else:
                return

    async def stop(self, handle: str) -> None:
        await self._responses.stop(handle)

    def _memory(self, request: ReplyRequest) -> Memory:
        match self._state_mode:
            case StateMode.CONVERSATION:
                return ConversationMemory(self._client, request)
            case StateMode.STATELESS:
                return StatelessMemory(request)

    async def _round(
        self, request: ReplyRequest, memory: Memory, number: int, resume: Resumption | None
    ) -> AsyncGenerator[Begun | TextDelta | ToolCalled | RoundFinished, None]:
        """Sends the request once, or finds the response to it that was begun before, and reads that."""
        follows_text = any(finished.text for finished in request.rounds)
        reading = Reading(follows_text=follows_text, known=resume.text if resume else "")
        untold = self._background and resume is None
        if resume is not None:
            steps = self._responses.resume(resume.handle, reading)
        elif self._background:
            steps = self._responses.read_background(await self._call(request, memory, number), reading)
        else:
            steps = self._responses.read(await self._call(request, memory, number), reading)
        async with aclosing(steps):
            async for deltas in steps:
                if untold and reading.response_id is not None:
                    untold = False
                    yield Begun(reading.response_id)
                for delta in deltas:
                    yield delta
        assert reading.end is not None
        for called in reading.end.calls:
            yield called
        shortfall = reading.end.shortfall
        mirrored = memory.keeps_copy and memory.conversation is not None and shortfall is None
        yield RoundFinished(reading.end.usage, shortfall, keeps_copy=mirrored)

    async def _call(self, request: ReplyRequest, memory: Memory, number: int) -> Call:
        definition = request.definition
        user = hmac.new(self._user_key, request.user_id.encode(), sha256).hexdigest()
        model = self.model(definition)
        effort, verbosity = tuning.effort(definition, model), tuning.verbosity(definition, model)
        # The provider's own words, which its types spell out; a wrong one is its to refuse.
        reasoning = cast("Reasoning", {"effort": effort}) if effort else omit
        text = cast("ResponseTextConfigParam", {"verbosity": verbosity}) if verbosity else omit
        return self._client.responses.with_streaming_response.create(
            model=model,
            instructions=definition.instructions or omit,
            input=await memory.input(),
            conversation=memory.conversation or omit,
            store=memory.keeps_copy,
            background=self._background or omit,
            tools=[_tool(spec) for spec in request.tools] or omit,
            parallel_tool_calls=True if request.tools else omit,
            reasoning=reasoning,
            text=text,
            max_output_tokens=max(definition.max_output_tokens, MIN_OUTPUT_TOKENS),
            metadata={**labels(request), "turn_id": request.turn_id},
            safety_identifier=user,
            prompt_cache_key=f"{definition.id[:40]}-{user[:16]}",
            extra_headers={"X-Client-Request-Id": f"{request.turn_id}-{len(request.rounds)}-{number}"},
            stream=True,
        )

    async def aclose(self) -> None:
        await self._client.close()


async def _worth_another_try(fault: ProviderFault, memory: Memory, patience: Patience) -> bool:
    if fault.remedy is Remedy.REBUILD:
        return memory.forget()
    if await patience.wait(fault):
        return True
    # A conversation that stays locked may be held by a response that will never end.
    return fault.remedy is Remedy.WAIT and memory.forget()


def _tool(spec: ToolSpec) -> FunctionToolParam:
    return {
        "type": "function",
        "name": spec.name,
        "description": spec.description,
        "parameters": dict(spec.parameters),
        "strict": False,
    }


def _log(fault: ProviderFault, request: ReplyRequest, number: int) -> None:
    logger.warning(
        "provider fault: reason=%s status=%s code=%s request_id=%s turn_id=%s round=%d try=%d",
        fault.reason.value,
        fault.status,
        fault.code,
        fault.request_id,
        request.turn_id,
        len(request.rounds),
        number,
    )
