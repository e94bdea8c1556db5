"""How the model is reminded of a thread: the state modes, behind one interface."""

from abc import abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

from openai import AsyncOpenAI, omit
from openai.types.responses import ResponseInputItemParam

from adapters.openai.errors import Exchange, ProviderFault, translated
from adapters.openai.items import history_items, labels, output_items, turn_items
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import TurnReason
from core.ports.agent import ReplyRequest, StateChanged

PROVIDER = "openai"
MAX_ITEMS = 20
"""Items that a conversation takes in one call."""


class StateMode(StrEnum):
    """Where the provider's copy of a thread is kept."""

    CONVERSATION = "conversation"
    STATELESS = "stateless"


class Memory(Protocol):
    """The provider's copy of one thread, during one call of `reply`."""

    keeps_copy: bool
    """Whether the provider's copy mirrors a turn once its response is completed."""
    conversation: str | None
    """The conversation to reply on, once prepared."""

    @abstractmethod
    def prepare(self) -> AsyncGenerator[StateChanged, None]:
        """Makes the copy fit for the next request. Does nothing if it is. Fails with ProviderFault."""

    @abstractmethod
    async def input(self) -> list[ResponseInputItemParam]:
        """What the next request has to say, once prepared."""

    @abstractmethod
    def forget(self) -> bool:
        """Gives up a copy that the provider refuses; `prepare` makes another. False if that can't help."""

    @abstractmethod
    def doubt(self) -> StateChanged | None:
        """Says that nobody knows what the copy mirrors now; None where there is no copy."""


class ConversationMemory(Memory):
    """A conversation at the provider, built anew from the transcript wherever the two may differ."""

    keeps_copy = True

    def __init__(self, client: AsyncOpenAI, request: ReplyRequest) -> None:
        self._client = client
        self._request = request
        self._state = request.state or ProviderState(provider=PROVIDER)
        # Between the rounds of a turn the copy is ahead of the record, and right unless somebody doubts it.
        synced_to = self._state.synced_to
        in_step = synced_to != UNSYNCED if request.rounds else synced_to == request.message.index - 1
        self.conversation = self._state.conversation_id if in_step else None
        self._fresh = False

    async def prepare(self) -> AsyncGenerator[StateChanged, None]:
        if self.conversation is not None:
            return
        self._fresh = True
        items = history_items(await self._request.history())
        first, rest = items[:MAX_ITEMS], items[MAX_ITEMS:]
        with translated(Exchange()):
            created = await self._client.conversations.create(items=first or omit, metadata=labels(self._request))
        conversation = getattr(created, "id", None)
        if not isinstance(conversation, str):
            raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        mirrored = self._request.message.index - 1
        yield self._changed(conversation, UNSYNCED if rest else mirrored)
        for start in range(0, len(rest), MAX_ITEMS):
            with translated(Exchange()):
                await self._client.conversations.items.create(conversation, items=rest[start : start + MAX_ITEMS])
        if rest:
            yield self._changed(conversation, mirrored)
        self.conversation = conversation

    def _changed(self, conversation: str, synced_to: int) -> StateChanged:
        old = self._state.conversation_id
        retired = self._state.retired
        if old is not None and old != conversation:
            retired = (*retired, old)
        self._state = replace(self._state, conversation_id=conversation, synced_to=synced_to, retired=retired)
        return StateChanged(self._state)

    async def input(self) -> list[ResponseInputItemParam]:
        if self._fresh or not self._request.rounds:
            return turn_items(self._request)
        return output_items(self._request.rounds[-1])

    def forget(self) -> bool:
        if self._fresh:
            return False
        self.conversation = None
        return True

    def doubt(self) -> StateChanged | None:
        return self._changed(self.conversation, UNSYNCED) if self.conversation is not None else None


class StatelessMemory(Memory):
    """No copy at all: every request says everything. For servers without conversations, and for data that
    must not stay at the provider."""

    keeps_copy = False
    conversation = None

    def __init__(self, request: ReplyRequest) -> None:
        self._request = request

    async def prepare(self) -> AsyncGenerator[StateChanged, None]:
        return
        yield  # makes this a generator

    async def input(self) -> list[ResponseInputItemParam]:
        return history_items(await self._request.history()) + turn_items(self._request)

    def forget(self) -> bool:
        return False

    def doubt(self) -> StateChanged | None:
        return None
