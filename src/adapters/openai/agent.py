"""The agent whose replies OpenAI writes."""

import asyncio
import hmac
import logging
import random
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from hashlib import sha256
from itertools import count
from typing import TypeVar, cast

from openai import AsyncOpenAI, omit
from openai.types.responses import FunctionToolParam, ResponseTextConfigParam
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from openai.types.shared_params import Reasoning

from adapters.openai import tuning
from adapters.openai.client import WATCHED
from adapters.openai.context import Context
from adapters.openai.errors import ProviderFault, Remedy
from adapters.openai.form import filled, schema_of
from adapters.openai.items import labels
from adapters.openai.memory import PROVIDER, ChainMemory, ConversationMemory, Memory, StatelessMemory, StateMode
from adapters.openai.reading import Reading
from adapters.openai.responses import Call, Responses
from adapters.openai.retry import Clock, Patience, Policy, Sleep, loop_time
from adapters.openai.stream import Silence
from core.model.agent import DEFAULT_MODEL, AgentDefinition
from core.model.events import TextDelta, ToolCalled
from core.model.turn import TurnReason, Usage
from core.ports.agent import (
    Agent,
    AgentEvent,
    Begun,
    CannotResume,
    CopyFound,
    JsonAnswer,
    JsonRequest,
    ReplyRequest,
    Resumption,
    RoundFinished,
    Standing,
    StateChanged,
    Stored,
)
from core.ports.telemetry import UNMEASURED, Telemetry
from core.ports.tools import ToolSpec

T = TypeVar("T")

MIN_OUTPUT_TOKENS = 16

CONTEXT_TOKENS = 128_000
"""What a model is taken to read that we know nothing of."""

logger = logging.getLogger(__name__)


