"""Group commit: the events of all running turns reach the log together.

A turn's first text waits for its own commit and for no timer. What comes after waits for ticks that grow with the
number of live turns: one for fetching more, so that what comes meanwhile is read, stored and sent as one piece,
and a shorter one for commits. So the count of all of these grows with time and not with tokens.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from functools import partial

from core.model.errors import LeaseLost, StoreUnavailable
from core.model.events import LogEntry, TextDelta, TurnEvent, extent, merged, place
from core.model.turn import Turn, TurnState
from core.ports.store import Store, Transaction
from core.ports.telemetry import UNMEASURED, Telemetry
from core.ports.turns import Appended, LogAppend
from core.use_cases.bell import Bell
from core.use_cases.turn_feed import TurnFeed

_log = logging.getLogger(__name__)

_PACE_PER_TURN = 0.0005
_MIN_PACE, _MAX_PACE = 0.004, 0.18
"""Seconds between two pieces of a turn's text; less than the least is not waited for."""
_COMMITS_IN_A_PACE = 6
_FETCHES_IN_A_PACE = 30
"""How many times turns are sent to fetch more, those together whose time it is."""
_MIN_TICK = 0.005
_MAX_PENDING = 65_536
_RETRY_FIRST = 0.05
_RETRY_MAX = 1.0
_BUSY_WAIT = 0.02


class OpenLog:
    """The end of one running turn's log, held by the turn's engine task alone."""

    def __init__(self, writer: "TurnLogWriter", turn: Turn, feed: TurnFeed, telemetry: Telemetry) -> None:
        self.turn_id = turn.id
        self.epoch = turn.epoch
        self.position = turn.last_position
        self.pending: list[TurnEvent] = []
        self.in_flight = False
        self.error: Exception | None = None
        self.closed = False
        self._pending_extent = 0
        self._writer = writer
        self._feed = feed
        self._spoken = False
        self._unheard = True
        self._turn = turn
        self._telemetry = telemetry
        self._begun = telemetry.time()
        self._asked = -math.inf
        self._landed = Bell()
        self.silent = True
        """Whether nothing was added since the log was opened."""

    @property
    def events(self) -> list[TurnEvent]:
        """All that is committed."""
        return self._feed.events

    def add(self, event: TurnEvent) -> None:
        """Hands an event over; it reaches followers once it is committed. Raises what made a commit fail."""
        if self.error is not None:
            raise self.error
        self.silent = False
        first_text = not self._spoken and isinstance(event, TextDelta)
        self._spoken = self._spoken or first_text
        self.pending.append(event)
        self._pending_extent += extent(event)
        self._writer.offer(self, urgent=first_text)

    async def drain(self) -> None:
        """Waits where too much is not yet committed: bounds memory when the store is slow."""
        if self._pending_extent > _MAX_PENDING:
            await self.flush()

    async def pause(self) -> None:
        """Waits until it is time to fetch more text. What comes meanwhile gathers where it comes from."""
        loop = asyncio.get_running_loop()
        pace = self._writer.pace
        if pace >= _MIN_PACE and (due := self._asked + pace) > loop.time():
            await self._writer.until(due, pace / _FETCHES_IN_A_PACE)
        self._asked = loop.time()

    async def flush(self) -> None:
        """Waits until everything added is committed. Raises LeaseLost, or what made a commit fail."""
        while (self.pending or self.in_flight) and self.error is None:
            self._writer.offer(self, urgent=True)
            await self._landed.wait()
        if self.error is not None:
            raise self.error

    async def settle(self) -> tuple[TurnEvent, ...]:
        """Waits for what is on its way and takes back what is not: the caller commits it with the ending."""
        self._writer.withdraw(self)
        while self.in_flight:
            await self._landed.wait()
        if self.error is not None:
            raise self.error
        return self._take()

    def publish(self, events: Sequence[TurnEvent]) -> None:
        """Shows committed events to the followers."""
        entries: list[LogEntry] = place(events, self.position)
        self.position = entries[-1].position
        self._feed.publish(entries)
        if self._unheard and self._spoken:
            self._unheard = False
            self._telemetry.spoke(self._turn, self._telemetry.time() - self._begun)

    def launch(self) -> LogAppend:
        """Takes everything pending as one append."""
        self.in_flight = True
        return LogAppend(self.turn_id, self.epoch, self.position, self._take())

    def land(self, append: LogAppend, error: Exception | None) -> None:
        """Tells the outcome of an append."""
        self.in_flight = False
        self.error = error
        if error is None:
            self.publish(append.events)
        self._landed.ring()

    def _take(self) -> tuple[TurnEvent, ...]:
        events = tuple(merged(self.pending))
        self.pending.clear()
        self._pending_extent = 0
        return events


