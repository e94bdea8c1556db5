"""What must hold whatever happens: judged after every change of the record, and once more at the end."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from adapters.memory import store as memory
from core.model.events import (
    AttemptRestarted,
    LogEntry,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
    extent,
)
from core.model.ledger import Tally
from core.model.message import Message, Role
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.use_cases.accept_message import MAX_WAITING
from core.use_cases.claim_turn import MAX_ATTEMPTS
from simulation.database import View, ViolationError, WatchedTables, seconds

BUDGET = 12.0
LEASE = 3.0
SLACK = 15.0

Unit = str | TurnEvent
"""What one position of a log stands for: a code point, or another event."""

_AT_WORK = (TurnState.RUNNING, TurnState.WAITING_FOR_CLIENT)
_TAKEN = {
    TurnReason.INTERRUPTED,
    TurnReason.TOOL_OUTCOME_UNKNOWN,
    TurnReason.BUDGET_EXCEEDED,
}
"""Why a turn may be ended by who has never claimed it."""


def units(events: Iterable[TurnEvent]) -> list[Unit]:
    """A log's content by position, however its text is cut."""
    result: list[Unit] = []
    for event in events:
        if isinstance(event, TextDelta):
            result.extend(event.text)
        else:
            result.append(event)
    return result


@dataclass
class Seen:
    """All that is known of a turn. `owners` are the processes that have claimed it."""

    turn: Turn
    number: int
    owners: list[View] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    deleted: bool = False
    changed_by: View | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a tool did in the world. `step` names the call in the plan of the conversation, whatever its key."""

    turn_id: str
    step: str
    name: str
    key: str
    again: bool


class Judge:
    """Watches the record, what agents say, what tools do, and what clients are told."""

    def __init__(self, *, idempotent: frozenset[str], restart: bool) -> None:
        self.idempotent = idempotent
        self.restart = restart
        self.seen: dict[str, Seen] = {}
        self.finals: dict[str, set[str]] = {}
        self.broken: set[str] = set()
        """Turns whose agent has raised what it should not."""
        self.unresumable: set[str] = set()
        """Turns whose provider did not know a round any more."""
        self.effects: list[Effect] = []
        self.acknowledged: dict[tuple[str, str], list[tuple[str, str]]] = {}
        self.counts: Counter[str] = Counter()
        self.trace: list[tuple[float, str]] = []
        self.now = 0.0
        self.tables: WatchedTables | None = None
        self.suspicious: Callable[[View], bool] = lambda _: True
        """Whether a process may have lost its lease, or its turns' endings, by a fault of its own."""
        self.harmed: Callable[[View], bool] = lambda _: True
        """Whether anything but a gentle stop has ever befallen a process."""

    def note(self, what: str) -> None:
        """Adds to the schedule."""
        self.trace.append((self.now, what))

    def fail(self, what: str) -> NoReturn:
        """A promise is broken."""
        self.note(f"BROKEN: {what}")
        raise ViolationError(what)

    def demand(self, holds: bool, what: str) -> None:
        """Fails where something does not hold. What takes long to say is said after an `if` instead."""
        if not holds:
            self.fail(what)

    # After every change

    def committed(self, view: View, tables: WatchedTables) -> None:
        """Judges a change that `view` has just committed."""
        self.tables = tables
        self.now = seconds(view.database.clock.peek())
        before = tables.before(tables.turns)
        claims = tables.before(tables.claims)
        for turn_id, old in before.items():
            new = tables.turns.get(turn_id)
            if new is None:
                self._deleted(turn_id, tables)
                if old is None or not old.state.is_terminal:  # else its owner hears of the ending, or has
                    self.seen[turn_id].changed_by = view
            elif old is None:
                self._accepted(view, new, tables)
            elif old != new:
                claim = claims.get(turn_id) or tables.claims.get(turn_id)
                self._changed(view, old, new, claim, tables)
        for turn_id in dict.fromkeys((*before, *tables.before(tables.logs))):
            if turn_id in tables.turns:
                self._logged(turn_id, tables)
                self.seen[turn_id].turn = tables.turns[turn_id]
                self.seen[turn_id].changed_by = view
        for thread_id in dict.fromkeys(self.seen[turn_id].turn.thread_id for turn_id in before):
            turns = [tables.turns[turn_id] for turn_id in tables.turns_of.get(thread_id, ())]
            self.demand(sum(turn.state in _AT_WORK for turn in turns) <= 1, f"{thread_id}: two turns at work")
        for thread_id in tables.before(tables.threads):
            gone = thread_id in tables.tombstones
            self.demand(not gone or thread_id not in tables.threads, f"{thread_id} is back")

        self._booked(tables)

    def _booked(self, tables: WatchedTables) -> None:
        """A turn is in the ledger once: from the change on in which it ends, or is deleted before its end."""
        booked, expected = Tally(), Tally()
        for turn_id, old in tables.before(tables.turns).items():
            new = tables.turns.get(turn_id)
            if old is not None and not old.state.is_terminal and (new is None or new.state.is_terminal):
                expected += Tally(turns=1, usage=(new or old).usage)
        for key, before in tables.before(tables.ledger).items():
            now, then = tables.ledger[key], before or Tally()
            booked += Tally(
                turns=now.turns - then.turns,
                usage=Usage(
                    input_tokens=now.usage.input_tokens - then.usage.input_tokens,
                    output_tokens=now.usage.output_tokens - then.usage.output_tokens,
                ),
            )
        if booked != expected:
            self.fail(f"the ledger tells of {booked}, not of {expected}")

    def _accepted(self, view: View, new: Turn, tables: WatchedTables) -> None:
        others = self._unfinished(new, tables)
        seen = self.seen[new.id] = Seen(new, len(self.seen))
        self.note(f"{view.owner} accepts {new.id} in {new.thread_id}: {new.state}")
        if new.state is TurnState.ACCEPTED:
            self.counts["queued"] += 1
            waiting = sum(turn.state is TurnState.ACCEPTED for turn in others)
            self.demand(bool(others), f"{new.id} waits in a free thread")
            self.demand(waiting < MAX_WAITING, f"{new.id}: too many wait")
            self.demand(new.epoch == 0 and new.claimed_at is None, f"{new.id} is claimed and waits")
            self.demand(tables.claims[new.id].waiting is not None, f"{new.id}: what it is to answer is lost")
        else:
            self.demand(not others, f"{new.id} is accepted past {[turn.id for turn in others]}")
            self.demand(tables.claims[new.id].owner == view.owner, f"{new.id} is claimed for somebody else")
            seen.owners.append(view)

    def _changed(
        self, view: View, old: Turn, new: Turn, claim: memory._Claim | None, tables: WatchedTables
    ) -> None:
        seen, turn_id = self.seen[new.id], new.id
        if old.state.is_terminal:
            self.fail(f"{turn_id} has ended, and changed: {old} {new}")
        self.demand(new.attempt - old.attempt in (0, 1), f"{turn_id}: attempt {old.attempt} → {new.attempt}")
        self.demand(new.attempt <= MAX_ATTEMPTS, f"{turn_id}: attempt {new.attempt}")
        self.demand(old.claimed_at in (None, new.claimed_at), f"{turn_id}: its budget begins anew")
        assert claim is not None
        ours = claim.owner == view.owner
        alive = (until := tables.leases.get(claim.owner)) is not None and until > view.database.clock.peek()
        if new.epoch == old.epoch:
            self.demand(ours and old.state is new.state is TurnState.RUNNING, f"{view.owner} writes to {turn_id}")
            return
        self.demand(new.epoch == old.epoch + 1, f"{turn_id}: epoch {old.epoch} → {new.epoch}")
        self.note(
            f"{view.owner}: {turn_id} {old.state} → {new.state} {new.reason or ''} attempt {new.attempt}"
            f" epoch {new.epoch} owner {claim.owner or '-'}"
        )
        if old.state in _AT_WORK and not ours and new.state is not TurnState.CANCELLED:
            self.demand(not alive, f"{view.owner} takes {turn_id} from {claim.owner}, which is alive")
            self.demand(
                self.suspicious(seen.owners[-1]), f"{view.owner} takes {turn_id} from {claim.owner}: it is well"
            )
            self.counts["take-overs"] += 1
        if new.state is TurnState.RUNNING:
            self._claimed(view, old, new, tables)
        elif new.state is TurnState.ACCEPTED:
            self.demand(ours, f"{view.owner} releases {turn_id} of {claim.owner}")
            self.demand(old.claimed_at is not None, f"{turn_id} is released, and never was claimed")
            self.counts["hand-overs"] += 1
            self.counts["hand-overs at once"] += self.now < view.patient_until - 1.0
        else:
            self._ended(view, old, new, ours=ours)

    def _claimed(self, view: View, old: Turn, new: Turn, tables: WatchedTables) -> None:
        seen = self.seen[new.id]
        others = [self.seen[turn.id] for turn in self._unfinished(new, tables)]
        self.demand(all(seen.number < other.number for other in others), f"{new.id} is claimed out of order")
        if old.claimed_at is None:
            self.counts["queue runs"] += 1
            self.demand(new.attempt == 1, f"{new.id}: its first attempt is {new.attempt}")
        else:
            self.counts["further attempts"] += 1
            goes_on = old.continuation is not None and new.attempt == old.attempt
            self.demand(goes_on or new.attempt == old.attempt + 1, f"{new.id}: another attempt does not count")
            late = self.now - seconds(old.claimed_at) if old.claimed_at else 0.0
            self.demand(late < BUDGET, f"{new.id} begins again beyond its budget")
        seen.owners.append(view)

    def _ended(self, view: View, old: Turn, new: Turn, *, ours: bool) -> None:
        seen = self.seen[new.id]
        self.counts[f"{new.state}"] += 1
        self.demand(new.finished_at is not None, f"{new.id} has no end")
        self.demand((new.reason is None) is (new.state is TurnState.COMPLETED), f"{new.id}: {new.reason}")
        if new.state is TurnState.CANCELLED:
            if new.reason is TurnReason.INTERRUPTED:
                self.counts["interrupts"] += 1
            self.demand(
                new.reason in (TurnReason.INTERRUPTED, TurnReason.CANCELLED_BY_CALLER), f"{new.id}: {new.reason}"
            )
        elif not ours:
            self.demand(old.claimed_at is not None, f"{new.id} ends unheard: {new.reason}")
            self.demand(new.reason in _TAKEN, f"{view.owner} ends {new.id} of somebody else: {new.reason}")
        if (
            new.reason in (TurnReason.INTERRUPTED, TurnReason.TOOL_OUTCOME_UNKNOWN)
            and new.state is not TurnState.CANCELLED
        ):
            befell = (
                new.id in self.unresumable or new.attempt == MAX_ATTEMPTS or any(map(self.harmed, seen.owners))
            )
            self.demand(befell, f"{new.id} is harmed, and nothing has happened")
        if new.reason is TurnReason.INTERNAL:
            self.demand(new.id in self.broken, f"{new.id}: something went wrong in the service")

    def _deleted(self, turn_id: str, tables: WatchedTables) -> None:
        seen = self.seen[turn_id]
        self.note(f"{turn_id} is deleted with {seen.turn.thread_id}")
        self.demand(seen.turn.thread_id in tables.tombstones, f"{turn_id} is gone, and its thread is not")
        self.counts["deleted at work"] += not seen.turn.state.is_terminal
        seen.deleted = True

    def _logged(self, turn_id: str, tables: WatchedTables) -> None:
        """A log only grows, its positions are contiguous by extent, and it says what has become of its turn."""
        seen, turn, entries = self.seen[turn_id], tables.turns[turn_id], tables.logs[turn_id]
        position = 0
        for entry in entries:
            position += extent(entry.event)
            self.demand(entry.position == position, f"{turn_id}: a hole before {entry.position}")
        self.demand(position == turn.last_position, f"{turn_id}: position {turn.last_position}, log {position}")
        now = units(entry.event for entry in entries)
        self.demand(now[: len(seen.units)] == seen.units, f"{turn_id}: what was committed has changed")
        self.demand(isinstance(now[0], TurnStarted), f"{turn_id}: begins with {now[0]!r}")
        endings = [number for number, unit in enumerate(now, 1) if isinstance(unit, TurnFinished)]
        expected = [len(now)] if turn.state.is_terminal else []
        self.demand(endings == expected, f"{turn_id} is {turn.state}, finished at {endings} of {len(now)}")
        self._fresh(turn_id, now[len(seen.units) :], seen, turn)
        seen.units = now

    def _fresh(self, turn_id: str, added: Sequence[Unit], seen: Seen, turn: Turn) -> None:
        """Another attempt begins with a restart where there is something to drop, and only there."""
        restarts = [unit.attempt for unit in added if isinstance(unit, AttemptRestarted)]
        dropped = any(isinstance(unit, str | ToolCalled) for unit in seen.units)
        told = restarts == [turn.attempt] if restarts or dropped else True
        again = turn.attempt > seen.turn.attempt
        self.demand(told if again else not restarts, f"{turn_id}: attempt {turn.attempt}, restarts {restarts}")
        if restarts:
            self.counts["restarts"] += 1
            last = seen.units[self._last_restart(seen.units) :]
            repeated = [u for u in seen.units if isinstance(u, ToolCalled) and u.name not in self.idempotent]
            self.demand(not repeated, f"{turn_id}: begins again after {repeated}")
            self.demand(self.restart or not any(isinstance(u, str) for u in last), f"{turn_id}: takes text back")

    @staticmethod
    def _last_restart(log: Sequence[Unit]) -> int:
        return max((number for number, unit in enumerate(log) if isinstance(unit, AttemptRestarted)), default=0)

    def _unfinished(self, turn: Turn, tables: WatchedTables) -> list[Turn]:
        of_thread = (tables.turns[other] for other in tables.turns_of.get(turn.thread_id, ()))
        return [other for other in of_thread if other.id != turn.id and not other.state.is_terminal]

    # What the world is told

    def delivered(self, turn_id: str, entry: LogEntry) -> None:
        """An event leaves for a client: it is on record."""
        told = units([entry.event])
        start = entry.position - len(told)
        if self.seen[turn_id].units[start : entry.position] != told:
            self.fail(f"{turn_id}: {entry} is delivered, and not on record")

    def said(self, turn_id: str, text: str) -> None:
        """An agent has said that a reply is complete."""
        self.finals.setdefault(turn_id, set()).add(text)

    def leased(self, owner: str, turn_id: str) -> None:
        """A process calls a tool: it knows that its turns are its own."""
        assert self.tables is not None
        until = self.tables.leases.get(owner)
        now = asyncio.get_running_loop().time()
        self.demand(until is not None and seconds(until) > now, f"{turn_id}: {owner} calls a tool without a lease")

    def took_effect(self, effect: Effect) -> None:
        """A tool has changed the world."""
        earlier = [other for other in self.effects if (other.turn_id, other.step) == (effect.turn_id, effect.step)]
        self.effects.append(effect)
        self.counts[f"effects of {effect.name}"] += 1
        if earlier:
            self.counts["repeated effects"] += 1
            same = {other.key for other in earlier} == {effect.key}
            self.demand(same and effect.name in self.idempotent, f"{effect} follows {earlier}")
        called = [u for u in self.seen[effect.turn_id].units if isinstance(u, ToolCalled)]
        known = {f"{effect.turn_id}:{call.call_id}" for call in called}
        if effect.key not in known:
            self.fail(f"{effect} is not on record")

    def acknowledge(self, user: str, request_id: str, turn_id: str, text: str) -> None:
        """A client has been told that its message is accepted."""
        self.counts["acknowledged"] += 1
        self.demand(turn_id in self.seen, f"{turn_id} was acknowledged, and is not on record")
        if not request_id:
            return
        earlier = self.acknowledged.setdefault((user, request_id), [])
        for other_id, other_text in earlier:
            if not self.seen[other_id].deleted:
                self.demand((turn_id, text) == (other_id, other_text), f"{request_id}: {turn_id}, {other_id}")
        earlier.append((turn_id, text))

    def followed(self, turn_id: str, received: Sequence[LogEntry], after: int) -> None:
        """A client has followed from a position on: what it has is exactly the log's content there."""
        position = after
        got: list[Unit] = []
        for entry in received:
            position += extent(entry.event)
            self.demand(
                entry.position == position, f"{turn_id}: a follower misses what is before {entry.position}"
            )
            got += units([entry.event])
        if self.seen[turn_id].units[after:position] != got:
            self.fail(f"{turn_id}: a follower has something else: {got}")

    # At the end

    def verdict(self, unserved: "Unserved") -> None:
        """Judges the record once everything is over."""
        assert self.tables is not None
        tables = self.tables
        told = [answer for answers in self.acknowledged.values() for answer in answers]
        asked = {text: turn_id for turn_id, text in told if not self.seen[turn_id].deleted}
        questions: Counter[str] = Counter()
        for thread_id, lines in tables.messages.items():
            self._transcript(thread_id, lines)
            questions.update(line.turn_id for line in lines if line.role is Role.USER)
            for line in lines:
                if line.role is Role.USER and line.text in asked:
                    self.demand(asked[line.text] == line.turn_id, f"{line.turn_id} answers another message")
        for turn_id, seen in self.seen.items():
            turn = seen.turn
            self.demand(seen.deleted == (turn_id not in tables.turns), f"{turn_id} is not where it should be")
            if seen.deleted:
                self.demand(turn_id not in tables.logs, f"{turn_id}: its log is still there")
                continue
            if not turn.state.is_terminal:
                self.fail(f"{turn_id} never ends: {turn}")
            self.demand(tables.logs[turn_id][-1].position == len(seen.units), f"{turn_id}: its log has changed")
            self.demand(questions[turn_id] == bool(seen.owners), f"{turn_id}: {questions[turn_id]} questions")
            self._judge_reply(turn, seen)
            if turn.claimed_at is not None and turn.finished_at is not None:
                begun, ended = seconds(turn.claimed_at), seconds(turn.finished_at)
                allowed = BUDGET + LEASE + SLACK + unserved(begun, ended)
                self.demand(ended - begun <= allowed, f"{turn_id} took {ended - begun:.1f} s, not {allowed:.1f}")

    def _transcript(self, thread_id: str, lines: Sequence[Message]) -> None:
        """Question, tools, answer, question, in the order in which messages were accepted."""
        self.demand([line.index for line in lines] == list(range(1, len(lines) + 1)), f"{thread_id}: a hole")
        order = list(dict.fromkeys(line.turn_id for line in lines))
        numbers = [self.seen[turn_id].number for turn_id in order]
        self.demand(numbers == sorted(numbers), f"{thread_id}: not in order: {order}")
        for turn_id in order:
            roles = [line.role for line in lines if line.turn_id == turn_id]
            tools = [Role.TOOL] * roles.count(Role.TOOL)
            answered = [Role.ASSISTANT] * (Role.ASSISTANT in roles)
            self.demand(roles == [Role.USER, *tools, *answered], f"{turn_id}: {roles}")
        places = [order.index(line.turn_id) for line in lines]
        self.demand(places == sorted(places), f"{thread_id}: turns overlap")

    def _judge_reply(self, turn: Turn, seen: Seen) -> None:
        ending = seen.units[-1]
        assert isinstance(ending, TurnFinished)
        if ending.turn != turn:
            self.fail(f"{turn.id}: its log says {ending.turn}, not {turn}")
        last = seen.units[self._last_restart(seen.units) :]
        text = "".join(unit for unit in last if isinstance(unit, str))
        reply = ending.reply
        assert self.tables is not None
        self.demand(self.tables.replies.get(turn.id) == reply, f"{turn.id}: its log tells of another reply")
        if text != (reply.text if reply else ""):
            self.fail(f"{turn.id}: says {text!r}, stored {reply}")
        states = (
            (TurnState.COMPLETED, TurnState.INCOMPLETE, TurnState.CANCELLED)
            if text
            else (TurnState.FAILED, TurnState.CANCELLED)
        )
        self.demand(turn.state in states, f"{turn.id} is {turn.state} with {text!r}")
        if reply is not None and reply.partial is (turn.state is TurnState.COMPLETED):
            self.fail(f"{turn.id}: {reply}")
        if turn.state is TurnState.COMPLETED:
            self.demand(
                text in self.finals.get(turn.id, ()), f"{turn.id} is complete, and nobody said so: {text!r}"
            )
        answers = Counter(unit.call_id for unit in last if isinstance(unit, ToolAnswered))
        calls = Counter(unit.call_id for unit in last if isinstance(unit, ToolCalled))
        self.demand(all(count == 1 for count in calls.values()), f"{turn.id}: calls {calls}")
        self.demand(answers <= calls, f"{turn.id}: answers {answers} to {calls}")
        if turn.state is TurnState.COMPLETED:
            self.demand(answers == calls, f"{turn.id}: complete, and calls have no answer")

    def schedule(self, limit: int = 600) -> str:
        """What happened, for people."""
        lines = [f"{at:9.4f}  {what}" for at, what in self.trace]
        return "\n".join([*(["…"] if len(lines) > limit else []), *lines[-limit:]])


class Unserved:
    """The seconds of a stretch in which no process was well for long enough to take others' turns over."""

    def __init__(self) -> None:
        self._served: list[tuple[float, float]] = []

    def add(self, begun: float, ended: float) -> None:
        """Says that a process was well."""
        if ended > begun + LEASE + 1.0:
            self._served.append((begun + LEASE + 1.0, ended))

    def __call__(self, begun: float, ended: float) -> float:
        free, at = 0.0, begun
        for start, stop in sorted(self._served):
            free += max(0.0, min(start, ended) - at) if at < ended else 0.0
            at = max(at, stop)
        return free + max(0.0, ended - at)
