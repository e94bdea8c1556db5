"""Writes the reply of one turn: asks the agent round by round, runs the tools, feeds the log, begins again."""

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from io import StringIO

from core.model.events import AttemptRestarted, Round, TextDelta, ToolAnswered, ToolCalled
from core.model.message import Message, ToolExchange
from core.model.thread import UNSYNCED, ProviderState
from core.model.turn import Continuation, Turn, TurnReason, Usage
from core.ports.agent import (
    Agent,
    AgentFailed,
    Begun,
    ReplyRequest,
    RoundFinished,
    StateChanged,
    Stored,
    ToolRound,
)
from core.ports.store import Store, Transaction
from core.ports.tools import ToolContext, Tools
from core.use_cases.claim_turn import (
    Claimant,
    ClaimedTurn,
    kept_rounds,
    require_claim,
    restarting,
    why_not_again,
)
from core.use_cases.end_turn import Ending
from core.use_cases.patience import patiently
from core.use_cases.turn_log_writer import OpenLog

_log = logging.getLogger(__name__)

MAX_TOOL_ROUNDS = 8
MAX_TOOL_CALLS = 32
"""Tool calls in one turn."""
MAX_ARGUMENTS = 65_536
"""Code points of one tool call's arguments."""
MAX_OUTPUT = 131_072
"""Code points of text in one reply."""

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


