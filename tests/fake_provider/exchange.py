"""One request on its connection, and the ways to answer it."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fake_provider.script import HttpError
from fake_provider.wire import Connection, Disconnected, Json, Request

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider


class Exchange:
    """A request and its answer."""

    def __init__(self, provider: "FakeProvider", request: Request, connection: Connection) -> None:
        self._provider = provider
        self.request = request
        self.connection = connection

    @property
    def body(self) -> Json:
        """The body of the request; empty where there is none."""
        return self.request.body or {}

    @property
    def headers(self) -> Mapping[str, str]:
        """What every answer carries."""
        return {"x-request-id": self._provider.numbers.next("req"), "openai-processing-ms": "1"}

    async def answer(self, body: Json) -> None:
        """Answers with an object."""
        await self.connection.answer(200, json.dumps(body).encode(), self.headers)

    async def refuse(self, error: HttpError) -> None:
        """Answers with an error. Raises Disconnected where that is a reset."""
        if error.gate is not None:
            await self._provider.wait_at(error.gate, self.connection)
        if error.reset:
            self.connection.reset()
            raise Disconnected
        facts = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        body = json.dumps({"error": facts}).encode() if error.body is None else error.body
        await self.connection.answer(error.status, body, {**self.headers, **error.headers})

    async def fail(self, error: HttpError) -> None:
        """Answers with an error that the script wants, and counts it."""
        self._provider.strikes[error.name or ("reset" if error.reset else str(error.status))] += 1
        await self.refuse(error)

    async def reject(self, error: HttpError) -> None:
        """Answers to a request that is wrong in itself, and remembers that."""
        self._provider.rejected.append((self.request, error))
        await self.refuse(error)

    async def miss(self, what: str, name: str) -> None:
        """Says that a thing is not there."""
        await self.refuse(not_found(f"{what} with id '{name}' not found."))

    async def unknown_route(self) -> None:
        """Says that there is no such endpoint, in the words of the server that is played."""
        dialect = self._provider.dialect
        await self.connection.answer(404, dialect.missing, {**self.headers, "content-type": dialect.missing_type})


def not_found(message: str) -> HttpError:
    """The API's 404."""
    return HttpError(status=404, message=message)
