"""The transport to the provider, against servers on loopback that do what real ones do at their worst."""

import array
import asyncio
import fcntl
import gzip
import select
import socket
import ssl
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvloop

from adapters.openai.client import make_client
from adapters.openai.transport import MAX_FIELD, PullTransport
from harness import until

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Answer = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One connection as a server has it: requests come in, bytes go out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[str, bytes]:
        """The next request: its head and its body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        sizes = [line.split(":")[1] for line in head.lower().splitlines() if line.startswith("content-length:")]
        return head, await self.reader.readexactly(int(sizes[0]) if sizes else 0)

    async def send(self, data: bytes) -> None:
        """Sends bytes, at once."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Ends the connection with a reset."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Server:
    """Serves each connection as `answer` says. `heads` are those of the requests that it has seen."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.url = ""
        self.port = 0
        self.connections = 0
        self.gone = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection to its end."""
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(Exchange(reader, writer))
        writer.close()
        with suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        self.gone += 1


@asynccontextmanager
async def serving(
    answer: Answer, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, host, 0, ssl=tls)
    server.port = listening.sockets[0].getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    server.url = f"{'https' if tls else 'http'}://{name}:{server.port}/v1"
    async with listening:
        yield server
        await until(lambda: server.gone == server.connections)


@asynccontextmanager
async def client(connections: int = 1, read: float | None = 5.0) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Timeout(connect=5.0, read=read, write=None, pool=0.05)
    async with httpx2.AsyncClient(
        transport=PullTransport(connections, httpx2.create_ssl_context()), timeout=limits, trust_env=False
    ) as made:
        yield made


async def always(exchange: Exchange) -> None:
    """Says "ok" to everything."""
    while True:
        await exchange.request()
        await exchange.send(OK)


def saying(data: bytes) -> Answer:
    """Says this to the first request, and ends the connection."""

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(data)

    return answer


# --- reading


def socket_of(response: httpx2.Response) -> Any:
    """Our end of an answer's connection, and its transport."""
    body: Any = response.stream
    transport = body._stream._response.connection.transport
    return transport.get_extra_info("socket"), transport


def unread(connection: Any) -> int:
    """Bytes that have arrived in the kernel and that nobody has read."""
    found = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, found)
    return found[0]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def test_what_comes_between_two_reads_is_one_piece() -> None:
    more, sent = asyncio.Event(), asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED + chunk(b"one "))
        await more.wait()
        for _ in range(100):
            await exchange.send(chunk(b"more "))
        await exchange.send(chunk(b""))
        sent.set()
        await exchange.reader.read()

    async with serving(answer) as server, client() as http, http.stream("POST", server.url) as response:
        pieces = response.aiter_raw()
        assert await anext(pieces) == b"one "
        connection, transport = socket_of(response)
        await until(lambda: not transport.is_reading())
        more.set()
        await sent.wait()
        await until(lambda: unread(connection) == 100 * len(chunk(b"more ")) + len(chunk(b"")))
        assert [piece async for piece in pieces] == [b"more " * 100]


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on uvloop, as `serve` does, and on asyncio's own: they look at sockets at different times."""

    def run(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test())

    loops = pytest.mark.parametrize(
        "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
    )
    return loops(run)


async def paused_behind(
    exchanges: "asyncio.Queue[Exchange]", pieces: AsyncIterator[bytes], response: Any
) -> Exchange:
    """Reads a first piece, lets another slip in before the pause, and waits for that."""
    exchange = await exchanges.get()
    assert await anext(pieces) == b"one "
    response.stream._stream._response.content.feed_data(b"slipped ")
    _, transport = socket_of(response)
    await until(lambda: not transport.is_reading())
    return exchange


@on_both_loops
async def test_what_slips_in_before_a_pause_comes_with_what_comes_behind_it() -> None:
    async with streaming() as (exchanges, response):
        pieces = response.aiter_raw()
        exchange = await paused_behind(exchanges, pieces, response)
        connection, transport = socket_of(response)
        for sent, came in ((b"abc", b"slipped abc"), (b"def", b"def")):
            await exchange.send(chunk(sent))
            await until(lambda: unread(connection) == len(chunk(b"abc")))
            assert await anext(pieces) == came
            await until(lambda: not transport.is_reading())


@on_both_loops
async def test_what_slips_in_before_a_pause_is_not_lost_with_the_connection() -> None:
    async with streaming() as (exchanges, response):
        pieces = response.aiter_raw()
        exchange = await paused_behind(exchanges, pieces, response)
        exchange.reset()
        assert await anext(pieces) == b"slipped "
        with pytest.raises(httpx2.TransportError):
            await anext(pieces)


