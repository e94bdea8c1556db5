"""The practice coach as an agent."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from adapters.practice.conversation import Conversation, PastTurn
from core.model.agent import AgentDefinition
from core.model.attachment import FilePart, ImagePart
from core.model.errors import NotSupported
from core.model.events import TextDelta, ToolCalled
from core.model.message import Message, Role, TextPart, ToolExchange
from core.model.turn import TurnReason, Usage
from core.ports.agent import (
    Agent,
    AgentEvent,
    AgentFailed,
    JsonAnswer,
    JsonRequest,
    ReplyRequest,
    RoundFinished,
)

T = TypeVar("T")

_WORD = re.compile(r"\s*\S+\s*")

_EACH = 500
_MUCH = 100_000
"""Characters of history, counting _EACH more for each message, whose replay would hold up the other turns."""


class PracticeAgent(Agent):
    """A deterministic coach: the same transcript gets the same reply. Needs no key and no network.

    It sends a word at a time, `words_per_second` of them; 0 sends them without a pause. Usage counts words
    where a model would count tokens: those of the user's message and those of the reply.
    """

    def __init__(
        self,
        words_per_second: float = 25.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if words_per_second < 0:
            raise ValueError("words_per_second must not be negative")
        self._pause = 1 / words_per_second if words_per_second else 0.0
        self._sleep = sleep

    @property
    def provider(self) -> str:
        return "practice"

    def model(self, definition: AgentDefinition) -> str:
        return "practice-1"

    def refusal(self) -> float | None:
        return None

    async def complete_json(self, request: JsonRequest[T]) -> JsonAnswer[T]:
        raise NotSupported("provider")  # it holds conversations and has no judgement of them

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        history = await request.history()
        try:
            if sum(_EACH + len(message.text) for message in history) > _MUCH:
                answer = await asyncio.to_thread(_answer, request, history)
            else:
                answer = _answer(request, history)
        except Exception as error:
            raise AgentFailed(TurnReason.INTERNAL) from error
        said = _words(_said(request.message))
        if isinstance(answer, ToolCalled):
            yield answer
            yield RoundFinished(Usage(input_tokens=len(said)))
            return
        words = _words(answer)
        for number, word in enumerate(words):
            if number and self._pause:
                await self._sleep(self._pause)
            yield TextDelta(word)
        yield RoundFinished(Usage(input_tokens=len(said), output_tokens=len(words)))

    async def stop(self, handle: str) -> None:
        """There is nothing that goes on by itself."""

    async def aclose(self) -> None:
        """Holds nothing."""


def _answer(request: ReplyRequest, history: Sequence[Message]) -> str | ToolCalled:
    conversation = Conversation(request.thread_id, request.definition.domain)
    for turn in _past_turns(history):
        conversation.replay(turn)
    said = _said(request.message)
    exchange = next((each for done in request.rounds for each in done.exchanges), None)
    # Once a round was run its tool has been called: another call would go round in circles.
    offered = frozenset() if request.rounds else frozenset(tool.name for tool in request.tools)
    if call := conversation.call_for(said, offered):
        return ToolCalled(
            f"call_{request.turn_id}", call.name, json.dumps(dict(call.arguments), ensure_ascii=False)
        )
    return conversation.answer(said, offered, exchange, unseen=_has_unseen(request.message))


def _past_turns(history: Iterable[Message]) -> list[PastTurn]:
    """The transcript, turn by turn. What nobody asked for, such as a greeting put there by hand, is left out."""
    questions: dict[str, Message] = {}
    replies: dict[str, Message] = {}
    exchanges: dict[str, tuple[ToolExchange, ...]] = {}
    for message in history:
        match message.role:
            case Role.USER:
                questions[message.turn_id] = message
            case Role.ASSISTANT:
                replies[message.turn_id] = message
            case Role.TOOL if message.tool is not None:
                exchanges[message.turn_id] = (*exchanges.get(message.turn_id, ()), message.tool)
    turns = []
    for turn_id, question in questions.items():
        reply = replies.get(turn_id)
        has_text = reply is not None and bool(reply.text.strip())
        turns.append(
            PastTurn(
                said=_said(question),
                reply=reply.text if reply is not None and has_text else None,
                partial=reply is not None and reply.partial,
                exchanges=exchanges.get(turn_id, ()),
                unseen=_has_unseen(question),
            )
        )
    return turns


def _said(message: Message) -> str:
    """A user's words. Parts stand on lines of their own, so that words of two parts do not run together."""
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _has_unseen(message: Message) -> bool:
    """Whether there are pictures or files beside them."""
    return any(isinstance(part, ImagePart | FilePart) for part in message.content)


def _words(text: str) -> list[str]:
    """A text cut behind each word, nothing lost."""
    return _WORD.findall(text)
