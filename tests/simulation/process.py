"""A simulated process: the core wired as the container wires it, with an agent and tools that act on a whim."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from core.model.agent import AgentDefinition, Catalog, Domain
from core.model.errors import NotSupported, StoreUnavailable
from core.model.events import TextDelta, ToolCalled
from core.model.thread import ProviderState
from core.model.turn import TurnReason, Usage
from core.ports.agent import (
    Agent,
    AgentEvent,
    AgentFailed,
    Begun,
    CannotResume,
    JsonAnswer,
    JsonRequest,
    ReplyRequest,
    RoundFinished,
    StateChanged,
)
from core.ports.store import Transaction
from core.ports.system import Ids
from core.ports.tools import ToolContext, ToolOutput, Tools, ToolSpec
from core.use_cases.accept_message import AcceptMessage
from core.use_cases.cancel_turn import CancelTurn
from core.use_cases.definitions import Definitions
from core.use_cases.delete_thread import DeleteThread
from core.use_cases.follow_turn import FollowTurn
from core.use_cases.recover_turns import RecoverTurns
from core.use_cases.turn_engine import TurnEngine, TurnLimits
from core.use_cases.turn_feed import TurnFeeds
from doubles import definition
from simulation.database import Database, View
from simulation.judge import BUDGET, LEASE, Effect, Judge, Unserved
from simulation.loop import Host

NOTE, BOOK = "note", "book"
"""A tool whose calls may be repeated, and one whose calls may not."""
TOOLS = {NOTE: True, BOOK: False}
CATALOG = Catalog({domain: definition(domain, tools=(NOTE, BOOK)) for domain in Domain})

_FAILURES = (
    TurnReason.PROVIDER_RATE_LIMITED,
    TurnReason.PROVIDER_UNAVAILABLE,
    TurnReason.PROVIDER_STALLED,
    TurnReason.PROVIDER_TRUNCATED,
    TurnReason.PROVIDER_CONFIG,
    TurnReason.CONTENT_FILTERED,
)


class CountedIds(Ids):
    """Identifiers that people can read: whose, and which."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0

    def new(self) -> str:
        self._count += 1
        return f"{self._name}.{self._count:04d}"


@dataclass
class World:
    """What all processes share besides the record: the provider, what tools have done, and the judge."""

    seed: int
    judge: Judge
    database: Database
    chance: random.Random
    manners: "AgentManners"
    limits: TurnLimits
    invocations: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, str] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    unserved: Unserved = field(default_factory=Unserved)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentManners:
    """How likely what is while an agent writes."""

    fails: float = 0.08
    stalls: float = 0.04
    breaks: float = 0.02
    tools: float = 0.4
    background: float = 0.0
    pace: float = 0.4