@asynccontextmanager
async def streaming() -> AsyncIterator[tuple["asyncio.Queue[Exchange]", httpx2.Response]]:
    """An answer that has begun, and the server's end of it."""
    exchanges: asyncio.Queue[Exchange] = asyncio.Queue()

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED + chunk(b"one "))
        exchanges.put_nowait(exchange)
        await exchange.reader.read()

    async with serving(answer) as server, client() as http, http.stream("POST", server.url) as response:
        yield exchanges, response


async def test_a_sender_is_held_up_while_nobody_reads() -> None:
    loop = asyncio.get_running_loop()
    data = chunk(b"x" * 65_536)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        async with client() as http:
            asking = asyncio.create_task(http.send(http.build_request("POST", url), stream=True))
            sender, _ = await loop.sock_accept(listening)
            with sender:
                await loop.sock_recv(sender, 65_536)
                await loop.sock_sendall(sender, CHUNKED + chunk(b"one"))
                response = await asking
                pieces = response.aiter_raw()
                assert await anext(pieces) == b"one"
                connection, transport = socket_of(response)
                await until(lambda: not transport.is_reading())
                sent = await asyncio.wait_for(loop.run_in_executor(None, fill, sender, data), 5)
                held = unread(connection)
                assert held > 0
                assert await asyncio.wait_for(loop.run_in_executor(None, fill, sender, data), 5) == 0
                assert unread(connection) >= held  # the kernel may bring more, nobody takes any

                rest = (data * (sent // len(data) + 1))[sent % len(data) :][: -sent % len(data)]
                ending = asyncio.create_task(loop.sock_sendall(sender, rest + chunk(b"")))
                size = sum([len(piece) async for piece in pieces])
                await ending
                assert size == -(-sent // len(data)) * 65_536
                await response.aclose()


def fill(sender: socket.socket, data: bytes) -> int:
    """Sends the same over and over until the socket takes no more, nor for a while after what it took has got
    across. Returns how many bytes it took."""
    room = select.poll()
    room.register(sender, select.POLLOUT)
    sent = 0
    while room.poll(200):
        with suppress(BlockingIOError):
            while True:
                sent += sender.send(data[sent % len(data) :])
    return sent


async def test_a_body_left_unread_takes_its_connection_with_it() -> None:
    gone = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED + chunk(b"one"))
        with suppress(ConnectionError):
            await exchange.reader.read()
        gone.set()

    async with serving(answer) as server, client() as http:
        for number in range(3):
            async with http.stream("POST", server.url) as response:
                assert await anext(response.aiter_raw()) == b"one"
            await gone.wait()
            gone.clear()
            assert server.connections == number + 1


async def test_a_request_that_is_cancelled_leaves_its_place() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        asked.set()
        with suppress(ConnectionError):
            await exchange.reader.read()
        gone.set()

    async with serving(answer) as server, client() as http:
        for _ in range(3):
            asking = asyncio.create_task(http.post(server.url))
            await asked.wait()
            with pytest.raises(httpx2.PoolTimeout):
                await http.post(server.url)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await gone.wait()
            asked.clear()
            gone.clear()


async def test_silence_is_bounded_only_while_somebody_waits() -> None:
    go_on = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED + chunk(b"one"))
        await go_on.wait()
        await exchange.send(chunk(b"two"))
        await exchange.reader.read()

    async with (
        serving(answer) as server,
        client(read=0.5) as http,
        http.stream("POST", server.url) as response,
    ):
        pieces = response.aiter_raw()
        assert await anext(pieces) == b"one"
        elapsed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.6, elapsed.set)
        await elapsed.wait()
        go_on.set()
        assert await anext(pieces) == b"two"
        with pytest.raises(httpx2.ReadTimeout):
            await anext(pieces)


# --- what is sent, and how often


async def test_a_connection_is_used_again() -> None:
    async with serving(always) as server, client() as http:
        for _ in range(3):
            assert (await http.post(server.url, content=b"x")).text == "ok"
        assert server.connections == 1


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_that_ends_just_as_a_request_is_sent(method: str, how: str) -> None:
    requests = []

    async def answer(exchange: Exchange) -> None:
        requests.append(await exchange.request())
        await exchange.send(OK)
        requests.append(await exchange.request())
        if how == "reset":
            exchange.reset()

    async with serving(answer) as server, client() as http:
        assert (await http.request(method, server.url)).text == "ok"
        with pytest.raises(httpx2.RemoteProtocolError if how == "close" else httpx2.ReadError):
            await http.request(method, server.url)
        assert len(requests) == 2


