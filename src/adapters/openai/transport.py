"""HTTP/1.1 to the provider, which is read only when somebody asks for more."""

import asyncio
import io
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

KEEPALIVE_SECONDS = 4.0
"""How long a connection is kept for the next request. The longer, the likelier the server ends it just then. It is
looked for as often, so an unused one is closed before it is twice as old; from 5 on, aiohttp rounds up as well."""
MAX_FIELD = 65_536
"""Bytes of a header's line."""

_SMALL = 65_536
"""Bytes of a request that are written at once; more of it is written piece by piece."""
_NO_HEADERS: CIMultiDictProxy[str] = CIMultiDictProxy(CIMultiDict())
_FAILURES = (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError)
"""What a connection can come to; TimeoutError is an OSError."""


class PullTransport(httpx2.AsyncBaseTransport):
    """Sends requests for httpx2 through aiohttp, at most `max_connections` at a time.

    A piece of a body is all that has come since the last one was asked for. In between nothing is read: what comes
    gathers in the kernel, and when that is full, the sender waits. Over TLS asyncio itself reads on meanwhile, up
    to 256 KiB, but opens nothing of it. A body that is not read to its end takes its connection with it.

    No request is repeated, no redirect is followed, no cookie kept. Proxies are those of the environment
    (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY), not over SOCKS; `trusted` says whose certificates are believed.
    What goes wrong is raised as httpx2's exceptions: ConnectError and ConnectTimeout where nothing of the request
    was sent.
    """

    def __init__(self, max_connections: int, trusted: ssl.SSLContext) -> None:
        self._room = asyncio.Semaphore(max_connections)
        self._session: aiohttp.ClientSession | None = None
        self._proxies: dict[str, str | None] = {}
        self._trusted = trusted

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        limits: dict[str, float | None] = request.extensions["timeout"]
        content = await request.aread()
        await self._enter(limits["pool"])
        try:
            async with asyncio.timeout(limits["read"]):
                response = await self._opened().request(
                    request.method,
                    URL(str(request.url), encoded=True),
                    headers=request.headers.multi_items(),
                    data=content if len(content) <= _SMALL else io.BytesIO(content),
                    allow_redirects=False,
                    proxy=self._proxy(request.url),
                    timeout=aiohttp.ClientTimeout(connect=limits["connect"]),
                )
        except _FAILURES as error:
            self._room.release()
            raise _as_httpx2(error) from error
        except BaseException:
            self._room.release()
            raise
        reason = (response.reason or "").encode(errors="surrogateescape")  # bytes that are no UTF-8 as they came
        return httpx2.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response, limits["read"], self._room.release),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": reason},
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _enter(self, seconds: float | None) -> None:
        if not self._room.locked():
            await self._room.acquire()
            return
        try:
            async with asyncio.timeout(seconds):
                await self._room.acquire()
        except TimeoutError as error:
            raise httpx2.PoolTimeout("all connections are in use") from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=self._connector(),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
                middlewares=(_once,),
                response_class=_Answer,
                max_line_size=MAX_FIELD,
                max_field_size=MAX_FIELD,
            )
        return self._session

    def _connector(self) -> aiohttp.BaseConnector:
        return aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=self._trusted)

    def _proxy(self, url: httpx2.URL) -> str | None:
        """The proxy of the environment for an address. It is looked up once for each server."""
        server = f"{url.scheme}://{url.netloc.decode()}"
        if server not in self._proxies:
            proxies = getproxies()
            bypassed = proxy_bypass(url.netloc.decode())
            named = None if bypassed else proxies.get(url.scheme) or proxies.get("all")
            self._proxies[server] = named if named is None or "://" in named else f"http://{named}"
        proxy = self._proxies[server]
        if proxy is not None and not proxy.startswith(("http://", "https://")):
            raise httpx2.UnsupportedProtocol("a proxy must be one for HTTP")
        return proxy


class _Answer(aiohttp.ClientResponse):
    """One that does not keep the headers of its request while its body is read."""

    def __init__(self, method: str, url: URL, *, request_info: aiohttp.RequestInfo, **more: Any) -> None:
        bare = aiohttp.RequestInfo(url, method, _NO_HEADERS, request_info.real_url)
        super().__init__(method, url, request_info=bare, **more)


class _Body(httpx2.AsyncByteStream):
    """A body on its way. `seconds` bound the wait for each piece, None for no bound; `done` is called once."""

    def __init__(self, response: aiohttp.ClientResponse, seconds: float | None, done: Callable[[], None]) -> None:
        self._response = response
        self._seconds = seconds
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._pausing: asyncio.Handle | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            if self._seconds is None:
                piece = await self._piece()
            else:
                async with asyncio.timeout(self._seconds):
                    piece = await self._piece()
        except _FAILURES as error:
            raise _as_httpx2(error) from error
        if not piece:
            raise StopAsyncIteration
        # Whoever comes back at once finds it reading: to pause costs as much as to read.
        self._pausing = self._loop.call_soon(self._pause)
        return piece

    async def _piece(self) -> bytes:
        content = self._response.content
        if not self._goes_on() or not (left := content.read_nowait()):
            return await content.readany()
        # This came between the last piece and the pause. Were it handed out alone, what waits behind it would come
        # in its place, and everything one piece late from now on.
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # asyncio looks at the socket in the first turn and reads in the second
        return left if content.exception() is not None else left + content.read_nowait()

    async def aclose(self) -> None:
        self._response.close()
        if self._pausing is not None:
            self._pausing.cancel()
        self._done()

    def _pause(self) -> None:
        self._pausing = None
        if (transport := self._transport()) is not None:
            transport.pause_reading()

    def _goes_on(self) -> bool:
        """Goes on reading. Returns whether it had paused."""
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
            return False
        if (transport := self._transport()) is not None:
            transport.resume_reading()
        return True

    def _transport(self) -> asyncio.Transport | None:
        connection = self._response.connection
        return None if connection is None else connection.transport


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Sends a request. A lost connection leaves here as an exception of httpx2: to one of its own aiohttp would
    send a GET again, and nobody would know."""
    try:
        return await send(request)
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _as_httpx2(error) from error


def _as_httpx2(error: Exception) -> httpx2.TransportError:
    """What httpx2 would raise. Only ConnectError and ConnectTimeout say that nothing was sent."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            kind: type[httpx2.TransportError] = httpx2.ConnectTimeout
        case aiohttp.ClientConnectorError() | aiohttp.ClientHttpProxyError():
            kind = httpx2.ConnectError
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            kind = httpx2.UnsupportedProtocol
        case TimeoutError():
            kind = httpx2.ReadTimeout
        case OSError():
            kind = httpx2.ReadError
        case _:
            kind = httpx2.RemoteProtocolError
    return kind(str(error))
