"""Runs turns, detached from any call: asks the agent, runs the tools, feeds the log, ends the turn."""

import asyncio
import logging
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
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
from core.model.events import AttemptRestarted, Round, TextDelta, ToolAnswered, ToolCalled, TurnEvent, TurnFinished
from core.model.message import Message, ToolExchange
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import Continuation, Turn, TurnReason, TurnState, Usage
from core.ports.agent import Agent, AgentFailed, Begun, ReplyRequest, RoundFinished, StateChanged, ToolRound
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.ports.tools import ToolContext, Tools
from core.use_cases.claim_turn import (
    MAX_ATTEMPTS,
    Claimant,
    ClaimedTurn,
    kept_rounds,
    release_turn,
    restarting,
    why_not_again,
)
from core.use_cases.definitions import Definitions
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

_LOOK = 1.0
"""Seconds that a stop gives to the question whether there is another process."""
_LAST_WRITES = 5.0
"""Seconds that a stop gives to what must still be written."""

_RETRY_FIRST = 0.05
_RETRY_MAX = 1.0

T = TypeVar("T")

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


_RESTARTABLE = frozenset(
    {
        TurnReason.PROVIDER_RATE_LIMITED,
        TurnReason.PROVIDER_UNAVAILABLE,
        TurnReason.PROVIDER_TIMEOUT,
        TurnReason.PROVIDER_TRUNCATED,
        TurnReason.PROVIDER_STALLED,
        TurnReason.PROVIDER_PROTOCOL,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """Bounds on turns in flight, and the seconds that a turn may take.

    `restart` says that a reply whose text was cut off begins again instead of ending INCOMPLETE.
    """

    max_turns: int = 5_000
    max_turns_per_user: int = 8
    budget: float = 180.0
    restart: bool = False


class TurnEngine:
    """Owns the running turns of this process. Works from `start` to `drain`."""

    def __init__(
        self,
        *,
        store: Store,
        agent: Agent,
        tools: Tools,
        feeds: TurnFeeds,
        ids: Ids,
        definitions: Definitions,
        owner: str,
        limits: TurnLimits,
    ) -> None:
        self._store = store
        self._agent = agent
        self._tools = tools
        self._feeds = feeds
        self._ids = ids
        self._limits = limits
        self._writer = TurnLogWriter(store)
        self._writing: asyncio.Task[None] | None = None
        self._running: dict[str, _Run] = {}
        self._expected: set[str] = set()
        self._stopping: set[asyncio.Task[None]] = set()
        self._reserved: Counter[str] = Counter()
        self._leased_until = math.inf
        self._leased = asyncio.Event()
        self._draining = False
        self._hurried = asyncio.Event()
        self.claimant = Claimant(
            owner=owner,
            budget=limits.budget,
            restart=limits.restart,
            is_idempotent=self._is_idempotent,
            served_by=lambda definition: (agent.model(definition), agent.provider),
            definition=definitions.of,
        )
        self.waiting = asyncio.Event()
        """Set where a turn that waits may be claimed now."""
        self.tell_of_room = False
        """Whether to set it as soon as there is another place."""

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
        if asyncio.get_running_loop().time() >= self._leased_until:
            return StoreUnavailable()  # others may take what this process claims now
        if self._reserved.total() >= self._limits.max_turns:
            return Overloaded()
        if self._reserved[user_id] >= self._limits.max_turns_per_user:
            return QuotaExceeded()
        self._reserved[user_id] += 1
        return None

    def reserve_anyway(self, user_id: str) -> None:
        """Takes a place for a turn that replaces another one."""
        self._reserved[user_id] += 1

    def release(self, user_id: str) -> None:
        """Gives a place back."""
        self._reserved[user_id] -= 1
        if not self._reserved[user_id]:
            del self._reserved[user_id]

    @contextmanager
    def expecting(self, turn_id: str) -> Iterator[None]:
        """Says that a turn is being accepted: it may be on record before it runs."""
        self._expected.add(turn_id)
        try:
            yield
        finally:
            self._expected.discard(turn_id)

    def knows(self, turn_id: str) -> bool:
        """Whether a turn runs here or is being accepted here."""
        return turn_id in self._running or turn_id in self._expected

    def held(self) -> dict[str, int]:
        """Ids and epochs of the turns that run here."""
        return {turn_id: run.claimed.turn.epoch for turn_id, run in self._running.items()}

    def leased(self, until: float) -> None:
        """Says how long, in the loop's time, this process may count on its lease."""
        self._leased_until = until
        self._leased.set()

    def run(self, claimed: ClaimedTurn) -> None:
        """Runs a turn in the background, in the place reserved for it."""
        turn = claimed.turn
        if earlier := self._running.get(turn.id):
            # A claim of a turn that still runs here: the older epoch can write nothing, and is stopped.
            earlier.task.cancel()
        feed = self._feeds.open(turn.id, claimed.log)
        log = self._writer.open(turn, feed)
        task = asyncio.create_task(self._run(claimed, log), name=f"turn-{turn.id}")
        run = self._running[turn.id] = _Run(claimed, log, task)

        # Not in the task itself: one that is cancelled before its first step runs none of its code.
        def forget(task: asyncio.Task[None]) -> None:
            _retrieve(task)
            self._writer.close(log)
            if self._running.get(turn.id) is run:
                self._feeds.drop(turn.id)
                del self._running[turn.id]
            self.release(turn.user_id)
            if self.tell_of_room:
                self.tell_of_room = False
                self.waiting.set()

        task.add_done_callback(forget)

    def abandon(self, turn_id: str) -> None:
        """Stops work on a turn that somebody else has ended or claimed; followers go on from the store."""
        self._feeds.drop(turn_id)
        self._feeds.tell(turn_id)
        if run := self._running.get(turn_id):
            run.task.cancel()

    def ended(self, ended: Ended) -> None:
        """Takes notice of an ending: the next turn of the thread may be claimed, and nobody reads on."""
        if ended.next_id is not None:
            self.waiting.set()
        if not ended.already and ended.turn.state is not TurnState.COMPLETED:
            self.stop_reply(ended.turn)

    def stop_reply(self, turn: Turn) -> None:
        """Stops what the provider still writes for a turn that has ended or is gone."""
        if turn.continuation is not None and turn.provider == self._agent.provider:
            self._stop_round(turn.continuation.handle)

    def _stop_round(self, handle: str) -> None:
        task = asyncio.create_task(self._agent.stop(handle), name="stop-round")
        task.add_done_callback(_retrieve)
        task.add_done_callback(self._stopping.discard)
        self._stopping.add(task)

    def refuse(self) -> None:
        """Takes no more turns."""
        self._draining = True

    async def drain(self, grace: float) -> None:
        """Hands turns without text over if there is another process; lets the others finish for `grace` seconds.

        What is left then waits for another process if it can begin again, else it ends INTERRUPTED.
        """
        self.refuse()
        if grace > 0 and await self._has_peers():
            await self._stop(lambda run: run.can_move)
        async with asyncio.TaskGroup() as group:
            hurried = group.create_task(self._hurried.wait())
            running = [run.task for run in self._running.values()]
            finished = group.create_task(_all_done(running))
            await asyncio.wait([hurried, finished], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            finished.cancel()
        await self._stop(lambda _: True)
        if self._stopping:
            await asyncio.wait(self._stopping, timeout=_LAST_WRITES)
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    def hurry(self) -> None:
        """Cuts the grace of a drain short."""
        self._hurried.set()

    async def _has_peers(self) -> bool:
        try:
            async with asyncio.timeout(_LOOK):
                return await self._store.read(lambda tx: tx.leases.others(self.claimant.owner))
        except (StoreUnavailable, TimeoutError):
            return False

    async def _stop(self, chosen: Callable[["_Run"], bool]) -> None:
        """Stops turns and releases them. Between a look at a turn and its stop nothing else happens."""
        stopped = [run for run in self._running.values() if chosen(run)]
        for run in stopped:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in stopped), return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_WRITES):
                releases = [self._release(run.claimed.turn) for run in stopped]
                for outcome in await asyncio.gather(*releases, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        _log.error("a turn is left to be recovered", exc_info=outcome)
        except TimeoutError:
            _log.error("the store does not answer: turns are left to be recovered")

    async def _release(self, turn: Turn) -> None:
        await _patiently(
            lambda: self._store.write(lambda tx: release_turn(tx, self._ids, turn, self.claimant)),
        )

    def _is_idempotent(self, definition: AgentDefinition, name: str) -> bool:
        if name not in definition.tools:
            return True  # it was answered with an error, never run
        specs = self._tools.specs([name])
        return bool(specs) and specs[0].idempotent

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
            self.ended(ended)
        except (LeaseLost, TurnNotFound):
            _log.warning("turn %s is no longer ours", turn.id)

    async def _within_budget(self, claimed: ClaimedTurn, log: OpenLog) -> Ending:
        work = _Work(claimed, self._agent.provider)
        try:
            async with asyncio.timeout(claimed.budget_left) as budget:
                while True:
                    try:
                        return await self._reply(claimed, log, work)
                    except AgentFailed as failure:
                        _log.info("turn %s: %s", claimed.turn.id, failure.reason)
                        work.resume = None
                        if not await self._begins_again(claimed, log, work, failure.reason):
                            return Ending(reason=failure.reason, usage=work.usage)
        except TimeoutError:
            if not budget.expired():
                raise
            return Ending(reason=TurnReason.BUDGET_EXCEEDED, usage=work.usage)

    async def _begins_again(self, claimed: ClaimedTurn, log: OpenLog, work: "_Work", reason: TurnReason) -> bool:
        """Begins another attempt where text was cut off, or where a round can't be resumed.

        Without text the agent itself has tried again.
        """
        lost = reason is TurnReason.INTERRUPTED
        if not lost and not (self._limits.restart and reason in _RESTARTABLE):
            return False
        await log.flush()
        events = log.events
        again = restarting(events, work.attempt + 1, reason)
        if not again and not lost:
            return False
        if why_not_again(events, work.attempt, self.claimant, claimed.definition) is not None:
            return False
        if not again:  # nothing to drop, but attempts are counted on record
            again = (AttemptRestarted(work.attempt + 1, reason.value),)
        for event in again:
            log.add(event)
        await log.flush()
        if work.handle is not None:
            self._stop_round(work.handle)
        work.begin_again(kept_rounds(events))
        return True

    async def _reply(self, claimed: ClaimedTurn, log: OpenLog, work: "_Work") -> Ending:
        turn = claimed.turn
        rounds = [ToolRound(kept.text, await self._answered(claimed, kept, log)) for kept in work.kept]
        written = sum(len(done.text) for done in rounds) + (len(work.resume.text) if work.resume else 0)
        seen = {exchange.call_id for done in rounds for exchange in done.exchanges}
        request = ReplyRequest(
            turn_id=turn.id,
            thread_id=turn.thread_id,
            user_id=turn.user_id,
            domain=claimed.thread.domain,
            definition=claimed.definition,
            message=claimed.message,
            history=partial(self._history, claimed.message),
            tools=self._tools.specs(claimed.definition.tools),
            rounds=tuple(rounds),
            state=work.state,
            resume=work.resume,
        )
        while True:
            text: list[str] = [request.resume.text] if request.resume else []
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
                                return Ending(reason=TurnReason.OUTPUT_LIMIT, usage=work.usage)
                            if event.text:
                                written += len(event.text)
                                text.append(event.text)
                                log.add(event)
                                await log.drain()
                        case ToolCalled():
                            calls.append(_checked(event, seen))
                        case Begun(handle):
                            work.handle = handle
                            begun = Continuation(handle, work.attempt, len(request.rounds))
                            await _patiently(partial(self._store.write, partial(_save_continuation, turn, begun)))
                        case StateChanged(state):
                            work.state = state
                            request = replace(request, state=state)
                            save = partial(_save_state, turn, state)
                            await _patiently(partial(self._store.write, save))
                        case RoundFinished():
                            work.handle = None
                            finished = event
            if finished is None:
                raise AgentFailed(TurnReason.PROVIDER_TRUNCATED)
            work.usage += finished.usage
            if finished.shortfall is not None:
                return Ending(reason=finished.shortfall, usage=work.usage)
            if not calls:
                return Ending(usage=work.usage, keeps_copy=finished.keeps_copy)
            if len(request.rounds) == MAX_TOOL_ROUNDS or len(seen) > MAX_TOOL_CALLS:
                return Ending(reason=TurnReason.TOOL_LIMIT, usage=work.usage)
            for call in calls:
                log.add(call)
            await log.flush()  # a call is on record before it can have an effect
            exchanges = await self._call_tools(claimed, calls, log)
            done = ToolRound("".join(text), exchanges)
            request = replace(request, rounds=(*request.rounds, done), resume=None)

    async def _answered(self, claimed: ClaimedTurn, kept: Round, log: OpenLog) -> tuple[ToolExchange, ...]:
        """The exchanges of a round of an earlier attempt; calls without an answer on record are made again."""
        answers = {answer.call_id: answer for answer in kept.answers}
        done = {
            call.call_id: ToolExchange(
                call.call_id, call.name, call.arguments_json, answer.output, answer.is_error
            )
            for call in kept.calls
            if (answer := answers.get(call.call_id))
        }
        if kept.open_calls:
            for exchange in await self._call_tools(claimed, kept.open_calls, log):
                done[exchange.call_id] = exchange
        return tuple(done[call.call_id] for call in kept.calls)

    async def _call_tools(
        self, claimed: ClaimedTurn, calls: Sequence[ToolCalled], log: OpenLog
    ) -> tuple[ToolExchange, ...]:
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
                await self._sure_of_lease()
                result = await self._tools.call(call.name, call.arguments_json, context)
                output, is_error = _storable(result.text), result.is_error
            return ToolExchange(call.call_id, call.name, call.arguments_json, output, is_error)

        exchanges = await asyncio.gather(*map(run, calls))
        for exchange in exchanges:
            log.add(ToolAnswered(exchange.call_id, exchange.output, exchange.is_error))
        await log.flush()
        return tuple(exchanges)

    async def _sure_of_lease(self) -> None:
        """Waits, after a pause of this process, until it knows again whether its turns are its own."""
        while asyncio.get_running_loop().time() >= self._leased_until:
            self._leased.clear()
            await self._leased.wait()

    async def _history(self, message: Message) -> Sequence[Message]:
        if message.index == 1:
            return ()

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


@dataclass(frozen=True, slots=True)
class _Run:
    """A turn at work."""

    claimed: ClaimedTurn
    log: OpenLog
    task: "asyncio.Task[None]"

    @property
    def can_move(self) -> bool:
        """Whether another process can take it over and nobody notices."""
        return self.log.silent and not self.claimed.rounds and self.claimed.turn.attempt < MAX_ATTEMPTS


class _Work:
    """What is kept over the attempts of a reply in this process, also of one that is broken off."""

    def __init__(self, claimed: ClaimedTurn, provider: str) -> None:
        self.usage = Usage()
        self.attempt = claimed.turn.attempt
        self.kept = claimed.rounds
        self.resume = claimed.resume
        self.handle = claimed.resume.handle if claimed.resume else None
        self.state = claimed.state if claimed.state and claimed.state.provider == provider else None

    def begin_again(self, kept: tuple[Round, ...]) -> None:
        """The provider's copy may hold anything of the attempt before."""
        self.attempt += 1
        self.kept = kept
        self.handle = None
        if self.state is not None:
            self.state = replace(self.state, synced_to=UNSYNCED)


async def _all_done(tasks: Sequence["asyncio.Task[None]"]) -> None:
    if tasks:
        await asyncio.wait(tasks)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Logs what ended a task; asyncio would do so with the exception's text."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s broke", task.get_name(), exc_info=error)


def _require_ours(turn: Turn, tx: Transaction) -> None:
    current = tx.turns.lock(turn.id)
    if current is None or current.epoch != turn.epoch or current.state is not TurnState.RUNNING:
        raise LeaseLost


def _save_continuation(turn: Turn, continuation: Continuation, tx: Transaction) -> None:
    _require_ours(turn, tx)
    tx.turns.save_continuation(turn.id, continuation)


def _save_state(turn: Turn, state: ProviderState, tx: Transaction) -> None:
    _require_ours(turn, tx)
    tx.threads.save_provider_state(turn.thread_id, state)


def _checked(call: ToolCalled, seen: set[str]) -> ToolCalled:
    if not call.call_id or call.call_id in seen or len(call.arguments_json) > MAX_ARGUMENTS:
        raise AgentFailed(TurnReason.PROVIDER_PROTOCOL)
    seen.add(call.call_id)
    return ToolCalled(_storable(call.call_id), _storable(call.name), _storable(call.arguments_json))


def _storable(text: str) -> str:
    """The same text with what no database and no protobuf string can hold replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)
