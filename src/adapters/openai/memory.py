"""How the model is reminded of a thread: the state modes, behind one interface."""

from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

from openai import AsyncOpenAI
from openai.types.responses import ResponseInputItemParam

from adapters.openai.context import Context
from adapters.openai.errors import Exchange, ProviderFault, Remedy, translated
from adapters.openai.items import aside, history_items, labels, output_items
from adapters.openai.repair import MAX_ITEMS, PAGE, Repair, orphaned_calls, repair
from adapters.openai.stream import decoded, identifier
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import TurnReason
from core.ports.agent import CopyFound, ReplyRequest, Standing, StateChanged

PROVIDER = "openai"

MAX_CONVERSATION_ID = 255
"""Characters of a conversation's name: what a thread's row has room for."""

_GONE = frozenset({404, 410})


class StateMode(StrEnum):
    """Where the provider's copy of a thread is kept."""

    CONVERSATION = "conversation"
    RESPONSE_CHAIN = "response_chain"
    STATELESS = "stateless"


class Memory(Protocol):
    """The provider's copy of one thread, during one call of `reply`.

    A copy is in step where it mirrors the transcript up to this turn's message, or the turn so far. Whatever may
    have put it out of step, a failure, a cancellation, a crash, another provider or another mode in between, has
    left `synced_to` behind: there is no flag to forget.
    """

    stores: bool
    """Whether the provider keeps what is said."""
    conversation: str | None
    """The conversation to reply on, once prepared."""
    previous: str | None
    """The response to reply to, once prepared."""

    @abstractmethod
    def prepare(self) -> AsyncGenerator[StateChanged, None]:
        """Makes the copy fit for the next request. Does nothing if it is. Fails with ProviderFault."""

    @abstractmethod
    async def input(self) -> list[ResponseInputItemParam]:
        """What the next request has to say, once prepared."""

    @abstractmethod
    def doubt(self) -> None:
        """The last request may have left anything in the copy: `prepare` looks at it."""

    @abstractmethod
    def forget(self) -> bool:
        """Gives up a copy that the provider refuses; `prepare` makes another. False if that can't help."""

    @abstractmethod
    async def shrink(self) -> bool:
        """Gives up a copy that is too long for the model, for a shorter one. False if that can't help."""

    @abstractmethod
    def copy(self, response_id: str | None) -> ProviderState | None:
        """The copy with the turn so far in it, now that this response is completed. None if there is no such."""


class ConversationMemory(Memory):
    """A conversation at the provider. Out of step it is repaired where that is little work, else built anew."""

    stores = True
    previous = None

    def __init__(self, client: AsyncOpenAI, request: ReplyRequest, context: Context) -> None:
        self._client = client
        self._request = request
        self._context = context
        self._state = request.state or ProviderState(provider=PROVIDER)
        self._knows_rounds = bool(request.rounds) and self._state.synced_to == request.message.index
        in_step = self._knows_rounds or _is_at_message(self._state, request)
        self.conversation = self._state.conversation_id if in_step else None
        self._gone = self._state.conversation_id is None
        self._built = False

    async def prepare(self) -> AsyncGenerator[StateChanged, None]:
        if self.conversation is not None:
            return
        self._knows_rounds = False
        known = None if self._gone else self._state.conversation_id
        if known is not None and await self._repaired(known):
            self.conversation = known
            mirrored = self._request.message.index - 1
            if self._state.synced_to != mirrored:
                yield self._changed(known, mirrored)
            return
        async for changed in self._build():
            yield changed

    async def compare(self) -> CopyFound:
        """How the conversation stands to the transcript, whatever is known of it. Fails with ProviderFault."""
        known = self._state.conversation_id
        if known is None:
            return CopyFound(Standing.NO_COPY)
        self.doubt()
        try:
            newest, is_all = await self._newest(known)
        except ProviderFault as fault:
            if fault.status in _GONE:
                return CopyFound(Standing.GONE)
            raise
        todo = await self._compared(newest, is_all=is_all)
        orphaned = orphaned_calls(newest)
        if todo is None:
            return CopyFound(Standing.UNKNOWN, orphaned_calls=orphaned)
        standing = Standing.OUT_OF_STEP if todo.add or todo.delete else Standing.IN_STEP
        return CopyFound(standing, len(todo.add), len(todo.delete), orphaned)

    async def _build(self) -> AsyncGenerator[StateChanged, None]:
        self._built = True
        items = await self._context.items()
        first, rest = items[:MAX_ITEMS], items[MAX_ITEMS:]
        begin = self._client.conversations.with_raw_response.create
        body = {"items": first} if first else {}
        with translated(Exchange()):
            created = await begin(extra_body={**body, "metadata": labels(self._request)})
            found = decoded(created.content) or {}
        conversation = identifier(found.get("id"), MAX_CONVERSATION_ID)
        if conversation is None:
            raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        self._gone = False
        mirrored = self._request.message.index - 1
        self._state = replace(self._state, begins_at=self._context.begins_at)
        # Its id is nowhere else: the provider does not list conversations.
        yield self._changed(conversation, UNSYNCED if rest else mirrored)
        for start in range(0, len(rest), MAX_ITEMS):
            with translated(Exchange()):
                await self._client.conversations.items.create(conversation, items=rest[start : start + MAX_ITEMS])
        if rest:
            yield self._changed(conversation, mirrored)
        self.conversation = conversation

    async def _repaired(self, conversation: str) -> bool:
        """Brings a conversation into step with the transcript. False where it must be built anew."""
        try:
            newest, is_all = await self._newest(conversation)
            todo = await self._compared(newest, is_all=is_all)
            if todo is None:
                return False
            items = self._client.conversations.items
            for item_id in todo.delete:
                with translated(Exchange()):
                    await items.delete(item_id, conversation_id=conversation)
            if todo.add:
                with translated(Exchange()):
                    await items.create(conversation, items=todo.add)
        except ProviderFault as fault:
            if fault.remedy in (Remedy.RETRY, Remedy.LOOK, Remedy.WAIT):
                raise
            return False
        return True

    async def _newest(self, conversation: str) -> tuple[Sequence[Mapping[str, Any]], bool]:
        """Its newest items, oldest first, and whether they are all. None can be read where the server lists
        something else."""
        with translated(Exchange()):
            raw = self._client.conversations.items.with_raw_response
            found = await raw.list(conversation, order="desc", limit=PAGE)
        listed = decoded(found.content) or {}
        newest = listed.get("data")
        if not isinstance(newest, list) or not all(
            isinstance(item, dict) and identifier(item.get("id")) for item in newest
        ):
            return (), False
        return newest[::-1], listed.get("has_more") is False

    async def _compared(self, newest: Sequence[Mapping[str, Any]], *, is_all: bool) -> Repair | None:
        lines = await self._context.lines()
        compare = partial(
            repair,
            newest,
            is_all=is_all,
            lines=lines,
            synced_to=self._state.synced_to,
            begins_at=self._state.begins_at,
        )
        return await aside(compare, lines)

    def _changed(self, conversation: str, synced_to: int) -> StateChanged:
        self._state = _replaced(self._state, conversation_id=conversation, synced_to=synced_to)
        return StateChanged(self._state)

    async def input(self) -> list[ResponseInputItemParam]:
        return output_items(self._request.rounds[-1]) if self._knows_rounds else await self._context.turn()

    def doubt(self) -> None:
        self.conversation = None

    def forget(self) -> bool:
        if self._built:
            return False
        self.conversation, self._gone = None, True
        return True

    async def shrink(self) -> bool:
        if not await self._context.shrink() and (self._built or not self._context.has_room):
            return False
        self.conversation, self._gone = None, True
        return True

    def copy(self, response_id: str | None) -> ProviderState | None:
        if self.conversation is None:
            return None
        return _replaced(self._state, conversation_id=self.conversation, synced_to=self._request.message.index)


