"""The tables.

Every text of a user is in `messages.content`, `messages.tool`, `turn_log.events`, `goals`, or, until its turn is
claimed or has ended, in `turns.waiting`; every image and file of a user is in `attachments`, and its
kind, size and name are where the text is.
"""

from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Named,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypedColumns,
    UniqueConstraint,
    literal_column,
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
    held_since: Named[datetime | None] = Column(UtcDateTime)


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
    assistant_id: Named[str] = Column(String(64))
    domain: Named[str] = Column(String(32))
    is_active: Named[bool] = Column(Boolean)
    metadata_: Named[dict[str, str]] = Column("metadata", JSON, nullable=False)
    last_message_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    title: Named[str] = Column(String(200))
    message_count: Named[int]
    provider_state: Named[dict[str, Any] | None] = Column(JSON(none_as_null=True))


class TombstoneColumns(TypedColumns):
    """Deleted threads, by their ids alone. `erasure_id` is empty where the thread did not go with its user."""

    thread_id = Column(String(36), primary_key=True)
    erasure_id: Named[str] = Column(String(36), nullable=False, server_default=text("''"))
    deleted_at: Named[datetime] = Column(UtcDateTime, nullable=False)


class ErasureColumns(TypedColumns):
    """Erasures of users. `user_id` is there until nothing of the user is left; `erased` are the counts."""

    id = Column(String(36), primary_key=True)
    user_id: Named[str | None] = Column(String(128))
    user_hash: Named[str] = Column(String(64))
    requested_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    touched_at: Named[datetime] = Column(UtcDateTime, nullable=False)
    finished_at: Named[datetime | None] = Column(UtcDateTime)
    erased: Named[dict[str, int]] = Column(JSON, nullable=False)


class CopyColumns(TypedColumns):
    """What providers keep, by their own ids. `due` is when it is to be erased there, NULL while its thread lives;
    `tries` and `reason` tell of attempts that failed."""

    provider: Named[str] = Column(String(64))
    ref: Named[str] = Column(String(1_024))
    thread_id: Named[str] = Column(String(36))
    due: Named[datetime | None] = Column(UtcDateTime)
    tries: Named[int]
    reason: Named[str] = Column(String(128))


class LeaseColumns(TypedColumns):
    """Processes that work on turns, each until a time of the database's own clock."""

    owner = Column(String(36), primary_key=True)
    lease_until: Named[datetime] = Column(UtcDateTime, nullable=False)


class TurnColumns(TypedColumns):
    """Turns. A write to a running turn is conditional on `epoch`. `owner` is empty where nobody has claimed it.
    `last_position` is the log's where the turn has ended; until then the log itself tells.

    `place` orders the turns that wait in a thread. `waiting` is the id and the content of a user message that
    is not in the transcript yet. `continuation` names a round that the provider writes by itself: its handle, the
    attempt and the round's number.
    """

    id = Column(String(36), primary_key=True)
    thread_id: Named[str] = Column(String(36), ForeignKey("assistant_threads.id"))
    user_id: Named[str] = Column(String(128))
    agent_id: Named[str] = Column(String(64))
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
    claimed_at: Named[datetime | None] = Column(UtcDateTime)
    finished_at: Named[datetime | None] = Column(UtcDateTime)
    place: Named[int] = Column(Integer, nullable=False, server_default=text("0"))
    cache_write_tokens: Named[int] = Column(BigInteger, nullable=False, server_default=text("0"))
    waiting: Named[list[Any] | None] = Column(JSON(none_as_null=True))
    continuation: Named[list[Any] | None] = Column(JSON(none_as_null=True))


class MessageColumns(TypedColumns):
    """The transcript. `number` is a line's place in its thread, dense from 1."""

    id = Column(String(36), primary_key=True)
    thread_id: Named[str] = Column(String(36))
    turn_id: Named[str] = Column(String(36), ForeignKey("turns.id"))
    number: Named[int]
    role: Named[str] = Column(String(16))
    content: Named[list[list[Any]]] = Column(JSON, nullable=False)
    partial: Named[bool] = Column(Boolean)
    tool: Named[dict[str, Any] | None] = Column(JSON(none_as_null=True))
    created_at: Named[datetime] = Column(UtcDateTime, nullable=False)


class AttachmentColumns(TypedColumns):
    """The bytes of images and files. `number` is their part's place in the content of the turn's user message."""

    turn_id: Named[str] = Column(String(36), ForeignKey("turns.id"))
    number: Named[int]
    data: Named[bytes] = Column(LargeBinary)


class TurnLogColumns(TypedColumns):
    """Events of turns: a row for each commit while a turn runs, one row once it has ended.

    `position` is the log's position after the row, `start` before it.
    """

    turn_id: Named[str] = Column(String(36))
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


class UsageColumns(TypedColumns):
    """The ledger: what turns have cost, added up by user, UTC day of their end, agent version and model.

    `user_id` refers to nobody: an erased user's lines are added to those of the empty one. `unmetered_turns` are
    those whose whole cost the provider never said. A line is the sum of its rows: `slot` keeps processes that end
    turns of one user at the same time from waiting for each other.
    """

    user_id: Named[str] = Column(String(128))
    day: Named[date] = Column(Date)
    agent_id: Named[str] = Column(String(64))
    model: Named[str] = Column(String(255))
    slot: Named[int]
    turns: Named[int] = Column(BigInteger)
    unmetered_turns: Named[int] = Column(BigInteger)
    input_tokens: Named[int] = Column(BigInteger)
    cached_input_tokens: Named[int] = Column(BigInteger)
    cache_write_tokens: Named[int] = Column(BigInteger)
    output_tokens: Named[int] = Column(BigInteger)
    reasoning_tokens: Named[int] = Column(BigInteger)


