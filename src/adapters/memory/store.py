"""A store without a database. It forgets everything with its process and is durable for no one."""

from collections import Counter
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Hashable,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from itertools import islice
from typing import TypeVar

from core.model.agent import AgentDefinition, Domain
from core.model.attachment import data_of, with_data, without_data
from core.model.erasure import Copy, Counts, Receipt, user_hash
from core.model.events import LogEntry, TurnEvent, TurnFinished, attempt_of, extent, merged, place
from core.model.events import after as events_after
from core.model.goal import Goal
from core.model.ledger import FORGOTTEN, Dimension, LedgerKey, LedgerLine, Tally
from core.model.message import ContentPart, Message, Role, readable
from core.model.thread import ProviderState, Thread, ThreadState, Tombstone
from core.model.turn import Continuation, Turn, TurnState, Usage
from core.model.user import User
from core.ports import agents, erasures, goals, ledger, store, threads, turns
from core.ports.agents import AgentVersionChanged
from core.ports.erasures import OpenErasure
from core.ports.store import Conflict
from core.ports.system import Clock
from core.ports.threads import SETTLE, ExpiredBatch, NewMessage, ThreadKey
from core.ports.turns import Appended, Holder, LogAppend, RequestKey

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_PLACE = 32
"""Threads in a place."""
_AT_WORK = frozenset({TurnState.RUNNING, TurnState.WAITING_FOR_CLIENT})


@dataclass(frozen=True, slots=True)
class _Claim:
    """What is kept of a turn beside itself until it has ended."""

    owner: str
    place: int
    waiting: NewMessage | None


@dataclass
class Tables:
    """What is stored, and how to take back what the current transaction has changed."""

    users: dict[str, User] = field(default_factory=dict)
    agents: dict[str, AgentDefinition] = field(default_factory=dict)
    threads: dict[str, Thread] = field(default_factory=dict)
    provider_states: dict[str, ProviderState] = field(default_factory=dict)
    messages: dict[str, tuple[Message, ...]] = field(default_factory=dict)
    replies: dict[str, Message] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    turns_of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    claims: dict[str, _Claim] = field(default_factory=dict)
    leases: dict[str, datetime] = field(default_factory=dict)
    tombstones: dict[str, Tombstone] = field(default_factory=dict)
    erasures: dict[str, Receipt] = field(default_factory=dict)
    open_erasures: dict[str, tuple[str, datetime]] = field(default_factory=dict)
    copies: dict[tuple[str, str], Copy] = field(default_factory=dict)
    due: dict[tuple[str, str], datetime] = field(default_factory=dict)
    attachments: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)
    logs: dict[str, tuple[LogEntry, ...]] = field(default_factory=dict)
    goals: dict[str, Goal] = field(default_factory=dict)
    ledger: dict[LedgerKey, Tally] = field(default_factory=dict)
    undo: list[Callable[[], object]] = field(default_factory=list)

    def put(self, table: MutableMapping[K, V], key: K, value: V) -> None:
        """Stores a value so that it can be taken back."""
        if key in table:
            self.undo.append(lambda old=table[key]: table.__setitem__(key, old))  # type: ignore[misc]
        else:
            self.undo.append(lambda: table.pop(key))
        table[key] = value

    def drop(self, table: MutableMapping[K, V], key: K) -> None:
        """Removes a value so that it can be put back."""
        if key in table:
            old = table.pop(key)
            self.undo.append(lambda: table.__setitem__(key, old))


class _Repository:
    def __init__(self, tables: Tables) -> None:
        self._tables = tables


