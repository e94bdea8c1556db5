"""Duplicates of requests race on two replicas: one turn for each request id, whoever calls, leaves or dies."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import Tables
from faults.client import insist, stubs, why
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, SIZE, chance, sized
from faults.scripted import expected

SUITE = "request ids"
KEYS = sized("KEYS", 10, 100, 1_000)
CALLS = sized("CALLS", 8, 8, 16)
AT_ONCE = 10
"""Keys whose duplicates race together."""

pytestmark = pytest.mark.timeout(60 + KEYS)


@dataclass
class Key:
    """A request id, the two messages that come with it, and what became of its calls."""

    user: str
    thread_id: str
    messages: tuple[str, str]
    request_id: str = field(default_factory=lambda: uuid4().hex)
    turn_ids: dict[str, set[str]] = field(default_factory=dict)
    """By message, the turns that calls with it were told of."""
    refused: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)


class _Callers:
    def __init__(self, cluster: Cluster, draw: random.Random, services: dict[str, Any]) -> None:
        self._cluster, self._draw, self._services = cluster, draw, services

    async def call(self, key: Key, message: str, leave_after: float | None) -> None:
        """One duplicate: tries servers until it has an answer, or leaves in the midst of it."""
        while True:
            address = self._draw.choice(self._cluster.addresses)
            fields: dict[str, Any] = {
                "user_id": key.user,
                "thread_id": key.thread_id,
                "request_id": key.request_id,
            }
            content = [pb.ContentPart(text=message)]
            agents = self._services[address]
            call: Any
            if self._draw.random() < 0.5:
                call = agents.SendMessage(api.SendMessageRequest(content=content, **fields), timeout=DEADLINE)
                answer = call
            else:
                call = agents.Chat(api.ChatRequest(content=content, **fields), timeout=DEADLINE)
                answer = call.read()
            try:
                async with asyncio.timeout(leave_after):
                    response = await answer
            except TimeoutError:
                call.cancel()
                key.outcomes["left"] += 1
                return
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    key.outcomes["called again"] += 1
                    continue
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS or why(error) != "REQUEST_ID_REUSED":
                    raise
                key.refused.add(message)
                key.outcomes["refused"] += 1
                return
            started = response.event.started.turn_id if isinstance(call, grpc.aio.UnaryStreamCall) else ""
            key.turn_ids.setdefault(message, set()).add(started or response.turn.id)
            key.outcomes["answered"] += 1
            call.cancel()
            return


async def test_duplicates_race(postgres_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE)
    for _ in range(2):
        await cluster.start(postgres_url, VIDA_MAX_TURNS_PER_USER="1000")
    total: Counter[str] = Counter()
    kills = 0
    for first in range(0, KEYS, AT_ONCE):
        # In the larger sizes a replica dies in the midst of it now and then.
        kill = SIZE != "tiny" and first % (5 * AT_ONCE) == 0
        keys = await _race(cluster, draw, kill=kill)
        await _check(postgres_url, keys)
        for key in keys:
            total.update(key.outcomes)
        if kill:
            await cluster.start(postgres_url, VIDA_MAX_TURNS_PER_USER="1000")
            kills += 1
        FIGURES.progress(SUITE, first + len(keys), KEYS)
    FIGURES.add(SUITE, {"request ids": KEYS, "cycles": kills, "acknowledged turns": KEYS, **total})
    assert total["answered"] >= KEYS * CALLS / 2, "too few calls were answered for this test to mean anything"
    assert total["refused"] >= KEYS / 10
    assert total["left"] >= KEYS / 10
    assert not kills or total["called again"] >= kills, "no kill struck a caller"


async def _race(cluster: Cluster, draw: random.Random, *, kill: bool) -> list[Key]:
    services: dict[str, Any] = {}
    async with asyncio.TaskGroup() as racing:
        callers = _Callers(cluster, draw, services)
        contexts = [stubs(address) for address in cluster.addresses]
        try:
            for address, context in zip(cluster.addresses, contexts, strict=True):
                services[address] = (await context.__aenter__())[0]
            keys = [await _key(services, draw, number) for number in range(AT_ONCE)]
            async with asyncio.TaskGroup() as calls:
                for key in keys:
                    for number in range(CALLS):
                        message = key.messages[draw.random() < 0.1]
                        leaves = number and draw.random() < 0.1
                        calls.create_task(callers.call(key, message, draw.uniform(0, 0.05) if leaves else None))
                if kill:
                    racing.create_task(_kill_soon(cluster, draw))
        finally:
            for context in contexts:
                await context.__aexit__(None, None, None)
    return keys


async def _key(services: dict[str, Any], draw: random.Random, number: int) -> Key:
    """A key in a new thread or in one that there is."""
    user, mark = f"ada{number}", uuid4().hex[:8]
    key = Key(user, "", (f"words:3 {mark}", f"words:3 other {mark}"))
    if number % 2:
        agents = draw.choice(list(services.values()))
        request = api.SendMessageRequest(user_id=user, content=[pb.ContentPart(text="words:1")])
        key.thread_id = (await insist(agents, request)).turn.thread_id
    return key


async def _kill_soon(cluster: Cluster, draw: random.Random) -> None:
    await asyncio.sleep(draw.uniform(0.005, 0.04))
    await cluster.kill(draw.choice(cluster.servers))


async def _check(database_url: str, keys: list[Key]) -> None:
    tables = Tables(database_url)
    rows = await asyncio.to_thread(tables.of_requests, [key.request_id for key in keys])
    ended = asyncio.get_running_loop().time() + DEADLINE
    while left := await asyncio.to_thread(tables.unended, [row["id"] for row in rows]):
        assert asyncio.get_running_loop().time() < ended, f"turns that never ended: {left}"
    stored = await asyncio.to_thread(tables.turns, [row["id"] for row in rows])
    by_request = Counter(row["request_id"] for row in rows)
    for key in keys:
        FIGURES.add(SUITE, {"duplicates": by_request[key.request_id] != 1})
        assert by_request[key.request_id] == 1, f"{by_request[key.request_id]} turns for one request id"
        (turn,) = [each for each in stored.values() if each.turn["request_id"] == key.request_id]
        (question,) = turn.lines("user")
        said = "".join(part[1] for part in question["content"])
        # Whichever of the two messages came first is the turn's; calls with the other one were refused. It may be
        # that of a caller who left before the answer.
        assert key.turn_ids == {said: {turn.turn["id"]}} or (not key.turn_ids and key.outcomes["left"])
        assert said not in key.refused
        assert len(turn.lines("assistant")) == 1
        assert turn.turn["state"] == "completed" or turn.turn["reason"] == "INTERRUPTED"
        if turn.turn["state"] == "completed":
            (reply,) = turn.lines("assistant")
            assert "".join(part[1] for part in reply["content"]) == expected(said)
        lines = tables.rows("SELECT turn_id FROM messages WHERE thread_id = ?", turn.turn["thread_id"])
        assert len(lines) == (4 if key.thread_id else 2), "something was written for a call that was refused"
