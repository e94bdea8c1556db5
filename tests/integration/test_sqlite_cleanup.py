"""What a cleanup costs SQLite: which index it reads, how much of the file a batch writes."""

import sqlite3
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.sql.session import Session
from adapters.sql.statement import Parameters, Statement
from adapters.sql.store import SqlStore
from core.ports.store import Transaction
from core.ports.threads import ThreadKey
from doubles import ManualClock
from records import NOW

_PAGE, _FRAME = 4096, 4096 + 24


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How SQLite reads what is asked of it."""
    made: list[str] = []
    rows = Session.rows

    def explained(self: Session, statement: Statement, parameters: Parameters) -> list[Any]:
        form = statement.form(self.dialect, parameters)
        found = self._driver.rows(f"EXPLAIN QUERY PLAN {form.sql}", form.bind(parameters))
        made.append("\n".join(str(line) for line in found))
        return rows(self, statement, parameters)

    monkeypatch.setattr(Session, "rows", explained)
    return made


@pytest.mark.parametrize(
    "look",
    [
        lambda tx: tx.threads.expire(NOW, None, None, 9),
        lambda tx: tx.threads.expire(NOW, None, ThreadKey(NOW, "x"), 9),
        lambda tx: tx.threads.count_expired(NOW, None, 9),
    ],
    ids=["first", "next", "count"],
)
async def test_a_few_are_found_by_the_index_in_its_order(
    sqlite_url: str, clock: ManualClock, plans: list[str], look: Callable[[Transaction], object]
) -> None:
    async with aclosing(SqlStore(sqlite_url, clock)) as store:
        await store.write(look)
    (plan,) = plans
    assert "ix_assistant_threads_active_days (<expr>" in plan, plan
    assert "TEMP B-TREE" not in plan, plan


async def test_a_batch_writes_its_threads_and_few_pages_of_the_index(sqlite_url: str, clock: ManualClock) -> None:
    threads, days, step = 40_000, 60, 16
    now = datetime(2026, 6, 1, tzinfo=UTC)
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("INSERT INTO users (id, created_at) VALUES ('ada', '2026-01-01 00:00:00.000000')")
        connection.execute(
            "INSERT INTO agents (id, slug, version, domain, definition, created_at)"
            " VALUES ('career-v1', 'career', 1, 'career', '{}', '2026-01-01 00:00:00.000000')"
        )
        ages = (timedelta(seconds=number * 1_000_003 % (days * 86_400)) for number in range(threads))  # strewn
        times = (f"{now - age:%Y-%m-%d %H:%M:%S.000000}" for age in ages)
        connection.executemany(
            "INSERT INTO assistant_threads (id, user_id, assistant_id, domain, is_active, metadata,"
            " last_message_at, created_at, title, message_count)"
            " VALUES (?, 'ada', 'career-v1', 'career', 1, '{}', ?, ?, '', 0)",
            ((f"{number:036}", time, time) for number, time in enumerate(times)),
        )
        ((size,),) = connection.execute("SELECT sum(pgsize) FROM dbstat WHERE name = 'assistant_threads'")
    connection.close()
    log = file.with_name(f"{file.name}-wal")
    async with aclosing(SqlStore(sqlite_url, clock)) as store:
        await store.write(lambda tx: tx.session._driver.run("PRAGMA wal_autocheckpoint=0"))  # type: ignore[attr-defined]
        before = log.stat().st_size
        batches = range(0, await store.read(lambda tx: tx.threads.places()), step)

        def expire(first: int, tx: Transaction) -> int:
            return tx.threads.expire_places(now - timedelta(days=days / 2), None, first, step)

        expired = sum([await store.write(partial(expire, first)) for first in batches])
        written = (log.stat().st_size - before) / _FRAME
    assert abs(expired - threads / 2) < threads / 100
    # Each page of the table once; of the index, where a day's threads lie in their order, one or two for each day.
    assert written < size / _PAGE + len(batches) * 2 * (days / 2 + 1)
    assert written < expired / 3
