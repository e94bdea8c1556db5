"""The provider itself: where it listens, what it keeps, and who serves which request."""

import asyncio
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from fake_provider.chat import serve_chat
from fake_provider.control import Control
from fake_provider.conversations import Conversations
from fake_provider.dialects import DIALECTS
from fake_provider.exchange import Exchange, not_found
from fake_provider.faults import Rule
from fake_provider.load import Lateness
from fake_provider.responses import Responses, words_of
from fake_provider.script import Answer, Break, Gate, HttpError, Load, Step
from fake_provider.sending import Stream
from fake_provider.store import Conversation, Numbers, stored
from fake_provider.wire import Connection, Disconnected, Json, Request

MODELS: dict[str, str | None] = {"gpt-6-luna": None, "gpt-4o": "2027-01-14"}
CONTEXT_LIMIT = 922_000
"""Tokens that gpt-6-luna takes."""

_BACKLOG = 4096
_GARBLED = "We could not parse the JSON body of your request."
_NO_KEY = "Incorrect API key provided."


class FakeProvider:
    """Listens on loopback while entered. Requests for responses follow the script, then get the `default` answer;
    `rules` say which of them a fault befalls.

    `models` maps the names of the models to their last days. With `api_key` set, only that key is taken. `like`
    names the server that is played (see `dialects`); `dialect` may be changed. `context_limit` is the tokens that
    fit.

    `connections` are open now, `accepted` were opened ever, `running` responses are being sent, or written in the
    background; `streams` are open. `refusals` holds errors for the next requests to `conversations`, `items`,
    `models` or `cancel`, or for the next `deletions` of anything; `attachments` says what befalls the next
    connections that ask for the stream of a background response. `cancelled` are the ids of the responses that
    were cancelled while they were written.
    `requests` are all that came, `rejected` those with parameters that the API does not take, and what they were
    told; `shown` is what the model was shown each time. `strikes` counts the faults that struck, by their names.
    `lateness` is of the paced replies.
    """

    def __init__(
        self,
        script: Iterable[Step] = (),
        *,
        api_key: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        like: str = "openai",
    ) -> None:
        self.api_key = api_key
        self.dialect = DIALECTS[like]
        self.connections = 0
        self.accepted = 0
        self.running = 0
        self.numbers = Numbers()
        self.gates: set[Gate] = set()
        self.streams: set[Stream] = set()
        self._host, self._port = host, port
        self._quiet = asyncio.Event()
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.forget_all()
        self.then(*script)

    def forget_all(self) -> None:
        """Begins anew: no script, no rules, nothing kept, nothing counted. What runs goes on."""
        self.script: list[Step] = []
        self.default: Answer | Load = Answer()
        self.rules: list[Rule] = []
        self.models = dict(MODELS)
        self.context_limit = CONTEXT_LIMIT
        self.requests: list[Request] = []
        self.rejected: list[tuple[Request, HttpError]] = []
        self.conversations: dict[str, Conversation] = {}
        self.items: dict[str, Json] = {}
        self.responses: dict[str, Json] = {}
        self.inputs: dict[str, list[Json]] = {}
        self.contexts: dict[str, list[Json]] = {}
        self.refusals: dict[str, list[HttpError]] = {
            name: [] for name in ("conversations", "items", "models", "cancel", "deletions")
        }
        self.attachments: list[Break | HttpError | None] = []
        self.cancelled: list[str] = []
        self.shown: list[list[Json]] = []
        self.strikes: Counter[str] = Counter()
        self.lateness = Lateness()
        self._responses = Responses(self)
        self._conversations = Conversations(self)
        self._control = Control(self)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self._host}:{self._port}"

    @property
    def base_url(self) -> str:
        """What OPENAI_BASE_URL would be."""
        return f"http://{self.address}/v1"

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

    # --- listening

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        server = self._server
        self.stop_listening()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if server is not None:
            await server.wait_closed()

    async def listen(self) -> None:
        """Listens, again at the same port if it did before."""
        self._server = await asyncio.start_server(self.accept, self._host, self._port, backlog=_BACKLOG)
        self._port = self._server.sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        """From here on connections are refused, idle ones are closed. What is being served goes on."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._open:
            if connection.idle:
                connection.reset()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection to its end."""
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(reader, writer)
        self._tasks.add(task)
        self._open.add(connection)
        self.connections += 1
        self.accepted += 1
        try:
            while True:
                request = await connection.read_request()
                if request.path.startswith("/__fake__"):
                    await self._control.serve(Exchange(self, request, connection))
                else:
                    self.requests.append(request)
                    await self._serve(Exchange(self, request, connection))
        except (Disconnected, asyncio.CancelledError):
            pass  # a cancelled handler is the end of the test; asyncio would report it as an error
        finally:
            self.connections -= 1
            self._tasks.discard(task)
            self._open.discard(connection)
            with suppress(asyncio.CancelledError):
                await connection.close()

    async def _serve(self, exchange: Exchange) -> None:
        request = exchange.request
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return await exchange.refuse(HttpError(status=401, code="invalid_api_key", message=_NO_KEY))
        if request.garbled:
            return await exchange.reject(HttpError(status=400, message=_GARBLED))
        if request.method == "DELETE" and self.refusals["deletions"]:
            return await exchange.fail(self.refusals["deletions"].pop(0))
        root, *path = request.path.removeprefix("/v1").strip("/").split("/")
        match root:
            case "responses" if self.dialect.responses:
                return await self._responses.serve(exchange, path)
            case "conversations" if self.dialect.conversations:
                return await self._conversations.serve(exchange, path)
            case "chat" if (request.method, path) == ("POST", ["completions"]):
                return await serve_chat(self, exchange)
            case "models" if request.method == "GET":
                return await self._serve_models(exchange, "/".join(path))
        return await exchange.unknown_route()

    async def _serve_models(self, exchange: Exchange, name: str) -> None:
        if self.refusals["models"]:
            return await exchange.fail(self.refusals["models"].pop(0))
        if not name:
            data = [self._model(each) for each in self.models]
            return await exchange.answer({"object": "list", "data": data})
        if name in self.models:
            return await exchange.answer(self._model(name))
        return await exchange.refuse(
            replace(not_found(f"The model '{name}' does not exist"), code="model_not_found", param="model")
        )

    def _model(self, name: str) -> Json:
        facts = {"id": name, "object": "model", "created": 1_790_000_000, "owned_by": "system"}
        return {**facts, "shutdown_date": self.models[name]}

    # --- for those who serve

    def next_step(self, context: Any, body: Json) -> Step:
        """What to do with a request for a response."""
        step = self.script.pop(0) if self.script else self.default
        if isinstance(step, HttpError):
            return step
        wanted = body.get("conversation")
        conversation = wanted["id"] if isinstance(wanted, dict) else wanted
        for rule in self.rules:
            if rule.takes(conversation, lambda: words_of(context)):
                return rule.apply(step)
        return step

    def as_stored(self, items: Iterable[Json]) -> list[Json]:
        """Items as the API gives them back."""
        return [stored(item, self.numbers) for item in items]

    def add_items(self, conversation: Conversation, items: Iterable[Json]) -> None:
        """Adds to a conversation."""
        added = list(items)
        conversation.items += added
        self.items.update((item["id"], item) for item in added)

    def find_item(self, item_id: str) -> Json | None:
        """An item, wherever it is kept."""
        if item_id in self.items:
            return self.items[item_id]
        everything = (item for context in self.contexts.values() for item in context)
        return next((item for item in everything if item["id"] == item_id), None)

    def forget_response(self, response_id: str) -> None:
        """Deletes a response: nothing can follow it any more."""
        self.responses.pop(response_id, None)
        self.inputs.pop(response_id, None)
        self.contexts.pop(response_id, None)

    def ended(self) -> None:
        """A running response has ended."""
        self.running -= 1
        if not self.running:
            self._quiet.set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets something go on by itself while the provider runs."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextmanager
    def open(self, stream: Stream) -> Iterator[Stream]:
        """Keeps a stream among the open ones."""
        self.streams.add(stream)
        try:
            yield stream
        finally:
            self.streams.discard(stream)

    async def wait_at(self, gate: Gate, connection: Connection, seconds: float | None = None) -> None:
        """Waits at a gate, `seconds` at most. Raises Disconnected if the client leaves before."""
        loop = asyncio.get_running_loop()
        timer = None if seconds is None else loop.call_later(seconds, gate.released.set)
        self.gates.add(gate)
        gate.reached.set()
        try:
            await connection.wait_for(gate.released)
        finally:
            self.gates.discard(gate)
            if timer is not None:
                timer.cancel()
