"""Runs turns, detached from any call: gives them places, has their replies written, and ends them."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

from core.model.agent import AgentDefinition
from core.model.errors import (
    CoreError,
    Draining,
    LeaseLost,
    ProviderUnavailable,
    StoreUnavailable,
    TurnNotFound,
)
from core.model.events import TurnEvent, TurnFinished
from core.model.trail import on_turn
from core.model.turn import Turn, TurnReason, TurnState
from core.ports.agent import Agent
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.ports.telemetry import UNMEASURED, Telemetry
from core.ports.tools import Tools
from core.use_cases.claim_turn import MAX_ATTEMPTS, Claimant, ClaimedTurn, release_turn
from core.use_cases.definitions import Definitions
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.patience import patiently
from core.use_cases.places import Places
from core.use_cases.reply_writer import ReplyWriter
from core.use_cases.stop_round import stop_round
from core.use_cases.turn_feed import TurnFeeds
from core.use_cases.turn_log_writer import OpenLog, TurnLogWriter

_log = logging.getLogger(__name__)

_LOOK = 1.0
"""Seconds that a stop gives to the question whether there is another process."""
_LAST_WRITES = 5.0
"""Seconds that a stop gives to what must still be written."""
_END_AGAIN = 1.0
"""Seconds before a turn whose ending the store refuses is ended anew."""


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
        telemetry: Telemetry = UNMEASURED,
    ) -> None:
        self._store = store
        self._agent = agent
        self._tools = tools
        self._feeds = feeds
        self._ids = ids
        self._telemetry = telemetry
        self._writer = TurnLogWriter(store, telemetry)
        self._writing: asyncio.Task[None] | None = None
        self._running: dict[str, _Run] = {}
        self._ending: set[tuple[str, int]] = set()
        self._expected: set[str] = set()
        self._too_late: set[str] = set()
        self._aside: set[asyncio.Task[None]] = set()
        self._places = Places(limits.max_turns, limits.max_turns_per_user)
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
        self._replies = ReplyWriter(
            store=store,
            agent=agent,
            tools=tools,
            claimant=self.claimant,
            sure_of_lease=self._sure_of_lease,
            stop_round=self._stop_round,
            keep=self._keep,
        )
        self.waiting = asyncio.Event()
        """Set where a turn that waits may be claimed now: its thread is free, or there is a place again."""

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
        if (refusal := self._places.refusal(user_id)) is not None:
            return refusal
        if (wait := self._agent.refusal()) is not None:
            return ProviderUnavailable(wait)
        self._places.take(user_id)
        return None

    def reserve_anyway(self, user_id: str) -> None:
        """Takes a place for a turn that replaces another one."""
        self._places.take(user_id)

    def release(self, user_id: str) -> None:
        """Gives a place back."""
        self._places.give_back(user_id)

    def users_without_room(self) -> frozenset[str]:
        """Users who have as many turns here as allowed."""
        return self._places.users_without_room()

    @contextmanager
    def expecting(self, turn_id: str) -> Iterator[None]:
        """Says that a turn is being accepted or claimed: it may be on record, and end, before it runs."""
        self._expected.add(turn_id)
        try:
            yield
        finally:
            self._expected.discard(turn_id)
            self._too_late.discard(turn_id)

    def knows(self, turn_id: str) -> bool:
        """Whether a turn runs here or is being accepted or claimed here."""
        return turn_id in self._running or turn_id in self._expected

    @property
    def running(self) -> int:
        """How many turns run here."""
        return len(self._running)

    def held(self) -> dict[str, int]:
        """Ids and epochs of the turns that run here."""
        return {turn_id: run.claimed.turn.epoch for turn_id, run in self._running.items()}

    def leased(self, until: float) -> None:
        """Says how long, in the loop's time, this process may count on its lease."""
        self._leased_until = until
        self._leased.set()

    async def _sure_of_lease(self) -> None:
        """Waits, after a pause of this process, until it knows again whether its turns are its own."""
        while asyncio.get_running_loop().time() >= self._leased_until:
            self._leased.clear()
            await self._leased.wait()

    def run(self, claimed: ClaimedTurn) -> None:
        """Runs a turn in the background, in the place reserved for it; what has ended meanwhile gives it back."""
        turn = claimed.turn
        if turn.id in self._too_late:
            self.release(turn.user_id)
            return
        if earlier := self._running.get(turn.id):
            # A claim of a turn that still runs here: the older epoch can write nothing, and is stopped.
            earlier.task.cancel()
        self._telemetry.began(turn)
        feed = self._feeds.open(turn.id, claimed.log)
        log = self._writer.open(turn, feed)
        task = asyncio.create_task(self._run(claimed, log), name=f"turn-{turn.id}")
        run = self._running[turn.id] = _Run(claimed, log, task)

        # Not in the task itself: one that is cancelled before its first step runs none of its code.
        def forget(task: asyncio.Task[None]) -> None:
            _retrieve(task)
            self._writer.close(log)
            self._telemetry.left(turn)
            if self._running.get(turn.id) is run:
                self._feeds.drop(turn.id)
                del self._running[turn.id]
            had_room = not self._places.refusal(turn.user_id)
            self.release(turn.user_id)
            if not had_room and not self._places.refusal(turn.user_id):
                self.waiting.set()

        task.add_done_callback(forget)

    def abandon(self, turn_id: str) -> None:
        """Stops work on a turn that somebody else has ended or claimed; followers go on from the store.

        One whose ending is on its way finds out by itself: that may be the very ending that was seen, and it is
        still to be told.
        """
        self._feeds.drop(turn_id)
        self._feeds.tell(turn_id)
        if turn_id in self._expected:
            self._too_late.add(turn_id)
        if (run := self._running.get(turn_id)) and not self._is_ending(run):
            run.task.cancel()

    def ended(self, ended: Ended) -> None:
        """Takes notice of an ending: the next turn of the thread may be claimed, and nobody reads on."""
        if ended.next_id is not None:
            self.waiting.set()
        if ended.already:
            return
        self._telemetry.ended(ended.turn)
        if ended.turn.state is not TurnState.COMPLETED:
            self.stop_reply(ended.turn)

    def stop_reply(self, turn: Turn) -> None:
        """Stops what the provider still writes for a turn that has ended or is gone."""
        if turn.continuation is not None and turn.provider == self._agent.provider:
            self._stop_round(turn, turn.continuation.handle)

    def gone(self, turn: Turn) -> None:
        """Takes notice of a turn that was erased with its thread."""
        self.abandon(turn.id)
        self.stop_reply(turn)

    def _stop_round(self, turn: Turn, handle: str) -> None:
        self._do_aside(stop_round(self._store, self._agent, turn, handle), "stop-round")

    def _keep(self, thread_id: str, refs: Sequence[str]) -> "asyncio.Task[None]":
        """Notes what the provider keeps, with the first text of it or a moment later. Whoever has lost the turn
        notes it as well: where the thread is gone, it is due to be erased at once."""
        change = partial(_keep, thread_id, self._agent.provider, tuple(refs))
        return self._do_aside(patiently(lambda: self._store.write(change)), "keep")

    def _do_aside(self, work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_retrieve)
        task.add_done_callback(self._aside.discard)
        self._aside.add(task)
        return task

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
            finished = group.create_task(self._all_done())
            await asyncio.wait([hurried, finished], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            finished.cancel()
        await self._stop(lambda _: True)
        if self._aside:
            await asyncio.wait(self._aside, timeout=_LAST_WRITES)
        for task in self._aside:
            task.cancel()
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _all_done(self) -> None:
        """Waits until nothing runs; a claim that was on its way when the drain began may still bring a turn."""
        while self._running:
            await asyncio.wait([run.task for run in self._running.values()])

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
        """Stops turns and releases them; those whose ending is on its way get time for it. Between a look at a
        turn and its stop nothing else happens."""
        runs = [run for run in self._running.values() if chosen(run)]
        ending = [run.task for run in runs if self._is_ending(run)]
        stopped = [run for run in runs if not self._is_ending(run)]
        for run in stopped:
            run.task.cancel()
        await asyncio.gather(*(run.task for run in stopped), return_exceptions=True)
        writes: list[Awaitable[None]] = [*(self._release(run.claimed.turn) for run in stopped), *ending]
        try:
            async with asyncio.timeout(_LAST_WRITES):
                for outcome in await asyncio.gather(*writes, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        _log.error("a turn is left to be recovered", exc_info=outcome)
        except TimeoutError:
            _log.error("the store does not answer: turns are left to be recovered")

    def _is_ending(self, run: "_Run") -> bool:
        """Whether it is decided how a turn ends, and only the store still has to take it."""
        return (run.claimed.turn.id, run.claimed.turn.epoch) in self._ending

    async def _release(self, turn: Turn) -> None:
        """Gives a turn up, or ends it where nobody else can go on with it."""
        on_turn(turn)
        ended = await patiently(
            lambda: self._store.write(lambda tx: release_turn(tx, self._ids, turn, self.claimant)),
        )
        if ended is None:
            self._telemetry.handed_over(turn)
        else:
            self.ended(ended)

    def _is_idempotent(self, definition: AgentDefinition, name: str) -> bool:
        if name not in definition.tools:
            return True  # it was answered with an error, never run
        specs = self._tools.specs([name])
        return bool(specs) and specs[0].idempotent

    async def _run(self, claimed: ClaimedTurn, log: OpenLog) -> None:
        turn = claimed.turn
        on_turn(turn)
        try:
            try:
                ending = await self._replies.write(claimed, log)
                tail = await log.settle()
            except LeaseLost:
                raise
            except Exception:  # noqa: BLE001 - whatever goes wrong, the turn ends and says so
                _log.exception("turn %s failed", turn.id)
                ending = Ending(reason=TurnReason.INTERNAL)
                tail = await _settled(log)
            self._ending.add((turn.id, turn.epoch))
            try:
                ended, kept = await self._end_somehow(turn, ending, tail)
            finally:
                self._ending.discard((turn.id, turn.epoch))
            if not ended.already:
                log.publish([*kept, TurnFinished(ended.turn, ended.reply)])
            self.ended(ended)
        except (LeaseLost, TurnNotFound):
            _log.warning("turn %s is no longer ours", turn.id)

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
                    await asyncio.sleep(_END_AGAIN)
        raise AssertionError("the attempts never end")

    async def _end(
        self, turn_id: str, ending: Ending, *, epoch: int | None = None, tail: Sequence[TurnEvent] = ()
    ) -> Ended:
        # The turn must end; the next start of the service ends it if this process does not.
        return await patiently(
            lambda: self._store.write(lambda tx: end_turn(tx, self._ids, turn_id, ending, epoch=epoch, tail=tail))
        )


def _keep(thread_id: str, provider: str, refs: Sequence[str], tx: Transaction) -> None:
    tx.copies.keep(thread_id, provider, refs)


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


def _retrieve(task: asyncio.Task[None]) -> None:
    """Logs what ended a task; asyncio would do so with the exception's text."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s broke", task.get_name(), exc_info=error)
