"""The agent whose replies OpenAI writes."""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from hashlib import sha256
from itertools import count
from typing import cast

from openai import AsyncOpenAI, omit
from openai.types.responses import FunctionToolParam, ResponseTextConfigParam
from openai.types.shared_params import Reasoning

from adapters.openai import tuning
from adapters.openai.errors import Exchange, ProviderFault, Remedy, translated
from adapters.openai.items import labels
from adapters.openai.memory import PROVIDER, ConversationMemory, Memory, StatelessMemory, StateMode
from adapters.openai.retry import Patience, Sleep
from adapters.openai.round import RoundReader
from adapters.openai.stream import SseSplitter, Watchdog, drain
from core.model.agent import DEFAULT_MODEL, AgentDefinition
from core.model.events import TextDelta, ToolCalled
from core.model.turn import TurnReason
from core.ports.agent import Agent, AgentEvent, ReplyRequest, RoundFinished
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
    """

    def __init__(
        self,
        client: AsyncOpenAI,
        *,
        model: str,
        user_key: bytes | str,
        state_mode: StateMode | str = StateMode.CONVERSATION,
        first_event: float = 30.0,
        idle: float = 45.0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._client = client
        self._model = model
        self._user_key = user_key.encode() if isinstance(user_key, str) else user_key
        self._state_mode = StateMode(state_mode)
        self._first_event = first_event
        self._idle = idle
        self._sleep = sleep

    @property
    def provider(self) -> str:
        return PROVIDER

    def model(self, definition: AgentDefinition) -> str:
        return self._model if definition.model == DEFAULT_MODEL else definition.model

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        patience = Patience(self._sleep)
        memory = self._memory(request)
        for number in count():
            visible = False
            try:
                async with aclosing(memory.prepare()) as changes:
                    async for change in changes:
                        yield change
                async with aclosing(self._round(request, memory, number)) as events:
                    async for event in events:
                        visible = True
                        yield event
            except ProviderFault as fault:
                _log(fault, request, number)
                if visible or not await _worth_another_try(fault, memory, patience):
                    if fault.reason in _OUTCOME_UNKNOWN and (doubt := memory.doubt()):
                        yield doubt
                    raise
            else:
                return

    def _memory(self, request: ReplyRequest) -> Memory:
        match self._state_mode:
            case StateMode.CONVERSATION:
                return ConversationMemory(self._client, request)
            case StateMode.STATELESS:
                return StatelessMemory(request)

    async def _round(
        self, request: ReplyRequest, memory: Memory, number: int
    ) -> AsyncGenerator[TextDelta | ToolCalled | RoundFinished, None]:
        """Sends the request once and reads its answer."""
        definition = request.definition
        user = hmac.new(self._user_key, request.user_id.encode(), sha256).hexdigest()
        model = self.model(definition)
        effort, verbosity = tuning.effort(definition, model), tuning.verbosity(definition, model)
        # The provider's own words, which its types spell out; a wrong one is its to refuse.
        reasoning = cast("Reasoning", {"effort": effort}) if effort else omit
        text = cast("ResponseTextConfigParam", {"verbosity": verbosity}) if verbosity else omit
        call = self._client.responses.with_streaming_response.create(
            model=model,
            instructions=definition.instructions or omit,
            input=await memory.input(),
            conversation=memory.conversation or omit,
            store=memory.keeps_copy,
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
        exchange = Exchange()
        watchdog = Watchdog(self._first_event, self._idle)
        splitter = SseSplitter()
        reader = RoundReader(follows_text=any(finished.text for finished in request.rounds))
        with translated(exchange):
            async with AsyncExitStack() as stack:
                response = await watchdog.wait(stack.enter_async_context(call))
                exchange.opened = True
                exchange.request_id = response.request_id or ""
                chunks = await stack.enter_async_context(aclosing(response.http_response.aiter_bytes()))
                while reader.end is None:
                    chunk = await watchdog.wait(anext(chunks, None))
                    if chunk is None:
                        raise ProviderFault(TurnReason.PROVIDER_TRUNCATED)
                    events = splitter.feed(chunk)
                    if events:
                        exchange.started = True
                        watchdog.heard()
                    for delta in reader.read(events):
                        yield delta
                    if reader.fault is not None:
                        raise reader.fault
                await drain(chunks)
        for called in reader.end.calls:
            yield called
        shortfall = reader.end.shortfall
        yield RoundFinished(reader.end.usage, shortfall, keeps_copy=memory.keeps_copy and shortfall is None)

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
