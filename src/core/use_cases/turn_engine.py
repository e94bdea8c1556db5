"""Runs turns, detached from any call: asks the agent, runs the tools, feeds the log, ends the turn."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import TypeVar

from core.model.agent import AgentDefinition
from core.model.errors import (
    CoreError,
    Draining,
    LeaseLost,
    Overloaded,
    QuotaExceeded,
    StoreUnavailable,
    TurnNotFound,
)
from core.model.events import LogEntry, TextDelta, ToolAnswered, ToolCalled, TurnEvent, TurnFinished, TurnStarted
from core.model.message import Message, ToolExchange
from core.model.thread import ProviderState, Thread
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.ports.agent import Agent, AgentFailed, ReplyRequest, RoundFinished, StateChanged, ToolRound
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.ports.tools import ToolContext, Tools
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.turn_feed import TurnFeeds
from core.use_cases.turn_log_writer import OpenLog, TurnLogWriter

_log = logging.getLogger(__name__)

MAX_TOOL_ROUNDS = 8
MAX_TOOL_CALLS = 32
"""Tool calls in one turn."""
MAX_ARGUMENTS = 65_536
"""Code points of one tool call's arguments."""
MAX_OUTPUT = 131_072
"""Code points of text in one reply."""

_LAST_WRITES = 10.0
"""Seconds that a stop gives to ending what is left."""