class OpenAIAgent(Agent):
    """Writes replies through the Responses API.

    `model` serves the definitions that name none. `user_key` is the secret under which users are known to the
    provider: it sees their hash. A provider may be silent for `first_event` seconds before its first event, for
    `idle` seconds between two, and for `last_event` seconds once all items of its answer are done. What is rebuilt
    of a thread fits into the model's window, or into `context_tokens` where that is not known. `clock` gives
    seconds, those of the loop in which a request's deadline is. What is logged of a failure is its reason, status,
    code and ids.

    A request is repeated only before anything of its answer was seen, only where that can help, after a look at
    what the first one has left, and within the retry budget of the process; while its breaker is open nobody asks.

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
        context_tokens: int = CONTEXT_TOKENS,
        first_event: float = 30.0,
        idle: float = 45.0,
        last_event: float = 10.0,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = loop_time,
        chance: random.Random | None = None,
        telemetry: Telemetry = UNMEASURED,
    ) -> None:
        self._client = client
        self._model = model
        self._user_key = user_key.encode() if isinstance(user_key, str) else user_key
        self._state_mode = StateMode(state_mode)
        if background and self._state_mode is StateMode.STATELESS:
            raise ValueError("what is to be resumed must be stored")
        self._background = background
        self._context_tokens = context_tokens
        self._telemetry = telemetry
        self._policy = Policy(sleep, clock, chance or random.Random())  # noqa: S311 - spreads load, guards nothing
        self._responses = Responses(client, Silence(first_event, idle, last_event), self._policy)

    @property
    def provider(self) -> str:
        return PROVIDER

    def model(self, definition: AgentDefinition) -> str:
        return self._model if definition.model == DEFAULT_MODEL else definition.model

    def refusal(self) -> float | None:
        return self._policy.breaker.refusal()

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        patience = Patience(self._policy, request.deadline)
        memory = self._memory(request)
        resume = request.resume
        for number in count():
            visible = resume is not None and resume.text != ""
            try:
                if resume is None:
                    await patience.admission()
                    async with aclosing(memory.prepare()) as changes:
                        async for change in changes:
                            yield change
                async with aclosing(self._round(request, memory, number, resume)) as events:
                    async for event in events:
                        if not visible and not isinstance(event, Begun | Stored):
                            visible = True
                            self._policy.breaker.succeeded()
                        yield event
            except CannotResume:
                logger.warning(
                    "a reply can't be resumed: turn_id=%s round=%d", request.turn_id, len(request.rounds)
                )
                raise
            except ProviderFault as fault:
                _log(fault, request, number)
                if fault.is_outage and not visible:
                    self._policy.breaker.failed()
                if visible or not await self._worth_another_try(fault, memory, patience):
                    raise
                self._telemetry.retried(PROVIDER, fault.reason)
                resume = None
            else:
                return

    async def reconcile(
        self, request: ReplyRequest, *, dry_run: bool
    ) -> AsyncGenerator[CopyFound | StateChanged, None]:
        memory = self._memory(request)
        if not isinstance(memory, ConversationMemory):  # the others say what is missing with every request
            yield CopyFound(Standing.NO_COPY)
            return
        found = await memory.compare()
        yield found
        if dry_run or found.standing is Standing.NO_COPY:
            return
        async with aclosing(memory.prepare()) as changes:
            async for change in changes:
                yield change

    async def stop(self, handle: str) -> Usage | None:
        return await self._responses.stop(handle)

    def _memory(self, request: ReplyRequest) -> Memory:
        context = Context(request, tuning.window(self.model(request.definition)) or self._context_tokens)
        match self._state_mode:
            case StateMode.CONVERSATION:
                return ConversationMemory(self._client, request, context)
            case StateMode.RESPONSE_CHAIN:
                return ChainMemory(request, context)
            case StateMode.STATELESS:
                return StatelessMemory(context)

    async def _worth_another_try(self, fault: ProviderFault, memory: Memory, patience: Patience) -> bool:
        """Whether the request may be made again, after what it takes for that."""
        match fault.remedy:
            case Remedy.REBUILD:
                return memory.forget()
            case Remedy.SHRINK:
                return await memory.shrink()
            case Remedy.LOOK if self._background:
                return False  # it may still be written, whatever a look would show
        if await patience.wait(fault):
            memory.doubt()
            return True
        # A conversation that stays locked may be held by a response that will never end.
        return fault.remedy is Remedy.WAIT and memory.forget()

    async def _round(
        self, request: ReplyRequest, memory: Memory, number: int, resume: Resumption | None
    ) -> AsyncGenerator[Begun | Stored | TextDelta | ToolCalled | RoundFinished, None]:
        """Sends the request once, or finds the response to it that was begun before, and reads that."""
        follows_text = any(finished.text for finished in request.rounds)
        known = resume.text if resume else ""
        reading = Reading(follows_text=follows_text, known=known, again=self._background)
        untold = memory.stores and resume is None
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
                    response_id = reading.response_id
                    yield Begun(response_id) if self._background else Stored(response_id)
                for delta in deltas:
                    yield delta
                if deltas:
                    await request.pause()
        assert reading.end is not None
        if reading.oddities:
            logger.info("an odd stream: %s turn_id=%s", reading.oddities, request.turn_id)
        for called in reading.end.calls:
            yield called
        shortfall = reading.end.shortfall
        copy = memory.copy(reading.response_id) if shortfall is None else None
        yield RoundFinished(reading.end.usage, shortfall, copy)

    async def _call(self, request: ReplyRequest, memory: Memory, number: int) -> Call:
        definition = request.definition
        user = self._known_as(request.user_id)
        model = self.model(definition)
        body: ResponseCreateParamsStreaming = {
            "model": model,
            "input": await memory.input(),
            "store": memory.stores,
            "max_output_tokens": max(definition.max_output_tokens, MIN_OUTPUT_TOKENS),
            "metadata": {**labels(request), "turn_id": request.turn_id},
            "safety_identifier": user,
            "prompt_cache_key": f"{definition.id[:40]}-{user[:16]}",
            "stream": True,
        }
        if definition.instructions:
            body["instructions"] = definition.instructions
        if memory.conversation:
            body["conversation"] = memory.conversation
        if memory.previous:
            body["previous_response_id"] = memory.previous
        if self._background:
            body["background"] = True
        if request.tools:
            body["tools"] = [_tool(spec) for spec in request.tools]
            body["parallel_tool_calls"] = True
        # The provider's own words, which its types spell out; a wrong one is its to refuse.
        if effort := tuning.effort(definition, model):
            body["reasoning"] = cast("Reasoning", {"effort": effort})
        if verbosity := tuning.verbosity(definition, model):
            body["text"] = cast("ResponseTextConfigParam", {"verbosity": verbosity})
        if memory.stores and (compact_at := tuning.compact_at(model)) is not None:
            body["context_management"] = [{"type": "compaction", "compact_threshold": compact_at}]
        return self._client.responses.with_raw_response.create(
            # What comes as a parameter the SDK walks through, type by type: that costs more than all else here.
            extra_body=body,
            extra_headers={"X-Client-Request-Id": f"{request.turn_id}-{len(request.rounds)}-{number}"},
            timeout=WATCHED,
            stream=True,
        )

    async def complete_json(self, request: JsonRequest[T]) -> JsonAnswer[T]:
        patience = Patience(self._policy, self._policy.clock() + request.seconds)
        try:
            async with asyncio.timeout(request.seconds):
                text, usage = await self._completed(request, patience)
        except TimeoutError as error:
            fault = ProviderFault(TurnReason.PROVIDER_TIMEOUT)
            _log_question(fault)
            raise fault from error
        return JsonAnswer(filled(request.into, text), usage)

    async def _completed(self, request: JsonRequest[T], patience: Patience) -> tuple[str, Usage]:
        while True:
            await patience.admission()
            try:
                answer = await self._responses.complete(self._question(request))
            except ProviderFault as fault:
                _log_question(fault)
                if fault.is_outage:
                    self._policy.breaker.failed()
                if not await patience.wait(fault):
                    raise
                self._telemetry.retried(PROVIDER, fault.reason)
            else:
                self._policy.breaker.succeeded()
                return answer

    def _question(self, request: JsonRequest[T]) -> Awaitable[object]:
        # Left to itself a model thinks first, and that counts: of a bounded answer nothing may be left.
        effort = tuning.nearest_effort("none", self._model)
        return self._client.responses.with_raw_response.create(
            model=self._model,
            instructions=request.instructions,
            input=request.text,
            store=False,
            reasoning=cast("Reasoning", {"effort": effort}) if effort else omit,
            text={
                "format": {
                    "type": "json_schema",
                    "name": request.into.__name__,
                    "schema": schema_of(request.into),
                    "strict": True,
                }
            },
            max_output_tokens=max(request.max_output_tokens, MIN_OUTPUT_TOKENS),
            safety_identifier=self._known_as(request.user_id),
        )

    def _known_as(self, user_id: str) -> str:
        """What the provider sees of a user."""
        return hmac.new(self._user_key, user_id.encode(), sha256).hexdigest()

    async def aclose(self) -> None:
        await self._client.close()


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


def _log_question(fault: ProviderFault) -> None:
    logger.warning(
        "provider fault: reason=%s status=%s code=%s request_id=%s",
        fault.reason.value,
        fault.status,
        fault.code,
        fault.request_id,
    )