async def test_a_connection_that_ended_before_is_not_used() -> None:
    def kept(http: Any) -> list[Any]:
        connections = http._transport._session.connector._conns.values()
        return [protocol for idle in connections for protocol, *_ in idle if protocol.is_connected()]

    async with serving(saying(OK)) as server, client() as http:
        for _ in range(3):
            assert (await http.post(server.url)).text == "ok"
            await until(lambda: not kept(http))
        assert server.connections == 3


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_connections_that_nobody_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.openai.transport.KEEPALIVE_SECONDS", 0.2)
    all_there = asyncio.Barrier(200)

    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await all_there.wait()
        await exchange.send(OK)
        await exchange.request()

    async with serving(answer) as server, client(200) as http:
        before = descriptors()
        async with asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(http.post(server.url))
        assert server.connections == 200
        await until(lambda: server.gone == 200)
        assert descriptors() <= before


async def test_an_address_of_another_kind_is_told_apart() -> None:
    async with client() as http:
        for _ in range(2):  # its place is free again
            with pytest.raises(httpx2.UnsupportedProtocol):
                await http.post("ftp://127.0.0.1/")


async def test_nobody_listening_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    async with client() as http:
        with pytest.raises(httpx2.ConnectError):
            await http.post(f"http://127.0.0.1:{port}/")
        with pytest.raises(httpx2.ConnectError):
            await http.post("http://nowhere.invalid/")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
        CHUNKED + b"9\r\nhalf",
        CHUNKED + b"nine\r\nhalf",
        b"HTTP/1.1 200 OK\r\nx-large: " + b"x" * (MAX_FIELD + 1) + b"\r\n\r\n",
    ],
    ids=["nothing", "half a head", "no HTTP", "half a body", "half a chunk", "no chunk", "a large header"],
)
async def test_an_answer_cut_short_or_broken(data: bytes) -> None:
    async with serving(saying(data)) as server, client() as http:
        for _ in range(2):  # its place is free again
            with pytest.raises(httpx2.RemoteProtocolError):
                await http.post(server.url)


async def test_whatever_letters_a_server_names_its_status_in() -> None:
    data = OK.replace(b"200 OK", b"503 D\xe9pass\xe9")
    async with serving(saying(data)) as server, client() as http:
        for _ in range(2):  # its place is free again
            response = await http.post(server.url)
            assert (response.status_code, response.text) == (503, "ok")


async def test_a_reset_in_the_middle_of_a_body() -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.request()
        await exchange.send(CHUNKED + chunk(b"one"))
        await exchange.reader.read(1)
        exchange.reset()

    async with serving(answer) as server, client() as http, http.stream("POST", server.url) as response:
        pieces = response.aiter_raw()
        assert await anext(pieces) == b"one"
        socket_of(response)[1].write(b"!")
        with pytest.raises((httpx2.RemoteProtocolError, httpx2.ReadError)):
            await anext(pieces)


async def test_a_large_header_and_a_large_request() -> None:
    bodies = []

    async def answer(exchange: Exchange) -> None:
        bodies.append((await exchange.request())[1])
        await exchange.send(OK.replace(b"\r\n\r\n", b"\r\nx-large: " + b"x" * 60_000 + b"\r\n\r\n"))

    body = bytes(range(256)) * 20_000
    async with serving(answer) as server, client() as http:
        response = await http.post(server.url, content=body)
    assert bodies == [body]
    assert len(response.headers["x-large"]) == 60_000


async def test_a_compressed_answer() -> None:
    packed = gzip.compress(b"words " * 1000)
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with serving(saying(head + packed)) as server, client() as http:
        assert (await http.post(server.url)).text == "words " * 1000


async def test_ipv6() -> None:
    async with serving(always, "::1") as server, client() as http:
        assert (await http.post(server.url)).text == "ok"


async def test_redirects_are_not_followed() -> None:
    async with serving(always) as elsewhere:
        moved = f"HTTP/1.1 307 Moved\r\nlocation: {elsewhere.url}\r\ncontent-length: 0\r\n\r\n".encode()
        async with serving(saying(moved)) as server, make_client("key", server.url, 1) as asking:
            with pytest.raises(openai.APIStatusError):
                await asking.responses.create(model="gpt-6-luna", input="Hello")
        assert elsewhere.connections == 0


async def test_cookies_are_not_kept() -> None:
    heads = []

    async def answer(exchange: Exchange) -> None:
        while True:
            heads.append((await exchange.request())[0])
            await exchange.send(OK.replace(b"\r\n\r\n", b"\r\nset-cookie: a=b; Path=/\r\n\r\n"))

    async with serving(answer) as server, make_client("key", server.url, 1) as asking:
        for _ in range(2):
            await asking.responses.with_raw_response.retrieve("resp_1")
    assert len(heads) == 2
    assert "cookie" not in "".join(heads).lower()


# --- proxies and certificates


@pytest.fixture
def no_proxy_yet(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of our own for 127.0.0.1, and its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "made.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=loopback"
    command += " -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:TRUE"
    files = ("-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem"))
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    made.write_bytes((folder / "key.pem").read_bytes() + (folder / "certificate.pem").read_bytes())
    return made


