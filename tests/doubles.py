"""Hand-written doubles: a clock, an agent that follows a script, tools, and a wired engine."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from adapters.system import Ids
from core.model.agent import AgentDefinition, Catalog, Domain
from core.model.errors import NotSupported
from core.model.events import LogEntry, TextDelta, TurnEvent
from core.model.message import TextPart
from core.model.turn import Usage
from core.ports.agent import Agent, AgentEvent, AgentFailed, JsonAnswer, JsonRequest, ReplyRequest, RoundFinished
from core.ports.store import Store, Transaction
from core.ports.system import Clock
from core.ports.telemetry import UNMEASURED, Telemetry
from core.ports.tools import ToolContext, ToolOutput, Tools, ToolSpec
from core.use_cases.accept_message import AcceptMessage, IncomingMessage
from core.use_cases.cancel_turn import CancelTurn
from core.use_cases.definitions import Definitions
from core.use_cases.delete_thread import DeleteThread
from core.use_cases.follow_turn import FollowTurn
from core.use_cases.read_threads import ReadThreads
from core.use_cases.recover_turns import RecoverTurns
from core.use_cases.turn_engine import TurnEngine, TurnLimits
from core.use_cases.turn_feed import TurnFeeds


class ManualClock(Clock):
    """Time that moves when told, and a microsecond at every look, so that nothing is simultaneous."""

    def __init__(self) -> None:
        self._now = datetime(2026, 11, 22, 12, tzinfo=UTC)

    def now(self) -> datetime:
        self._now += timedelta(microseconds=1)
        return self._now

    def advance(self, **by: float) -> None:
        """Moves on."""
        self._now += timedelta(**by)


def definition(domain: Domain = Domain.CAREER, **changes: object) -> AgentDefinition:
    """An agent for tests."""
    values: dict[str, object] = {
        "slug": domain.value,
        "version": 1,
        "domain": domain,
        "name": f"{domain.value} coach",
        "instructions": "Coach.",
        "tools": ("note",),
    }
    return AgentDefinition(**{**values, **changes})  # type: ignore[arg-type] # a test's own business


CATALOG = Catalog({domain: definition(domain) for domain in Domain})


class Gate:
    """A step of a script that waits until the test opens it, and tells the test when it is reached."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        """Lets the script go on."""
        self._open.set()

    async def wait(self) -> None:
        """What the script does."""
        self.reached.set()
        await self._open.wait()


Step = AgentEvent | Gate | AgentFailed | Exception | str
DONE = RoundFinished(Usage(input_tokens=3, output_tokens=5))


class ScriptedAgent(Agent):
    """Plays a script for each round: events, text as plain strings, gates, and failures to raise."""

    def __init__(self, *scripts: Sequence[Step], default: Sequence[Step] = ("All right.", DONE)) -> None:
        self._scripts = list(scripts)
        self._default = default
        self.requests: list[ReplyRequest] = []
        self.stopped: list[str] = []
        self.used: dict[str, Usage] = {}
        """What rounds that are stopped have used, by their handles."""
        self.refused: float | None = None
        self.closed = 0

    @property
    def provider(self) -> str:
        return "scripted"

    def model(self, definition: AgentDefinition) -> str:
        return "script-1"

    def refusal(self) -> float | None:
        return self.refused

    async def complete_json(self, request: JsonRequest[Any]) -> JsonAnswer[Any]:
        raise NotSupported("provider")

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        self.requests.append(request)
        script = self._scripts.pop(0) if self._scripts else self._default
        try:
            for step in script:
                match step:
                    case str():
                        yield TextDelta(step)
                    case Gate():
                        await step.wait()
                    case Exception():
                        raise step
                    case _:
                        yield step
        finally:
            self.closed += 1

    async def stop(self, handle: str) -> Usage | None:
        self.stopped.append(handle)
        return self.used.get(handle)

    async def aclose(self) -> None:
        """Nothing is held."""


class NotedTools(Tools):
    """One tool, `note`, that notes its calls; a test may say what it answers, and what it waits for before."""

    def __init__(
        self,
        answer: Callable[[str, ToolContext], ToolOutput] | None = None,
        *,
        idempotent: bool = False,
        gate: Gate | None = None,
    ) -> None:
        self._answer = answer or (lambda arguments, _: ToolOutput(f"noted {arguments}"))
        self._idempotent = idempotent
        self._gate = gate
        self.calls: list[tuple[str, str, ToolContext]] = []

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"note"})

    def specs(self, names: Iterable[str]) -> Sequence[ToolSpec]:
        return [
            ToolSpec(name=name, description="Notes.", parameters={}, idempotent=self._idempotent)
            for name in names
            if name in self.names
        ]

    async def call(self, name: str, arguments_json: str, context: ToolContext) -> ToolOutput:
        self.calls.append((name, arguments_json, context))
        if self._gate is not None:
            await self._gate.wait()
        return self._answer(arguments_json, context)


@dataclass
class Service:
    """The core, wired as the container wires it."""

    store: Store
    agent: ScriptedAgent
    tools: NotedTools
    engine: TurnEngine
    accept: AcceptMessage
    follow: FollowTurn
    cancel: CancelTurn
    delete: DeleteThread
    threads: ReadThreads
    feeds: TurnFeeds
    recover: RecoverTurns
    killed: bool = False

    async def kill(self) -> None:
        """Stops everything as kill -9 would: no goodbye to the store, and nobody is told."""
        self.killed = True
        tasks = [*self.recover._tasks, *(run.task for run in self.engine._running.values())]
        if self.engine._writing is not None:
            tasks.append(self.engine._writing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stream(self, turn_id: str, text: str) -> None:
        """Waits until so much of a reply is committed."""
        position = 0
        async with aclosing(self.follow.events(turn_id, 0)) as entries:
            said = ""
            async for entry in entries:
                position = entry.position
                said += entry.event.text if isinstance(entry.event, TextDelta) else ""
                if said == text:
                    return
        raise AssertionError(f"the turn ended at {position} with {said!r}")

    async def say(self, text: str = "Hello", user: str = "ada", **more: object) -> str:
        """Accepts a message; returns the turn's id."""
        message = IncomingMessage(user_id=user, content=(TextPart(text),), **more)  # type: ignore[arg-type]
        return (await self.accept(message)).turn.id

    async def events(self, turn_id: str, after: int = 0) -> list[LogEntry]:
        """Follows a turn to its end."""
        async with aclosing(self.follow.events(turn_id, after)) as entries:
            return [entry async for entry in entries]