_LATE_COMMITS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between looks for a turn whose acceptance was not answered."""
_RETRY_FIRST = 0.05
_RETRY_MAX = 1.0

T = TypeVar("T")

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """Bounds on turns in flight, and the seconds that a turn may take."""

    max_turns: int = 5_000
    max_turns_per_user: int = 8
    budget: float = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedTurn:
    """A turn that this process has claimed, with all that it needs to run."""

    turn: Turn
    thread: Thread
    message: Message
    definition: AgentDefinition
    state: ProviderState | None


class TurnEngine:
    """Owns the running turns of this process. Works from `start` to `drain`."""

    def __init__(
        self, *, store: Store, agent: Agent, tools: Tools, feeds: TurnFeeds, ids: Ids, limits: TurnLimits
    ) -> None:
        self._store = store
        self._agent = agent
        self._tools = tools
        self._feeds = feeds
        self._ids = ids
        self._limits = limits
        self._writer = TurnLogWriter(store)
        self._writing: asyncio.Task[None] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._reserved: Counter[str] = Counter()
        self._disowned: set[asyncio.Task[None]] = set()
        self._draining = False

    @property
    def agent(self) -> Agent:
        """Who answers."""
        return self._agent

    def start(self) -> None:
        """Begins to commit events. Needs a running loop."""
        self._writing = asyncio.create_task(self._writer.run(), name="turn-log-writer")

    def reserve(self, user_id: str) -> CoreError | None:
        """Takes a place for a turn, or says why there is none. A place must be used by `run` or released."""
        if self._draining:
            return Draining()
        if self._reserved.total() >= self._limits.max_turns:
            return Overloaded()
        if self._reserved[user_id] >= self._limits.max_turns_per_user:
            return QuotaExceeded()
        self._reserved[user_id] += 1
        return None

    def release(self, user_id: str) -> None:
        """Gives a place back."""
        self._reserved[user_id] -= 1
        if not self._reserved[user_id]:
            del self._reserved[user_id]

    def run(self, claimed: ClaimedTurn) -> None:
        """Runs a turn in the background, in the place reserved for it."""
        turn = claimed.turn
        started = TurnStarted(turn.id, turn.thread_id, turn.agent_id)
        feed = self._feeds.open(turn.id, [LogEntry(1, started)])
        log = self._writer.open(turn, feed)
        task = asyncio.create_task(self._run(claimed, log), name=f"turn-{turn.id}")
        self._running[turn.id] = task

        # Not in the task itself: one that is cancelled before its first step runs none of its code.
        def forget(task: asyncio.Task[None]) -> None:
            _retrieve(task)
            self._writer.close(log)
            self._feeds.drop(turn.id)
            del self._running[turn.id]
            self.release(turn.user_id)

        task.add_done_callback(forget)

    def disown(self, turn_id: str) -> None:
        """Ends a turn, if there is one, whose acceptance the store did not answer: it may be there or not."""
        task = asyncio.create_task(self._disown(turn_id), name=f"disown-{turn_id}")
        task.add_done_callback(_retrieve)
        task.add_done_callback(self._disowned.discard)
        self._disowned.add(task)

    async def _disown(self, turn_id: str) -> None:
        for wait in _LATE_COMMITS:  # a commit whose answer was lost may still be under way
            await asyncio.sleep(wait)
            with suppress(TurnNotFound):
                await self._end(turn_id, Ending(reason=TurnReason.INTERRUPTED))
                return

    def abandon(self, turn_id: str) -> None:
        """Stops work on a turn that somebody else has ended; followers go on from the store."""
        self._feeds.drop(turn_id)
        if task := self._running.get(turn_id):
            task.cancel()

    def refuse(self) -> None:
        """Takes no more turns."""
        self._draining = True

    async def drain(self, grace: float) -> None:
        """Lets the running turns finish for `grace` seconds, then ends them INTERRUPTED."""
        self.refuse()
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=grace)
        for disowning in list(self._disowned):
            disowning.cancel()  # what it may have missed is ended at the next start
        left = dict(self._running)
        for task in left.values():
            task.cancel()
        await asyncio.gather(*left.values(), return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_WRITES):
                endings = (self._end(turn_id, Ending(reason=TurnReason.INTERRUPTED)) for turn_id in left)
                for outcome in await asyncio.gather(*endings, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        _log.error("a turn is left to be ended at the next start", exc_info=outcome)
        except TimeoutError:
            _log.error("the store does not answer: turns are left to be ended at the next start")
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _run(self, claimed: ClaimedTurn, log: OpenLog) -> None:
        turn = claimed.turn
        try:
            try:
                ending = await self._within_budget(claimed, log)
                tail = await log.settle()
            except LeaseLost:
                raise
            except Exception:  # noqa: BLE001 - whatever goes wrong, the turn ends and says so
                _log.exception("turn %s failed", turn.id)
                ending = Ending(reason=TurnReason.INTERNAL)
                tail = await _settled(log)
            ended, kept = await self._end_somehow(turn, ending, tail)
            if not ended.already:
                log.publish([*kept, TurnFinished(ended.turn, ended.reply)])
        except (LeaseLost, TurnNotFound):
            _log.warning("turn %s is no longer ours", turn.id)

    async def _within_budget(self, claimed: ClaimedTurn, log: OpenLog) -> Ending:
        usage = _Usage()
        try:
            async with asyncio.timeout(self._limits.budget) as budget:
                return await self._reply(claimed, log, usage)
        except AgentFailed as failure:
            _log.info("turn %s: %s", claimed.turn.id, failure.reason)
            return Ending(reason=failure.reason, usage=usage.total)
        except TimeoutError:
            if not budget.expired():
                raise
            return Ending(reason=TurnReason.BUDGET_EXCEEDED, usage=usage.total)

    async def _reply(self, claimed: ClaimedTurn, log: OpenLog, usage: "_Usage") -> Ending:
        turn = claimed.turn
        request = ReplyRequest(
            turn_id=turn.id,
            thread_id=turn.thread_id,
            user_id=turn.user_id,
            domain=claimed.thread.domain,
            definition=claimed.definition,
            message=claimed.message,
            history=partial(self._history, claimed.message),
            tools=self._tools.specs(claimed.definition.tools),
            state=claimed.state if claimed.state and claimed.state.provider == self._agent.provider else None,
        )
        written = 0
        seen: set[str] = set()
        while True:
            text: list[str] = []
            calls: list[ToolCalled] = []
            finished: RoundFinished | None = None
            async with aclosing(self._agent.reply(request)) as events:
                async for event in events:
                    match event:
                        case TextDelta():
                            event = replace(event, text=_storable(event.text))
                            room = MAX_OUTPUT - written
                            if len(event.text) > room:
                                if room:
                                    log.add(replace(event, text=event.text[:room]))
                                return Ending(reason=TurnReason.OUTPUT_LIMIT, usage=usage.total)
                            if event.text:
                                written += len(event.text)
                                text.append(event.text)
                                log.add(event)
                                await log.drain()
                        case ToolCalled():
                            calls.append(_checked(event, seen))
                        case StateChanged(state):
                            request = replace(request, state=state)
                            save = partial(_save_state, turn, state)
                            await _patiently(partial(self._store.write, save))
                        case RoundFinished():
                            finished = event
            if finished is None:
                return Ending(reason=TurnReason.PROVIDER_TRUNCATED, usage=usage.total)
            usage.total += finished.usage
            if finished.shortfall is not None:
                return Ending(reason=finished.shortfall, usage=usage.total)
            if not calls:
                return Ending(usage=usage.total, keeps_copy=finished.keeps_copy)
            if len(request.rounds) == MAX_TOOL_ROUNDS or len(seen) > MAX_TOOL_CALLS:
                return Ending(reason=TurnReason.TOOL_LIMIT, usage=usage.total)
            exchanges = await self._call_tools(claimed, calls, log)
            request = replace(request, rounds=(*request.rounds, ToolRound("".join(text), exchanges)))

    async def _call_tools(
        self, claimed: ClaimedTurn, calls: Sequence[ToolCalled], log: OpenLog
    ) -> tuple[ToolExchange, ...]:
        for call in calls:
            log.add(call)
        await log.flush()  # a call is on record before it can have an effect

        async def run(call: ToolCalled) -> ToolExchange:
            context = ToolContext(
                user_id=claimed.turn.user_id,
                thread_id=claimed.turn.thread_id,
                turn_id=claimed.turn.id,
                call_id=call.call_id,
                domain=claimed.thread.domain,
            )
            if call.name not in claimed.definition.tools:
                output, is_error = '{"error": "there is no such tool"}', True
            else:
                result = await self._tools.call(call.name, call.arguments_json, context)
                output, is_error = _storable(result.text), result.is_error
            return ToolExchange(call.call_id, call.name, call.arguments_json, output, is_error)

        exchanges = await asyncio.gather(*map(run, calls))
        for exchange in exchanges:
            log.add(ToolAnswered(exchange.call_id, exchange.output, exchange.is_error))
        await log.flush()
        return tuple(exchanges)

    async def _history(self, message: Message) -> Sequence[Message]:
        def query(tx: Transaction) -> Sequence[Message]:
            return tx.messages.list(message.thread_id, after=message.index, newest_first=True, limit=None)

        lines = await _patiently(partial(self._store.read, query))
        return lines[::-1]

    async def _end_somehow(
        self, turn: Turn, ending: Ending, tail: Sequence[TurnEvent]
    ) -> tuple[Ended, Sequence[TurnEvent]]:
        """Ends a turn; what the store can't take of its ending must not keep it open. Returns what was kept."""
        broken = Ending(reason=TurnReason.INTERNAL)
        for attempt, kept in chain([(ending, tail), (broken, tail)], repeat((broken, ()))):
            try:
                return await self._end(turn.id, attempt, epoch=turn.epoch, tail=kept), kept
            except (LeaseLost, TurnNotFound):
                raise
            except Exception:  # noqa: BLE001 - the next attempt asks less of the store
                _log.exception("turn %s can't be ended as it should", turn.id)
                if not kept:
                    await asyncio.sleep(_RETRY_MAX)
        raise AssertionError("the attempts never end")

    async def _end(
        self, turn_id: str, ending: Ending, *, epoch: int | None = None, tail: Sequence[TurnEvent] = ()
    ) -> Ended:
        # The turn must end; the next start of the service ends it if this process does not.
        return await _patiently(
            lambda: self._store.write(lambda tx: end_turn(tx, self._ids, turn_id, ending, epoch=epoch, tail=tail))
        )


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Tries until the store answers. The turn's budget, or the end of the process, bounds it."""
    wait = _RETRY_FIRST
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            await asyncio.sleep(wait)
            wait = min(_RETRY_MAX, wait * 2)