_AT_WORK = ("running", "waiting_for_client")


def unfinished(state: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a turn has not ended."""
    return state.in_([literal_column(f"'{value}'", String) for value in ("accepted", *_AT_WORK)])


def at_work(state: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a turn is at work, written so that both databases know the partial indexes' condition in it."""
    return state.in_([literal_column(f"'{value}'", String) for value in _AT_WORK])


def accepted(state: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether a turn waits in its thread; written so for the same reason."""
    return state == literal_column("'accepted'", String)


def _on_sqlite(name: str, refers_to: str) -> ForeignKeyConstraint:
    """A foreign key of SQLite alone: PostgreSQL reads and locks the other row for each row that is written.

    What PostgreSQL has none for holds by the locks: versions of agents are never deleted, and who adds to a turn's
    log or to a transcript has its turn locked, as who deletes it has.
    """
    return ForeignKeyConstraint([name], [refers_to], info={"dialect": "sqlite"})


users = Table("users", metadata, UserColumns)
agents = Table("agents", metadata, AgentColumns, UniqueConstraint("slug", "version"))
threads = Table("assistant_threads", metadata, ThreadColumns, _on_sqlite("assistant_id", "agents.id"))
turns = Table("turns", metadata, TurnColumns, _on_sqlite("agent_id", "agents.id"))
messages = Table(
    "messages",
    metadata,
    MessageColumns,
    UniqueConstraint("thread_id", "number"),
    _on_sqlite("thread_id", "assistant_threads.id"),
)
attachments = Table("attachments", metadata, AttachmentColumns, PrimaryKeyConstraint("turn_id", "number"))
# By rowid, each row of a long log would be on a page with those of all turns that run beside it: to read and to
# delete it when the turn has ended would touch as many pages as it has rows.
turn_log = Table(
    "turn_log",
    metadata,
    TurnLogColumns,
    PrimaryKeyConstraint("turn_id", "position"),
    _on_sqlite("turn_id", "turns.id"),
    sqlite_with_rowid=False,
)
goals = Table("goals", metadata, GoalColumns, UniqueConstraint("key"))
usage = Table("usage", metadata, UsageColumns, PrimaryKeyConstraint("user_id", "day", "agent_id", "model", "slot"))
leases = Table("leases", metadata, LeaseColumns)
tombstones = Table("tombstones", metadata, TombstoneColumns)
erasures = Table("erasures", metadata, ErasureColumns)
copies = Table("copies", metadata, CopyColumns, PrimaryKeyConstraint("provider", "ref"))

_IS_AT_WORK = text("state IN ('running', 'waiting_for_client')")
_IS_ACCEPTED = text("state = 'accepted'")
_HAS_NOT_ENDED = text("state IN ('accepted', 'running', 'waiting_for_client')")
_HAS_REQUEST_ID = text("request_id IS NOT NULL")
_IS_QUESTION_OR_REPLY = text("role IN ('user', 'assistant')")

Index("ix_assistant_threads_user", threads.c.user_id, threads.c.last_message_at, threads.c.id)
# SQLite's is `ix_assistant_threads_active_days` (see `repositories.expiry`), an expression's: Alembic sees none.
Index(
    "ix_assistant_threads_active",
    threads.c.last_message_at,
    threads.c.id,
    postgresql_where=text("is_active"),
    info={"dialect": "postgresql"},
)
Index("ix_turns_thread", turns.c.thread_id, turns.c.state, turns.c.place)
Index(
    "uq_turns_request",
    turns.c.caller,
    turns.c.user_id,
    turns.c.request_id,
    unique=True,
    sqlite_where=_HAS_REQUEST_ID,
    postgresql_where=_HAS_REQUEST_ID,
)
# Those of turns that have not ended are small however many have, and an ended turn costs them nothing.
Index(
    "uq_turns_one_at_work",
    turns.c.thread_id,
    unique=True,
    sqlite_where=_IS_AT_WORK,
    postgresql_where=_IS_AT_WORK,
)
Index("ix_turns_held", turns.c.owner, sqlite_where=_IS_AT_WORK, postgresql_where=_IS_AT_WORK)
Index("ix_turns_waiting", turns.c.accepted_at, sqlite_where=_IS_ACCEPTED, postgresql_where=_IS_ACCEPTED)
Index("ix_turns_of_user", turns.c.user_id, sqlite_where=_HAS_NOT_ENDED, postgresql_where=_HAS_NOT_ENDED)
Index(
    "uq_messages_question_and_reply",
    messages.c.turn_id,
    messages.c.role,
    unique=True,
    sqlite_where=_IS_QUESTION_OR_REPLY,
    postgresql_where=_IS_QUESTION_OR_REPLY,
)
Index("ix_messages_turn", messages.c.turn_id)
Index("ix_goals_user", goals.c.user_id, goals.c.domain, goals.c.created_at)
Index("ix_tombstones_erasure", tombstones.c.erasure_id)
Index(
    "uq_erasures_open",
    erasures.c.user_id,
    unique=True,
    sqlite_where=text("user_id IS NOT NULL"),
    postgresql_where=text("user_id IS NOT NULL"),
)
Index("ix_copies_thread", copies.c.thread_id)
Index(
    "ix_copies_due",
    copies.c.due,
    sqlite_where=text("due IS NOT NULL"),
    postgresql_where=text("due IS NOT NULL"),
)
