"""The whole core with the OpenAI agent and the fake provider, in memory and in simulated time."""

import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from adapters.memory.store import MemoryStore
from adapters.openai.agent import OpenAIAgent
from adapters.openai.items import history_items
from core.model.events import TurnFinished
from core.model.turn import Turn, TurnReason, TurnState
from core.use_cases.read_threads import MessageQuery
from core.use_cases.turn_engine import TurnLimits
from doubles import ManualClock, NotedTools, ScriptedAgent, Service, service
from fake_provider import FakeProvider
from openai_thread import words
from openai_wire import Wire, wired
from simulation.loop import simulate

T = TypeVar("T")

MODES = ("conversation", "response_chain", "stateless")


@dataclass
class Lab:
    """What a test needs of it all."""

    provider: FakeProvider
    wire: Wire
    agent: OpenAIAgent
    it: Service
    thread_id: str = ""

    async def say(self, text: str) -> Turn:
        """A turn on the thread, from its message to its end."""
        turn_id = await self.it.say(text, thread_id=self.thread_id)
        turn = await self.ended(turn_id)
        self.thread_id = turn.thread_id
        return turn

    async def ended(self, turn_id: str) -> Turn:
        """A turn at its end."""
        last = (await self.it.events(turn_id))[-1].event
        assert isinstance(last, TurnFinished)
        return last.turn

    async def transcript(self) -> list[str]:
        """What is on record, as the provider would show it."""
        query = MessageQuery(user_id="ada", thread_id=self.thread_id)
        lines, token = await self.it.threads.messages(query, 200, "")
        assert not token
        return words([_stored(dict(item)) for item in history_items(lines)])

    def shown(self) -> list[str]:
        """What the model was shown last."""
        return words([item for item in self.provider.shown[-1] if item["type"] != "reasoning"])

    async def lags_behind(self, question: str) -> bool:
        """Whether the model was shown anything else than what is on record up to its last answer."""
        record = await self.transcript()
        return self.shown() != record[: len(record) - record[::-1].index(f"user: {question}")]


def _stored(item: dict[str, Any]) -> dict[str, Any]:
    content = item.get("content")
    return {**item, "content": [{"text": content}]} if isinstance(content, str) else item


def outcome(turn: Turn) -> tuple[TurnState, TurnReason | None]:
    """How a turn ended."""
    return turn.state, turn.reason


@asynccontextmanager
async def lab(
    mode: str, *, limits: TurnLimits | None = None, connections: int = 5, **more: Any
) -> AsyncIterator[Lab]:
    """A running core; in the end nothing may be left of it."""
    provider = FakeProvider()
    client, wire = wired(provider, connections)
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key="k", state_mode=mode, chance=random.Random(7), **more)
    async with service(
        MemoryStore(ManualClock()), cast("ScriptedAgent", agent), NotedTools(), limits=limits
    ) as it:
        yield Lab(provider, wire, agent, it)
    await agent.aclose()
    await wire.hang_up()
    assert wire.open == 0


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a test in simulated time. Nothing may go wrong unnoticed."""
    surprises: list[BaseException] = []
    result = simulate(main, surprises.append)
    assert surprises == []
    return result