async def _settled(log: OpenLog) -> tuple[TurnEvent, ...]:
    """What a turn that has failed can still keep."""
    try:
        return await log.settle()
    except LeaseLost:
        raise
    except Exception:  # noqa: BLE001 - the append that failed is lost; the ending is not
        return ()


class _Usage:
    """The sum over the rounds, also of a turn that is broken off."""

    def __init__(self) -> None:
        self.total = Usage()


def _retrieve(task: asyncio.Task[None]) -> None:
    """Logs what ended a task; asyncio would do so with the exception's text."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s broke", task.get_name(), exc_info=error)


def _save_state(turn: Turn, state: ProviderState, tx: Transaction) -> None:
    current = tx.turns.lock(turn.id)
    if current is None or current.epoch != turn.epoch or current.state is not TurnState.RUNNING:
        raise LeaseLost
    tx.threads.save_provider_state(turn.thread_id, state)


def _checked(call: ToolCalled, seen: set[str]) -> ToolCalled:
    if not call.call_id or call.call_id in seen or len(call.arguments_json) > MAX_ARGUMENTS:
        raise AgentFailed(TurnReason.PROVIDER_PROTOCOL)
    seen.add(call.call_id)
    return ToolCalled(_storable(call.call_id), _storable(call.name), _storable(call.arguments_json))


def _storable(text: str) -> str:
    """The same text with what no database and no protobuf string can hold replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)
