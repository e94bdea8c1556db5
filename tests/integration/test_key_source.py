"""A key set behind a URL, from servers on loopback that do what real ones do at their worst."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest

from adapters.identity import keys
from adapters.identity.keys import KeysFault, from_url, parse
from certificates import Issuer


@asynccontextmanager
async def answering(answer: bytes, *, again: bytes = b"") -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that answers each request with these bytes, then with `again` for ever, and never hangs up.

    Yields a URL and the requests that came.
    """
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(answer)
            while again and not writer.is_closing():
                writer.write(again)
                await writer.drain()
            await reader.read()  # until the client hangs up

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys", requests


async def test_a_key_set_is_fetched() -> None:
    issuer = Issuer()
    body = issuer.jwks.encode()
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)) as (
        url,
        requests,
    ):
        assert parse(await from_url(url)(), frozenset({"ES256"})).find(issuer.kid, "ES256") is not None
    assert requests[0].startswith(b"GET /keys HTTP/1.1\r\n")


BROKEN = {
    "somewhere else": (b"HTTP/1.1 302 Found\r\nlocation: /canary\r\ncontent-length: 0\r\n\r\n", b"", "HTTP 302"),
    "an error": (b"HTTP/1.1 503 canary\r\ncontent-length: 6\r\n\r\ncanary", b"", "HTTP 503"),
    "no end": (b"HTTP/1.1 200 OK\r\n\r\n", b"canary" * 1_000, "larger"),
    "silence": (b"", b"", "Timeout"),
    "half": (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ncanary", b"", "Timeout"),
    "no HTTP": (b"canary\r\n\r\n", b"", "ClientResponseError|BadStatusLine|BadHttpMessage"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_what_can_not_be_a_key_set_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_TIMEOUT", 0.3)
    answer, again, problem = BROKEN[name]
    async with answering(answer, again=again) as (url, requests):
        with pytest.raises(KeysFault, match=problem) as fault:
            await from_url(url)()
        assert "canary" not in str(fault.value)
    assert len(requests) == 1


async def test_nobody_is_there() -> None:
    with pytest.raises(KeysFault, match="ConnectorError"):
        await from_url("http://127.0.0.1:1/keys")()


async def test_a_proxy_that_is_no_url_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:canary")
    with pytest.raises(KeysFault, match="can't be fetched") as fault:
        await from_url("http://127.0.0.1:1/keys")()
    assert "canary" not in str(fault.value)