class ReplyWriter:
    """Writes the replies of the turns that run in this process; what becomes of a turn is not its business.

    `sure_of_lease` waits until this process knows that its turns are its own: asked before each call of a tool.
    `stop_round` stops, in the background, a round at the provider that nobody will read. `keep` notes, in the
    background, what the provider keeps; a turn does not end before that is done.
    """

    def __init__(
        self,
        *,
        store: Store,
        agent: Agent,
        tools: Tools,
        claimant: Claimant,
        sure_of_lease: Callable[[], Awaitable[None]],
        stop_round: Callable[[Turn, str], None],
        keep: Callable[[str, Sequence[str]], asyncio.Task[None]],
    ) -> None:
        self._store = store
        self._agent = agent
        self._tools = tools
        self._claimant = claimant
        self._sure_of_lease = sure_of_lease
        self._stop_round = stop_round
        self._keep = keep

    async def write(self, claimed: ClaimedTurn, log: OpenLog) -> Ending:
        """Writes the reply of a claimed turn into its log, within its budget. Returns how the turn is to end.

        Raises LeaseLost, and what makes a commit fail.
        """
        work = _Work(claimed, log, self._agent.provider)
        try:
            async with asyncio.timeout(claimed.budget_left) as budget:
                work.deadline = budget.when() or math.inf
                while True:
                    try:
                        ending = await self._attempt(work)
                    except AgentFailed as failure:
                        _log.info("turn %s: %s", claimed.turn.id, failure.reason)
                        work.resume = None
                        if not await self._begins_again(work, failure.reason):
                            return work.ending(failure.reason)
                    else:
                        await work.kept_all()
                        return ending
        except TimeoutError:
            if not budget.expired():
                raise
            return work.ending(TurnReason.BUDGET_EXCEEDED)

    async def _begins_again(self, work: "_Work", reason: TurnReason) -> bool:
        """Begins another attempt where text was cut off, or where a round can't be resumed.

        Without text the agent itself has tried again.
        """
        lost = reason is TurnReason.INTERRUPTED
        if not lost and not (self._claimant.restart and reason in _RESTARTABLE):
            return False
        await work.log.flush()
        events = work.log.events
        again = restarting(events, work.attempt + 1, reason)
        if not again and not lost:
            return False
        if why_not_again(events, work.attempt, self._claimant, work.claimed.definition) is not None:
            return False
        if not again:  # nothing to drop, but attempts are counted on record
            again = (AttemptRestarted(work.attempt + 1, reason.value),)
        for event in again:
            work.log.add(event)
        await work.log.flush()
        if work.handle is not None:
            self._stop_round(work.claimed.turn, work.handle)
        work.begin_again(kept_rounds(events))
        return True

    async def _attempt(self, work: "_Work") -> Ending:
        claimed, turn, log = work.claimed, work.claimed.turn, work.log
        rounds = [ToolRound(kept.text, await self._answered(kept, work)) for kept in work.kept]
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
            deadline=work.deadline,
            pause=log.pause,
        )
        while True:
            text = StringIO()
            text.write(request.resume.text if request.resume else "")
            calls: list[ToolCalled] = []
            finished: RoundFinished | None = None
            work.asked += 1
            async with aclosing(self._agent.reply(request)) as events:
                async for event in events:
                    match event:
                        case TextDelta(said, refusal):
                            said = _storable(said)
                            room = MAX_OUTPUT - written
                            if len(said) > room:
                                if room:
                                    log.add(TextDelta(said[:room], refusal))
                                return work.ending(TurnReason.OUTPUT_LIMIT)
                            if said:
                                written += len(said)
                                text.write(said)
                                log.add(TextDelta(said, refusal))
                                await log.drain()
                        case ToolCalled():
                            calls.append(_checked(event, seen))
                        case Begun(handle):
                            work.handle = handle
                            begun = Continuation(handle, work.attempt, len(request.rounds))
                            work.await_also(self._keep(turn.thread_id, [handle]))
                            await patiently(partial(self._store.write, partial(_save_continuation, turn, begun)))
                        case Stored(ref):
                            work.await_also(self._keep(turn.thread_id, [ref]))
                        case StateChanged(state):
                            work.state = state
                            request = replace(request, state=state)
                            work.await_also(self._keep(turn.thread_id, state.refs))
                            await patiently(partial(self._store.write, partial(_save_state, turn, state)))
                        case RoundFinished():
                            work.handle = None
                            finished = event
            if finished is None:
                raise AgentFailed(TurnReason.PROVIDER_TRUNCATED)
            work.account(finished.usage)
            if finished.shortfall is not None:
                return work.ending(finished.shortfall)
            if not calls:
                return work.ending(copy=finished.copy)
            if len(request.rounds) == MAX_TOOL_ROUNDS or len(seen) > MAX_TOOL_CALLS:
                return work.ending(TurnReason.TOOL_LIMIT)
            await self._record(calls, work)
            done = ToolRound(text.getvalue(), await self._call_tools(calls, work))
            copy = finished.copy or request.state
            request = replace(request, rounds=(*request.rounds, done), resume=None, state=copy)

    async def _record(self, calls: Sequence[ToolCalled], work: "_Work") -> None:
        """Puts on record what a round has cost, and its calls: each is there before it can have an effect."""
        for call in calls:
            work.log.add(call)
        usage = partial(_save_usage, work.claimed.turn, work.usage)
        try:
            async with asyncio.TaskGroup() as group:  # whoever has lost the lease does not wait for the other
                group.create_task(patiently(partial(self._store.write, usage)))
                group.create_task(work.log.flush())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _answered(self, kept: Round, work: "_Work") -> tuple[ToolExchange, ...]:
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
            for exchange in await self._call_tools(kept.open_calls, work):
                done[exchange.call_id] = exchange
        return tuple(done[call.call_id] for call in kept.calls)

    async def _call_tools(self, calls: Sequence[ToolCalled], work: "_Work") -> tuple[ToolExchange, ...]:
        try:
            async with asyncio.TaskGroup() as group:  # where one has lost the lease, the others are stopped
                answers = [group.create_task(self._call_tool(call, work.claimed)) for call in calls]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        exchanges = tuple(answer.result() for answer in answers)
        for exchange in exchanges:
            work.log.add(ToolAnswered(exchange.call_id, exchange.output, exchange.is_error))
        await work.log.flush()
        return exchanges

    async def _call_tool(self, call: ToolCalled, claimed: ClaimedTurn) -> ToolExchange:
        if call.name not in claimed.definition.tools:
            output, is_error = '{"error": "there is no such tool"}', True
        else:
            context = ToolContext(
                user_id=claimed.turn.user_id,
                thread_id=claimed.turn.thread_id,
                turn_id=claimed.turn.id,
                epoch=claimed.turn.epoch,
                call_id=call.call_id,
                domain=claimed.thread.domain,
            )
            await self._sure_of_lease()
            result = await self._tools.call(call.name, call.arguments_json, context)
            output, is_error = _storable(result.text), result.is_error
        return ToolExchange(call.call_id, call.name, call.arguments_json, output, is_error)

    async def _history(self, message: Message, data: int = 0) -> Sequence[Message]:
        """The lines before a message, as `History` promises."""
        if message.index == 1:
            return ()

        def query(tx: Transaction) -> Sequence[Message]:
            return tx.messages.list(
                message.thread_id, after=message.index, newest_first=True, limit=None, data=data
            )

        lines = await patiently(partial(self._store.read, query))
        return lines[::-1]


