"""Turns and threads as a plain model has them, beside the record: they must never disagree."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.system import Ids
from core.model.errors import (
    CoreError,
    Draining,
    LeaseLost,
    Overloaded,
    QueueFull,
    QuotaExceeded,
    RequestIdReused,
    ThreadNotFound,
    TurnInProgress,
    TurnNotFound,
)
from core.model.events import (
    AttemptRestarted,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    extent,
)
from core.model.ledger import Dimension
from core.model.message import Role, TextPart
from core.model.thread import ThreadState
from core.model.turn import BusyPolicy, Continuation, Turn, TurnReason, TurnState, Usage
from core.ports.store import Store, Transaction
from core.ports.turns import LogAppend
from core.use_cases.accept_message import AcceptMessage, IncomingMessage
from core.use_cases.cancel_turn import CancelTurn
from core.use_cases.claim_turn import Claimant, ClaimedTurn, Why, claim_turn, release_turn
from core.use_cases.definitions import Definitions
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.erase_thread import erase_thread
from core.use_cases.reply_writer import _save_continuation
from core.use_cases.turn_engine import TurnEngine, TurnLimits
from core.use_cases.turn_feed import TurnFeeds
from core.use_cases.turn_log_writer import _append
from doubles import ManualClock, ScriptedAgent
from simulation.judge import Unit, units
from simulation.process import BOOK, CATALOG, NOTE, WorldlyTools

T = TypeVar("T")

BUDGET = 31.0
LEASE = 10.0
TTL = timedelta(days=1)
OWNERS = ("p1", "p2", "p3")
USERS = ("ada", "eve")

picks = st.integers(0, 1_000_000)
owners = st.sampled_from(OWNERS)
policies = st.sampled_from(BusyPolicy)
refusals = st.sampled_from((*[None] * 9, Overloaded, QuotaExceeded, Draining))
beginnings = st.sampled_from(("", "before", "after"))
fresh_events = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5).map(TextDelta),
        st.sampled_from((NOTE, NOTE, BOOK)),
        st.just("answer"),
    ),
    min_size=1,
    max_size=4,
)


@dataclass
class ATurn:
    """What the model knows of a turn."""

    id: str
    thread_id: str
    user: str
    state: TurnState
    owner: str
    question: str
    epoch: int
    attempt: int = 1
    reason: TurnReason | None = None
    claimed_at: datetime | None = None
    log: list[TurnEvent] = field(default_factory=list)
    request: str = ""
    continuation: Continuation | None = None
    deleted: bool = False

    @property
    def at_work(self) -> bool:
        return self.state is TurnState.RUNNING and not self.deleted

    @property
    def position(self) -> int:
        return sum(map(extent, self.log))

    @property
    def current(self) -> list[TurnEvent]:
        """What counts of the log: all that follows the last restart."""
        restarts = [number for number, event in enumerate(self.log) if isinstance(event, AttemptRestarted)]
        return self.log[restarts[-1] if restarts else 0 :]

    @property
    def open_calls(self) -> list[ToolCalled]:
        """Calls of the current attempt that have no answer."""
        answered = {event.call_id for event in self.current if isinstance(event, ToolAnswered)}
        return [e for e in self.current if isinstance(e, ToolCalled) and e.call_id not in answered]


@dataclass
class AThread:
    """What the model knows of a thread. `queue` are the turns that have not ended, in order."""

    id: str
    user: str
    touched_at: datetime
    active: bool = True
    deleted: bool = False
    queue: list[ATurn] = field(default_factory=list)
    lines: list[tuple[Role, str, str]] = field(default_factory=list)


class Lifecycles(RuleBasedStateMachine):
    """Any changes of turns and threads in any order, by any of three processes."""

    covered: ClassVar[Counter[str]]
    restart = False

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.loop = asyncio.new_event_loop()
        self.store = self.open()
        self.ids = Ids()
        self.turns: dict[str, ATurn] = {}
        self.threads: dict[str, AThread] = {}
        self.leases: dict[str, datetime] = {}
        self.count = 0
        self.touched: set[str] = set()
        definitions = Definitions(CATALOG)
        tools = WorldlyTools.__new__(WorldlyTools)
        self.engines = {
            owner: TurnEngine(
                store=self.store,
                agent=ScriptedAgent(),
                tools=tools,
                feeds=TurnFeeds(),
                ids=self.ids,
                definitions=definitions,
                owner=owner,
                limits=TurnLimits(budget=BUDGET),
            )
            for owner in OWNERS
        }
        for owner, engine in self.engines.items():
            engine.knows = partial(self.runs, owner=owner)  # type: ignore[method-assign] # nothing really runs here
        self.acceptors = {
            owner: AcceptMessage(
                store=self.store, engine=engine, catalog=CATALOG, definitions=definitions, ids=self.ids
            )
            for owner, engine in self.engines.items()
        }
        self.cancel = CancelTurn(store=self.store, engine=self.engines["p1"], ids=self.ids)
        self.write(lambda tx: [tx.agents.publish(offered) for offered in CATALOG.agents()])

    def open(self) -> Store:
        """An empty record."""
        raise NotImplementedError

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs what the store does."""
        return self.loop.run_until_complete(work)

    def write(self, change: Callable[[Transaction], T]) -> T:
        """Commits a change."""
        return self.run(self.store.write(change))

    def refused(self, change: Callable[[Transaction], object], error: type[Exception]) -> Exception:
        """A change that must fail so, and leave no trace."""
        try:
            self.write(change)
        except error as refusal:
            self.cover(f"refused {error.__name__}")
            return refusal
        raise AssertionError(f"no {error.__name__}")

    def teardown(self) -> None:
        self.touched.update(self.threads)
        self.the_record_agrees()
        self.run(self.store.aclose())
        self.loop.close()

    def cover(self, what: str) -> None:
        """Counts what was exercised."""
        self.covered[what] += 1

    def claimant(self, owner: str) -> Claimant:
        """What decides for a process."""
        engine = self.engines[owner].claimant
        return Claimant(
            owner=owner,
            budget=BUDGET,
            restart=self.restart,
            is_idempotent=engine.is_idempotent,
            served_by=engine.served_by,
            definition=engine.definition,
        )

    # Choices

    def some_turn(self, pick: int) -> ATurn:
        """A turn; mostly one that has not ended."""
        turns = list(self.turns.values())
        unfinished = [turn for thread in self.threads.values() for turn in thread.queue]
        if unfinished and pick % 8:
            turns = unfinished
        return turns[pick // 8 % len(turns)]

    def some_thread(self, pick: int) -> AThread:
        """A thread."""
        threads = list(self.threads.values())
        if pick % 2:
            threads = [thread for thread in threads if not thread.deleted][-2:] or threads
        return threads[pick // 2 % len(threads)]

    def alive(self, owner: str) -> bool:
        """Whether a process has a lease."""
        return owner in self.leases and self.leases[owner] > self.clock._now

    # Time and leases

    @initialize(configured=st.booleans())
    def begin(self, configured: bool) -> None:
        self.restart = configured

    @rule(seconds=st.sampled_from((0.7, 3.3, 11.0, 32.0, 90_000.0)))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds=seconds)

    @rule(owner=owners)
    def renew(self, owner: str) -> None:
        had = self.alive(owner)
        assert self.write(lambda tx: tx.leases.renew(owner, LEASE)) is had
        self.leases[owner] = self.clock._now + timedelta(seconds=LEASE)

    @rule(owner=owners)
    def stop(self, owner: str) -> None:
        self.write(lambda tx: tx.leases.end(owner))
        self.leases.pop(owner, None)

    # Messages

    @rule(owner=owners, user=st.sampled_from(USERS), policy=policies, refusal=refusals)
    def new_thread(self, owner: str, user: str, policy: BusyPolicy, refusal: type[CoreError] | None) -> None:
        self.accept(owner, user, None, policy, refusal, self.fresh())

    @rule(owner=owners, pick=picks, policy=policies, refusal=refusals, times=st.sampled_from((1, 1, 2, 3, 10)))
    @precondition(lambda self: self.threads)
    def say(self, owner: str, pick: int, policy: BusyPolicy, refusal: type[CoreError] | None, times: int) -> None:
        thread = self.some_thread(pick)
        for _ in range(times):
            self.accept(owner, thread.user, thread, policy, refusal, self.fresh())

    @rule(owner=owners, pick=picks)
    @precondition(lambda self: self.threads)
    def say_as_another(self, owner: str, pick: int) -> None:
        thread = self.some_thread(pick)
        if pick % 3:
            return
        other = next(user for user in USERS if user != thread.user)
        message = self.message(other, thread.id, "hello", BusyPolicy.INTERRUPT, "")
        record = self.acceptors[owner]._record
        self.refused(lambda tx: record(tx, message, message.request(), None, self.ids.new()), ThreadNotFound)
        self.refused(lambda tx: _erase(other, thread.id, tx), ThreadNotFound)

    @rule(owner=owners, pick=picks, policy=policies, refusal=refusals, otherwise=st.integers(0, 3))
    @precondition(lambda self: self.turns)
    def repeat(
        self, owner: str, pick: int, policy: BusyPolicy, refusal: type[CoreError] | None, otherwise: int
    ) -> None:
        turns = [turn for turn in self.turns.values() if turn.request]
        if not turns:
            return
        turn = turns[pick % len(turns)]
        thread = self.threads[turn.thread_id]
        thread_id = "" if turn.request.startswith("new") else thread.id
        text = "something else" if otherwise == 0 else turn.question
        message = self.message(turn.user, thread_id, text, policy, turn.request)
        error = refusal() if refusal else None
        record = self.acceptors[owner]._record
        if thread.deleted:
            if thread_id:
                self.refused(
                    lambda tx: record(tx, message, message.request(), error, self.ids.new()), ThreadNotFound
                )
        elif otherwise == 0:
            self.refused(lambda tx: record(tx, message, message.request(), error, self.ids.new()), RequestIdReused)
        else:
            recorded = self.write(lambda tx: record(tx, message, message.request(), error, self.ids.new()))
            assert (recorded.turn.id, recorded.attached, recorded.claimed) == (turn.id, True, None)
            self.cover("attached")

    def fresh(self) -> str:
        """A text that nobody has sent."""
        self.count += 1
        return f"message {self.count}"

    def message(self, user: str, thread_id: str, text: str, policy: BusyPolicy, request: str) -> IncomingMessage:
        """What a client sends."""
        return IncomingMessage(
            user_id=user, thread_id=thread_id, content=(TextPart(text),), request_id=request, on_busy=policy
        )

    def accept(
        self,
        owner: str,
        user: str,
        thread: AThread | None,
        policy: BusyPolicy,
        refusal: type[CoreError] | None,
        text: str,
    ) -> None:
        """Sends a message, and expects what must become of it."""
        request = f"{'old' if thread else 'new'} {text}" if self.count % 3 else ""
        message = self.message(user, thread.id if thread else "", text, policy, request)
        turn_id, error = self.ids.new(), refusal() if refusal else None

        def change(tx: Transaction) -> Any:
            return self.acceptors[owner]._record(tx, message, message.request(), error, turn_id)

        if thread is not None and thread.deleted:
            self.refused(change, ThreadNotFound)
            return
        queue = thread.queue if thread else []
        if queue and policy is BusyPolicy.REJECT:
            busy = self.refused(change, TurnInProgress)
            assert isinstance(busy, TurnInProgress)
            assert busy.turn_id == queue[0].id
            return
        replaces = policy is BusyPolicy.INTERRUPT and any(self.runs(turn.id, owner) for turn in queue)
        tolerated = (queue and policy is BusyPolicy.QUEUE) or replaces
        if refusal is not None and (refusal is Draining or not tolerated):
            self.refused(change, refusal)
            return
        if queue and policy is BusyPolicy.QUEUE and sum(not turn.at_work for turn in queue) >= 8:
            self.refused(change, QueueFull)
            return
        recorded = self.write(change)
        assert (recorded.turn.id, recorded.attached) == (turn_id, False)
        if thread is None:
            thread = AThread(recorded.turn.thread_id, user, self.clock._now)
            self.threads[thread.id] = thread
        elif queue and policy is BusyPolicy.INTERRUPT:
            for turn in list(queue):
                self.ended(turn, TurnState.CANCELLED, TurnReason.INTERRUPTED)
            self.cover("interrupted")
        waits = bool(thread.queue)
        state = TurnState.ACCEPTED if waits else TurnState.RUNNING
        turn = ATurn(turn_id, thread.id, user, state, "" if waits else owner, text, 0 if waits else 1)
        turn.log = [TurnStarted(turn_id, thread.id, recorded.turn.agent_id)]
        turn.request = request
        self.turns[turn_id] = turn
        thread.queue.append(turn)
        self.touch(thread)
        if waits:
            self.cover("queued")
        else:
            turn.claimed_at = self.clock._now
            thread.lines.append((Role.USER, turn_id, text))

    def runs(self, turn_id: str, owner: str) -> bool:
        """Whether a process works on a turn."""
        return self.turns[turn_id].at_work and self.turns[turn_id].owner == owner

    def touch(self, thread: AThread) -> None:
        """A message has come."""
        thread.touched_at, thread.active = self.clock._now, True
        self.touched.add(thread.id)

    # Work

    @rule(owner=owners, pick=picks, why=st.sampled_from(Why), has_place=st.sampled_from((True, True, False)))
    @precondition(lambda self: self.turns)
    def claim(self, owner: str, pick: int, why: Why, has_place: bool) -> None:
        self.claim_this(self.some_turn(pick), owner, why, has_place=has_place)

    def claim_this(self, turn: ATurn, owner: str, why: Why, *, has_place: bool) -> None:
        """Claims a turn, and expects what must come of it."""
        thread, claimant = self.threads[turn.thread_id], self.claimant(owner)
        free = (
            turn in thread.queue
            and {
                Why.WAITING: turn.state is TurnState.ACCEPTED,
                Why.ORPHANED: turn.state is TurnState.ACCEPTED or turn.owner == owner,
                Why.ABANDONED: turn.state is TurnState.ACCEPTED
                or (turn.owner != owner and not self.alive(turn.owner)),
            }[why]
        )
        if not turn.at_work:
            free = free and thread.queue[0] is turn
        first = turn.claimed_at is None
        goes_on = free and self.goes_on(turn)
        hindrance = self.hindrance(turn, goes_on) if free and not first else None
        outcome = self.write(lambda tx: claim_turn(tx, self.ids, turn.id, claimant, why, has_place=has_place))
        self.touched.add(thread.id)
        if hindrance is not None:
            assert isinstance(outcome, Ended), f"{outcome}, not {hindrance}"
            self.ended(turn, self.verdict(turn, hindrance), hindrance)
            self.cover(f"not again: {hindrance}")
            return
        if not free or not has_place:
            assert outcome is None
            return
        assert isinstance(outcome, ClaimedTurn)
        assert outcome.message.text == turn.question
        turn.state, turn.owner, turn.epoch = TurnState.RUNNING, owner, turn.epoch + 1
        if first:
            turn.claimed_at = self.clock._now
            thread.lines.append((Role.USER, turn.id, turn.question))
            self.touch(thread)
            self.cover("claimed first")
        elif goes_on:
            assert outcome.resume is not None
            self.cover("claimed to go on")
        else:
            turn.attempt += 1
            self.begin_again(turn)
            self.cover("claimed again")
        assert units(entry.event for entry in outcome.log) == units(turn.log)
        assert [done.calls for done in outcome.rounds] == [done.calls for done in self.rounds(turn)]

    @rule(
        owner=owners,
        pick=picks,
        crash=st.booleans(),
        begun=st.sampled_from(("", "before", "after")),
        events=fresh_events,
    )
    @precondition(lambda self: any(thread.queue for thread in self.threads.values()))
    def work_and_lose(self, owner: str, pick: int, crash: bool, begun: str, events: Sequence[Any]) -> None:
        """A process claims a turn, or has claimed one, writes, and is lost; another takes over."""
        first = [thread.queue[0] for thread in self.threads.values() if thread.queue]
        turn = first[pick % len(first)]
        if not turn.at_work:
            self.claim_this(turn, owner, Why.WAITING, has_place=True)
        if not turn.at_work:
            return
        if begun == "before":
            self.begin_background(turn)
        self.append_to(turn, events)
        if begun == "after":
            self.begin_background(turn)
        holder = turn.owner
        if crash:
            self.stop(holder)
        else:
            self.wait(11.0)
        other = next(other for other in OWNERS if other != holder)
        self.renew(other)
        self.claim_this(turn, other, Why.ABANDONED, has_place=True)

    def goes_on(self, turn: ATurn) -> bool:
        """Whether the provider goes on by itself where the log stands."""
        there = turn.continuation
        return (
            turn.claimed_at is not None
            and there is not None
            and (there.attempt, there.round) == (turn.attempt, len(self.rounds(turn)))
            and not turn.open_calls
        )

    def rounds(self, turn: ATurn) -> Sequence[Any]:
        """The rounds of the current attempt in which tools were called."""
        rounds: list[_ARound] = [_ARound()]
        for event in turn.current:
            now = rounds[-1]
            if (isinstance(event, TextDelta) and now.calls) or (isinstance(event, ToolCalled) and now.answers):
                rounds.append(now := _ARound())
            if isinstance(event, TextDelta):
                now.text += event.text
            elif isinstance(event, ToolCalled):
                now.calls = (*now.calls, event)
            elif isinstance(event, ToolAnswered):
                now.answers = (*now.answers, event)
        return [done for done in rounds if done.calls]

    def begin_again(self, turn: ATurn) -> None:
        """What another attempt writes first."""
        if not any(isinstance(event, TextDelta | ToolCalled) for event in turn.log):
            return
        kept = self.rounds(turn)
        turn.log.append(AttemptRestarted(turn.attempt, TurnReason.INTERRUPTED.value))
        for done in kept:
            turn.log += [TextDelta(done.text)] if done.text else []
            turn.log += [*done.calls, *done.answers]

    def hindrance(self, turn: ATurn, goes_on: bool) -> TurnReason | None:
        """Why a turn can't begin again."""
        late = self.clock._now - (turn.claimed_at or self.clock._now) >= timedelta(seconds=BUDGET)
        if goes_on:
            said = self.said_since(turn)
            return (TurnReason.INTERRUPTED if said else TurnReason.BUDGET_EXCEEDED) if late else None
        if any(call.name == BOOK for call in turn.open_calls):
            return TurnReason.TOOL_OUTCOME_UNKNOWN
        booked = any(isinstance(event, ToolCalled) and event.name == BOOK for event in turn.log)
        spoken = any(isinstance(event, TextDelta) for event in turn.current)
        if booked or turn.attempt >= 3 or (spoken and not self.restart):
            return TurnReason.INTERRUPTED
        return TurnReason.BUDGET_EXCEEDED if late else None

    def said_since(self, turn: ATurn) -> str:
        """The text behind the last round in which tools were called."""
        text = ""
        for event in turn.current:
            text = text + event.text if isinstance(event, TextDelta) else ""
        return text

    @rule(pick=picks, stale=st.sampled_from((0, 0, 0, 1)), off=st.sampled_from((0, 0, 0, 1)), events=fresh_events)
    @precondition(lambda self: self.turns)
    def append(self, pick: int, stale: int, off: int, events: Sequence[TurnEvent | str]) -> None:
        self.append_to(self.some_turn(pick), events, stale, off)

    def append_to(self, turn: ATurn, events: Sequence[Any], stale: int = 0, off: int = 0) -> None:
        """Appends to a log, and expects what must come of it."""
        added: list[TurnEvent] = []

        def answer(most: int) -> None:
            """Answers calls: so many, or all."""
            calls = [c for c in turn.open_calls if not any(_answers(e, c) for e in added)]
            calls += [c for c in added if isinstance(c, ToolCalled) and not any(_answers(e, c) for e in added)]
            added.extend(ToolAnswered(call.call_id, "done", is_error=False) for call in calls[: most or None])

        for event in events:
            begun = isinstance(([*turn.current, *added])[-1], ToolAnswered)
            if event == "answer":
                answer(1)
            elif isinstance(event, str):
                if begun:
                    answer(0)  # a round is answered before the next one calls
                self.count += 1
                added.append(ToolCalled(f"c{self.count}", event, "{}"))
            else:
                answer(0)
                added.append(event)
        if not added:
            return
        # An older epoch's append may begin where the log is, or where it would end just there.
        position = turn.position + off - (sum(map(extent, added)) if stale and not off else 0)
        append = LogAppend(turn.id, turn.epoch - stale, position, tuple(added))
        ours = turn.at_work and not stale and not off
        for _ in range(2 if ours else 1):  # as after an answer that was lost
            done = self.write(lambda tx: _append([append], tx))
            assert (turn.id in done.accepted) is ours
            assert not done.busy
        if ours:
            turn.log += added
            self.cover("appended")
        self.touched.add(turn.thread_id)

    @rule(pick=picks, stale=st.sampled_from((0, 0, 1)))
    @precondition(lambda self: self.turns)
    def background(self, pick: int, stale: int) -> None:
        self.begin_background(self.some_turn(pick), stale)

    def begin_background(self, turn: ATurn, stale: int = 0) -> None:
        """Notes a round that the provider writes by itself, and expects what must come of it."""
        there = Continuation(f"h{self.count}", turn.attempt, len(self.rounds(turn)))
        claimed = self.a_turn(turn, turn.epoch - stale)
        if turn.at_work and not stale:
            self.write(lambda tx: _save_continuation(claimed, there, tx))
            turn.continuation = there
        else:
            self.refused(lambda tx: _save_continuation(claimed, there, tx), LeaseLost)

    @rule(owner=owners, pick=picks, stale=st.sampled_from((0, 0, 1)))
    @precondition(lambda self: self.turns)
    def release(self, owner: str, pick: int, stale: int) -> None:
        turn = self.some_turn(pick)
        if turn.state is TurnState.ACCEPTED:
            return  # nobody holds it
        thread = self.threads[turn.thread_id]
        claimed, claimant = self.a_turn(turn, turn.epoch - stale), self.claimant(owner)
        outcome = self.write(lambda tx: release_turn(tx, self.ids, claimed, claimant))
        self.touched.add(thread.id)
        if not turn.at_work or stale:
            assert outcome is None
            return
        claimed_at, turn.claimed_at = turn.claimed_at, self.clock._now  # a budget is no hindrance here
        hindrance = None if self.goes_on(turn) else self.hindrance(turn, goes_on=False)
        turn.claimed_at = claimed_at
        if hindrance is not None:
            assert isinstance(outcome, Ended)
            self.ended(turn, self.verdict(turn, hindrance), hindrance)
            return
        assert outcome is None
        turn.state, turn.owner, turn.epoch = TurnState.ACCEPTED, "", turn.epoch + 1
        self.cover("released")

    def a_turn(self, turn: ATurn, epoch: int) -> Turn:
        """What a process holds of a turn that it has claimed."""
        return Turn(
            id=turn.id,
            thread_id=turn.thread_id,
            user_id=turn.user,
            agent_id="",
            state=TurnState.RUNNING,
            attempt=turn.attempt,
            epoch=epoch,
            last_position=turn.position,
            usage=Usage(),
            reason=None,
            model="",
            provider="",
            accepted_at=self.clock._now,
        )

    # Endings

    @rule(
        pick=picks,
        stale=st.sampled_from((0, 0, 0, 1)),
        reason=st.sampled_from((None, None, TurnReason.PROVIDER_STALLED, TurnReason.BUDGET_EXCEEDED)),
        tail=st.sampled_from(("", "", "the end")),
    )
    @precondition(lambda self: self.turns)
    def end(self, pick: int, stale: int, reason: TurnReason | None, tail: str) -> None:
        turn = self.some_turn(pick)
        thread = self.threads[turn.thread_id]
        events = [TextDelta(tail)] if tail else []

        def change(tx: Transaction) -> Ended:
            return end_turn(tx, self.ids, turn.id, Ending(reason=reason), epoch=turn.epoch - stale, tail=events)

        self.touched.add(thread.id)
        if thread.deleted:
            self.refused(change, TurnNotFound)
        elif turn.state.is_terminal:
            outcome = self.write(change)
            assert outcome.already
            assert outcome.turn.state is turn.state
        elif stale:
            self.refused(change, LeaseLost)
        elif turn.at_work:  # who waits is ended by nobody but a cancellation
            outcome = self.write(change)
            turn.log += events
            state = self.verdict(turn, reason)
            if state is TurnState.FAILED and reason is None:
                reason = TurnReason.PROVIDER_PROTOCOL
            self.ended(turn, state, reason)
            assert outcome.next_id == (thread.queue[0].id if thread.queue else None)
            self.cover(f"ended {state}")

    @rule(pick=picks, another=st.integers(0, 4))
    @precondition(lambda self: self.turns)
    def cancel_turn(self, pick: int, another: int) -> None:
        turn = self.some_turn(pick)
        thread = self.threads[turn.thread_id]
        user = turn.user if another else next(user for user in USERS if user != turn.user)
        self.touched.add(thread.id)
        if thread.deleted or not another:
            self.refused(lambda tx: self.cancel._cancel(user, turn.id, tx), TurnNotFound)
            return
        outcome = self.write(lambda tx: self.cancel._cancel(user, turn.id, tx))
        assert outcome.already is turn.state.is_terminal
        if not outcome.already:
            self.cover("cancelled while waiting" if turn.claimed_at is None else "cancelled")
            self.ended(turn, TurnState.CANCELLED, TurnReason.CANCELLED_BY_CALLER)

    def verdict(self, turn: ATurn, reason: TurnReason | None) -> TurnState:
        """How a turn ends, by what it has said."""
        if not any(isinstance(event, TextDelta) for event in turn.current):
            return TurnState.FAILED
        return TurnState.COMPLETED if reason is None else TurnState.INCOMPLETE

    def ended(self, turn: ATurn, state: TurnState, reason: TurnReason | None) -> None:
        """Notes an ending."""
        thread = self.threads[turn.thread_id]
        answered = {event.call_id for event in turn.current if isinstance(event, ToolAnswered)}
        called = [event for event in turn.current if isinstance(event, ToolCalled)]
        for event in turn.current:
            if isinstance(event, ToolAnswered) and event.call_id in {call.call_id for call in called}:
                thread.lines.append((Role.TOOL, turn.id, "done"))
        text = "".join(event.text for event in turn.current if isinstance(event, TextDelta))
        if text:
            thread.lines.append((Role.ASSISTANT, turn.id, text))
        turn.state, turn.reason, turn.owner, turn.epoch = state, reason, "", turn.epoch + 1
        thread.queue.remove(turn)
        if text or answered:
            self.touch(thread)
        self.touched.add(thread.id)

    # Threads

    @rule(pick=picks)
    @precondition(lambda self: self.threads)
    def delete_thread(self, pick: int) -> None:
        thread = self.some_thread(pick)
        if pick % 5:
            return
        self.touched.add(thread.id)
        if thread.deleted:
            self.refused(lambda tx: _erase(thread.user, thread.id, tx), ThreadNotFound)
            return
        at_work = self.write(lambda tx: _erase(thread.user, thread.id, tx))
        assert [turn.id for turn in at_work] == [turn.id for turn in thread.queue]
        self.cover("deleted at work" if thread.queue else "deleted")
        thread.deleted = True
        for turn in thread.queue:
            turn.deleted = True
        thread.queue.clear()

    @rule(limit=st.sampled_from((1, 2, 100)))
    def clean_up(self, limit: int) -> None:
        def change(tx: Transaction) -> tuple[datetime, int, set[str]]:
            cutoff = tx.now() - TTL
            expired = tx.threads.expire(cutoff, None, None, limit).expired
            there = [found for thread_id in self.threads if (found := tx.threads.find(thread_id)) is not None]
            return cutoff, expired, {found.id for found in there if found.state is ThreadState.INACTIVE}

        cutoff, expired, inactive = self.write(change)
        idle = [
            thread
            for thread in self.threads.values()
            if thread.active and not thread.deleted and not thread.queue and thread.touched_at < cutoff
        ]
        gone = [thread for thread in idle if thread.id in inactive]
        assert expired == len(gone) == min(limit, len(idle))
        left = [thread.touched_at.date() for thread in idle if thread.id not in inactive]
        assert not left or max(thread.touched_at.date() for thread in gone) <= min(
            left
        )  # oldest first, to the day
        for thread in gone:
            thread.active = False
            self.touched.add(thread.id)
            self.cover("expired")

    @rule(after=st.integers(0, 3))
    def clean_up_by_places(self, after: int) -> None:
        def change(tx: Transaction) -> tuple[datetime, int]:
            cutoff, places = tx.now() - TTL, tx.threads.places()
            expired = tx.threads.expire_places(cutoff, None, 0, after)
            return cutoff, expired + tx.threads.expire_places(cutoff, None, after, places)

        cutoff, expired = self.write(change)
        idle = [
            thread
            for thread in self.threads.values()
            if thread.active and not thread.deleted and not thread.queue and thread.touched_at < cutoff
        ]
        assert expired == len(idle)
        for thread in idle:
            thread.active = False
            self.touched.add(thread.id)
            self.cover("expired")

    @rule(owner=owners, pick=picks)
    @precondition(lambda self: self.threads)
    def take_back(self, owner: str, pick: int) -> None:
        """A change that fails at its end leaves no trace."""
        thread = self.some_thread(pick)
        if thread.deleted:
            return
        message = self.message(thread.user, thread.id, "never", BusyPolicy.INTERRUPT, "never")
        record = self.acceptors[owner]._record

        def change(tx: Transaction) -> None:
            record(tx, message, message.request(), None, self.ids.new())
            tx.leases.renew(owner, 1_000.0)
            _erase(thread.user, thread.id, tx)
            raise ZeroDivisionError

        self.refused(change, ZeroDivisionError)
        self.touched.add(thread.id)

    # What must hold

    @invariant()
    def the_record_agrees(self) -> None:
        self.cover("steps")
        touched, self.touched = self.touched, set()
        self.run(self.store.read(lambda tx: self.compare(tx, touched)))

    def compare(self, tx: Transaction, touched: set[str]) -> None:
        """Compares what the record says with the model."""
        first = [thread.queue[0] for thread in self.threads.values() if thread.queue]
        assert set(tx.turns.unclaimed(100)) == {turn.id for turn in first if not turn.at_work}
        left = {turn.id for turn in first if turn.at_work and not self.alive(turn.owner)}
        assert set(tx.turns.abandoned(100)) == left
        for owner in OWNERS:
            assert tx.turns.held_by(owner) == {t.id: t.epoch for t in first if t.at_work and t.owner == owner}
        for thread_id in sorted(touched):
            self.compare_thread(tx, self.threads[thread_id])
        if touched:
            self.compare_ledger(tx)

    def compare_ledger(self, tx: Transaction) -> None:
        """Every turn that has ended is in it once, also where its thread is deleted."""
        open_ = Counter(turn.user for thread in self.threads.values() for turn in thread.queue)
        booked = Counter(turn.user for turn in self.turns.values()) - open_
        totals = tx.ledger.totals((Dimension.USER,), date.min, date.max)
        assert {group[0]: tally.turns for group, tally in totals} == booked
        for user in USERS:
            assert tx.ledger.spent(user, date.min).turns == open_[user]

    def compare_thread(self, tx: Transaction, thread: AThread) -> None:
        """Compares a thread."""
        stored = tx.threads.get(thread.user, thread.id)
        turns = [turn for turn in self.turns.values() if turn.thread_id == thread.id]
        if thread.deleted:
            assert stored is None
            assert tx.threads.tombstone(thread.id) is not None
            assert not any(tx.turns.find(turn.id) or tx.log.read(turn.id) for turn in turns)
            assert not tx.messages.list(thread.id, after=None, newest_first=False, limit=None)
            return
        assert stored is not None
        assert (stored.state is ThreadState.ACTIVE) is thread.active
        assert abs(stored.last_message_at - thread.touched_at) < timedelta(milliseconds=1)
        lines = tx.messages.list(thread.id, after=None, newest_first=False, limit=None)
        assert [(line.role, line.turn_id, line.text) for line in lines] == thread.lines
        assert [line.index for line in lines] == list(range(1, stored.message_count + 1))
        assert [turn.id for turn in tx.turns.unfinished(thread.id)] == [turn.id for turn in thread.queue]
        for turn in turns:
            self.compare_turn(tx, turn)

    def compare_turn(self, tx: Transaction, turn: ATurn) -> None:
        """Compares a turn and its log."""
        stored = tx.turns.get(turn.user, turn.id)
        assert stored is not None
        assert (stored.state, stored.reason, stored.epoch, stored.attempt, stored.continuation) == (
            turn.state, turn.reason, turn.epoch, turn.attempt, turn.continuation,
        )  # fmt: skip
        waiting = tx.turns.waiting_message(turn.id)
        expected = turn.claimed_at is None and not turn.state.is_terminal
        assert (waiting is not None) is expected
        said: list[Unit] = units(entry.event for entry in tx.log.read(turn.id))
        if turn.state.is_terminal:
            ending = said.pop()
            assert isinstance(ending, TurnFinished)
            assert ending.turn == stored
            assert ending.reply == tx.messages.reply_of(turn.id)
            text = "".join(event.text for event in turn.current if isinstance(event, TextDelta))
            assert (ending.reply.text if ending.reply else "") == text
            assert ending.reply is None or ending.reply.partial is (turn.state is not TurnState.COMPLETED)
        assert said == units(turn.log)
        assert stored.last_position == turn.position + turn.state.is_terminal


def _erase(user_id: str, thread_id: str, tx: Transaction) -> Sequence[Turn]:
    erased = erase_thread(tx, user_id, thread_id)
    if erased is None:
        raise ThreadNotFound
    return erased.unfinished


@dataclass
class _ARound:
    text: str = ""
    calls: tuple[ToolCalled, ...] = ()
    answers: tuple[ToolAnswered, ...] = ()


def _answers(event: TurnEvent, call: ToolCalled) -> bool:
    return isinstance(event, ToolAnswered) and event.call_id == call.call_id