class TurnLogWriter:
    """Commits the events of all running turns of the process. `run` must be running."""

    def __init__(self, store: Store, telemetry: Telemetry = UNMEASURED) -> None:
        self._store = store
        self._telemetry = telemetry
        self._dirty: dict[str, OpenLog] = {}
        self._work = asyncio.Event()
        self._urgent = asyncio.Event()
        self._held: set[asyncio.Task[None]] = set()
        self._live = 0
        self._fetches: dict[float, Bell] = {}

    @property
    def pace(self) -> float:
        """Seconds that are to be between two pieces of one turn's text."""
        return min(_MAX_PACE, _PACE_PER_TURN * self._live)

    async def until(self, due: float, step: float) -> None:
        """Waits until `due`, in the loop's time, and up to a `step` longer, for the others of that step."""
        when = math.ceil(due / step) * step
        bell = self._fetches.get(when)
        if bell is None:
            bell = self._fetches[when] = Bell()
            asyncio.get_running_loop().call_at(when, self._fetch, when)
        await bell.wait()

    def _fetch(self, when: float) -> None:
        self._fetches.pop(when).ring()

    def open(self, turn: Turn, feed: TurnFeed) -> OpenLog:
        """Opens a turn's log for the process that has claimed it."""
        self._live += 1
        return OpenLog(self, turn, feed, self._telemetry)

    def close(self, log: OpenLog) -> None:
        """Ends a turn's part in the groups."""
        self._live -= 1
        log.closed = True
        self.withdraw(log)

    def offer(self, log: OpenLog, *, urgent: bool) -> None:
        """Asks for a commit of a log's pending events: at the next tick, or at once."""
        if log.pending and not log.in_flight:
            self._dirty[log.turn_id] = log
            self._work.set()
        if urgent:
            self._urgent.set()

    def withdraw(self, log: OpenLog) -> None:
        """Takes back what is not yet on its way."""
        if self._dirty.get(log.turn_id) is log:
            del self._dirty[log.turn_id]

    async def run(self) -> None:
        """Commits until cancelled."""
        try:
            await self._run()
        finally:
            for task in self._held:
                task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        last = 0.0
        while True:
            await self._work.wait()
            tick = max(_MIN_TICK, self.pace / _COMMITS_IN_A_PACE)
            if not self._urgent.is_set() and (wait := last + tick - loop.time()) > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._urgent.wait()
                except TimeoutError:
                    _log.debug("tick")
            self._work.clear()
            self._urgent.clear()
            logs, self._dirty = self._dirty, {}
            await self._commit([(log, log.launch()) for log in logs.values() if log.pending])
            last = loop.time()

    async def _commit(self, group: list[tuple[OpenLog, LogAppend]]) -> None:
        if not group:
            return
        retry = _RETRY_FIRST
        while True:
            try:
                appended = await self._store.write(partial(_append, [append for _, append in group]))
            except StoreUnavailable:
                # Nothing may be shown that is not durable, and nothing is given up: turns wait, within
                # their budgets, until the store is back.
                await asyncio.sleep(retry)
                retry = min(_RETRY_MAX, retry * 2)
            except Exception as error:  # noqa: BLE001 - whatever a group fails on is one turn's, and ends that one
                if len(group) == 1:
                    _log.error(
                        "turn %s: its events can't be stored: %s", group[0][1].turn_id, type(error).__name__
                    )
                    self._land(*group[0], error)
                else:
                    for member in group:
                        await self._commit([member])
                return
            else:
                for log, append in group:
                    if append.turn_id in appended.busy:
                        self._wait_for(log, append)
                    else:
                        self._land(log, append, None if append.turn_id in appended.accepted else LeaseLost())
                return

    def _wait_for(self, log: OpenLog, append: LogAppend) -> None:
        """Tries again soon, apart from the other turns: whoever holds this one must not hold them up."""

        async def again() -> None:
            await asyncio.sleep(_BUSY_WAIT)
            await self._commit([(log, append)])

        task = asyncio.create_task(again(), name=f"turn-log-{append.turn_id}")
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    def _land(self, log: OpenLog, append: LogAppend, error: Exception | None) -> None:
        log.land(append, error)
        if log.pending and error is None and not log.closed:
            self.offer(log, urgent=False)


def _append(appends: Sequence[LogAppend], tx: Transaction) -> Appended:
    appended = tx.log.append(appends)
    known = appended.accepted | appended.busy
    rest = [append for append in appends if append.turn_id not in known]
    there = {append.turn_id for append in rest if _is_there(tx.turns.find(append.turn_id), append)}
    return Appended(appended.accepted | there, appended.busy)


def _is_there(turn: Turn | None, append: LogAppend) -> bool:
    """Whether an append whose outcome was unknown had been committed: nobody else writes in this epoch."""
    return (
        turn is not None
        and turn.state is TurnState.RUNNING
        and turn.epoch == append.epoch
        and turn.last_position == append.position + sum(map(extent, append.events))
    )