class _Work:
    """A reply in the making: its turn, its log, and what is kept over the attempts."""

    def __init__(self, claimed: ClaimedTurn, log: OpenLog, provider: str) -> None:
        self.claimed = claimed
        self.log = log
        self.usage = claimed.turn.usage
        self.asked = self._accounted = 0
        self._keeping: set[asyncio.Task[None]] = set()
        self.deadline = math.inf
        self.attempt = claimed.turn.attempt
        self.kept = claimed.rounds
        self.resume = claimed.resume
        self.handle = claimed.resume.handle if claimed.resume else None
        self.state = claimed.state if claimed.state and claimed.state.provider == provider else None

    def account(self, usage: Usage) -> None:
        """Notes what a round has cost."""
        self.usage += usage
        self._accounted += 1

    def ending(self, reason: TurnReason | None = None, copy: ProviderState | None = None) -> Ending:
        """How the turn is to end. What a round has cost that was cut off, here or earlier, is not known."""
        all_told = self.asked == self._accounted and self.claimed.turn.attempt == 1
        return Ending(reason=reason, usage=self.usage, all_told=all_told, copy=copy)

    def await_also(self, keeping: asyncio.Task[None]) -> None:
        """Has `kept_all` wait for this, too."""
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)

    async def kept_all(self) -> None:
        """Waits until all that the provider keeps is on record, or can't be."""
        if self._keeping:
            await asyncio.wait(self._keeping)

    def begin_again(self, kept: tuple[Round, ...]) -> None:
        """The provider's copy may hold anything of the attempt before."""
        self.attempt += 1
        self.kept = kept
        self.handle = None
        if self.state is not None:
            self.state = replace(self.state, synced_to=UNSYNCED)


def _save_continuation(turn: Turn, continuation: Continuation, tx: Transaction) -> None:
    require_claim(tx, turn.id, turn.epoch)
    tx.turns.save_continuation(turn.id, continuation)


def _save_usage(turn: Turn, usage: Usage, tx: Transaction) -> None:
    tx.turns.save_usage(turn.id, turn.epoch, usage)


def _save_state(turn: Turn, state: ProviderState, tx: Transaction) -> None:
    require_claim(tx, turn.id, turn.epoch)
    tx.threads.save_provider_state(turn.thread_id, state)


def _checked(call: ToolCalled, seen: set[str]) -> ToolCalled:
    call_id = _storable(call.call_id)
    if not call_id or call_id in seen or len(call.arguments_json) > MAX_ARGUMENTS:
        raise AgentFailed(TurnReason.PROVIDER_PROTOCOL)
    seen.add(call_id)
    return ToolCalled(call_id, _storable(call.name), _storable(call.arguments_json))


def _storable(text: str) -> str:
    """The same text with what no database and no protobuf string can hold replaced by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)