@asynccontextmanager
async def service(
    store: Store,
    agent: ScriptedAgent | None = None,
    tools: NotedTools | None = None,
    limits: TurnLimits | None = None,
    *,
    lease: float | None = None,
    telemetry: Telemetry = UNMEASURED,
) -> AsyncIterator[Service]:
    """A running core on a store; whatever still runs at the end is given up.

    With a `lease` it is one of several processes; else it is alone, as the owner of an embedded database is.
    """
    agent, tools, ids, feeds = agent or ScriptedAgent(), tools or NotedTools(), Ids(), TurnFeeds()

    def publish(tx: Transaction) -> None:
        for offered in CATALOG.agents():
            tx.agents.publish(offered)

    await store.write(publish)
    definitions = Definitions(CATALOG)
    engine = TurnEngine(
        store=store,
        agent=telemetry.agent(agent),
        tools=telemetry.tools(tools),
        feeds=feeds,
        ids=ids,
        definitions=definitions,
        owner=ids.new(),
        limits=limits or TurnLimits(),
        telemetry=telemetry,
    )
    recover = RecoverTurns(
        store=store, engine=engine, feeds=feeds, ids=ids, lease=lease or 15.0, alone=lease is None
    )
    engine.start()
    await recover.start()
    accept = AcceptMessage(
        store=store, engine=engine, catalog=CATALOG, definitions=definitions, ids=ids, telemetry=telemetry
    )
    it = Service(
        store=store,
        agent=agent,
        tools=tools,
        engine=engine,
        accept=accept,
        follow=FollowTurn(store, feeds),
        cancel=CancelTurn(store=store, engine=engine, ids=ids),
        delete=DeleteThread(store=store, gone=engine.gone, erased=lambda: None),
        threads=ReadThreads(store),
        feeds=feeds,
        recover=recover,
    )
    try:
        yield it
    finally:
        if not it.killed:
            await accept.settle()
            await engine.drain(0)
            await recover.stop()


def text_of(entries: Iterable[LogEntry]) -> str:
    """The concatenated text of events."""
    return "".join(entry.event.text for entry in entries if isinstance(entry.event, TextDelta))


def kinds(entries: Iterable[LogEntry]) -> list[type[TurnEvent]]:
    """The types of events, in order."""
    return [type(entry.event) for entry in entries]
