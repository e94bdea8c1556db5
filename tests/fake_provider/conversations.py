"""The endpoints of conversations and their items."""

from typing import TYPE_CHECKING

from fake_provider import validation
from fake_provider.exchange import Exchange
from fake_provider.store import Conversation, page
from fake_provider.validation import bad

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider

LOCKED = "Another process is currently operating on this conversation. Please retry in a few seconds."


class Conversations:
    """Serves them. What it keeps lies with the provider."""

    def __init__(self, provider: "FakeProvider") -> None:
        self._provider = provider

    async def serve(self, exchange: Exchange, path: list[str]) -> None:
        """Answers a request to `path`, the part behind `/conversations`."""
        if not path:
            return await (
                self._create(exchange) if exchange.request.method == "POST" else exchange.unknown_route()
            )
        found = self._provider.conversations.get(path[0])
        if found is None:
            return await exchange.miss("Conversation", path[0])
        match (exchange.request.method, path[1:]):
            case ("GET", []):
                return await exchange.answer(found.as_json())
            case ("POST", []):
                if complaint := validation.about_conversation_update(exchange.body):
                    return await exchange.reject(complaint)
                found.metadata = exchange.body["metadata"] or {}
                return await exchange.answer(found.as_json())
            case ("DELETE", []):
                del self._provider.conversations[found.id]  # its items and responses stay, as at OpenAI
                deleted = {"id": found.id, "object": "conversation.deleted", "deleted": True}
                return await exchange.answer(deleted)
            case (_, ["items", *rest]):
                return await self._serve_items(exchange, found, rest)
        return await exchange.unknown_route()

    async def _create(self, exchange: Exchange) -> None:
        provider, body = self._provider, exchange.body
        if complaint := validation.about_conversation(body):
            return await exchange.reject(complaint)
        if provider.refusals["conversations"]:
            return await exchange.fail(provider.refusals["conversations"].pop(0))
        conversation = Conversation(provider.numbers.next("conv"), body.get("metadata") or {})
        provider.conversations[conversation.id] = conversation
        provider.add_items(conversation, provider.as_stored(body.get("items") or []))
        return await exchange.answer(conversation.as_json())

    async def _serve_items(self, exchange: Exchange, conversation: Conversation, rest: list[str]) -> None:
        provider, query = self._provider, exchange.request.query
        match (exchange.request.method, rest):
            case ("POST", []):
                if complaint := validation.about_items(exchange.body):
                    return await exchange.reject(complaint)
                if provider.refusals["items"]:
                    return await exchange.fail(provider.refusals["items"].pop(0))
                if conversation.busy:
                    return await exchange.refuse(bad(LOCKED, code="conversation_locked", param="conversation"))
                added = provider.as_stored(exchange.body["items"])
                provider.add_items(conversation, added)
                return await exchange.answer(page(added, len(added), "asc") or {})
            case ("GET", []):
                if complaint := validation.about_item_list(query):
                    return await exchange.reject(complaint)
                limit, after = int(query.get("limit", 20)), query.get("after")
                listed = page(conversation.items, limit, query.get("order", "desc"), after)
                return await (exchange.answer(listed) if listed else exchange.miss("Item", after or ""))
            case (("GET" | "DELETE") as verb, [item_id]):
                for item in conversation.items:
                    if item["id"] == item_id:
                        if verb == "GET":
                            return await exchange.answer(item)
                        conversation.items.remove(item)
                        provider.items.pop(item_id, None)
                        return await exchange.answer(conversation.as_json())
                return await exchange.miss("Item", item_id)
        return await exchange.unknown_route()
