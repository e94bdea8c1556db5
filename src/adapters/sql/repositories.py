"""The repositories on one connection within one transaction."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from adapters.sql import mapping as m
from adapters.sql import tables as t
from core.model.agent import AgentDefinition, Domain
from core.model.events import LogEntry, TurnEvent, TurnFinished, extent, place
from core.model.events import after as events_after
from core.model.goal import Goal
from core.model.message import Message, Role
from core.model.thread import ProviderState, Thread, ThreadState
from core.model.turn import Turn, TurnState
from core.ports import agents, goals, store, threads, turns
from core.ports.agents import AgentVersionChanged
from core.ports.system import Clock
from core.ports.threads import ExpiredBatch, NewMessage, ThreadKey
from core.ports.turns import LogAppend, RequestKey

_UNFINISHED = [state.value for state in TurnState if not state.is_terminal]


class _Repository:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._dialect = postgresql if connection.dialect.name == "postgresql" else sqlite


class Users(_Repository, threads.Users):
    """`users`."""

    def ensure(self, user_id: str, now: datetime) -> None:
        c = t.users.c
        new = self._dialect.insert(t.users).values({c.id: user_id, c.created_at: now})
        self._connection.execute(new.on_conflict_do_nothing())


class AgentVersions(_Repository, agents.AgentVersions):
    """`agents`."""

    def publish(self, definition: AgentDefinition) -> None:
        c = t.agents.c
        self._connection.execute(
            self._dialect.insert(t.agents)
            .values(
                {
                    c.id: definition.id,
                    c.slug: definition.slug,
                    c.version: definition.version,
                    c.domain: definition.domain.value,
                    c.definition: m.definition_values(definition),
                    c.created_at: datetime.now(UTC),
                }
            )
            .on_conflict_do_nothing()
        )
        if self.get(definition.id) != definition:
            raise AgentVersionChanged(definition.id)

    def get(self, agent_id: str) -> AgentDefinition | None:
        c = t.agents.c
        stored = self._connection.execute(select(c.definition).where(c.id == agent_id)).scalar_one_or_none()
        return None if stored is None else m.definition_of(stored)


class Threads(_Repository, threads.Threads):
    """`assistant_threads`."""

    def add(self, thread: Thread) -> None:
        self._connection.execute(insert(t.threads).values(m.thread_values(thread)))

    def get(self, user_id: str, thread_id: str) -> Thread | None:
        return self._one(self._of(user_id, thread_id))

    def lock(self, user_id: str, thread_id: str) -> Thread | None:
        return self._one(self._of(user_id, thread_id).with_for_update())

    def list(
        self,
        user_id: str,
        domain: Domain | None,
        states: frozenset[ThreadState],
        before: ThreadKey | None,
        limit: int,
    ) -> Sequence[Thread]:
        c = t.threads.c
        query = select(t.threads).where(c.user_id == user_id)
        if domain is not None:
            query = query.where(c.domain == domain.value)
        if len(states) < len(ThreadState):
            query = query.where(c.is_active.in_([state is ThreadState.ACTIVE for state in states]))
        if before is not None:
            query = query.where(_key() < _values(before))
        query = query.order_by(c.last_message_at.desc(), c.id.desc()).limit(limit)
        return [m.thread_of(row) for row in self._connection.execute(query).mappings()]

    def describe(self, thread_id: str, *, title: str | None, metadata: Mapping[str, str] | None) -> None:
        c = t.threads.c
        values: m.Values = {}
        if title is not None:
            values[c.title] = title
        if metadata is not None:
            values[c.metadata_] = dict(metadata)
        self._connection.execute(update(t.threads).where(c.id == thread_id).values(values))

    def provider_state(self, thread_id: str) -> ProviderState | None:
        c = t.threads.c
        row = self._connection.execute(select(c.thread_id, c.provider_state).where(c.id == thread_id)).one()
        return m.provider_state_of(row[0], row[1])

    def save_provider_state(self, thread_id: str, state: ProviderState) -> None:
        self._connection.execute(
            update(t.threads).where(t.threads.c.id == thread_id).values(m.provider_state_values(state))
        )

    def expire(self, cutoff: datetime, domain: Domain | None, after: ThreadKey | None, limit: int) -> ExpiredBatch:
        c = t.threads.c
        idle = _idle(cutoff, domain)
        if after is not None:
            idle = and_(idle, _key() > _values(after))
        found = self._connection.execute(
            select(c.last_message_at, c.id)
            .where(idle)
            .order_by(c.last_message_at, c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        ).all()
        if not found:
            return ExpiredBatch(0, None)
        # A turn may have begun between the look and the lock; the row as it is now decides.
        expired = self._connection.execute(
            update(t.threads)
            .where(c.id.in_([row[1] for row in found]), _idle(cutoff, domain))
            .values(is_active=False)
        )
        return ExpiredBatch(expired.rowcount, ThreadKey(*found[-1]))

    def count_expired(self, cutoff: datetime, domain: Domain | None) -> int:
        return self._connection.execute(
            select(func.count()).select_from(t.threads).where(_idle(cutoff, domain))
        ).scalar_one()

    def _of(self, user_id: str, thread_id: str) -> Select[Any]:
        c = t.threads.c
        return select(t.threads).where(c.id == thread_id, c.user_id == user_id)

    def _one(self, query: Select[Any]) -> Thread | None:
        row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else m.thread_of(row)


def _key() -> ColumnElement[Any]:
    return tuple_(t.threads.c.last_message_at, t.threads.c.id)


def _values(key: ThreadKey) -> ColumnElement[Any]:
    return tuple_(literal(key.last_message_at, t.UtcDateTime), literal(key.id))


def _idle(cutoff: datetime, domain: Domain | None) -> ColumnElement[bool]:
    """What expires: active, older than the cutoff, without a turn that has not ended."""
    c = t.threads.c
    unfinished = exists().where(t.turns.c.thread_id == c.id, t.turns.c.state.in_(_UNFINISHED))
    idle = and_(c.is_active, c.last_message_at < cutoff, ~unfinished)
    return idle if domain is None else and_(idle, c.domain == domain.value)


class Messages(_Repository, threads.Messages):
    """`messages`."""

    def append(self, thread_id: str, messages: Sequence[NewMessage]) -> Sequence[Message]:
        c = t.threads.c
        count = self._connection.execute(
            update(t.threads)
            .where(c.id == thread_id)
            .values(
                message_count=c.message_count + len(messages),
                last_message_at=messages[-1].created_at,
                is_active=True,
            )
            .returning(c.message_count)
        ).scalar_one()
        first = count - len(messages) + 1
        rows = [m.message_values(thread_id, first + offset, message) for offset, message in enumerate(messages)]
        for row in rows:
            self._connection.execute(insert(t.messages).values(row))
        return [
            Message(
                id=message.id,
                thread_id=thread_id,
                turn_id=message.turn_id,
                index=first + offset,
                role=message.role,
                content=message.content,
                partial=message.partial,
                created_at=message.created_at,
                tool=message.tool,
            )
            for offset, message in enumerate(messages)
        ]

    def list(
        self, thread_id: str, *, after: int | None, newest_first: bool, limit: int | None
    ) -> Sequence[Message]:
        c = t.messages.c
        query = select(t.messages).where(c.thread_id == thread_id)
        if after is not None:
            query = query.where(c.number < after if newest_first else c.number > after)
        query = query.order_by(c.number.desc() if newest_first else c.number).limit(limit)
        return [m.message_of(row) for row in self._connection.execute(query).mappings()]

    def reply_of(self, turn_id: str) -> Message | None:
        c = t.messages.c
        query = select(t.messages).where(c.turn_id == turn_id, c.role == Role.ASSISTANT.value)
        row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else m.message_of(row)


class Turns(_Repository, turns.Turns):
    """`turns`."""

    def add(self, turn: Turn, owner: str, request: RequestKey) -> None:
        c = t.turns.c
        self._connection.execute(
            insert(t.turns).values(
                {
                    **m.turn_values(turn),
                    c.owner: owner,
                    c.caller: request.caller,
                    c.request_id: request.request_id or None,
                    c.fingerprint: request.fingerprint if request.request_id else None,
                }
            )
        )

    def get(self, user_id: str, turn_id: str) -> Turn | None:
        c = t.turns.c
        return self._one(select(t.turns).where(c.id == turn_id, c.user_id == user_id))

    def find(self, turn_id: str) -> Turn | None:
        return self._one(select(t.turns).where(t.turns.c.id == turn_id))

    def lock(self, turn_id: str) -> Turn | None:
        return self._one(select(t.turns).where(t.turns.c.id == turn_id).with_for_update())

    def by_request(self, caller: str, user_id: str, request_id: str) -> tuple[Turn, str] | None:
        c = t.turns.c
        query = select(t.turns).where(c.caller == caller, c.user_id == user_id, c.request_id == request_id)
        row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else (m.turn_of(row), row[c.fingerprint])

    def in_the_way(self, thread_id: str) -> Turn | None:
        c = t.turns.c
        query = select(t.turns).where(c.thread_id == thread_id, c.state.in_(_UNFINISHED))
        return self._one(query.order_by(c.accepted_at).limit(1))

    def unfinished(self, limit: int) -> Sequence[str]:
        c = t.turns.c
        query = select(c.id).where(c.state.in_(_UNFINISHED)).order_by(c.accepted_at).limit(limit)
        return self._connection.execute(query).scalars().all()

    def save_ending(self, turn: Turn) -> None:
        self._connection.execute(update(t.turns).where(t.turns.c.id == turn.id).values(m.ending_values(turn)))

    def _one(self, query: Select[Any]) -> Turn | None:
        row = self._connection.execute(query).mappings().one_or_none()
        return None if row is None else m.turn_of(row)


class TurnLog(_Repository, turns.TurnLog):
    """`turn_log`, and the position in `turns` that fences it."""

    def begin(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._insert([_log_row(turn_id, 0, events)])

    def append(self, batch: Sequence[LogAppend]) -> frozenset[str]:
        c = t.turns.c
        rows = []
        for append in sorted(batch, key=lambda append: append.turn_id):
            row = _log_row(append.turn_id, append.position, append.events)
            fence = (
                update(t.turns)
                .where(
                    c.id == append.turn_id,
                    c.epoch == append.epoch,
                    c.last_position == append.position,
                    c.state == TurnState.RUNNING.value,
                )
                .values(last_position=row["position"])
            )
            if self._connection.execute(fence).rowcount == 1:
                rows.append(row)
        if rows:
            self._insert(rows)
        return frozenset(row["turn_id"] for row in rows)

    def read(self, turn_id: str, after: int = 0) -> Sequence[LogEntry]:
        c = t.turn_log.c
        rows = self._connection.execute(
            select(c.start, c.events).where(c.turn_id == turn_id, c.position > after).order_by(c.position)
        ).all()
        finished = self._finished(turn_id) if rows and rows[-1].events.endswith('["f"]]') else None
        entries: list[LogEntry] = []
        for row in rows:
            entries.extend(place(m.load_events(row.events, finished), row.start))
        return events_after(entries, after)

    def fold(self, turn_id: str, events: Sequence[TurnEvent]) -> None:
        self._connection.execute(delete(t.turn_log).where(t.turn_log.c.turn_id == turn_id))
        self._insert([_log_row(turn_id, 0, events)])

    def _insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._connection.execute(insert(t.turn_log), rows)

    def _finished(self, turn_id: str) -> TurnFinished | None:
        turn = Turns(self._connection).find(turn_id)
        if turn is None or not turn.state.is_terminal:
            return None
        return TurnFinished(turn, Messages(self._connection).reply_of(turn_id))


def _log_row(turn_id: str, start: int, events: Sequence[TurnEvent]) -> dict[str, Any]:
    position = start + sum(map(extent, events))
    return {"turn_id": turn_id, "position": position, "start": start, "events": m.dump_events(events)}


class Goals(_Repository, goals.Goals):
    """`goals`."""

    def add(self, goal: Goal, key: str) -> Goal:
        c = t.goals.c
        self._connection.execute(
            self._dialect.insert(t.goals)
            .values(
                {
                    c.id: goal.id,
                    c.user_id: goal.user_id,
                    c.domain: goal.domain.value,
                    c.text: goal.text,
                    c.commitment: goal.commitment,
                    c.due: goal.due,
                    c.key: key,
                    c.created_at: goal.created_at,
                }
            )
            .on_conflict_do_nothing()
        )
        row = self._connection.execute(select(t.goals).where(c.key == key)).mappings().one()
        return m.goal_of(row)

    def list(self, user_id: str, domain: Domain, limit: int) -> Sequence[Goal]:
        c = t.goals.c
        query = (
            select(t.goals)
            .where(c.user_id == user_id, c.domain == domain.value)
            .order_by(c.created_at.desc(), c.id.desc())
            .limit(limit)
        )
        return [m.goal_of(row) for row in self._connection.execute(query).mappings()]


class SqlTransaction(store.Transaction):
    """All repositories on one connection."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    @property
    def users(self) -> Users:
        return Users(self._connection)

    @property
    def agents(self) -> AgentVersions:
        return AgentVersions(self._connection)

    @property
    def threads(self) -> Threads:
        return Threads(self._connection)

    @property
    def messages(self) -> Messages:
        return Messages(self._connection)

    @property
    def turns(self) -> Turns:
        return Turns(self._connection)

    @property
    def log(self) -> TurnLog:
        return TurnLog(self._connection)

    @property
    def goals(self) -> Goals:
        return Goals(self._connection)

    def now(self) -> datetime:
        """PostgreSQL's clock; an embedded database has no other than this machine's."""
        if self._connection.dialect.name == "postgresql":
            return self._connection.execute(select(func.clock_timestamp(type_=t.UtcDateTime))).scalar_one()
        return self._clock.now()
