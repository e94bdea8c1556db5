"""One record that several processes share: latency, outages, partitions, lost answers, hints that get lost."""

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Hashable, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from functools import partial
from typing import Any, TypeVar

from adapters.memory import store as memory
from core.model.errors import StoreUnavailable
from core.model.thread import Thread
from core.model.turn import Turn, TurnState
from core.ports.store import UNCLAIMED, Conflict, Store, Transaction
from core.ports.system import Clock
from core.ports.turns import Appended, LogAppend
from simulation.loop import Host

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_TRIES = 3
_PATIENCE = 1.5
"""Seconds after which a process gives a database up that it can't reach."""
_BEGINNING = datetime(2026, 11, 22, 12, tzinfo=UTC)
_OUTSIDE = Context()
"""Where nothing of any process runs."""


class StoreClock(Clock):
    """The database's time: the loop's, never twice the same."""

    def __init__(self) -> None:
        self._last = _BEGINNING

    def now(self) -> datetime:
        self._last = max(self.peek(), self._last + timedelta(microseconds=1))
        return self._last

    def peek(self) -> datetime:
        """The time, without a mark that somebody looked."""
        return _BEGINNING + timedelta(seconds=asyncio.get_running_loop().time())


def seconds(at: datetime) -> float:
    """The loop's time of a moment."""
    return (at - _BEGINNING).total_seconds()


@dataclass
class WatchedTables(memory.Tables):
    """Tables that remember what the change at hand has touched, and what was there before."""

    touched: dict[int, dict[Any, Any]] = field(default_factory=lambda: defaultdict(dict))
    """By the table's identity: its keys, and what was there."""

    def put(self, table: MutableMapping[K, V], key: K, value: V) -> None:
        self.touched[id(table)].setdefault(key, table.get(key))
        super().put(table, key, value)

    def drop(self, table: MutableMapping[K, V], key: K) -> None:
        if key in table:
            self.touched[id(table)].setdefault(key, table[key])
        super().drop(table, key)

    def before(self, table: MutableMapping[K, V]) -> dict[K, V | None]:
        """What the change has touched of a table, as it was."""
        return self.touched.get(id(table), {})


class ViolationError(AssertionError):
    """A promise is broken."""


class Fate(Enum):
    """What becomes of a call."""

    ANSWERED = auto()
    REFUSED = auto()  # nothing was done
    UNANSWERED = auto()  # done, and nobody hears of it
    LATE = auto()  # done after it was given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Manners:
    """How likely what is. `contention`: that others commit while a change waits for a lock."""

    refused: float = 0.0
    unanswered: float = 0.0
    late: float = 0.0
    contention: float = 0.0
    latency: float = 0.01
    slow: float = 0.0
    hints: bool = True
    lost_hints: float = 0.1


@dataclass(slots=True, eq=False)
class _Job:
    view: "View"
    function: Callable[[Transaction], Any]
    is_write: bool
    fate: Fate
    answer: "asyncio.Future[Any]"
    done: bool = False