class WhimsicalAgent(Agent):
    """Says something else each time that it is asked. Which tools a conversation calls does not change."""

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self._host = host
        self.running = 0

    @property
    def provider(self) -> str:
        return "whim"

    def model(self, definition: AgentDefinition) -> str:
        return "whim-1"

    def refusal(self) -> float | None:
        return None

    async def complete_json(self, request: JsonRequest[Any]) -> JsonAnswer[Any]:
        raise NotSupported("provider")

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        self.running += 1
        try:
            async with aclosing(self._reply(request)) as events:  # not left to the garbage collector
                async for event in events:
                    yield event
        finally:
            self.running -= 1

    async def _reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        world, judge, turn_id = self._world, self._world.judge, request.turn_id
        known = request.resume.text if request.resume else ""
        if request.resume:
            stopped = request.resume.handle in world.stopped
            judge.demand(self._is_over(turn_id) or not stopped, f"{turn_id}: its reply was stopped")
            if world.chance.random() < 0.2:
                judge.unresumable.add(turn_id)
                raise CannotResume
            world.invocations["resumed"] += 1
            _, round_number, begun = request.resume.handle.split(":")
            judge.demand(int(round_number) == len(request.rounds), f"{turn_id}: resumes round {round_number}")
            invocation = int(begun)
        else:
            world.invocations[turn_id] += 1
            invocation = world.invocations[turn_id]
        chance = random.Random(f"{world.seed}:{turn_id}:{invocation}")
        lines = await request.history()
        whole = [line.index for line in lines] == list(range(1, request.message.index))
        if not (whole or judge.seen[turn_id].deleted):
            judge.fail(f"{turn_id}: a history of {lines}")
        if chance.random() < world.manners.background and not request.resume:
            yield Begun(f"{turn_id}:{len(request.rounds)}:{invocation}")
        if chance.random() < 0.3:
            yield StateChanged(ProviderState(provider="whim", conversation_id=f"{turn_id}-{invocation}"))
        said, calls = "", self._plan(request)
        for number in range(chance.choice((0, 1, 2, 4)) if calls else chance.choice((0, 1, 2, 3, 6, 12))):
            piece = f"{invocation}.{number} "
            await self._whim(chance, turn_id, known=known[len(said) :][: len(piece)] == piece)
            stopped = f"{turn_id}:{len(request.rounds)}:{invocation}" in world.stopped
            judge.demand(
                self._is_over(turn_id) or not stopped, f"{turn_id}: its reply is stopped while it is read"
            )
            said += piece
            if len(said) > len(known):
                yield TextDelta(said[max(len(known), len(said) - len(piece)) :])
        judge.demand(said.startswith(known), f"{turn_id}: resumes {known!r} with {said!r}")
        await asyncio.sleep(world.manners.pace * chance.random())
        if chance.random() < world.manners.fails / 3:
            if chance.random() < 0.5:
                return
            raise AgentFailed(chance.choice(_FAILURES))
        for number, name in enumerate(calls):
            arguments = json.dumps({"step": f"{len(request.rounds)}.{number}"})
            yield ToolCalled(f"{invocation}-{number}", name, arguments)
        if not calls:
            judge.said(turn_id, "".join(done.text for done in request.rounds) + said)
        copy = ProviderState(provider="whim", conversation_id=f"{turn_id}-{invocation}")
        kept = copy if chance.random() < 0.5 else None
        yield RoundFinished(Usage(input_tokens=1, output_tokens=len(said)), copy=kept)

    def _is_over(self, turn_id: str) -> bool:
        """Whether nothing is to be written here any more, as this process may not know yet."""
        seen = self._world.judge.seen[turn_id]
        return seen.deleted or seen.turn.state.is_terminal or seen.owners[-1].host is not self._host

    async def _whim(self, chance: random.Random, turn_id: str, *, known: bool) -> None:
        """What comes before a piece: time, a halt, a failure; nothing of it where the piece is on record."""
        manners = self._world.manners
        pause = manners.pace * chance.random() ** 3 * (8 if chance.random() < 0.1 else 1)
        stalls, fails, breaks = (chance.random() for _ in range(3))
        reason = chance.choice(_FAILURES)
        if known:
            return
        await asyncio.sleep(pause)
        if stalls < manners.stalls / 3:
            await asyncio.get_running_loop().create_future()
        if fails < manners.fails / 3:
            raise AgentFailed(reason)
        if breaks < manners.breaks / 3:
            self._world.judge.broken.add(turn_id)
            raise ZeroDivisionError("an agent's bug")

    def _plan(self, request: ReplyRequest) -> Sequence[str]:
        """Which tools the next round calls."""
        chance = random.Random(f"{self._world.seed}:{request.message.text}:{len(request.rounds)}")
        if len(request.rounds) >= 3 or chance.random() >= self._world.manners.tools:
            return ()
        return chance.choices((NOTE, NOTE, BOOK), k=chance.choice((1, 1, 2)))

    async def stop(self, handle: str) -> None:
        await asyncio.sleep(self._world.chance.random())
        if not self._host.dead:
            self._world.stopped.add(handle)

    async def aclose(self) -> None:
        """Nothing is held."""


class WorldlyTools(Tools):
    """Two tools that change the world: somewhere between the call and the answer."""

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self._host = host

    @property
    def names(self) -> frozenset[str]:
        return frozenset(TOOLS)

    def specs(self, names: Iterable[str]) -> Sequence[ToolSpec]:
        return [
            ToolSpec(name=name, description="", parameters={}, idempotent=TOOLS[name])
            for name in names
            if name in TOOLS
        ]

    async def call(self, name: str, arguments_json: str, context: ToolContext) -> ToolOutput:
        world, key = self._world, context.idempotency_key
        world.judge.leased(self._host.name, context.turn_id)
        await asyncio.sleep(world.chance.random() ** 2 * 2)
        if self._host.dead:
            raise asyncio.CancelledError
        step = json.loads(arguments_json)["step"]
        effect = Effect(context.turn_id, step, name, key, key in world.outputs)
        world.judge.took_effect(effect)
        output = world.outputs.setdefault(key, f"{name} {step} by {self._host.name}")
        await asyncio.sleep(world.chance.random() ** 2 * 2)
        return ToolOutput(output, is_error=world.chance.random() < 0.1)


