"""A seed's story: processes, clients, what befalls them, and what everybody must find in the end."""

import asyncio
import hashlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from core.model.agent import Domain
from core.model.errors import (
    CoreError,
    Draining,
    Overloaded,
    PositionAhead,
    QueueFull,
    QuotaExceeded,
    RequestIdReused,
    StoreUnavailable,
    ThreadNotFound,
    TurnInProgress,
    TurnNotFound,
)
from core.model.events import LogEntry, TurnFinished
from core.model.message import TextPart
from core.model.turn import BusyPolicy, Turn
from core.use_cases.accept_message import Accepted, IncomingMessage
from core.use_cases.turn_engine import TurnLimits
from simulation.database import Database, Manners, View
from simulation.judge import BUDGET, LEASE, Judge
from simulation.loop import simulate
from simulation.process import TOOLS, AgentManners, Process, World

T = TypeVar("T")

STORM = 30.0
"""Seconds in which things happen."""
_PATIENCE = 5.0
_CALM = 10 * (BUDGET + LEASE + 15.0)
"""Seconds after which everything has ended: a queue of eight, one after the other."""
_USERS = ("ada", "bob")


class UnreachableError(Exception):
    """No answer. Whether anything was done is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a seed is about. `gap` is the mean of the seconds between two faults."""

    processes: int
    clients: int
    faults: tuple[str, ...]
    gap: float
    restart: bool
    store: Manners
    agent: AgentManners
    lost_answers: float

    @classmethod
    def of(cls, seed: int) -> "Weather":
        """Draws the weather: each seed has some kinds of trouble, few have all."""
        chance = random.Random(f"{seed}:weather")

        def some(value: float, how_often: float = 0.4) -> float:
            return value if chance.random() < how_often else 0.0

        kinds = ("crash", "pause", "partition", "outage", "drain", "rolling")
        return cls(
            processes=chance.choice((2, 2, 3, 3, 1)),
            clients=chance.choice((2, 3, 4)),
            faults=tuple(kind for kind in kinds if chance.random() < 0.45),
            gap=chance.choice((2.0, 4.0, 8.0)),
            restart=chance.random() < 0.5,
            store=Manners(
                refused=some(0.04),
                unanswered=some(0.04),
                late=some(0.03),
                contention=some(0.5, 0.6),
                latency=chance.choice((0.004, 0.02, 0.1)),
                slow=some(0.03, 0.2),
                hints=chance.random() < 0.8,
                lost_hints=some(0.2, 0.7),
            ),
            agent=AgentManners(
                fails=some(0.2, 0.7),
                stalls=some(0.1, 0.5),
                breaks=some(0.06, 0.3),
                tools=chance.choice((0.0, 0.3, 0.7)),
                background=some(0.7, 0.4),
                pace=chance.choice((0.05, 0.5, 1.5)),
            ),
            lost_answers=some(0.1, 0.6),
        )


