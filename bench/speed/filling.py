"""Databases with a history: many threads that talked once, half of them longer ago than a month."""

from __future__ import annotations

from sqlalchemy import Connection, text

from adapters.sql.engines import migration_engine

TTL_DAYS = 30
"""Half of the threads are older."""
_SPAN_SECONDS = 2 * TTL_DAYS * 86_400
_STEP = 1_000_003
"""A prime: threads whose numbers are neighbours have ages that are not."""
_CHUNK = 100_000

_FORMS = {
    "sqlite": {
        "id": "printf('%08x-0000-7000-8000-%012x', n, n)",
        "time": "strftime('%Y-%m-%d %H:%M:%S.000000', 'now', '-' || (n * :step % :span) || ' seconds')",
    },
    "postgresql": {
        "id": "lpad(to_hex(n), 8, '0') || '-0000-7000-8000-' || lpad(to_hex(n), 12, '0')",
        "time": "now() - (n * :step % :span) * interval '1 second'",
    },
}
_SERIES = """
WITH RECURSIVE series(n) AS
(SELECT CAST(:first AS bigint) UNION ALL SELECT n + 1 FROM series WHERE n + 1 < :end)
"""
_AGENT = """
INSERT INTO agents (id, slug, version, domain, definition, created_at)
VALUES ('filling', 'filling', 1, 'career', '{}', '2026-01-01 00:00:00')
"""
_USERS = """
INSERT INTO users (id, created_at) SELECT 'user ' || n, $time FROM series
"""
_THREADS = """
INSERT INTO assistant_threads (id, user_id, assistant_id, domain, is_active, metadata, last_message_at, created_at,
    title, message_count)
SELECT $id, 'user ' || n, 'filling', 'career', true, '{}', $time, $time, '', 2 FROM series
"""
_TURNS = """
INSERT INTO turns (id, thread_id, user_id, agent_id, caller, state, attempt, epoch, owner, last_position,
    input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, model, provider, accepted_at, finished_at)
SELECT $id, $id, 'user ' || n, 'filling', 'local', 'completed', 1, 1, '', 100, 10, 0, 10, 0, 'm', 'p', $time, $time
FROM series
"""
_MESSAGES = """
INSERT INTO messages (id, thread_id, turn_id, number, role, content, partial, created_at)
SELECT substr('$role', 1, 1) || substr($id, 2), $id, $id, $number, '$role',
    '[["text","What would you like to change about that, and what would be the first step?"]]', false, $time
FROM series
"""
_ROLES = (("user", "1"), ("assistant", "2"))


def fill(url: str, threads: int) -> None:
    """Adds so many threads to a database with the schema, each with a turn that has ended and its two messages."""
    engine = migration_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql(_AGENT)
    for first in range(1, threads + 1, _CHUNK):
        with engine.begin() as connection:
            _add(connection, first, min(first + _CHUNK, threads + 1))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")  # refused in a transaction
    else:
        with engine.begin() as connection:
            connection.exec_driver_sql("ANALYZE")
    engine.dispose()


def _add(connection: Connection, first: int, end: int) -> None:
    form = _FORMS[connection.dialect.name]
    roles = [_MESSAGES.replace("$role", role).replace("$number", number) for role, number in _ROLES]
    for statement in (_USERS, _THREADS, _TURNS, *roles):
        written = text(_SERIES + statement.replace("$id", form["id"]).replace("$time", form["time"]))
        connection.execute(written, {"first": first, "end": end, "step": _STEP, "span": _SPAN_SECONDS})
