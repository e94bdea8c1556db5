"""A reply cut after any position goes on exactly there: live or ended, here or on another replica."""

import asyncio
from uuid import uuid4

import grpc
import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import judge, pieces
from faults.client import Client, Told, follow, why
from faults.cluster import Cluster
from faults.figures import FIGURES, chance, sized, stores
from harness import until

SUITE = "resume"
TURNS = sized("RESUME_TURNS", 1, 10, 500)

pytestmark = pytest.mark.timeout(60 + 20 * TURNS)


@pytest.mark.parametrize("database_url", stores(tiny="postgresql"), indirect=True)
async def test_every_cut(database_url: str, cluster: Cluster) -> None:
    suite = f"{SUITE}, {database_url.partition(':')[0]}"
    draw = chance(suite)
    # An embedded database has one server: both followers then ask the same one.
    for _ in range(1 if database_url.startswith("sqlite") else 2):
        await cluster.start(database_url)
    here, there = cluster.addresses[0], cluster.addresses[-1]
    for number in range(1, TURNS + 1):
        tool = draw.choice(["tool:plain", "tool:idempotent"])
        told = Told("ada", f"words:{draw.randint(8, 12)} before:3 {tool} pace:20 {uuid4().hex[:8]}")
        chat = asyncio.create_task(Client(cluster, draw, at=here).chat(told))
        live: list[tuple[int, asyncio.Task[list[pb.TurnEvent]]]] = []
        position = 0
        while not chat.done():
            while position <= told.position and told.turn_id and told.finished is None:
                live += [(position, asyncio.create_task(follow(at, told, position))) for at in (here, there)]
                position += 1
            seen = told.position
            await until(lambda told=told, seen=seen: told.position > seen or told.finished)
            if told.finished is not None:
                await chat
        whole = await follow(here, told, 0)
        for after, follower in live:
            assert pieces(await follower, after) == pieces(whole, after), f"live, after {after}"
        for after in range(told.position + 1):
            for at in {here, there}:
                assert pieces(await follow(at, told, after), after) == pieces(whole, after), (
                    f"ended, after {after}"
                )
        assert await follow(there, told, told.position) == []
        for after, code, reason in (
            (told.position + 1, grpc.StatusCode.OUT_OF_RANGE, "POSITION_AHEAD"),
            (2**63 - 1, grpc.StatusCode.OUT_OF_RANGE, "POSITION_AHEAD"),
            (-1, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await follow(there, told, after)
            assert (refusal.value.code(), why(refusal.value)) == (code, reason)
        assert len(live) >= told.position, "the reply was over before it could be followed"
        await judge(suite, database_url, cluster.addresses, [told], draw, reasons=())
        FIGURES.add(suite, {"cuts while live": len(live), "cuts of ended turns": told.position})
        FIGURES.progress(suite, number, TURNS)
