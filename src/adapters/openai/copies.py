"""Deleting what the provider keeps: every item, conversation and response by itself."""

from collections.abc import Awaitable, Callable
from typing import Any

from openai import AsyncOpenAI

from adapters.openai.errors import Exchange, ProviderFault, translated
from adapters.openai.memory import PROVIDER
from adapters.openai.repair import PAGE
from adapters.openai.stream import decoded, identifier
from core.ports.provider_copies import CopyStays, ProviderCopies

_GONE = frozenset({404, 410})
_AT_WORK = frozenset({400, 409})
"""What a provider may say to who deletes a response that is still being written."""


class OpenAICopies(ProviderCopies):
    """Deletes conversations and responses. Deleting a conversation leaves its items, so they go one by one, and
    the conversation only when it is seen to be empty: the items of one that is gone can't be found any more."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client

    @property
    def provider(self) -> str:
        return PROVIDER

    async def erase(self, ref: str) -> None:
        try:
            # A server whose names say nothing is asked for both.
            if not ref.startswith("conv"):
                await self._erase_response(ref)
            if not ref.startswith("resp"):
                await self._erase_conversation(ref)
        except ProviderFault as fault:
            reason = " ".join(filter(None, (str(fault.status or ""), fault.code, fault.reason.value)))
            refused = fault.status is not None and 400 <= fault.status < 500
            busy = fault.status in (408, 409, 425, 429) or fault.code == "conversation_locked"
            raise CopyStays(reason, retry_after=fault.retry_after, refused=refused and not busy) from fault

    async def _erase_response(self, response_id: str) -> None:
        responses = self._client.responses.with_raw_response
        try:
            await _unless_gone(lambda: responses.delete(response_id))
        except ProviderFault as fault:
            if fault.status not in _AT_WORK:
                raise
            await _unless_gone(lambda: responses.cancel(response_id))
            await _unless_gone(lambda: responses.delete(response_id))

    async def _erase_conversation(self, conversation_id: str) -> None:
        conversations = self._client.conversations
        deleted: set[str] = set()
        while True:
            found = await _unless_gone(
                lambda: conversations.items.with_raw_response.list(conversation_id, order="asc", limit=PAGE)
            )
            if found is None:
                return
            ids = _ids((decoded(found.content) or {}).get("data"))
            if not ids:
                break
            if not deleted.isdisjoint(ids):
                raise CopyStays("items stay that were deleted")
            deleted.update(ids)
            for item_id in ids:
                await self._erase_item(conversation_id, item_id)
        await _unless_gone(lambda: conversations.with_raw_response.delete(conversation_id))

    async def _erase_item(self, conversation_id: str, item_id: str) -> None:
        items = self._client.conversations.items.with_raw_response
        await _unless_gone(lambda: items.delete(item_id, conversation_id=conversation_id))


def _ids(listed: object) -> list[str]:
    items = listed if isinstance(listed, list) else [None]
    ids = [identifier(item.get("id")) for item in items if isinstance(item, dict)]
    known = [item_id for item_id in ids if item_id is not None]
    if len(known) < len(items):
        raise CopyStays("the list of items can't be read")
    return known


async def _unless_gone(call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer; None where there is nothing any more. Raises ProviderFault."""
    try:
        with translated(Exchange()):
            return await call()
    except ProviderFault as fault:
        if fault.status in _GONE:
            return None
        raise