class Users(_Repository, threads.Users):
    """Users."""

    def ensure(self, user_id: str, now: datetime) -> None:
        if user_id not in self._tables.users:
            self._tables.put(self._tables.users, user_id, User(id=user_id, created_at=now))

    def get(self, user_id: str) -> User | None:
        return self._tables.users.get(user_id)

    def held(self, user_id: str) -> bool:
        user = self.get(user_id)
        return user is not None and user.held_since is not None

    def hold(self, user_id: str, since: datetime | None) -> None:
        user = self.get(user_id)
        if user is not None and (since is None or user.held_since is None):
            self._tables.put(self._tables.users, user_id, replace(user, held_since=since))

    def belongings(self, user_id: str) -> tuple[Counts, int]:
        tables = self._tables
        threads = [thread.id for thread in tables.threads.values() if thread.user_id == user_id]
        turns = [turn_id for thread_id in threads for turn_id in tables.turns_of.get(thread_id, ())]
        counts = Counts(
            threads=len(threads),
            turns=len(turns),
            messages=sum(len(tables.messages.get(thread_id, ())) for thread_id in threads),
            attachments=sum(len(tables.attachments.get(turn_id, {})) for turn_id in turns),
            goals=sum(goal.user_id == user_id for goal in tables.goals.values()),
        )
        return counts, sum(copy.thread_id in threads for copy in tables.copies.values())

    def remove(self, user_id: str) -> None:
        counts, _ = self.belongings(user_id)
        if counts != Counts():
            raise Conflict
        self._tables.drop(self._tables.users, user_id)

    def lock(self, user_id: str) -> None:
        """There is one writer."""


class AgentVersions(_Repository, agents.AgentVersions):
    """Agent versions."""

    def publish(self, definition: AgentDefinition) -> None:
        stored = self._tables.agents.get(definition.id)
        if stored is None:
            self._tables.put(self._tables.agents, definition.id, definition)
        elif stored != definition:
            raise AgentVersionChanged(definition.id)

    def get(self, agent_id: str) -> AgentDefinition | None:
        return self._tables.agents.get(agent_id)

    def all(self) -> Sequence[AgentDefinition]:
        return sorted(self._tables.agents.values(), key=lambda one: (one.slug, -one.version))