def tls_of(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


async def test_a_certificate_of_an_own_authority(certificate: Path, no_proxy_yet: pytest.MonkeyPatch) -> None:
    async with serving(always, tls=tls_of(certificate)) as server:
        async with client() as http:
            with pytest.raises(httpx2.ConnectError):
                await http.post(server.url)
        no_proxy_yet.setenv("SSL_CERT_FILE", str(certificate.with_name("certificate.pem")))
        async with client() as http:
            assert (await http.post(server.url)).text == "ok"
            with pytest.raises(httpx2.ConnectError):
                await http.post(server.url.replace("127.0.0.1", "localhost"))


async def test_the_client_tells_nothing_to_whom_nobody_vouches_for(
    certificate: Path, no_proxy_yet: pytest.MonkeyPatch
) -> None:
    requests = []

    async def answer(exchange: Exchange) -> None:
        requests.append(await exchange.request())
        await exchange.send(OK)

    no_proxy_yet.delenv("SSL_CERT_FILE", raising=False)
    async with serving(answer, tls=tls_of(certificate)) as server, make_client("key", server.url, 1) as asking:
        with pytest.raises(openai.APIConnectionError) as refused:
            await asking.models.list()
    assert isinstance(refused.value.__cause__, httpx2.ConnectError)
    assert requests == []


async def test_an_encrypted_sender_is_held_up_as_well(certificate: Path, no_proxy_yet: pytest.MonkeyPatch) -> None:
    size = 16 << 20
    held = asyncio.Event()
    sent = 0

    async def answer(exchange: Exchange) -> None:
        nonlocal sent
        await exchange.request()
        await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            exchange.writer.write(b"x" * 65_536)
            sent += 65_536
            if exchange.writer.transport.get_write_buffer_size() > 1 << 20:
                held.set()
                await exchange.writer.drain()
        await exchange.writer.drain()

    no_proxy_yet.setenv("SSL_CERT_FILE", str(certificate.with_name("certificate.pem")))
    async with (
        serving(answer, tls=tls_of(certificate)) as server,
        client() as http,
        http.stream("POST", server.url) as response,
    ):
        pieces = response.aiter_raw()
        got = len(await anext(pieces))
        await held.wait()
        assert sent < size
        async for piece in pieces:
            got += len(piece)
    assert got == sent == size


def tunnel(heads: list[str], port: int) -> Answer:
    """A proxy that connects to a server here, whatever it is asked for."""

    async def answer(exchange: Exchange) -> None:
        head, _ = await exchange.request()
        heads.append(head)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await exchange.send(b"HTTP/1.1 200 Connected\r\n\r\n")

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                target.write(data)
                await target.drain()
            target.close()

        await asyncio.gather(copy(exchange.reader, writer), copy(reader, exchange.writer), return_exceptions=True)
        writer.close()

    return answer


async def test_a_proxy_of_the_environment(certificate: Path, no_proxy_yet: pytest.MonkeyPatch) -> None:
    heads: list[str] = []
    no_proxy_yet.setenv("SSL_CERT_FILE", str(certificate.with_name("certificate.pem")))
    async with serving(always, tls=tls_of(certificate)) as server, serving(tunnel(heads, server.port)) as proxy:
        no_proxy_yet.setenv("HTTPS_PROXY", f"http://ann:word@127.0.0.1:{proxy.port}")
        async with client() as http:
            assert (await http.post(server.url, headers={"authorization": "Bearer key"})).text == "ok"
        assert heads[0].startswith(f"CONNECT 127.0.0.1:{server.port} ")
        assert "proxy-authorization: basic" in heads[0].lower()
        assert "Bearer" not in heads[0]
        no_proxy_yet.setenv("NO_PROXY", "127.0.0.1")
        async with client() as http:
            assert (await http.post(server.url)).text == "ok"
        assert len(heads) == 1


async def test_a_proxy_without_encryption(no_proxy_yet: pytest.MonkeyPatch) -> None:
    heads = []

    async def answer(exchange: Exchange) -> None:
        heads.append((await exchange.request())[0])
        await exchange.send(OK)

    async with serving(answer) as proxy, client() as http:
        no_proxy_yet.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
        assert (await http.post("http://provider.test/v1")).text == "ok"
    assert heads[0].startswith("POST http://provider.test/v1 HTTP/1.1")


async def test_a_proxy_that_refuses(certificate: Path, no_proxy_yet: pytest.MonkeyPatch) -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    async with serving(saying(refusal)) as proxy, client() as http:
        no_proxy_yet.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(httpx2.ConnectError):
            await http.post("https://provider.test/v1")


async def test_a_proxy_of_another_kind(no_proxy_yet: pytest.MonkeyPatch) -> None:
    async with client() as http:
        no_proxy_yet.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
        for _ in range(2):
            with pytest.raises(httpx2.UnsupportedProtocol):
                await http.post("https://provider.test/v1")
