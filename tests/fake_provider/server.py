"""The provider itself: routes, locks, faults."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

from fake_provider.background import Writing, is_delta
from fake_provider.rendering import Rendering, as_bytes
from fake_provider.script import Answer, Break, Gate, HttpError, Step
from fake_provider.store import Conversation, Numbers, complaint_about_calls, last_words, page, stored
from fake_provider.validation import (
    complaint_about_conversation,
    complaint_about_items,
    complaint_about_response,
    complaint_about_retrieval,
)
from fake_provider.wire import Connection, Disconnected, Json, Request

MODELS: dict[str, str | None] = {"gpt-6-luna": None, "gpt-4o": "2027-01-14"}


class FakeProvider:
    """Listens on loopback while entered. Requests for responses follow the script, then answer by themselves.

    `models` maps the names of the models to their last days. With `api_key` set, only that key is taken.
    `connections` are open now, `accepted` were opened ever, `running` responses are being sent, or written in the
    background. `refusals` holds errors for the next requests to `conversations`, `items`, `models` or `cancel`;
    `attachments` says what befalls the next connections that ask for the stream of a background response.
    `cancelled` are the ids of the responses that were cancelled while they were written.
    """

    def __init__(self, script: Iterable[Step] = (), *, api_key: str | None = None, port: int = 0) -> None:
        self.script: list[Step] = list(script)
        self.api_key = api_key
        self.models = dict(MODELS)
        self.requests: list[Request] = []
        self.conversations: dict[str, Conversation] = {}
        self.items: dict[str, Json] = {}
        self.responses: dict[str, Json] = {}
        self.refusals: dict[str, list[HttpError]] = {"conversations": [], "items": [], "models": [], "cancel": []}
        self.attachments: list[Break | HttpError | None] = []
        self.cancelled: list[str] = []
        self.connections = 0
        self.accepted = 0
        self.running = 0
        self._port = port
        self._quiet = asyncio.Event()
        self._contexts: dict[str, list[Json]] = {}
        self._writings: dict[str, Writing] = {}
        self._numbers = Numbers()
        self._gates: list[Gate] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def base_url(self) -> str:
        """What OPENAI_BASE_URL would be."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    @property
    def posts(self) -> list[Json]:
        """The bodies of all requests for responses."""
        return [r.body or {} for r in self.requests if (r.method, r.path) == ("POST", "/v1/responses")]

    def then(self, *steps: Step) -> None:
        """Adds to the script."""
        self.script += steps

    async def quiet(self) -> None:
        """Waits until no response is running."""
        if self.running:
            self._quiet.clear()
            await self._quiet.wait()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def serve_forever(self) -> None:
        """Serves until cancelled."""
        assert self._server is not None
        await self._server.serve_forever()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.accepted += 1
        connection = Connection(reader, writer)
        try:
            while True:
                request = await connection.read_request()
                self.requests.append(request)
                await self._serve(request, connection)
        except (Disconnected, asyncio.CancelledError):
            pass  # a cancelled handler is the end of the test; asyncio would report it as an error
        finally:
            self.connections -= 1
            self._tasks.discard(task)
            with suppress(asyncio.CancelledError):
                await connection.close()

    async def _serve(self, request: Request, connection: Connection) -> None:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return await self._refuse(
                connection, HttpError(status=401, code="invalid_api_key", message="Incorrect API key provided.")
            )
        match (request.method, request.path.removeprefix("/v1").strip("/").split("/")):
            case ("POST", ["responses"]):
                return await self._create_response(request.body or {}, connection)
            case (_, ["responses", response_id, *rest]) if response_id in self.responses:
                return await self._serve_response(request, response_id, rest, connection)
            case ("GET", ["models", name]):
                if self.refusals["models"]:
                    return await self._refuse(connection, self.refusals["models"].pop(0))
                if name in self.models:
                    facts = {"id": name, "object": "model", "created": 1_790_000_000, "owned_by": "system"}
                    return await self._answer(connection, {**facts, "shutdown_date": self.models[name]})
            case (_, ["conversations", *_]):
                return await self._serve_conversation(request, connection)
        return await self._refuse(connection, _not_found())

    async def _serve_response(
        self, request: Request, response_id: str, rest: list[str], connection: Connection
    ) -> None:
        writing = self._writings.get(response_id)
        found = writing.response if writing else self.responses[response_id]
        match (request.method, rest):
            case ("GET", []):
                if complaint := complaint_about_retrieval(request.query):
                    return await self._refuse(connection, _bad(complaint))
                if request.query.get("stream") == "true":
                    return await self._attach(writing, int(request.query.get("starting_after", -1)), connection)
                return await self._answer(connection, found)
            case ("DELETE", []):
                del self.responses[response_id]
                deleted = {"id": response_id, "object": "response", "deleted": True}
                return await self._answer(connection, deleted)
            case ("POST", ["cancel"]):
                if self.refusals["cancel"]:
                    return await self._refuse(connection, self.refusals["cancel"].pop(0))
                if request.body:
                    return await self._refuse(connection, _bad("Unknown parameter."))
                if writing is None:
                    return await self._refuse(connection, _bad("Cannot cancel a synchronous response."))
                if not writing.is_over:
                    self.cancelled.append(response_id)
                writing.cancel()
                return await self._answer(connection, writing.response)
        return await self._refuse(connection, _not_found())

    async def _attach(self, writing: Writing | None, after: int, connection: Connection) -> None:
        """Sends the events of a background response, from anywhere."""
        fault = self.attachments.pop(0) if self.attachments else None
        if isinstance(fault, HttpError):
            return await self._refuse(connection, fault)
        if writing is None:
            return await self._refuse(connection, _not_found())
        if not writing.streamed:
            return await self._refuse(connection, _bad("This response was not created with stream=true."))
        with suppress(_BrokenOff):
            await self._send(writing.events(after, connection), writing.answer, fault, connection)
        return None

    async def _serve_conversation(self, request: Request, connection: Connection) -> None:
        method, path = request.method, request.path.removeprefix("/v1/conversations").strip("/")
        name, _, rest = path.partition("/")
        body = request.body or {}
        if not name and method == "POST":
            if self.refusals["conversations"]:
                return await self._refuse(connection, self.refusals["conversations"].pop(0))
            if complaint := complaint_about_conversation(body):
                return await self._refuse(connection, _bad(complaint))
            conversation = Conversation(self._numbers.next("conv"), body.get("metadata") or {})
            self.conversations[conversation.id] = conversation
            self._add(conversation, body.get("items") or [])
            return await self._answer(connection, conversation.as_json())
        found = self.conversations.get(name)
        if found is None:
            return await self._refuse(connection, _not_found(f"Conversation with id '{name}' not found."))
        match (method, rest.split("/") if rest else []):
            case ("GET", []):
                return await self._answer(connection, found.as_json())
            case ("DELETE", []):
                del self.conversations[name]  # its items stay, as at OpenAI
                deleted = {"id": name, "object": "conversation.deleted", "deleted": True}
                return await self._answer(connection, deleted)
            case ("POST", ["items"]):
                if self.refusals["items"]:
                    return await self._refuse(connection, self.refusals["items"].pop(0))
                if complaint := complaint_about_items(body):
                    return await self._refuse(connection, _bad(complaint))
                if found.busy:
                    return await self._refuse(connection, _locked())
                added = self._add(found, body["items"])
                return await self._answer(connection, page(added, {"limit": "100", "order": "asc"}) or {})
            case ("GET", ["items"]):
                listed = page(found.items, dict(request.query))
                if listed is None:
                    return await self._refuse(connection, _bad("Invalid paging."))
                return await self._answer(connection, listed)
            case (("GET" | "DELETE") as verb, ["items", item_id]):
                for item in found.items:
                    if item["id"] == item_id:
                        if verb == "DELETE":
                            found.items.remove(item)
                            self.items.pop(item_id, None)
                            return await self._answer(connection, found.as_json())
                        return await self._answer(connection, item)
        return await self._refuse(connection, _not_found())

    def _add(self, conversation: Conversation, items: Iterable[Json]) -> list[Json]:
        added = [stored(item, self._numbers) for item in items]
        conversation.items += added
        self.items.update((item["id"], item) for item in added)
        return added

    async def _create_response(self, body: Json, connection: Connection) -> None:
        step = self.script.pop(0) if self.script else Answer()
        if isinstance(step, HttpError):
            return await self._refuse(connection, step)
        wanted = body.get("conversation")
        name = wanted["id"] if isinstance(wanted, dict) else wanted
        conversation = self.conversations.get(name) if name else None
        given = body.get("input") or []
        if isinstance(given, str):
            given = [{"type": "message", "role": "user", "content": given}]
        refusal = self._refusal(body, name, conversation)
        if refusal is not None:
            return await self._refuse(connection, refusal)
        before = (
            conversation.items if conversation else self._contexts.get(body.get("previous_response_id", ""), [])
        )
        added = [stored(item, self._numbers) for item in given]
        context = [*before, *added]
        if complaint := complaint_about_calls(context):
            return await self._refuse(connection, _bad(complaint, param="input"))
        rendering = Rendering(body, step, last_words(context), self._numbers, len(json.dumps(context)))
        if conversation:
            conversation.busy = True
        self.running += 1

        def ended(response: Json) -> None:
            whole = response["status"] == "completed"
            if whole and conversation:
                self._add(conversation, [*added, *rendering.output])
            if whole and body.get("store", True):
                if not response["background"]:
                    self.responses[response["id"]] = response
                self._contexts[response["id"]] = [*context, *rendering.output]
            if conversation:
                conversation.busy = False
            self.running -= 1
            if not self.running:
                self._quiet.set()

        events = rendering.events()
        if body.get("background"):
            writing = Writing(events, rendering.response, step, ended, streamed=bool(body.get("stream")))
            return await self._write(writing, connection)
        final = {**rendering.response, "status": "cancelled"}
        try:
            if body.get("stream"):
                await self._send(_one_by_one(events), step, step.fault, connection)
            else:
                await self._answer(connection, rendering.response)
            final = rendering.response
        except _BrokenOff:
            pass
        finally:
            ended(final)
        return None

    async def _write(self, writing: Writing, connection: Connection) -> None:
        """Lets a background response be written, and sends what is asked for of it."""
        self._writings[writing.response["id"]] = writing
        self.responses[writing.response["id"]] = writing.response
        task = asyncio.create_task(writing.write())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not writing.streamed:
            return await self._answer(connection, writing.response)
        with suppress(_BrokenOff):
            await self._send(writing.events(-1, connection), writing.answer, writing.answer.fault, connection)
        return None

    def _refusal(self, body: Json, name: str | None, conversation: Conversation | None) -> HttpError | None:
        if complaint := complaint_about_response(body):
            return _bad(complaint)
        if body["model"] not in self.models:
            message = f"The requested model '{body['model']}' does not exist."
            return _bad(message, code="model_not_found", param="model")
        if name and conversation is None:
            return _not_found(f"Conversation with id '{name}' not found.")
        if body.get("previous_response_id") and body["previous_response_id"] not in self._contexts:
            return _bad("Previous response not found.", code="previous_response_not_found")
        return _locked() if conversation and conversation.busy else None

    async def _send(
        self, events: AsyncGenerator[Json, None], answer: Answer, fault: Break | None, connection: Connection
    ) -> None:
        """Sends the events. Raises _BrokenOff where the script ends them, Disconnected if the client left."""
        if answer.headers_gate is not None:
            answer.headers_gate.reached.set()
            await connection.wait_for(answer.headers_gate.released)
        await connection.begin(self._headers())
        deltas = 0
        if fault is not None and fault.after == 0:
            await self._break(fault, b"", connection)
        async with aclosing(events):
            async for event in events:
                frame = as_bytes(event, answer)
                if fault is not None and 0 < fault.after == deltas:
                    await self._break(fault, frame, connection)
                if fault is not None and fault.after == deltas:
                    fault = None
                for data in (frame[at : at + 1] for at in range(len(frame))) if answer.byte_by_byte else (frame,):
                    await connection.send(data)
                deltas += is_delta(event)
        await connection.end()

    async def _break(self, fault: Break, frame: bytes, connection: Connection) -> None:
        """Lets something go wrong before `frame` is sent. Raises _BrokenOff or Disconnected if that is the end."""
        match fault.how:
            case "eof" | "half":
                if fault.how == "half":
                    await connection.send(frame[: len(frame) // 2] or b"data: {")
                await connection.end()
                raise _BrokenOff
            case "cut":
                await connection.send(frame[: len(frame) // 2] or b"data: {")
                connection.reset()
                raise Disconnected
            case "malformed":
                await connection.send(b'data: {"type": "response.output_text.delta", "delta": \n\n')
            case "stall":
                fault.gate.reached.set()
                await connection.wait_for(fault.gate.released)
            case "comments":
                fault.gate.reached.set()
                while not fault.gate.released.is_set():
                    await connection.send(b": keep-alive\n\n")
                    await asyncio.sleep(0.005)

    async def _answer(self, connection: Connection, body: Json) -> None:
        await connection.answer(200, json.dumps(body).encode(), self._headers())

    async def _refuse(self, connection: Connection, error: HttpError) -> None:
        if error.gate is not None:
            error.gate.reached.set()
            await connection.wait_for(error.gate.released)
        if error.reset:
            connection.reset()
            raise Disconnected
        facts = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        body = json.dumps({"error": facts}).encode() if error.body is None else error.body
        await connection.answer(error.status, body, {**self._headers(), **error.headers})

    def _headers(self) -> dict[str, str]:
        return {"x-request-id": self._numbers.next("req"), "openai-processing-ms": "1"}


class _BrokenOff(Exception):
    """The answer has ended where the script says, before its end."""


async def _one_by_one(events: Iterable[Json]) -> AsyncGenerator[Json, None]:
    for event in events:
        yield event


def _bad(message: str, *, code: str | None = None, param: str | None = None) -> HttpError:
    return HttpError(status=400, message=message, code=code, param=param)


def _not_found(message: str = "Not found.") -> HttpError:
    return HttpError(status=404, message=message)


def _locked() -> HttpError:
    return HttpError(
        status=400,
        code="conversation_locked",
        param="conversation",
        message="Another process is currently operating on this conversation. Please retry in a few seconds.",
    )
