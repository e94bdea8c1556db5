"""A server kills itself in the middle of an erasure, another one goes on: nothing of the user is left. Two that
delete at the provider at the same time share the work."""

import asyncio
import json
import sqlite3
from collections import Counter
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from sqlalchemy import make_url

from adapters.openai import make_client
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
from fake_provider import FakeProvider, HttpError, rate_limited
from fake_provider.exchange import Exchange
from faults.checker import Tables
from faults.client import Client, Told
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, chance, chosen, sized, stores

SUITE = "erasures"
REPEATS = sized("ERASURE_REPEATS", 1, 1, 10)
THREADS = sized("ERASURE_THREADS", 4, 12, 100)
COPIES = sized("ERASURE_COPIES", 200, 2_000, 20_000)
CANARIES = sized("ERASURE_CANARIES", 1, 1, 8)
POINTS = [f"delete.{commit}-commit#{number}" for commit in ("before", "after") for number in (1, 2, THREADS)]

_UNFINISHED = "SELECT id FROM erasures WHERE finished_at IS NULL"

pytestmark = pytest.mark.timeout(60 * REPEATS)


@pytest.mark.parametrize("point", chosen(POINTS, "delete.after-commit#2"))
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_an_erasure_goes_on_after_kill_9(point: str, database_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, point, number)
        server = await cluster.start(database_url, point)
        for user in ("ada", "eve"):
            for line in range(THREADS):
                await Client(cluster, draw).chat(Told(user, f"words:2 n{number} {line}"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await _erase(channel)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        await cluster.struck(server, point)
        tables = Tables(database_url)
        left = _threads(tables, "ada")
        assert left == THREADS - int(point.partition("#")[2]) + ("before" in point)
        survivor = await cluster.start(database_url)
        while tables.rows(_UNFINISHED):  # noqa: ASYNC110 - it is another process that is waited for
            await asyncio.sleep(0.01)
        assert _threads(tables, "ada") == 0
        assert not tables.rows("SELECT id FROM users WHERE id = ?", "ada")
        assert not tables.rows("SELECT id FROM turns WHERE user_id = ?", "ada")
        (receipt,) = tables.rows("SELECT erased FROM erasures ORDER BY requested_at DESC LIMIT 1")
        erased = receipt["erased"]
        assert (json.loads(erased) if isinstance(erased, str) else erased)["threads"] == THREADS
        assert _threads(tables, "eve") == THREADS * (number + 1)
        async with grpc.aio.insecure_channel(survivor.address) as channel:
            assert (await _erase(channel)).erased == users_api.ErasedCounts()
        assert await survivor.terminate() == 0
        cluster.forget(survivor)
        FIGURES.add(SUITE, {"erasures": 1, "threads left at the kill": left})


class Shelf(FakeProvider):
    """Answers once `asked` is had by as many shelves as there are."""

    def __init__(self, asked: asyncio.Barrier) -> None:
        super().__init__()
        self._asked = asked
        self._first = True

    @property
    def deleted(self) -> list[str]:
        """The paths that were to be deleted."""
        return [request.path for request in self.requests if request.method == "DELETE"]

    async def _serve(self, exchange: Exchange) -> None:
        if self._first:
            self._first = False
            await self._asked.wait()
        await super()._serve(exchange)


@pytest.mark.timeout(60 + COPIES / 50)
async def test_two_processes_delete_each_copy_once(postgres_url: str, cluster: Cluster) -> None:
    async with AsyncExitStack() as stack:
        both_have_some = asyncio.Barrier(2)
        shelves = [await stack.enter_async_context(Shelf(both_have_some)) for _ in range(2)]
        channels = []
        for shelf in shelves:
            server = await cluster.start(postgres_url, VIDA_PROVIDER="practice", OPENAI_BASE_URL=shelf.base_url)
            channels.append(await stack.enter_async_context(grpc.aio.insecure_channel(server.address)))
        with psycopg.connect(postgres_url) as connection:
            connection.execute(
                "INSERT INTO copies SELECT 'openai', 'resp_' || n, 'gone', now() - interval '1 minute', 0, '' "
                "FROM generate_series(1, %s) n",
                [COPIES],
            )
        await asyncio.gather(*map(_erase, channels))  # so that both look now
        tables = Tables(postgres_url)
        while tables.rows("SELECT 1 FROM copies LIMIT 1"):  # noqa: ASYNC110 - other processes are waited for
            await asyncio.sleep(0.05)
    shares = [Counter(shelf.deleted) for shelf in shelves]
    assert all(shares), "one of them had nothing to do"
    assert sum(shares, Counter()) == Counter(f"/v1/responses/resp_{n}" for n in range(1, COPIES + 1))
    FIGURES.add(
        SUITE, {"copies deleted by two": COPIES, "by the one that did less": min(s.total() for s in shares)}
    )


@pytest.mark.timeout(120 * CANARIES)
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_no_canary_is_left_whatever_strikes(database_url: str, cluster: Cluster) -> None:
    """kill -9 in the middle of the erasure, a provider that fails: nothing is left in the record, its files, or
    there. What is of another user stays."""
    for number in range(CANARIES):
        draw = chance(SUITE, "canaries", number)
        mark = f"canary-{draw.randrange(10**12):012}"
        async with FakeProvider() as provider, make_client("", provider.base_url, 5) as client:
            before = await cluster.start(database_url)
            for user in ("ada", "eve"):
                for line in range(THREADS):
                    await Client(cluster, draw).chat(Told(user, f"words:2 n{line} {mark}-{user}"))
            assert await before.terminate() == 0
            cluster.forget(before)
            for thread in Tables(database_url).rows("SELECT id FROM assistant_threads WHERE user_id = 'ada'"):
                content = [{"type": "message", "role": "user", "content": f"{mark}-ada"}]
                kept = await client.conversations.create(items=content)  # type: ignore[arg-type]
                _note(database_url, kept.id, thread["id"])
            faults = [HttpError(status=500), HttpError(status=503), HttpError(reset=True), rate_limited()]
            provider.refusals["deletions"] = [draw.choice(faults) for _ in range(draw.randint(1, THREADS))]
            assert f"{mark}-ada" in _everything(database_url) + str(provider.items)

            settings = {"VIDA_PROVIDER": "practice", "OPENAI_BASE_URL": provider.base_url}
            point = f"delete.{draw.choice(['before', 'after'])}-commit#{draw.randint(1, THREADS)}"
            server = await cluster.start(database_url, point, **settings)
            async with grpc.aio.insecure_channel(server.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await _erase(channel)
            await cluster.struck(server, point)
            survivor = await cluster.start(database_url, **settings)
            while f"{mark}-ada" in _everything(database_url) + str(provider.items):  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.1)
            while Tables(database_url).rows("SELECT 1 FROM copies"):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.1)
            assert not provider.conversations
            assert not provider.refusals["deletions"]
            assert f"{mark}-eve" in _everything(database_url)
            assert await survivor.terminate() == 0
            cluster.forget(survivor)
        FIGURES.add(SUITE, {"erasures with faults at both ends": 1})


def _note(database_url: str, ref: str, thread_id: str) -> None:
    """Puts on record what the provider has of a thread. Nobody uses the database."""
    row = ("openai", ref, thread_id, 0, "")
    names = "INSERT INTO copies (provider, ref, thread_id, tries, reason) VALUES"
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(database_url).database or "")) as record:
            record.execute(f"{names} (?, ?, ?, ?, ?)", row)
            record.commit()
    else:
        with psycopg.connect(database_url) as server:
            server.execute(f"{names} (%s, %s, %s, %s, %s)".encode(), row)


def _everything(database_url: str) -> str:
    """All octets of an embedded database's files; every row of another's."""
    if database_url.startswith("sqlite"):
        folder = Path(make_url(database_url).database or "").parent
        files = [file for file in folder.iterdir() if file.is_file()]
        return b"".join(file.read_bytes() for file in files).decode("latin-1")
    tables = Tables(database_url)
    names = tables.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return str([tables.rows(f"SELECT * FROM {name['tablename']}") for name in names])


async def _erase(channel: grpc.aio.Channel) -> users_api.ErasureReceipt:
    users: Any = UserServiceStub(channel)
    answer = await users.EraseUser(users_api.EraseUserRequest(user_id="ada"), timeout=DEADLINE)
    receipt: users_api.ErasureReceipt = answer.receipt
    return receipt


def _threads(tables: Tables, user: str) -> int:
    return len(tables.rows("SELECT id FROM assistant_threads WHERE user_id = ?", user))