class Database:
    """The record and the network to it. `committed` is called after every change, in its instant."""

    def __init__(
        self, chance: random.Random, manners: Manners, committed: Callable[["View", WatchedTables], None]
    ) -> None:
        self.chance = chance
        self.manners = manners
        self.calm = False
        """Whether every call is answered, and soon."""
        self.down = False
        self.clock = StoreClock()
        self.tables = WatchedTables()
        self.views: list[View] = []
        self.counts: Counter[str] = Counter()
        self._busy: list[View] = []
        self._committed = committed
        self._store = memory.MemoryStore(self.clock, self.tables)
        self._turns = memory.Turns(self.tables, self.clock)

    def draw(self, chances: float) -> bool:
        """Whether something happens that has these chances in bad times."""
        return chances > 0 and not self.calm and self.chance.random() < chances

    def latency(self) -> float:
        """Seconds that a message takes."""
        if self.draw(self.manners.slow):
            return self.chance.uniform(0.1, 2.0)
        return self.manners.latency * self.chance.random() ** 2 + 1e-5

    def arrive(self, job: _Job) -> None:
        """Does what a call asks for, if it still has to be done, and answers."""
        if not job.done:
            self._do(job)

    def contend(self, view: "View") -> None:
        """Lets another process's change commit while one of `view` waits for its first lock."""
        if view.locks:
            return
        view.locks = True
        if self.tables.undo or not self.draw(self.manners.contention):
            return
        waiting = [other.writes[0] for other in self.views if other not in self._busy and other.writes]
        if waiting:
            self.counts["lock waits"] += 1
            self.arrive(self.chance.choice(waiting))

    def _do(self, job: _Job) -> None:
        job.done = True
        view = job.view
        if job.is_write:
            view.writes.remove(job)
        if self.down or job.fate is Fate.REFUSED or (view.cut and job.fate is not Fate.LATE):
            self.counts["refused"] += 1
            self._answer(job, StoreUnavailable(), after=_PATIENCE if view.cut else 0.01)
            return
        self._busy.append(view)
        try:
            outcome = self._run(job)
        except ViolationError:
            raise
        except Exception as error:  # noqa: BLE001 - it is the caller's
            outcome = error
        finally:
            self._busy.remove(view)
        self._answer(job, outcome)

    def _run(self, job: _Job) -> Any:
        def attempt(*_: Transaction) -> Any:
            job.view.locks = False
            return job.function(job.view.transaction)

        if not job.is_write:
            return attempt()
        for tries in range(1, _TRIES + 1):
            try:
                result = _at_once(self._store.write(attempt))
                break
            except Conflict:
                self.counts["conflicts"] += 1
                self.tables.touched.clear()
                if tries == _TRIES:
                    raise
            except BaseException:
                self.tables.touched.clear()
                raise
        try:
            self._committed(job.view, self.tables)
            self._hint(job.view)
        finally:
            self.tables.touched.clear()
        return result

    def _answer(self, job: _Job, outcome: Any, after: float = 0.0) -> None:
        if job.fate in (Fate.UNANSWERED, Fate.LATE) and not isinstance(outcome, StoreUnavailable):
            self.counts["answers lost"] += job.is_write
            outcome = StoreUnavailable()
        loop = asyncio.get_running_loop()
        loop.call_later(after + self.latency(), self.deliver, job, outcome, context=_OUTSIDE)

    def deliver(self, job: _Job, outcome: Any) -> None:
        """Brings an answer to its process, if it is there."""
        if job.view.host.dead or job.answer.done():
            return
        if job.view.cut and not isinstance(outcome, StoreUnavailable):
            self.counts["answers lost"] += job.is_write
            loop = asyncio.get_running_loop()
            loop.call_later(_PATIENCE, self.deliver, job, StoreUnavailable(), context=_OUTSIDE)
            return
        if isinstance(outcome, StoreUnavailable):
            job.view.failures.append(asyncio.get_running_loop().time())
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)

    def _hint(self, writer: "View") -> None:
        tables = self.tables
        ids = set(tables.before(tables.turns)) | set(tables.before(tables.logs))
        threads = {turn.thread_id for turn_id in ids if (turn := tables.turns.get(turn_id))}
        for thread_id in threads:
            unfinished = self._turns.unfinished(thread_id)
            if unfinished and unfinished[0].state is TurnState.ACCEPTED:
                ids.add(UNCLAIMED)
        for view in self.views:
            if ids and view is not writer:
                view.hint(frozenset(ids))


