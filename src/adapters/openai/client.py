"""The HTTP client to the provider."""

import ssl
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
from openai import AsyncOpenAI

from adapters.openai.transport import PullTransport

OPENAI_URL = "https://api.openai.com/v1"

TIMEOUT = httpx2.Timeout(connect=5.0, pool=5.0, read=60.0, write=None)
"""In seconds: to make a connection, to wait for one that is free, and for the next bytes of an answer. The first
of them are waited for as long from before the request is sent."""
WATCHED = httpx2.Timeout(connect=5.0, pool=5.0, read=None, write=None)
"""The same for an answer that a Watchdog bounds."""


def make_client(api_key: str, base_url: str | None, max_connections: int) -> AsyncOpenAI:
    """Makes the one client of this process.

    It repeats no request by itself: the SDK would repeat a POST without an idempotency key. It follows no
    redirect and keeps no cookie. A server without keys is given a placeholder, so that the SDK doesn't look for
    one in the environment.
    """
    return AsyncOpenAI(
        api_key=api_key or "none",
        base_url=base_url or OPENAI_URL,
        timeout=TIMEOUT,
        max_retries=0,
        http_client=httpx2.AsyncClient(
            transport=PullTransport(max_connections, _trusted()),
            timeout=TIMEOUT,
            trust_env=False,  # the transport has looked there
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        ),
    )


@cache
def _trusted() -> ssl.SSLContext:
    """Whom this process believes. Reading the certificates takes 20 ms."""
    context = httpx2.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