class Process:
    """A process, from its start to its end. `gentle` says that nothing but a patient stop has befallen it."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.host = Host(name)
        self.view = View(world.database, self.host, name)
        self.ready = False
        self.leaving = False
        self.gone = False
        self.gentle = True
        self.troubled_until = 0.0
        ids, self.feeds, definitions = CountedIds(name), TurnFeeds(), Definitions(CATALOG)
        self.agent = WhimsicalAgent(world, self.host)
        self.engine = TurnEngine(
            store=self.view,
            agent=self.agent,
            tools=WorldlyTools(world, self.host),
            feeds=self.feeds,
            ids=ids,
            definitions=definitions,
            owner=name,
            limits=world.limits,
        )
        self.recover = RecoverTurns(
            store=self.view, engine=self.engine, feeds=self.feeds, ids=ids, lease=LEASE, alone=False
        )
        self.accept = AcceptMessage(
            store=self.view, engine=self.engine, catalog=CATALOG, definitions=definitions, ids=ids
        )
        self.follow = FollowTurn(self.view, self.feeds)
        self.cancel = CancelTurn(store=self.view, engine=self.engine, ids=ids)
        self.delete = DeleteThread(store=self.view, gone=self.engine.gone, erased=lambda: None)
        self.calls: dict[asyncio.Task[Any], None] = {}
        self._well_since = 0.0
        self.host.start(self._serve())

    @property
    def is_well(self) -> bool:
        """Whether it works, as far as it is concerned."""
        return self.ready and not (self.leaving or self.gone or self.host.stopped or self.view.cut)

    async def _serve(self) -> None:
        self.engine.start()
        while not self.ready:
            try:
                await self.view.write(_publish)
                await self.recover.start()
                self.ready = True
            except StoreUnavailable:
                await asyncio.sleep(0.1)  # whoever supervises processes starts another one
        self.well(True)

    def well(self, well: bool) -> None:
        """Keeps book of when it could work."""
        now = asyncio.get_running_loop().time()
        if well:
            self._well_since = now
        else:
            self.world.unserved.add(self._well_since if self.ready else now, now)
            self._well_since = float("inf")

    def trouble(self) -> None:
        """Notes that something befalls it."""
        self.gentle = False
        self.well(False)

    def recovered(self) -> None:
        """Notes that nothing befalls it any more."""
        self.troubled_until = asyncio.get_running_loop().time()
        self.well(True)

    def crash(self) -> None:
        """Ends it at once, without a word to anybody."""
        self.trouble()
        self.gone = True
        self.view.leave()
        self.host.kill()

    async def leave(self, grace: float) -> None:
        """Stops it as SIGTERM does."""
        self.leaving = True
        self.view.patient_until = asyncio.get_running_loop().time() + grace
        self.well(False)
        if grace < BUDGET + 5:
            self.gentle = False
        work = self.host.start(self._leave(grace))
        await asyncio.wait([work])
        if self.gone:
            return
        self.gone = True
        work.result()
        for task in list(self.calls):
            task.cancel()
        await asyncio.gather(*self.calls, return_exceptions=True)
        for use_case in (self.accept, self.cancel, self.delete):
            await use_case._detached.settle()
        await asyncio.gather(*self.engine._aside, return_exceptions=True)
        self.world.judge.demand(not self.leftovers(), f"{self.name} leaves with {self.leftovers()}")
        self.view.leave()
        self.host.kill()

    async def _leave(self, grace: float) -> None:
        self.engine.refuse()
        await self.accept.settle()
        await self.engine.drain(grace)
        await self.recover.stop()
        await self.accept.settle()
        await self.engine.drain(0)

    def leftovers(self) -> list[str]:
        """What is still held of turns; empty where none runs here."""
        engine, feeds = self.engine, self.feeds
        held = {
            "runs": engine._running,
            "expected": engine._expected,
            "places": engine._places.taken,
            "feeds": feeds._feeds,
            "listeners": feeds._waiting,
            "dirty logs": engine._writer._dirty if not self.leaving else (),
            "held logs": engine._writer._held,
            "acceptances": self.accept._detached._tasks,
            "cancellations": self.cancel._detached._tasks,
            "deletions": self.delete._detached._tasks,
            "live logs": engine._writer._live,
            "replies": self.agent.running,
            "aside": engine._aside,
        }
        return [f"{name}: {what}" for name, what in held.items() if what]


def _publish(tx: Transaction) -> None:
    for offered in CATALOG.agents():
        tx.agents.publish(offered)