class View(Store):
    """The record as one process sees it."""

    def __init__(self, database: Database, host: Host, owner: str) -> None:
        self.database = database
        self.host = host
        self.owner = owner
        self.cut = False
        """Whether the network between this process and the database is broken."""
        self.patient_until = 0.0
        """Until when turns that can't move may finish here, for a process that leaves."""
        self.writes: deque[_Job] = deque()
        self.failures: list[float] = []
        self.locks = False
        """Whether its transaction has waited for those that others hold."""
        self.transaction = _Transaction(database, self)
        self._last = 0.0
        self._heard: Callable[[frozenset[str]], None] | None = None
        database.views.append(self)

    async def write(self, change: Callable[[Transaction], T]) -> T:
        result: T = await self._call(change, is_write=True)
        return result

    async def read(self, query: Callable[[Transaction], T]) -> T:
        result: T = await self._call(query, is_write=False)
        return result

    async def purge(self) -> bool:
        raise NotImplementedError

    def exclusive(self, name: str) -> AbstractAsyncContextManager[bool]:
        raise NotImplementedError

    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        if self.database.manners.hints:
            self._heard = heard
        return self.database.manners.hints

    async def aclose(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Is no process's view any more. Of what is under way to the database the first part arrives."""
        self._heard = None
        self.database.views.remove(self)
        for job in list(self.writes)[self.database.chance.randint(0, len(self.writes)) :]:
            job.fate = Fate.REFUSED

    def mend(self) -> None:
        """The network works again."""
        self.cut = False
        self.hint(frozenset())

    def hint(self, turn_ids: frozenset[str]) -> None:
        """Passes on a hint: perhaps late, twice, or not at all."""
        database = self.database
        if self._heard is None or self.cut or database.draw(database.manners.lost_hints):
            return
        loop = asyncio.get_running_loop()
        for _ in range(2 if database.draw(0.05) else 1):
            delay = database.chance.uniform(0.5, 3.0) if database.draw(0.05) else database.latency()
            loop.call_later(delay, self._hear, turn_ids, context=self.host.context.copy())

    def _hear(self, turn_ids: frozenset[str]) -> None:
        if self._heard is not None and not self.host.dead:
            self._heard(turn_ids)

    async def _call(self, function: Callable[[Transaction], Any], *, is_write: bool) -> Any:
        if self.host.dead:
            raise asyncio.CancelledError
        loop, database, manners = asyncio.get_running_loop(), self.database, self.database.manners
        fate = Fate.ANSWERED
        if database.draw(manners.refused):
            fate = Fate.REFUSED
        elif database.draw(manners.unanswered):
            fate = Fate.UNANSWERED
        elif is_write and database.draw(manners.late):
            fate = Fate.LATE
        job = _Job(self, function, is_write, fate, loop.create_future())
        due = loop.time() + database.latency()
        if fate is Fate.LATE:
            loop.call_at(due, database.deliver, job, StoreUnavailable(), context=_OUTSIDE)
            due += database.chance.uniform(0.0, 2.0)
        if is_write:
            due = self._last = max(due, self._last + 1e-6)  # changes of one process keep their order
            self.writes.append(job)
        loop.call_at(due, database.arrive, job, context=_OUTSIDE)
        return await job.answer


class _Transaction(memory.MemoryTransaction):
    """A transaction that waits, at its first lock, for those that others hold. What is locked once nobody else
    changes."""

    def __init__(self, database: Database, view: View) -> None:
        super().__init__(database.tables, database.clock)
        wait = partial(database.contend, view)
        self._threads = _Threads(database.tables, wait)
        self._turns = _Turns(database.tables, database.clock, wait)
        self._log = _TurnLog(database, view)


class _Threads(memory.Threads):
    def __init__(self, tables: memory.Tables, wait: Callable[[], None]) -> None:
        super().__init__(tables)
        self._wait = wait

    def lock(self, user_id: str, thread_id: str) -> Thread | None:
        self._wait()
        return super().lock(user_id, thread_id)


class _Turns(memory.Turns):
    def __init__(self, tables: memory.Tables, clock: Clock, wait: Callable[[], None]) -> None:
        super().__init__(tables, clock)
        self._wait = wait

    def lock(self, turn_id: str) -> Turn | None:
        self._wait()
        return super().lock(turn_id)


class _TurnLog(memory.TurnLog):
    def __init__(self, database: Database, view: View) -> None:
        super().__init__(database.tables)
        self._database = database
        self._view = view

    def append(self, batch: Sequence[LogAppend]) -> Appended:
        database = self._database
        # Nobody waits for one's own locks.
        chances = 0.0 if self._view.locks else database.manners.contention / 5
        busy = frozenset(append.turn_id for append in batch if database.draw(chances))
        database.counts["busy logs"] += len(busy)
        rest = [append for append in batch if append.turn_id not in busy]
        return replace(super().append(rest), busy=busy)


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that never waits returns."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("the memory store waits for something")
