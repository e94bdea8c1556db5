"""The same as `naive` for the web: FastAPI, the SDK's typed stream, an event for each delta."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

from speed import extras

extras.add()

import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import StreamingResponse  # noqa: E402

from speed.references.serving import client, raise_file_limit  # noqa: E402

_BACKLOG = 4096

app = FastAPI()
sdk = client()


@app.post("/v1/responses")
async def respond(request: Request) -> StreamingResponse:
    """Relays the events of a response."""
    body: dict[str, Any] = await request.json()

    async def events() -> AsyncIterator[str]:
        async with await sdk.responses.create(model=body["model"], input=body["input"], stream=True) as stream:
            async for event in stream:
                yield f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def main() -> None:
    """Serves on a free port of loopback until it is stopped; says which."""
    raise_file_limit()
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, backlog=_BACKLOG))
        print(f"listening on 127.0.0.1:{listening.getsockname()[1]}", flush=True)
        await server.serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(main())