class ChainMemory(Memory):
    """A chain of responses, each of which names the one before. What has failed is no link of it: the next request
    goes on from the last response that mirrors the transcript, and says what is missing since."""

    stores = True
    conversation = None

    def __init__(self, request: ReplyRequest, context: Context) -> None:
        self._request = request
        self._context = context
        self._state = request.state or ProviderState(provider=PROVIDER)
        self.previous = self._state.response_id if self._state.synced_to != UNSYNCED else None

    async def prepare(self) -> AsyncGenerator[StateChanged, None]:
        return
        yield  # makes this a generator

    async def input(self) -> list[ResponseInputItemParam]:
        request, mirrored = self._request, self._state.synced_to
        if self.previous is None:
            return await self._context.items() + await self._context.turn()
        if request.rounds and mirrored == request.message.index:
            return output_items(request.rounds[-1])
        missing: list[ResponseInputItemParam] = []
        if mirrored < request.message.index - 1:
            lines = [line for line in await self._context.lines() if line.index > mirrored]
            missing = await aside(partial(history_items, lines), lines)
        return missing + await self._context.turn()

    def doubt(self) -> None:
        """Nothing that was asked for has changed what it began with."""

    def forget(self) -> bool:
        if self.previous is None:
            return False
        self.previous = None
        return True

    async def shrink(self) -> bool:
        begun, self.previous = self.previous, None
        return await self._context.shrink() or (begun is not None and self._context.has_room)

    def copy(self, response_id: str | None) -> ProviderState | None:
        if response_id is None:
            return None
        return _replaced(self._state, response_id=response_id, synced_to=self._request.message.index)


class StatelessMemory(Memory):
    """No copy at all: every request says everything. For servers that keep nothing, and for data that must not
    stay at the provider."""

    stores = False
    conversation = None
    previous = None

    def __init__(self, context: Context) -> None:
        self._context = context

    async def prepare(self) -> AsyncGenerator[StateChanged, None]:
        return
        yield  # makes this a generator

    async def input(self) -> list[ResponseInputItemParam]:
        return await self._context.items() + await self._context.turn()

    def doubt(self) -> None:
        """There is nothing to look at."""

    def forget(self) -> bool:
        return False

    async def shrink(self) -> bool:
        return await self._context.shrink()

    def copy(self, response_id: str | None) -> ProviderState | None:
        return None


def _is_at_message(state: ProviderState, request: ReplyRequest) -> bool:
    """Whether a copy mirrors all that was said before the turn, or began to be resumed."""
    mirrored = state.synced_to == request.message.index - 1
    return mirrored and (not request.rounds or request.resume is not None)


def _replaced(
    state: ProviderState, *, synced_to: int, conversation_id: str | None = None, response_id: str | None = None
) -> ProviderState:
    """The state with another copy."""
    return replace(state, conversation_id=conversation_id, response_id=response_id, synced_to=synced_to)
