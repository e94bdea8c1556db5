"""A server kills itself in the middle of an erasure, another one goes on: nothing of the user is left."""

import asyncio
import json
from typing import Any

import grpc
import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
from faults.checker import Tables
from faults.client import Client, Told
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, chance, chosen, sized, stores

SUITE = "erasures"
REPEATS = sized("ERASURE_REPEATS", 1, 1, 10)
THREADS = sized("ERASURE_THREADS", 4, 12, 100)
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


async def _erase(channel: grpc.aio.Channel) -> users_api.ErasureReceipt:
    users: Any = UserServiceStub(channel)
    answer = await users.EraseUser(users_api.EraseUserRequest(user_id="ada"), timeout=DEADLINE)
    receipt: users_api.ErasureReceipt = answer.receipt
    return receipt


def _threads(tables: Tables, user: str) -> int:
    return len(tables.rows("SELECT id FROM assistant_threads WHERE user_id = ?", user))
