"""Clients that chat on and on, each in a thread of its own, while the servers are treated badly."""

import asyncio
import random
from collections.abc import Callable
from uuid import uuid4

import grpc

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.client import STRAIGHT, Client, Told, Way
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES
from harness import until

CLIENTS = 8
_IMPATIENT = 0.2
"""The share of messages before whose answer another one is sent."""


def some_message(chance: random.Random) -> str:
    """Any message: short or long, at once or slowly, with a tool or without."""
    words = [
        f"words:{chance.randint(1, 30)}",
        f"pace:{chance.choice([0, 60, 200])}",
        f"slow-start:{chance.choice([0, 0, 0.05, 0.3])}",
        f"slow-end:{chance.choice([0, 0, 0.1])}",
        f"state:{chance.choice([0, 1])}",
    ]
    if tool := chance.choice(["", "", "", "idempotent", "plain"]):
        words += [f"tool:{tool}", f"before:{chance.choice([0, 0, 4])}", f"linger:{chance.choice([0, 0.1])}"]
    return " ".join([*words, uuid4().hex[:8]])


def streamed_message(chance: random.Random) -> str:
    """A message whose reply has begun soon and lasts a while, without tools."""
    return f"words:{chance.randint(20, 40)} pace:{chance.randint(30, 60)} {uuid4().hex[:8]}"


class Load:
    """Clients. `begin`, do harm, then `finish`: each sees its last turn to the end, whatever it takes."""

    def __init__(
        self,
        suite: str,
        cluster: Cluster,
        chance: random.Random,
        message: Callable[[random.Random], str] = some_message,
        *,
        call_timeout: float = DEADLINE,
        clients: int = CLIENTS,
        way: Way = STRAIGHT,
    ) -> None:
        self._suite = suite
        self._cluster = cluster
        self._chance = chance
        self._message = message
        self._timeout = call_timeout
        self._way = way
        self._threads = {f"{suite}-{uuid4().hex[:6]}-{number}": "" for number in range(clients)}
        self._tasks: list[asyncio.Task[None]] = []
        self._over = False
        self.tolds: list[Told] = []

    def begin(self) -> None:
        """Starts the clients, in the threads that they had."""
        self.tolds, self._over = [], False
        self._tasks = [asyncio.create_task(self._talk(user)) for user in self._threads]

    async def acknowledged(self, count: int) -> None:
        """Waits until so many turns have been acknowledged since the beginning."""
        await until(lambda: self._failed() or sum(bool(told.turn_id) for told in self.tolds) >= count)

    @property
    def unfinished(self) -> list[Told]:
        """Turns that have been acknowledged and not seen to their ends."""
        return [told for told in self.tolds if told.turn_id and told.finished is None]

    async def finish(self) -> list[Told]:
        """Lets every client see its turn to the end; returns what all were told since the beginning."""
        self._over = True
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        stuck = [outcome for outcome in outcomes if isinstance(outcome, TimeoutError)]
        if stuck:
            FIGURES.add(self._suite, {"turns that never ended": len(stuck)})
            left = [told for told in self.tolds if told.finished is None]
            raise AssertionError(f"{len(stuck)} turns never ended: {left}")
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return self.tolds

    def _client(self) -> Client:
        return Client(self._cluster, self._chance, call_timeout=self._timeout, way=self._way)

    async def _talk(self, user: str) -> None:
        client = self._client()
        while not self._over:
            told = Told(user, self._message(self._chance), self._threads[user])
            self.tolds.append(told)
            chat = asyncio.create_task(client.chat(told))
            if self._chance.random() < _IMPATIENT:
                await asyncio.gather(chat, self._press(user, told))
            else:
                await chat
            self._threads[user] = told.thread_id

    async def _press(self, user: str, told: Told) -> None:
        """Sends another message before the first is answered: to wait, perhaps in vain, or to take its place."""
        await until(lambda: told.turn_id)
        what = self._chance.choice(["wait", "wait", "wait in vain", "interrupt"])
        policy = pb.BUSY_POLICY_INTERRUPT if what == "interrupt" else pb.BUSY_POLICY_QUEUE
        second = Told(user, self._message(self._chance), told.thread_id, on_busy=policy)
        if what == "interrupt":
            told.asked_to_end = "INTERRUPTED"
        self.tolds.append(second)
        chat = asyncio.create_task(self._client().chat(second))
        if what == "wait in vain":
            await until(lambda: second.turn_id or chat.done())
            second.asked_to_end = "CANCELLED_BY_CALLER"
            await self._cancel(second)
        await chat

    async def _cancel(self, told: Told) -> None:
        address = ""
        while told.finished is None:
            address = self._cluster.another(address, self._chance)
            if not address:
                await self._back_off()
                continue
            async with self._way.stubs(address) as (agents, _):
                request = api.CancelTurnRequest(user_id=told.user, turn_id=told.turn_id)
                try:
                    await agents.CancelTurn(request, timeout=self._timeout)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED and not self._way.broke(error):
                        raise
                    await self._back_off()
                else:
                    return

    async def _back_off(self) -> None:
        await asyncio.sleep(self._chance.uniform(0.01, 0.1))

    def _failed(self) -> bool:
        return any(task.done() for task in self._tasks)

    async def aclose(self) -> None:
        """Stops the clients."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
