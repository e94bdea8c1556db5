"""The tables. Every text of a user is in `messages.content`, `messages.tool`, `turn_log.events` or `goals`."""

from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    Named,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypedColumns,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import JSON, TypeDecorator

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone: TIMESTAMPTZ on PostgreSQL; on SQLite, which knows no zones, UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turns into UTC what goes in."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Sets the zone on what comes out."""
        return (
            None if value is None else value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        )


class UserColumns(TypedColumns):
    """Users, by the calling product's own reference."""

    id = Column(String(128), primary_key=True)
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)


class AgentColumns(TypedColumns):
    """Immutable agent versions."""

    id = Column(String(64), primary_key=True)
    slug: Named[str] = Column(String(64))
    version: Named[int]
    domain: Named[str] = Column(String(32))
    definition: Named[dict[str, Any]] = Column(JSON, nullable=False)
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)


class ThreadColumns(TypedColumns):
    """Conversations. `thread_id` is the provider's conversation id, `assistant_id` the pinned agent version."""

    id = Column(String(36), primary_key=True)
    user_id: Named[str] = Column(String(128), ForeignKey("users.id"))
    thread_id: Named[str | None] = Column(String(255))
    assistant_id: Named[str] = Column(String(64), ForeignKey("agents.id"))
    domain: Named[str] = Column(String(32))
    is_active: Named[bool] = Column(Boolean)
    metadata_: Named[dict[str, str]] = Column("metadata", JSON, nullable=False)
    last_message_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    title: Named[str] = Column(String(200))
    message_count: Named[int]
    provider_state: Named[dict[str, Any] | None] = Column(JSON(none_as_null=True))


class TurnColumns(TypedColumns):
    """Turns. A write to a running turn is conditional on `epoch`."""

    id = Column(String(36), primary_key=True)
    thread_id: Named[str] = Column(String(36), ForeignKey("assistant_threads.id"))
    user_id: Named[str] = Column(String(128))
    agent_id: Named[str] = Column(String(64), ForeignKey("agents.id"))
    caller: Named[str] = Column(String(255))
    request_id: Named[str | None] = Column(String(128))
    fingerprint: Named[str | None] = Column(String(64))
    state: Named[str] = Column(String(32))
    attempt: Named[int]
    epoch: Named[int]
    owner: Named[str] = Column(String(36))
    last_position: Named[int] = Column(BigInteger)
    input_tokens: Named[int] = Column(BigInteger)
    cached_input_tokens: Named[int] = Column(BigInteger)
    output_tokens: Named[int] = Column(BigInteger)
    reasoning_tokens: Named[int] = Column(BigInteger)
    reason: Named[str | None] = Column(String(64))
    model: Named[str] = Column(String(255))
    provider: Named[str] = Column(String(64))
    accepted_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    finished_at: Named[datetime | None] = Column(UtcDateTime)


class MessageColumns(TypedColumns):
    """The transcript. `number` is a line's place in its thread, dense from 1."""

    id = Column(String(36), primary_key=True)
    thread_id: Named[str] = Column(String(36), ForeignKey("assistant_threads.id"))
    turn_id: Named[str] = Column(String(36), ForeignKey("turns.id"))
    number: Named[int]
    role: Named[str] = Column(String(16))
    content: Named[list[list[str]]] = Column(JSON, nullable=False)
    partial: Named[bool] = Column(Boolean)
    tool: Named[dict[str, Any] | None] = Column(JSON(none_as_null=True))
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)


class TurnLogColumns(TypedColumns):
    """Events of turns: a row for each commit while a turn runs, one row once it has ended.

    `position` is the log's position after the row, `start` before it.
    """

    turn_id: Named[str] = Column(String(36), ForeignKey("turns.id"))
    position: Named[int] = Column(BigInteger)
    start: Named[int] = Column(BigInteger)
    events: Named[str] = Column(Text)


class GoalColumns(TypedColumns):
    """Goals. `key` makes a repeated tool call take effect once."""

    id = Column(String(36), primary_key=True)
    user_id: Named[str] = Column(String(128), ForeignKey("users.id"))
    domain: Named[str] = Column(String(32))
    text: Named[str] = Column(Text)
    commitment: Named[str] = Column(Text)
    due: Named[date | None] = Column(Date)
    key: Named[str] = Column(String(255))
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)


_UNFINISHED = text("state IN ('accepted', 'running', 'waiting_for_client')")
_AT_WORK = text("state IN ('running', 'waiting_for_client')")

users = Table("users", metadata, UserColumns)
agents = Table("agents", metadata, AgentColumns, UniqueConstraint("slug", "version"))
threads = Table("assistant_threads", metadata, ThreadColumns)
turns = Table("turns", metadata, TurnColumns)
messages = Table("messages", metadata, MessageColumns, UniqueConstraint("thread_id", "number"))
turn_log = Table("turn_log", metadata, TurnLogColumns, PrimaryKeyConstraint("turn_id", "position"))
goals = Table("goals", metadata, GoalColumns, UniqueConstraint("key"))

Index("ix_assistant_threads_user", threads.c.user_id, threads.c.last_message_at, threads.c.id)
Index(
    "ix_assistant_threads_active",
    threads.c.last_message_at,
    threads.c.id,
    sqlite_where=text("is_active = 1"),
    postgresql_where=text("is_active"),
)
Index("ix_turns_thread", turns.c.thread_id)
Index(
    "uq_turns_request",
    turns.c.caller,
    turns.c.user_id,
    turns.c.request_id,
    unique=True,
    sqlite_where=text("request_id IS NOT NULL"),
    postgresql_where=text("request_id IS NOT NULL"),
)
Index(
    "uq_turns_one_at_work",
    turns.c.thread_id,
    unique=True,
    sqlite_where=_AT_WORK,
    postgresql_where=_AT_WORK,
)
Index("ix_turns_unfinished", turns.c.accepted_at, sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED)
for _role in ("user", "assistant"):
    _is_role = text(f"role = '{_role}'")
    Index(
        f"uq_messages_one_{_role}",
        messages.c.turn_id,
        unique=True,
        sqlite_where=_is_role,
        postgresql_where=_is_role,
    )
Index("ix_goals_user", goals.c.user_id, goals.c.domain, goals.c.created_at)
