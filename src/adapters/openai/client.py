"""The HTTP client to the provider."""

import ssl
from functools import cache

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpx2Client

OPENAI_URL = "https://api.openai.com/v1"


def make_client(api_key: str, base_url: str | None, max_connections: int, *, connect: float = 5.0) -> AsyncOpenAI:
    """Makes the one client of this process.

    It repeats no request by itself: the SDK would repeat a POST without an idempotency key. HTTP/1.1 only:
    over HTTP/2 every cancelled stream stays counted until the connection takes no more. A server without
    keys is given a placeholder, so that the SDK doesn't look for one in the environment. A connection must be made
    within `connect` seconds.
    """
    timeout = httpx2.Timeout(connect=connect, write=10.0, pool=5.0, read=60.0)
    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    return AsyncOpenAI(
        api_key=api_key or "none",
        base_url=base_url or OPENAI_URL,
        timeout=timeout,
        max_retries=0,
        http_client=DefaultAsyncHttpx2Client(timeout=timeout, limits=limits, http2=False, verify=_trusted()),
    )


@cache
def _trusted() -> ssl.SSLContext:
    """Whom this process believes. Reading the certificates takes 20 ms."""
    return httpx2.create_ssl_context()