class Threads(_Repository, threads.Threads):
    """Threads."""

    def add(self, thread: Thread) -> None:
        if thread.user_id not in self._tables.users or thread.agent_id not in self._tables.agents:
            raise ValueError("a thread needs its user and its agent")
        self._tables.put(self._tables.threads, thread.id, thread)

    def get(self, user_id: str, thread_id: str) -> Thread | None:
        thread = self._tables.threads.get(thread_id)
        return thread if thread is not None and thread.user_id == user_id else None

    def lock(self, user_id: str, thread_id: str) -> Thread | None:
        return self.get(user_id, thread_id)

    def find(self, thread_id: str) -> Thread | None:
        return self._tables.threads.get(thread_id)

    def touch(self, thread_id: str, now: datetime) -> None:
        thread = replace(self._tables.threads[thread_id], last_message_at=now, state=ThreadState.ACTIVE)
        self._tables.put(self._tables.threads, thread_id, thread)

    def delete(self, thread_id: str, now: datetime, *, erasure_id: str = "", in_use: bool = False) -> Counts:
        tables = self._tables
        turn_ids = tables.turns_of.get(thread_id, ())
        counts = Counts(
            threads=1,
            turns=len(turn_ids),
            messages=len(tables.messages.get(thread_id, ())),
            attachments=sum(len(tables.attachments.get(turn_id, {})) for turn_id in turn_ids),
        )
        for turn_id in turn_ids:
            tables.drop(tables.turns, turn_id)
            tables.drop(tables.logs, turn_id)
            tables.drop(tables.replies, turn_id)
            tables.drop(tables.claims, turn_id)
            tables.drop(tables.attachments, turn_id)
        for key in [key for key, (turn_id, _) in tables.requests.items() if turn_id in turn_ids]:
            tables.drop(tables.requests, key)
        tables.drop(tables.turns_of, thread_id)
        tables.drop(tables.messages, thread_id)
        tables.drop(tables.provider_states, thread_id)
        tables.drop(tables.threads, thread_id)
        tombstone = Tombstone(thread_id=thread_id, erasure_id=erasure_id, deleted_at=now)
        tables.put(tables.tombstones, thread_id, tombstone)
        for ref, copy in tables.copies.items():
            if copy.thread_id == thread_id and ref not in tables.due:
                tables.put(tables.due, ref, now + timedelta(seconds=SETTLE if in_use else 0))
        return counts

    def ids_of(self, user_id: str, after: str, limit: int) -> Sequence[str]:
        threads = self._tables.threads.values()
        return sorted(thread.id for thread in threads if thread.user_id == user_id and thread.id > after)[:limit]

    def forgotten(
        self, cutoff: datetime, domain: Domain | None, after: str, limit: int
    ) -> Sequence[tuple[str, str]]:
        found = sorted(self._unused(cutoff, domain, self._tables.threads.values()), key=lambda thread: thread.id)
        return [(thread.user_id, thread.id) for thread in found if thread.id > after][:limit]

    def tombstone(self, thread_id: str) -> Tombstone | None:
        return self._tables.tombstones.get(thread_id)

    def list(
        self,
        user_id: str,
        domain: Domain | None,
        states: frozenset[ThreadState],
        before: ThreadKey | None,
        limit: int,
    ) -> Sequence[Thread]:
        found = [
            thread
            for thread in self._tables.threads.values()
            if thread.user_id == user_id
            and domain in (None, thread.domain)
            and thread.state in states
            and (before is None or _key(thread) < (before.last_message_at, before.id))
        ]
        return sorted(found, key=_key, reverse=True)[:limit]

    def newest(
        self, user_id: str, domain: Domain | None, states: frozenset[ThreadState], limit: int
    ) -> Sequence[Thread]:
        found = [
            thread
            for thread in self._tables.threads.values()
            if user_id in ("", thread.user_id) and domain in (None, thread.domain) and thread.state in states
        ]
        return sorted(found, key=lambda thread: thread.id, reverse=True)[:limit]

    def pinned(self) -> Mapping[str, int]:
        return Counter(thread.agent_id for thread in self._tables.threads.values())

    def describe(self, thread_id: str, *, title: str | None, metadata: Mapping[str, str] | None) -> None:
        thread = self._tables.threads[thread_id]
        if title is not None:
            thread = replace(thread, title=title)
        if metadata is not None:
            thread = replace(thread, metadata=dict(metadata))
        self._tables.put(self._tables.threads, thread_id, thread)

    def provider_state(self, thread_id: str) -> ProviderState | None:
        return self._tables.provider_states.get(thread_id)

    def save_provider_state(self, thread_id: str, state: ProviderState) -> None:
        self._tables.put(self._tables.provider_states, thread_id, state)

    def expire(self, cutoff: datetime, domain: Domain | None, after: ThreadKey | None, limit: int) -> ExpiredBatch:
        found = sorted(self._idle(cutoff, domain), key=_key)
        if after is not None:
            found = [thread for thread in found if _key(thread) > (after.last_message_at, after.id)]
        for thread in found[:limit]:
            self._tables.put(self._tables.threads, thread.id, replace(thread, state=ThreadState.INACTIVE))
        batch = found[:limit]
        return ExpiredBatch(len(batch), ThreadKey(*_key(batch[-1])) if batch else None)

    def places(self) -> int:
        return -(-len(self._tables.threads) // _PLACE)

    def expire_places(self, cutoff: datetime, domain: Domain | None, first: int, count: int) -> int:
        there = islice(self._tables.threads.values(), first * _PLACE, (first + count) * _PLACE)
        found = self._idle(cutoff, domain, there)
        for thread in found:
            self._tables.put(self._tables.threads, thread.id, replace(thread, state=ThreadState.INACTIVE))
        return len(found)

    def count_expired(self, cutoff: datetime, domain: Domain | None, limit: int | None = None) -> int:
        return len(self._idle(cutoff, domain)[:limit])

    def _idle(
        self, cutoff: datetime, domain: Domain | None, among: Iterable[Thread] | None = None
    ) -> Sequence[Thread]:
        found = self._unused(cutoff, domain, self._tables.threads.values() if among is None else among)
        return [thread for thread in found if thread.state is ThreadState.ACTIVE]

    def _unused(self, cutoff: datetime, domain: Domain | None, among: Iterable[Thread]) -> Sequence[Thread]:
        return [
            thread
            for thread in among
            if thread.last_message_at < cutoff
            and domain in (None, thread.domain)
            and not any(turn_id in self._tables.claims for turn_id in self._tables.turns_of.get(thread.id, ()))
        ]


def _age(turn: Turn) -> tuple[datetime, str]:
    return turn.accepted_at, turn.id


def _key(thread: Thread) -> tuple[datetime, str]:
    return thread.last_message_at, thread.id


class Leases(turns.Leases):
    """What processes have of the right to work on turns."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock

    def renew(self, owner: str, seconds: float) -> bool:
        had = self.alive(owner)
        self._tables.put(self._tables.leases, owner, self._clock.now() + timedelta(seconds=seconds))
        return had

    def end(self, owner: str) -> None:
        self._tables.drop(self._tables.leases, owner)

    def end_others(self, owner: str) -> None:
        for other in [other for other in self._tables.leases if other != owner]:
            self.end(other)

    def others(self, owner: str) -> bool:
        return any(self.alive(other) for other in self._tables.leases if other != owner)

    def alive(self, owner: str) -> bool:
        """Whether a process has a valid lease."""
        until = self._tables.leases.get(owner)
        return until is not None and until > self._clock.now()


class Messages(_Repository, threads.Messages):
    """The transcript."""

    def begin(self, thread_id: str, message: NewMessage) -> Message:
        first = message.at(thread_id, 1)
        self._tables.put(self._tables.messages, thread_id, (_kept(first),))
        return first

    def append(self, thread_id: str, messages: Sequence[NewMessage]) -> Sequence[Message]:
        thread = self._tables.threads[thread_id]
        earlier = self._tables.messages.get(thread_id, ())
        added = [message.at(thread_id, index) for index, message in enumerate(messages, thread.message_count + 1)]
        for message in added:
            if message.role is Role.ASSISTANT:
                if message.turn_id in self._tables.replies:
                    raise Conflict
                self._tables.put(self._tables.replies, message.turn_id, message)
        self._tables.put(self._tables.messages, thread_id, (*earlier, *map(_kept, added)))
        moved = replace(
            thread,
            message_count=thread.message_count + len(added),
            last_message_at=added[-1].created_at,
            state=ThreadState.ACTIVE,
        )
        self._tables.put(self._tables.threads, thread_id, moved)
        return added

    def list(
        self, thread_id: str, *, after: int | None, newest_first: bool, limit: int | None, data: int = 0
    ) -> Sequence[Message]:
        lines = self._tables.messages.get(thread_id, ())
        if newest_first:
            lines = lines[: len(lines) if after is None else max(0, after - 1)][::-1][:limit]
        else:
            lines = lines[after or 0 :][:limit]
        read = set(readable(lines, data))
        return [self._whole(line) if line.turn_id in read else line for line in lines]

    def question_of(self, turn_id: str) -> Message | None:
        turn = self._tables.turns.get(turn_id)
        lines = self._tables.messages.get(turn.thread_id, ()) if turn is not None else ()
        of_turn = (line for line in reversed(lines) if line.turn_id == turn_id and line.role is Role.USER)
        return next(map(self._whole, of_turn), None)

    def reply_of(self, turn_id: str) -> Message | None:
        return self._tables.replies.get(turn_id)

    def _whole(self, line: Message) -> Message:
        return replace(line, content=with_data(line.content, self._tables.attachments.get(line.turn_id, {})))


def _kept(line: Message) -> Message:
    """A line as it stands in the transcript."""
    return replace(line, content=without_data(line.content))


class Turns(_Repository, turns.Turns):
    """Turns."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        super().__init__(tables)
        self._leases = Leases(tables, clock)

    def add(self, turn: Turn, request: RequestKey, *, owner: str = "", waiting: NewMessage | None = None) -> None:
        unfinished = self.unfinished(turn.thread_id)
        if turn.state in _AT_WORK and any(other.state in _AT_WORK for other in unfinished):
            raise Conflict
        if request.request_id:
            key = (request.caller, request.user_id, request.request_id)
            if key in self._tables.requests:
                raise Conflict
            self._tables.put(self._tables.requests, key, (turn.id, request.fingerprint))
        places = [self._tables.claims[other.id].place for other in unfinished]
        place = max(places, default=0) + 1 if waiting is not None else 0
        if not turn.state.is_terminal:
            kept = replace(waiting, content=without_data(waiting.content)) if waiting is not None else None
            self._tables.put(self._tables.claims, turn.id, _Claim(owner, place, kept))
        self._tables.put(self._tables.turns, turn.id, turn)
        self._tables.put(self._tables.turns_of, turn.thread_id, (*self._of(turn.thread_id), turn.id))

    def attach(self, turn_id: str, content: tuple[ContentPart, ...]) -> None:
        if data := data_of(content):
            self._tables.put(self._tables.attachments, turn_id, data)

    def get(self, user_id: str, turn_id: str) -> Turn | None:
        turn = self.find(turn_id)
        return turn if turn is not None and turn.user_id == user_id else None

    def find(self, turn_id: str) -> Turn | None:
        return self._tables.turns.get(turn_id)

    def lock(self, turn_id: str) -> Turn | None:
        return self.find(turn_id)

    def by_request(self, caller: str, user_id: str, request_id: str) -> tuple[Turn, str] | None:
        found = self._tables.requests.get((caller, user_id, request_id))
        return None if found is None else (self._tables.turns[found[0]], found[1])

    def unfinished(self, thread_id: str) -> Sequence[Turn]:
        turns = [self._tables.turns[turn_id] for turn_id in self._of(thread_id) if turn_id in self._tables.claims]
        return sorted(turns, key=lambda turn: (turn.state not in _AT_WORK, self._tables.claims[turn.id].place))

    def open(self, user_id: str, after: str, limit: int) -> Sequence[Turn]:
        turns = (self._tables.turns[turn_id] for turn_id in sorted(self._tables.claims) if turn_id > after)
        return [turn for turn in turns if user_id in ("", turn.user_id)][:limit]

    def of_thread(self, thread_id: str, after: str, limit: int) -> Sequence[Turn]:
        found = sorted(turn_id for turn_id in self._of(thread_id) if turn_id > after)
        return [self._tables.turns[turn_id] for turn_id in found[:limit]]

    def waiting_message(self, turn_id: str) -> NewMessage | None:
        claim = self._tables.claims.get(turn_id)
        if claim is None or claim.waiting is None:
            return None
        data = self._tables.attachments.get(turn_id, {})
        return replace(claim.waiting, content=with_data(claim.waiting.content, data))

    def holder(self, turn_id: str) -> Holder:
        claim = self._tables.claims.get(turn_id)
        owner = claim.owner if claim is not None else ""
        return Holder(owner, self._leases.alive(owner), self._tables.leases.get(owner))

    def held_by(self, owner: str) -> Mapping[str, int]:
        return {turn.id: turn.epoch for turn in self._at_work() if self._tables.claims[turn.id].owner == owner}

    def unclaimed(self, limit: int, *, but_of: Collection[str] = ()) -> Sequence[str]:
        waiting = (self._tables.turns[turn_id] for turn_id in self._tables.claims)
        found = [turn for turn in waiting if self.unfinished(turn.thread_id)[0] == turn]
        found = [turn for turn in found if turn.state is TurnState.ACCEPTED and turn.user_id not in but_of]
        return [turn.id for turn in sorted(found, key=_age)][:limit]

    def abandoned(self, limit: int) -> Sequence[str]:
        found = [turn for turn in self._at_work() if not self.holder(turn.id).alive]
        return [turn.id for turn in sorted(found, key=_age)][:limit]

    def any_at_work(self) -> bool:
        return bool(self._at_work())

    def save_claim(self, turn: Turn, owner: str) -> None:
        claim = self._tables.claims[turn.id]
        others = (other for other in self.unfinished(turn.thread_id) if other.id != turn.id)
        if turn.state in _AT_WORK and any(other.state in _AT_WORK for other in others):
            raise Conflict
        waiting = claim.waiting if turn.state is TurnState.ACCEPTED else None
        self._tables.put(self._tables.claims, turn.id, replace(claim, owner=owner, waiting=waiting))
        self._tables.put(self._tables.turns, turn.id, turn)

    def save_continuation(self, turn_id: str, continuation: Continuation | None) -> None:
        turn = replace(self._tables.turns[turn_id], continuation=continuation)
        self._tables.put(self._tables.turns, turn_id, turn)

    def save_usage(self, turn_id: str, epoch: int, usage: Usage) -> None:
        turn = self._tables.turns.get(turn_id)
        if turn is not None and turn.epoch == epoch and turn.state is TurnState.RUNNING:
            self._tables.put(self._tables.turns, turn_id, replace(turn, usage=usage))

    def save_ending(self, turn: Turn) -> str | None:
        self._tables.put(self._tables.turns, turn.id, turn)
        if self._tables.claims[turn.id].waiting is not None:
            self._tables.drop(self._tables.attachments, turn.id)
        self._tables.drop(self._tables.claims, turn.id)
        waiting = [other.id for other in self.unfinished(turn.thread_id) if other.state is TurnState.ACCEPTED]
        return waiting[0] if waiting else None

    def _at_work(self) -> Iterable[Turn]:
        turns = (self._tables.turns[turn_id] for turn_id in self._tables.claims)
        return [turn for turn in turns if turn.state in _AT_WORK]

    def _of(self, thread_id: str) -> tuple[str, ...]:
        return self._tables.turns_of.get(thread_id, ())


class TurnLog(_Repository, turns.TurnLog):
    """The events of every turn."""

    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._tables.put(self._tables.logs, turn_id, tuple(place(events, 0)))

    def append(self, batch: Sequence[LogAppend]) -> Appended:
        accepted = set()
        for append in batch:
            turn = self._tables.turns.get(append.turn_id)
            if (
                turn is None
                or turn.state is not TurnState.RUNNING
                or (turn.epoch, turn.last_position) != (append.epoch, append.position)
            ):
                continue
            turn = replace(
                turn,
                last_position=append.position + sum(map(extent, append.events)),
                attempt=attempt_of(append.events) or turn.attempt,
            )
            self._tables.put(self._tables.turns, turn.id, turn)
            log = self._tables.logs[turn.id]
            self._tables.put(self._tables.logs, turn.id, (*log, *place(append.events, append.position)))
            accepted.add(turn.id)
        return Appended(frozenset(accepted))

    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        return events_after(self._tables.logs.get(turn_id, ()), after)

    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        turn = self._tables.turns[turn_id]
        finished = TurnFinished(turn, self._tables.replies.get(turn_id))
        events = [finished if isinstance(event, TurnFinished) else event for event in events]
        self._tables.put(self._tables.logs, turn_id, tuple(place(merged(events), 0)))


class Goals(_Repository, goals.Goals):
    """Goals."""

    def add(self, goal: Goal, key: str) -> Goal:
        if key not in self._tables.goals:
            self._tables.put(self._tables.goals, key, goal)
        return self._tables.goals[key]

    def list(self, user_id: str, domain: Domain, limit: int) -> Sequence[Goal]:
        found = [goal for goal in self._tables.goals.values() if (goal.user_id, goal.domain) == (user_id, domain)]
        return sorted(found, key=lambda goal: (goal.created_at, goal.id), reverse=True)[:limit]

    def of_user(self, user_id: str, after: str, limit: int) -> Sequence[Goal]:
        found = [goal for goal in self._tables.goals.values() if goal.user_id == user_id and goal.id > after]
        return sorted(found, key=lambda goal: goal.id)[:limit]

    def delete_of(self, user_id: str) -> int:
        keys = [key for key, goal in self._tables.goals.items() if goal.user_id == user_id]
        for key in keys:
            self._tables.drop(self._tables.goals, key)
        return len(keys)


class Erasures(_Repository, erasures.Erasures):
    """Erasures of users."""

    def open(self, erasure_id: str, user_id: str, now: datetime) -> OpenErasure:
        tables = self._tables
        if user_id not in tables.open_erasures:
            receipt = Receipt(id=erasure_id, user_hash=user_hash(erasure_id, user_id), requested_at=now)
            tables.put(tables.erasures, erasure_id, receipt)
            tables.put(tables.open_erasures, user_id, (erasure_id, now))
        return OpenErasure(tables.open_erasures[user_id][0], user_id)

    def find(self, erasure_id: str) -> Receipt | None:
        tables = self._tables
        receipt = tables.erasures.get(erasure_id)
        if receipt is None:
            return None
        user = tables.users.get(self._user_of(erasure_id))
        graves = {grave.thread_id for grave in tables.tombstones.values() if grave.erasure_id == erasure_id}
        return replace(
            receipt,
            held=user is not None and user.held_since is not None,
            copies_left=sum(copy.thread_id in graves for copy in tables.copies.values()),
        )

    def note(self, erasure_id: str, erased: Counts, now: datetime) -> bool:
        tables = self._tables
        receipt = tables.erasures[erasure_id]
        if receipt.finished_at is not None:
            return False
        tables.put(tables.erasures, erasure_id, replace(receipt, erased=receipt.erased + erased))
        tables.put(tables.open_erasures, self._user_of(erasure_id), (erasure_id, now))
        return True

    def finish(self, erasure_id: str, now: datetime) -> None:
        tables = self._tables
        receipt = tables.erasures[erasure_id]
        if receipt.finished_at is None:
            tables.put(tables.erasures, erasure_id, replace(receipt, finished_at=now))
            tables.drop(tables.open_erasures, self._user_of(erasure_id))

    def left(self, before: datetime, limit: int) -> Sequence[OpenErasure]:
        tables = self._tables
        held = {user.id for user in tables.users.values() if user.held_since is not None}
        found = [
            OpenErasure(erasure_id, user_id)
            for user_id, (erasure_id, touched_at) in tables.open_erasures.items()
            if touched_at < before and user_id not in held
        ]
        return sorted(found, key=lambda erasure: self._age(erasure.id))[:limit]

    def newest(self, limit: int) -> Sequence[Receipt]:
        newest = sorted(self._tables.erasures, key=self._age, reverse=True)[:limit]
        return [receipt for erasure_id in newest if (receipt := self.find(erasure_id))]

    def _age(self, erasure_id: str) -> tuple[datetime, str]:
        return self._tables.erasures[erasure_id].requested_at, erasure_id

    def _user_of(self, erasure_id: str) -> str:
        opened = self._tables.open_erasures.items()
        return next((user_id for user_id, (its_id, _) in opened if its_id == erasure_id), "")


class Copies(erasures.Copies):
    """What providers keep."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self._tables = tables
        self._clock = clock

    def keep(self, thread_id: str, provider: str, refs: Collection[str], *, erase: bool = False) -> None:
        tables = self._tables
        for ref in refs:
            if (provider, ref) not in tables.copies:
                copy = Copy(provider=provider, ref=ref, thread_id=thread_id)
                tables.put(tables.copies, (provider, ref), copy)
                if erase or thread_id not in tables.threads:
                    tables.put(tables.due, (provider, ref), self._clock.now())

    def any_due(self, provider: str) -> bool:
        return bool(self._due(provider))

    def claim(self, provider: str, limit: int, seconds: float) -> Sequence[Copy]:
        tables = self._tables
        claimed = []
        for key in self._due(provider)[:limit]:
            copy = replace(tables.copies[key], tries=tables.copies[key].tries + 1)
            tables.put(tables.copies, key, copy)
            tables.put(tables.due, key, self._clock.now() + timedelta(seconds=seconds))
            claimed.append(copy)
        return claimed

    def erased(self, copy: Copy) -> None:
        self._tables.drop(self._tables.copies, (copy.provider, copy.ref))
        self._tables.drop(self._tables.due, (copy.provider, copy.ref))

    def stays(self, copy: Copy, reason: str, seconds: float) -> None:
        key = (copy.provider, copy.ref)
        if key in self._tables.copies:
            self._tables.put(self._tables.copies, key, replace(self._tables.copies[key], reason=reason))
            self._tables.put(self._tables.due, key, self._clock.now() + timedelta(seconds=seconds))

    def left(self, limit: int) -> Sequence[Copy]:
        tables = self._tables
        found = sorted(tables.due, key=lambda key: (-tables.copies[key].tries, tables.due[key], key[1]))
        return [tables.copies[key] for key in found[:limit]]

    def count_left(self) -> Mapping[str, int]:
        return Counter(provider for provider, _ in self._tables.due)

    def _due(self, provider: str) -> Sequence[tuple[str, str]]:
        due = self._tables.due
        found = [key for key in due if key[0] == provider and due[key] <= self._clock.now()]
        return sorted(found, key=lambda key: (due[key], key[1]))


class Ledger(_Repository, ledger.Ledger):
    """What turns have cost."""

    def enter(self, line: LedgerLine) -> None:
        before = self._tables.ledger.get(line.key, Tally())
        self._tables.put(self._tables.ledger, line.key, before + line.tally)

    def spent(self, user_id: str, day: date) -> Tally:
        booked = sum((line.tally for line in self._lines(day, day, user_id)), Tally())
        open_ = (self._tables.turns[turn_id] for turn_id in self._tables.claims)
        return sum((Tally(turns=1, usage=turn.usage) for turn in open_ if turn.user_id == user_id), booked)

    def of_user(
        self, user_id: str, since: date, until: date, before: LedgerKey | None, limit: int
    ) -> Sequence[LedgerLine]:
        found = [line for line in self._lines(since, until, user_id) if before is None or line.key < before]
        return sorted(found, key=lambda line: line.key, reverse=True)[:limit]

    def totals(
        self, by: Sequence[Dimension], since: date, until: date, *, user_id: str = "", agent_id: str = ""
    ) -> Sequence[tuple[tuple[str, ...], Tally]]:
        sums: dict[tuple[str, ...], Tally] = {}
        for line in self._lines(since, until, user_id):
            if agent_id in ("", line.key.agent_id):
                group = tuple(_value(line.key, dimension) for dimension in by)
                sums[group] = sums.get(group, Tally()) + line.tally
        return list(sums.items())

    def forget(self, user_id: str) -> None:
        for line in self._lines(date.min, date.max, user_id):
            self._tables.drop(self._tables.ledger, line.key)
            self.enter(replace(line, key=replace(line.key, user_id=FORGOTTEN)))

    def _lines(self, since: date, until: date, user_id: str) -> Sequence[LedgerLine]:
        return [
            LedgerLine(key, tally)
            for key, tally in self._tables.ledger.items()
            if since <= key.day <= until and user_id in ("", key.user_id)
        ]


def _value(key: LedgerKey, dimension: Dimension) -> str:
    match dimension:
        case Dimension.USER:
            return key.user_id
        case Dimension.AGENT:
            return key.agent_id
        case Dimension.MODEL:
            return key.model
        case Dimension.DAY:
            return key.day.isoformat()


class MemoryTransaction(store.Transaction):
    """All repositories on the same tables. It keeps nothing of its own: one is enough for all transactions."""

    def __init__(self, tables: Tables, clock: Clock) -> None:
        self._clock = clock
        self._users = Users(tables)
        self._agents = AgentVersions(tables)
        self._threads = Threads(tables)
        self._messages = Messages(tables)
        self._turns = Turns(tables, clock)
        self._log = TurnLog(tables)
        self._goals = Goals(tables)
        self._ledger = Ledger(tables)
        self._leases = Leases(tables, clock)
        self._erasures = Erasures(tables)
        self._copies = Copies(tables, clock)

    @property
    def users(self) -> Users:
        return self._users

    @property
    def agents(self) -> AgentVersions:
        return self._agents

    @property
    def threads(self) -> Threads:
        return self._threads

    @property
    def messages(self) -> Messages:
        return self._messages

    @property
    def turns(self) -> Turns:
        return self._turns

    @property
    def log(self) -> TurnLog:
        return self._log

    @property
    def goals(self) -> Goals:
        return self._goals

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @property
    def leases(self) -> Leases:
        return self._leases

    @property
    def erasures(self) -> Erasures:
        return self._erasures

    @property
    def copies(self) -> Copies:
        return self._copies

    def now(self) -> datetime:
        return self._clock.now()

    def about_now(self) -> datetime:
        return self._clock.now()


class MemoryStore(store.Store):
    """Runs every function at once, in the caller's thread."""

    def __init__(self, clock: Clock, tables: Tables | None = None) -> None:
        self._tables = Tables() if tables is None else tables
        self._transaction = MemoryTransaction(self._tables, clock)
        self._held: set[str] = set()

    async def write(self, change: Callable[[store.Transaction], T]) -> T:
        tables = self._tables
        try:
            return change(self._transaction)
        except BaseException:
            while tables.undo:
                tables.undo.pop()()
            raise
        finally:
            tables.undo.clear()

    async def read(self, query: Callable[[store.Transaction], T]) -> T:
        return query(self._transaction)

    async def purge(self) -> bool:
        return True

    @asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[bool]:
        if name in self._held:
            yield False
            return
        self._held.add(name)
        try:
            yield True
        finally:
            self._held.discard(name)

    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        return False

    async def aclose(self) -> None:
        """Nothing is held."""