@dataclass
class Outcome:
    """What a seed came to."""

    seed: int
    weather: Weather
    judge: Judge
    counts: Counter[str]
    error: BaseException | None = None

    @property
    def digest(self) -> str:
        """What is the same wherever and whenever a seed is played."""
        story = repr((self.judge.trace, sorted(self.counts.items()), self.error))
        return f"{self.seed}:{hashlib.sha256(story.encode()).hexdigest()[:16]}"

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.error!r}\nreplay with VIDA_TEST_SEED={self.seed}\n{self.weather}\n"
            f"{self.judge.schedule()}"
        )


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Scenario:
    """Plays one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.weather = weather = Weather.of(seed)
        self.counts: Counter[str] = Counter()
        self.judge = Judge(
            idempotent=frozenset(name for name, idempotent in TOOLS.items() if idempotent), restart=weather.restart
        )
        self.error: BaseException | None = None
        self.database = Database(random.Random(f"{seed}:store"), weather.store, self.judge.committed)
        self.world = World(
            seed=seed,
            judge=self.judge,
            database=self.database,
            chance=random.Random(f"{seed}:world"),
            manners=weather.agent,
            limits=TurnLimits(max_turns=6, max_turns_per_user=4, budget=BUDGET, restart=weather.restart),
        )
        self.judge.suspicious = self._suspicious
        self.judge.harmed = self._harmed
        self.chance = random.Random(f"{seed}:faults")
        self.processes: list[Process] = []
        self.started = 0
        self.story = asyncio.Event()
        self.outage_until = 0.0
        self.outages = 0
        self.storming = True
        self.threads: dict[str, str] = {}
        self.turns: dict[str, str] = {}
        self.requests = 0
        self._failed: asyncio.Future[None] | None = None

    def play(self) -> Outcome:
        """Plays it to the end."""
        watch = _Surprises(self.surprised)
        log = logging.getLogger("core")
        log.addHandler(watch)
        log.propagate = False
        try:
            simulate(self._play(), self.surprised)
        except BaseException as error:  # noqa: BLE001 - goes into the outcome
            self.error = self.error or _first(error)
        finally:
            log.propagate = True
            log.removeHandler(watch)
        counts = self.counts + self.judge.counts + self.database.counts
        counts["resumed rounds"] += self.world.invocations["resumed"]
        return Outcome(self.seed, self.weather, self.judge, counts, self.error)

    def surprised(self, error: BaseException) -> None:
        """Takes an exception that nobody expected."""
        if self.error is None:
            self.error = _first(error)
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(self.error)

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()
        story = loop.create_task(self._story())
        await asyncio.wait([story, self._failed], return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()
        await story
        self._failed.cancel()

    async def _story(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(self.weather.processes):
            self.start()
        clients = [Client(self, f"{self.seed}:{number}") for number in range(self.weather.clients)]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.act())
            group.create_task(self._befall())
            group.create_task(self._watch())
        # Everything heals. What is left must end by itself, in time.
        self.note("calm")
        deadline = loop.time() + _CALM
        while self._unfinished():
            if loop.time() >= deadline:
                self.judge.fail(f"still not ended: {self._unfinished()}")
            await asyncio.sleep(0.5)
        for client in clients:
            await client.settle()
        await asyncio.sleep(2.5)
        for process in self.processes:
            self.judge.demand(not process.leftovers(), f"{process.name} holds {process.leftovers()}")
            names = sorted(task.get_name() for task in process.host.tasks)
            self.judge.demand(
                names == ["keep-lease", "look-for-turns", "turn-log-writer"], f"{process.name} runs {names}"
            )
            process.well(False)
        self.judge.verdict(self.world.unserved)
        for process in self.processes:
            await process.leave(0)

    def _unfinished(self) -> list[str]:
        return [f"{turn_id} {seen.turn.state}" for turn_id, seen in self.judge.seen.items()
                if not (seen.deleted or seen.turn.state.is_terminal)]  # fmt: skip

    def note(self, what: str) -> None:
        """Adds to the schedule."""
        self.judge.now = asyncio.get_running_loop().time()
        self.judge.note(what)

    # Processes and what befalls them

    def start(self) -> None:
        """Starts another process."""
        self.started += 1
        process = Process(self.world, f"p{self.started}")
        self.note(f"{process.name} starts")
        self.processes.append(process)

    async def _befall(self) -> None:
        loop, chance = asyncio.get_running_loop(), self.chance
        async with asyncio.TaskGroup() as group:
            while loop.time() < STORM:
                await asyncio.sleep(min(chance.expovariate(1 / self.weather.gap), STORM - loop.time() + 0.001))
                if loop.time() < STORM and self.weather.faults:
                    fault = chance.choice(self.weather.faults)
                    group.create_task(getattr(self, f"_{fault}")())
            self.storming = False
        self.database.calm = True

    async def _watch(self) -> None:
        """Nobody works for long on a turn that is no longer its own."""
        since: dict[tuple[str, str, int], float] = {}
        while self.storming:
            await asyncio.sleep(0.2)
            now, told = asyncio.get_running_loop().time(), {}
            for process in self.processes:
                troubled = max([process.troubled_until, self.outage_until, *process.view.failures[-1:]])
                if not process.is_well or self.database.down or now - troubled < LEASE or self.weather.store.slow:
                    continue
                for turn_id, epoch in process.engine.held().items():
                    seen = self.judge.seen[turn_id]
                    if seen.deleted or seen.turn.epoch != epoch:
                        key = (process.name, turn_id, epoch)
                        told[key] = since.get(key, now)
                        limit = 0.7 if seen.changed_by is process.view else 2.7
                        self.judge.demand(now - told[key] < limit, f"{process.name} still works on {turn_id}")
            since = told

    def _victim(self) -> Process | None:
        well = [process for process in self.processes if process.is_well]
        return self.chance.choice(well) if well else None

    async def _crash(self) -> None:
        if (process := self._victim()) is None:
            return
        self.note(f"{process.name} crashes")
        self.counts["crashes"] += 1
        process.crash()
        self.processes.remove(process)
        await self._replace()

    async def _replace(self) -> None:
        await asyncio.sleep(self.chance.choice((0.1, 1.0, LEASE, 3 * LEASE)) * self.chance.random())
        self.start()

    async def _pause(self) -> None:
        if (process := self._victim()) is None:
            return
        length = self.chance.uniform(0.2, 3.5) * LEASE
        self.note(f"{process.name} is stopped for {length:.2f} s")
        self.counts["pauses"] += 1
        self.counts["long pauses"] += length > LEASE
        process.trouble()
        process.host.stop()
        await asyncio.sleep(length)
        self.note(f"{process.name} goes on")
        process.host.go_on()
        process.recovered()

    async def _partition(self) -> None:
        if (process := self._victim()) is None:
            return
        length = self.chance.uniform(0.2, 3.0) * LEASE
        self.note(f"{process.name} is cut off for {length:.2f} s")
        self.counts["partitions"] += 1
        process.trouble()
        process.view.cut = True
        await asyncio.sleep(length)
        self.note(f"{process.name} is connected")
        process.view.mend()
        process.recovered()

    async def _outage(self) -> None:
        if self.database.down:
            return
        length = self.chance.uniform(0.1, 3.0) * LEASE
        self.note(f"the store is away for {length:.2f} s")
        self.counts["outages"] += 1
        self.database.down = True
        well = [process for process in self.processes if process.is_well]
        for process in well:
            process.well(False)
        await asyncio.sleep(length)
        self.note("the store is back")
        self.database.down = False
        self.outage_until = asyncio.get_running_loop().time()
        self.outages += 1
        for process in well:
            if process.is_well:
                process.well(True)

    async def _drain(self) -> None:
        if (process := self._victim()) is not None:
            await self._leave(process, self.chance.choice((0.0, 1.0, 4.0, BUDGET + 5)))

    async def _rolling(self) -> None:
        if (process := self._victim()) is not None:
            self.start()
            await self._leave(process, BUDGET + 5, replace=False)

    async def _leave(self, process: Process, grace: float, *, replace: bool = True) -> None:
        self.note(f"{process.name} leaves within {grace:.0f} s")
        self.counts["drains"] += 1
        await process.leave(grace)
        self.note(f"{process.name} has left")
        self.processes.remove(process)
        if replace:
            await self._replace()

    def _suspicious(self, view: View) -> bool:
        process = next((process for process in self.processes if process.view is view), None)
        if process is None or not process.is_well:
            return True
        now = asyncio.get_running_loop().time()
        failures = [at for at in view.failures if at > max(now - LEASE, self.outage_until + 0.5)]
        return now - process.troubled_until < LEASE or self._sluggish or len(failures) > 2

    def _harmed(self, view: View) -> bool:
        process = next((process for process in self.processes if process.view is view), None)
        if process is None or not process.gentle or self._sluggish:
            return True
        # Who leaves tries to end its turns once a second: a store that is back too late is no gentle stop.
        return process.leaving and self.outage_until > view.patient_until - 2.0

    @property
    def _sluggish(self) -> bool:
        """Whether a renewal may take as long as a lease lasts."""
        return bool(self.weather.store.slow or self.weather.store.late)


class Client:
    """Sends messages, repeats them, follows, cancels and deletes, on whatever process it finds."""

    def __init__(self, scenario: Scenario, seed: str) -> None:
        self.scenario = scenario
        self.judge = scenario.judge
        self.chance = random.Random(seed)
        self.user = self.chance.choice(_USERS)
        self._background: set[asyncio.Task[None]] = set()

    async def act(self) -> None:
        """Does one thing after another while things happen."""
        loop = asyncio.get_running_loop()
        while loop.time() < STORM:
            await asyncio.sleep(self.chance.expovariate(1 / 1.5))
            deed = self.chance.choices(
                (self._say, self._cancel, self._delete, self._follow_any), weights=(10, 2, 0.6, 2)
            )[0]
            await deed()

    async def settle(self) -> None:
        """Waits for what it follows."""
        async with asyncio.timeout(_PATIENCE * 4):
            await asyncio.gather(*self._background)

    def _process(self) -> Process | None:
        ready = [process for process in self.scenario.processes if process.ready and not process.gone]
        return self.chance.choice(ready) if ready else None

    async def _call(self, work: Callable[[Process], Awaitable[T]]) -> T:
        """A unary call. Raises what the service answers, or UnreachableError."""
        process = self._process()
        if process is None:
            await asyncio.sleep(0.5)
            raise UnreachableError

        async def serve() -> T:
            return await work(process)

        loop = asyncio.get_running_loop()
        reply: asyncio.Future[T] = loop.create_future()
        lost = self.chance.random() < self.scenario.weather.lost_answers and not self.scenario.database.calm
        task = process.host.start(serve())
        process.calls[task] = None
        task.add_done_callback(process.calls.pop)
        task.add_done_callback(lambda done: self._answer(done, reply, lost=lost))
        try:
            async with asyncio.timeout(_PATIENCE):
                return await reply
        except TimeoutError:
            task.cancel()
            raise UnreachableError from None

    def _answer(self, done: "asyncio.Task[T]", reply: "asyncio.Future[T]", *, lost: bool) -> None:
        if done.cancelled():
            if not reply.done():
                reply.set_exception(UnreachableError())
            return
        error = done.exception()
        if error is not None and not isinstance(error, CoreError):
            self.scenario.surprised(error)
        if reply.done() or lost:
            return
        if error is not None:
            reply.set_exception(error)
        else:
            reply.set_result(done.result())

    # What it does

    async def _say(self) -> None:
        scenario, chance = self.scenario, self.chance
        scenario.requests += 1
        number = scenario.requests
        mine = [thread_id for thread_id, user in scenario.threads.items() if user == self.user]
        thread_id = chance.choice(mine[-3:]) if mine and chance.random() < 0.8 else ""
        message = IncomingMessage(
            user_id=self.user,
            content=(TextPart(f"message {number}"),),
            thread_id=thread_id,
            domain=None if thread_id else chance.choice(list(Domain)),
            request_id=f"r{number}" if chance.random() < 0.8 else "",
            on_busy=chance.choice((BusyPolicy.REJECT, BusyPolicy.QUEUE, BusyPolicy.QUEUE, BusyPolicy.INTERRUPT)),
        )
        sends = [self._send(message)]
        if message.request_id and chance.random() < 0.25:
            scenario.counts["repeats at once"] += 1
            sends.append(self._send(message))
        if message.request_id and chance.random() < 0.05:
            other = IncomingMessage(
                user_id=self.user,
                content=(TextPart(f"message {number} otherwise"),),
                thread_id=thread_id,
                domain=message.domain,
                request_id=message.request_id,
                on_busy=message.on_busy,
            )
            sends.append(self._send(other))
        for accepted in await asyncio.gather(*sends):
            if accepted is not None:
                scenario.threads[accepted.turn.thread_id] = self.user
                scenario.turns[accepted.turn.id] = self.user
                if chance.random() < 0.6:
                    self._follow(accepted.turn.id)

    async def _send(self, message: IncomingMessage) -> Accepted | None:
        """Sends a message until it is accepted, or refused for good."""
        counts = self.scenario.counts
        for _ in range(8 if message.request_id else 1):
            try:
                accepted = await self._call(lambda process: process.accept(message))
            except (UnreachableError, StoreUnavailable, Draining, Overloaded, QuotaExceeded, QueueFull) as error:
                counts[type(error).__name__] += 1
                await asyncio.sleep(self.chance.random() * 2)
            except TurnInProgress as busy:
                counts["TurnInProgress"] += 1
                if message.on_busy is not BusyPolicy.REJECT:
                    self.judge.fail(f"{message}: {busy}")
                key = ("local", message.user_id, message.request_id)
                own, _ = self.scenario.database.tables.requests.get(key, ("", ""))
                if own == busy.turn_id:
                    self.judge.fail(f"{message} is in its own way: {own}")
                if self.chance.random() < 0.6:
                    return None
                await asyncio.sleep(self.chance.random() * 2)
            except ThreadNotFound:
                self._must_be_gone(message.thread_id)
                return None
            except RequestIdReused:
                counts["RequestIdReused"] += 1
                return None
            else:
                (said,) = message.content
                assert isinstance(said, TextPart)
                self.judge.acknowledge(message.user_id, message.request_id, accepted.turn.id, said.text)
                counts["attached"] += accepted.attached
                return accepted
        return None

    async def _cancel(self) -> None:
        turns = [turn_id for turn_id, user in self.scenario.turns.items() if user == self.user][-4:]
        if not turns:
            return
        turn_id = self.chance.choice(turns)
        try:
            turn: Turn = await self._call(lambda process: process.cancel(self.user, turn_id))
        except (UnreachableError, StoreUnavailable):
            return
        except TurnNotFound:
            self.judge.demand(self.judge.seen[turn_id].deleted, f"{turn_id} is not found")
            return
        self.scenario.counts["cancels"] += 1
        self.judge.demand(turn.state.is_terminal, f"{turn_id} is cancelled, and {turn.state}")
        seen = self.judge.seen[turn_id]
        if not (seen.deleted or seen.turn == turn):
            self.judge.fail(f"{turn_id}: {turn} is not {seen.turn}")

    async def _delete(self) -> None:
        threads = [thread_id for thread_id, user in self.scenario.threads.items() if user == self.user]
        if not threads:
            return
        thread_id = self.chance.choice(threads)
        try:
            await self._call(lambda process: process.delete(self.user, thread_id))
        except (UnreachableError, StoreUnavailable):
            return
        except ThreadNotFound:
            self._must_be_gone(thread_id)
            return
        self.scenario.counts["deletions"] += 1
        self.scenario.note(f"{thread_id} is deleted")
        self._must_be_gone(thread_id)

    def _must_be_gone(self, thread_id: str) -> None:
        tables = self.scenario.database.tables
        self.judge.demand(
            thread_id in tables.tombstones and thread_id not in tables.threads, f"{thread_id} is there"
        )

    # Following

    async def _follow_any(self) -> None:
        turns = list(self.scenario.turns)[-8:]
        if turns:
            self._follow(self.chance.choice(turns))

    def _follow(self, turn_id: str) -> None:
        task = asyncio.get_running_loop().create_task(self._follow_to_the_end(turn_id))
        self._background.add(task)
        task.add_done_callback(self._follow_ended)

    def _follow_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.scenario.surprised(error)

    async def _follow_to_the_end(self, turn_id: str) -> None:
        """Follows a turn over any number of streams, on any process, from where the last one ended."""
        scenario, chance, counts = self.scenario, self.chance, self.scenario.counts
        received: list[LogEntry] = []
        begin = position = 0
        user = scenario.turns[turn_id]
        while True:
            limit = chance.choice((1, 2, 5, 1_000)) if not scenario.database.calm else 1_000
            try:
                async for entry in self._stream(user, turn_id, position, limit):
                    received.append(entry)
                    position = entry.position
            except (UnreachableError, StoreUnavailable):
                await asyncio.sleep(chance.random() * 0.5)
            except TurnNotFound:
                self.judge.demand(self.judge.seen[turn_id].deleted, f"{turn_id} is not found")
                counts["followers of deleted turns"] += 1
                break
            except PositionAhead:
                self.judge.fail(f"{turn_id}: {position} was received, and is ahead")
            if received and isinstance(received[-1].event, TurnFinished):
                break
            counts["resumes"] += 1
        counts["followed"] += 1
        self.judge.followed(turn_id, received, begin)

    async def _stream(self, user: str, turn_id: str, position: int, limit: int) -> AsyncIterator[LogEntry]:
        """One stream: until it ends, breaks, or the client leaves."""
        process = self._process()
        if process is None:
            await asyncio.sleep(0.5)
            raise UnreachableError
        slow = self.chance.random() < 0.2
        arrived: asyncio.Queue[LogEntry | BaseException | None] = asyncio.Queue()

        async def serve() -> None:
            await process.follow.find(user, turn_id, position)
            async with aclosing(process.follow.events(turn_id, position)) as entries:
                async for entry in entries:
                    self.judge.now = asyncio.get_running_loop().time()
                    self.judge.delivered(turn_id, entry)
                    arrived.put_nowait(entry)
                    if slow and not self.scenario.database.calm:
                        await asyncio.sleep(0.7)

        def ended(task: "asyncio.Task[None]") -> None:
            process.calls.pop(task)
            error: BaseException | None = UnreachableError() if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, CoreError | UnreachableError):
                self.scenario.surprised(error)
            arrived.put_nowait(error)

        task = process.host.start(serve())
        process.calls[task] = None
        task.add_done_callback(ended)
        try:
            last: LogEntry | None = None
            for _ in range(limit):
                async with asyncio.timeout(_PATIENCE if process.host.stopped else BUDGET + LEASE + _PATIENCE):
                    entry = await arrived.get()
                if isinstance(entry, BaseException):
                    raise entry
                if entry is None:
                    finished = last is not None and isinstance(last.event, TurnFinished)
                    self.judge.demand(finished, f"{turn_id}: a stream ends after {last}")
                    return
                last = entry
                yield entry
            self.scenario.counts["streams left"] += 1
        except TimeoutError:
            raise UnreachableError from None
        finally:
            task.cancel()


class _Surprises(logging.Handler):
    """Errors that the core reports and no scenario causes."""

    _KNOWN = ("turn %s failed", "a turn is left to be recovered", "the store does not answer: turns are left")

    def __init__(self, surprised: Callable[[BaseException], None]) -> None:
        super().__init__(logging.ERROR)
        self._surprised = surprised

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ZeroDivisionError) or (error is None and record.msg.startswith(self._KNOWN)):
            return
        self._surprised(error or RuntimeError(record.getMessage()))


def play(seeds: Sequence[int]) -> Counter[str]:
    """Plays seeds and counts what happened. Raises AssertionError, with what replays it, for one that fails."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = Scenario(seed).play()
        if outcome.error is not None:
            raise AssertionError(str(outcome)) from outcome.error
        counts += outcome.counts
    return counts


def digests(seeds: Sequence[int]) -> str:
    """What seeds come to, in a line."""
    return " ".join(Scenario(seed).play().digest for seed in seeds)
