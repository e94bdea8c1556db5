"""The endpoints of responses: create, retrieve, delete, cancel, input items, token counts, compaction."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from fake_provider import validation
from fake_provider.background import Writing
from fake_provider.conversations import LOCKED
from fake_provider.exchange import Exchange, not_found
from fake_provider.load import LoadStream
from fake_provider.rendering import Rendering, compaction, is_delta, usage
from fake_provider.script import Answer, Break, HttpError, Load
from fake_provider.sending import BrokenOff, Sender, Stream
from fake_provider.store import Conversation, complaint_about_calls, last_words, page, stored, tokens_of
from fake_provider.validation import bad
from fake_provider.wire import Json

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider

_TOO_LONG = "Your input exceeds the context window of this model. Please adjust your input and try again."


class Input:
    """What a request gives to the model: `added` by itself, `context` with all that goes before it."""

    def __init__(self, conversation: Conversation | None, before: Sequence[Json], added: list[Json]) -> None:
        self.conversation = conversation
        self.added = added
        self.context = [*before, *added]

    def stream(self, rendering: Rendering) -> Stream:
        """The stream of what is answered to it."""
        return Stream(rendering.response["id"], self.conversation.id if self.conversation else None)


class Responses:
    """Serves them. What it keeps lies with the provider."""

    def __init__(self, provider: "FakeProvider") -> None:
        self._provider = provider
        self._writings: dict[str, Writing] = {}

    async def serve(self, exchange: Exchange, path: list[str]) -> None:
        """Answers a request to `path`, the part behind `/responses`."""
        provider = self._provider
        match (exchange.request.method, path):
            case ("POST", []):
                return await self._create(exchange)
            case ("POST", ["input_tokens"]):
                return await self._count(exchange)
            case ("POST", ["compact"]):
                return await self._compact(exchange)
            case (_, [_, "input_items"]) if not provider.dialect.input_items:
                return await exchange.unknown_route()
            case (_, [response_id, *rest]) if response_id in provider.responses:
                return await self._serve_one(exchange, response_id, rest)
            case (_, [response_id, *_]):
                return await exchange.miss("Response", response_id)
        return await exchange.unknown_route()

    async def _serve_one(self, exchange: Exchange, response_id: str, rest: list[str]) -> None:
        provider, query = self._provider, exchange.request.query
        writing = self._writings.get(response_id)
        found = writing.response if writing else provider.responses[response_id]
        match (exchange.request.method, rest):
            case ("GET", []):
                if complaint := validation.about_retrieval(query):
                    return await exchange.reject(complaint)
                if query.get("stream") == "true":
                    return await self._attach(exchange, writing, int(query.get("starting_after", -1)))
                return await exchange.answer(found)
            case ("DELETE", []):
                provider.forget_response(response_id)
                self._writings.pop(response_id, None)
                return await exchange.answer({"id": response_id, "object": "response", "deleted": True})
            case ("GET", ["input_items"]):
                if complaint := validation.about_item_list(query, of_response=True):
                    return await exchange.reject(complaint)
                items = provider.inputs.get(response_id, [])
                after = query.get("after")
                listed = page(items, int(query.get("limit", 20)), query.get("order", "desc"), after)
                return await (exchange.answer(listed) if listed else exchange.miss("Item", after or ""))
            case ("POST", ["cancel"]):
                return await self._cancel(exchange, response_id, writing)
        return await exchange.unknown_route()

    async def _cancel(self, exchange: Exchange, response_id: str, writing: Writing | None) -> None:
        if self._provider.refusals["cancel"]:
            return await exchange.fail(self._provider.refusals["cancel"].pop(0))
        if exchange.body:
            name = next(iter(exchange.body))
            unknown = bad(f"Unknown parameter: '{name}'.", code="unknown_parameter", param=name)
            return await exchange.reject(unknown)
        if writing is None:
            return await exchange.refuse(bad("Cannot cancel a synchronous response."))
        if not writing.is_over:
            self._provider.cancelled.append(response_id)
        writing.cancel()
        return await exchange.answer(writing.response)

    async def _attach(self, exchange: Exchange, writing: Writing | None, after: int) -> None:
        """Sends the events of a background response, from anywhere."""
        attachments = self._provider.attachments
        fault = attachments.pop(0) if attachments else None
        if isinstance(fault, HttpError):
            return await exchange.fail(fault)
        if writing is None:
            return await exchange.refuse(not_found("Not found."))
        if not writing.streamed:
            return await exchange.refuse(bad("This response was not created with stream=true."))
        return await self._relay(exchange, writing, after, fault)

    async def _relay(self, exchange: Exchange, writing: Writing, after: int, fault: Break | None) -> None:
        sender = Sender(self._provider, exchange, writing.answer, fault)
        conversation = (writing.response["conversation"] or {}).get("id")
        with suppress(BrokenOff), self._provider.open(Stream(writing.response["id"], conversation)) as stream:
            async with aclosing(writing.events(after, exchange.connection)) as events:
                await sender.send(events, writing.whole, after + 1, stream)

    # --- input

    def _input(self, body: Json) -> Input | HttpError:
        """What goes into the model, or why nothing does."""
        provider = self._provider
        wanted = body.get("conversation")
        name = wanted["id"] if isinstance(wanted, dict) else wanted
        previous = body.get("previous_response_id")
        if name and not provider.dialect.conversations:
            return bad("Unknown parameter: 'conversation'.", code="unknown_parameter", param="conversation")
        if previous and not provider.dialect.chains:
            message = "Unsupported parameter: 'previous_response_id'."
            return bad(message, code="unsupported_parameter", param="previous_response_id")
        conversation = provider.conversations.get(name) if name else None
        if name and conversation is None:
            return not_found(f"Conversation with id '{name}' not found.")
        if previous and previous not in provider.contexts:
            message = f"Previous response with id '{previous}' not found."
            return bad(message, code="previous_response_not_found", param="previous_response_id")
        given = body.get("input") or []
        if isinstance(given, str):
            given = [{"type": "message", "role": "user", "content": given}]
        before = conversation.items if conversation else provider.contexts.get(previous or "", [])
        added = []
        for item in given:
            if item.get("type") == "item_reference":
                found = provider.find_item(item["id"])
                if found is None:
                    return not_found(f"Item with id '{item['id']}' not found.")
                added.append(found)
            else:
                added.append(stored(item, provider.numbers))
        return Input(conversation, before, added)

    def _unfit(self, body: Json, given: Input, tokens: int, *, compacts: bool) -> HttpError | None:
        """Why the model cannot answer to this."""
        if given.conversation and given.conversation.busy:
            return bad(LOCKED, code="conversation_locked", param="conversation")
        if complaint := complaint_about_calls(given.context):
            return bad(complaint, param="input")
        if tokens > self._provider.context_limit and not compacts and body.get("truncation") != "auto":
            return bad(_TOO_LONG, code="context_length_exceeded", param="input")
        return None

    async def _count(self, exchange: Exchange) -> None:
        if complaint := validation.about_token_count(exchange.body):
            return await exchange.reject(complaint)
        given = self._input(exchange.body)
        if isinstance(given, HttpError):
            return await exchange.refuse(given)
        tokens = tokens_of(given.context, exchange.body)
        return await exchange.answer({"object": "response.input_tokens", "input_tokens": tokens})

    async def _compact(self, exchange: Exchange) -> None:
        body, numbers = exchange.body, self._provider.numbers
        if complaint := validation.about_compact(body):
            return await exchange.reject(complaint)
        given = self._input(body)
        if isinstance(given, HttpError):
            return await exchange.refuse(given)
        # By its description OpenAI also gives back the users' messages; the SDK's type has no place for them.
        item = compaction(numbers)
        facts: Json = {"id": numbers.next("resp"), "object": "response.compaction", "created_at": 1_790_000_000}
        spent = usage(tokens_of(given.context, body), tokens_of([item], {}))
        return await exchange.answer({**facts, "output": [item], "usage": spent})

    # --- creation

    async def _create(self, exchange: Exchange) -> None:
        provider, body = self._provider, exchange.body
        if complaint := validation.about_response(body):
            return await exchange.reject(complaint)
        given = self._input(body)
        step = provider.next_step(given.context if isinstance(given, Input) else body.get("input"), body)
        if isinstance(step, HttpError):
            return await exchange.fail(step)
        if body["model"] not in provider.models:
            message = f"The requested model '{body['model']}' does not exist."
            return await exchange.refuse(bad(message, code="model_not_found", param="model"))
        if isinstance(given, HttpError):
            return await exchange.refuse(given)
        tokens = tokens_of(given.context, body)
        thresholds = [entry.get("compact_threshold") for entry in body.get("context_management") or ()]
        compacts = any(threshold is not None and tokens >= threshold for threshold in thresholds)
        if complaint := self._unfit(body, given, tokens, compacts=compacts):
            return await exchange.refuse(complaint)
        whole = isinstance(step, Load) and body.get("stream") and not body.get("background") and step.fault is None
        load = step if isinstance(step, Load) and whole else None
        answer = step.as_answer() if isinstance(step, Load) else step
        to_render = LoadStream.answer() if load else answer
        words = last_words(given.context)
        provider.shown.append(given.context)
        rendering = Rendering(body, to_render, words, provider.numbers, tokens, compacts=compacts)
        return await self._run(exchange, given, rendering, load or answer)

    async def _run(self, exchange: Exchange, given: Input, rendering: Rendering, step: Answer | Load) -> None:
        """Renders the response, sends it as it is asked for, and keeps what is left of it."""
        provider, body = self._provider, exchange.body
        if given.conversation:
            given.conversation.busy = True
        provider.running += 1

        def ended(response: Json) -> None:
            self._keep(response, given, rendering, stores=body.get("store") is not False)
            if given.conversation:
                given.conversation.busy = False
            provider.ended()

        if isinstance(step, Load):
            return await self._send_load(exchange, given, rendering, step, ended)
        events = rendering.events()
        for struck in rendering.strikes:
            provider.strikes[struck] += 1
        if step.ending != "completed":
            provider.strikes[type(step.ending).__name__] += 1
        if body.get("background"):
            return await self._write(exchange, events, rendering.response, step, ended)
        final = {**rendering.response, "status": "cancelled"}
        try:
            if body.get("stream"):
                sender = Sender(provider, exchange, step, step.fault)
                stream = given.stream(rendering)
                with provider.open(stream):
                    async with aclosing(_one_by_one(events, step.pace)) as paced:
                        await sender.send(paced, events, 0, stream)
            else:
                await exchange.answer(rendering.response)
            final = rendering.response
        except BrokenOff:
            return None  # the answer stopped short; `final` stays a response that was cut off
        finally:
            ended(rendering.response if step.kept_when_aborted else final)
        return None

    async def _send_load(
        self, exchange: Exchange, given: Input, rendering: Rendering, load: Load, ended: Any
    ) -> None:
        source = LoadStream(load, rendering)
        final = {**rendering.response, "status": "cancelled"}
        try:
            await exchange.connection.begin(exchange.headers)
            with self._provider.open(given.stream(rendering)) as stream:
                await source.send(exchange.connection, stream, self._provider.lateness)
            final = rendering.response
        finally:
            ended(final)

    async def _write(
        self, exchange: Exchange, events: list[Json], final: Json, answer: Answer, ended: Any
    ) -> None:
        """Lets a background response be written, and sends what is asked for of it."""
        provider, streamed = self._provider, bool(exchange.body.get("stream"))
        writing = Writing(events, final, answer, ended, provider.gates, streamed=streamed)
        self._writings[writing.response["id"]] = writing
        provider.responses[writing.response["id"]] = writing.response
        provider.start(writing.write())
        if not streamed:
            return await exchange.answer(writing.response)
        return await self._relay(exchange, writing, -1, answer.fault)

    def _keep(self, response: Json, given: Input, rendering: Rendering, *, stores: bool) -> None:
        """Keeps what a response leaves when it ends. One that was cut off leaves nothing."""
        provider, response_id = self._provider, response["id"]
        if response["status"] == "completed" and given.conversation:
            provider.add_items(given.conversation, [*given.added, *rendering.output])
        if response["status"] != "cancelled" and stores:
            if not response["background"]:
                provider.responses[response_id] = response
            provider.inputs[response_id] = given.context
            if response["status"] in ("completed", "incomplete"):
                provider.contexts[response_id] = [*given.context, *rendering.output]


async def _one_by_one(events: Sequence[Json], pace: float | None) -> AsyncGenerator[Json, None]:
    """The events, deltas of text at a pace."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for event in events:
        if pace and is_delta(event):
            await asyncio.sleep(due - loop.time())
            due += 1 / pace
        yield event


def words_of(context: Any) -> str:
    """Everything that a context says."""
    return json.dumps(context, ensure_ascii=False)
