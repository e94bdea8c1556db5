"""A replica is stopped past its lease and goes on later: nothing that it writes then is taken."""

import asyncio
import random
from uuid import uuid4

import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import Tables, go_on, judge
from faults.client import Client, Told, follow
from faults.cluster import DEADLINE, LEASE, Cluster
from faults.figures import FIGURES, chance, sized
from faults.process import ServerProcess
from faults.scripted import Effects
from harness import until

SUITE = "zombies"
CYCLES = sized("ZOMBIE_CYCLES", 1, 5, 200)

pytestmark = pytest.mark.timeout(60 + 40 * CYCLES)

_AGAIN = ("completed", 2, None)

# Stopped in the midst of the text, before the first word, before a call of a tool, and between effect and record:
# how each ends, and in which attempt.
MESSAGES = {
    "words:60 pace:20": ("incomplete", 1, "INTERRUPTED"),
    "words:40 pace:20": ("incomplete", 1, "INTERRUPTED"),
    "words:5 slow-start:0.8": _AGAIN,
    "words:5 slow-start:0.8 state:1": _AGAIN,
    "words:3 slow-start:0.8 tool:plain": _AGAIN,
    "words:3 tool:plain linger:1.5": ("failed", 1, "TOOL_OUTCOME_UNKNOWN"),
    "words:3 tool:idempotent linger:1.5": _AGAIN,
}


async def test_a_zombie_writes_nothing(postgres_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE)
    await asyncio.gather(*(cluster.start(postgres_url) for _ in range(2)))
    for cycle in range(1, CYCLES + 1):
        cluster.servers.reverse()
        tolds = [Told(f"ada{number}", f"{text} {uuid4().hex[:8]}") for number, text in enumerate(MESSAGES)]
        match cycle % 4:
            case 1 | 3:
                await _pause_beyond_the_end(cluster, draw, postgres_url, tolds)
            case 2:
                await _pause_beyond_the_lease(cluster, draw, postgres_url, tolds)
            case _:
                await _pause_within_the_lease(cluster, draw, tolds)
        await judge(SUITE, postgres_url, cluster.addresses, tolds, draw)
        _judge_effects(cluster, tolds)
        for server in cluster.servers:
            await go_on(server.address, tolds)
        FIGURES.add(SUITE, {"cycles": 1})
        FIGURES.progress(SUITE, cycle, CYCLES)
    # One that is stopped within a transaction holds its locks for a while: then there may be nobody at work.
    assert CYCLES < 4 or FIGURES.suites[SUITE]["at work when the zombie came back"], "nobody was ever at work"


async def _pause_beyond_the_end(
    cluster: Cluster, draw: random.Random, database_url: str, tolds: list[Told]
) -> None:
    """The zombie finds that all its turns have ended."""
    zombie, other = cluster.servers
    tables = Tables(database_url)
    chats = await _begin(cluster, draw, tolds)
    zombie.pause()
    # The other replica brings every turn to its end, and shows it.
    histories = await asyncio.gather(*(follow(other.address, told, 0) for told in tolds))
    turn_ids = [history[-1].finished.turn.id for history in histories]
    before = await asyncio.to_thread(tables.picture, turn_ids)
    zombie.go_on()
    # Its own followers stay with it, and hear what really happened.
    await asyncio.gather(*chats)
    # It works again, long enough for whatever it may still have wanted to write.
    fresh = await Client(cluster, draw, at=zombie.address).chat(Told("eve", "words:30 pace:20"))
    assert fresh.turn.state == pb.TURN_STATE_COMPLETED
    assert await asyncio.to_thread(tables.picture, turn_ids) == before, "a zombie has written"
    _judge_takeover(tables, other, tolds)
    FIGURES.add(SUITE, {"turns taken over": len(tolds)})


async def _pause_beyond_the_lease(
    cluster: Cluster, draw: random.Random, database_url: str, tolds: list[Told]
) -> None:
    """The zombie finds another process at work on its turns, at the very positions at which it would go on."""
    zombie, other = cluster.servers
    tables = Tables(database_url)
    chats = await _begin(cluster, draw, tolds)
    turn_ids = [told.turn_id for told in tolds]
    epochs = {turn_id: stored.turn["epoch"] for turn_id, stored in tables.turns(turn_ids).items()}
    zombie.pause()
    async with asyncio.timeout(DEADLINE):
        while any(
            stored.turn["epoch"] == epochs[turn_id]
            for turn_id, stored in (await asyncio.to_thread(tables.turns, turn_ids)).items()
        ):
            continue
    at_work = await asyncio.to_thread(tables.unended, turn_ids)
    zombie.go_on()
    await asyncio.gather(*chats)
    _judge_takeover(tables, other, tolds)
    FIGURES.add(SUITE, {"turns taken over": len(tolds), "at work when the zombie came back": len(at_work)})


def _judge_takeover(tables: Tables, other: ServerProcess, tolds: list[Told]) -> None:
    """Every turn ended as if its first process had been killed, by the other one's work alone."""
    stored = tables.turns([told.turn_id for told in tolds])
    for told, outcome in zip(tolds, MESSAGES.values(), strict=True):
        row = stored[told.turn_id].turn
        assert (row["state"], row["attempt"], row["reason"]) == outcome, told.message
        if outcome == _AGAIN:
            assert row["input_tokens"] == other.pid, f"the zombie has finished {told.message}"


async def _pause_within_the_lease(cluster: Cluster, draw: random.Random, tolds: list[Told]) -> None:
    chats = await _begin(cluster, draw, tolds)
    cluster.servers[0].pause()
    await asyncio.sleep(draw.uniform(0.1, 0.6) * LEASE)
    cluster.servers[0].go_on()
    await asyncio.gather(*chats)


async def _begin(cluster: Cluster, draw: random.Random, tolds: list[Told]) -> list["asyncio.Task[Told]"]:
    """Turns on the first server, each at the moment in which it is to be struck."""
    client_of = [Client(cluster, draw, at=cluster.servers[0].address) for _ in tolds]
    chats = [asyncio.create_task(client.chat(told)) for client, told in zip(client_of, tolds, strict=True)]

    def ready(told: Told) -> bool:
        if "pace:" in told.message:
            return bool(told.text)
        return bool(told.tools) if "linger:" in told.message else bool(told.turn_id)

    async with asyncio.timeout(DEADLINE):
        await until(lambda: all(map(ready, tolds)))
    await asyncio.sleep(draw.uniform(0, 0.25))
    return chats


def _judge_effects(cluster: Cluster, tolds: list[Told]) -> None:
    effects = Effects(cluster.folder / "effects")
    for told in tolds:
        took = [line for line in effects.lines(f"{told.turn_id}:") if line.startswith("took")]
        assert len(took) == (1 if "tool:" in told.message else 0), f"{told.message}: {took}"
