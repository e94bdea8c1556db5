"""Group commit in virtual time: what waits for the tick, and what becomes of a commit that fails."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from adapters.memory.store import MemoryStore, TurnLog
from core.model.agent import Domain
from core.model.errors import LeaseLost, StoreUnavailable
from core.model.events import LogEntry, TextDelta, ToolCalled, TurnEvent, TurnStarted
from core.model.turn import TurnState
from core.ports.store import Store, Transaction
from core.ports.turns import Appended, LogAppend
from core.use_cases.turn_feed import TurnFeed
from core.use_cases.turn_log_writer import OpenLog, TurnLogWriter
from doubles import CATALOG, ManualClock
from harness import until
from records import NOW, a_thread, a_turn, request
from virtual_time import in_virtual_time

T = TypeVar("T")

TICK = 0.005
COMMIT = 0.002
"""Virtual seconds that a commit takes."""


class SlowStore(Store):
    """A store whose commits take virtual time, are counted, and fail as a test says."""

    def __init__(self) -> None:
        self.inner = MemoryStore(ManualClock())
        self.commits = 0
        self.before: Callable[[Callable[[Transaction], Any]], None] = lambda _: None
        self.after: Callable[[], None] = lambda: None

    async def write(self, change: Callable[[Transaction], T]) -> T:
        self.commits += 1
        await asyncio.sleep(COMMIT)
        self.before(change)
        result = await self.inner.write(change)
        self.after()
        return result

    async def read(self, query: Callable[[Transaction], T]) -> T:
        return await self.inner.read(query)

    async def purge(self) -> bool:
        return await self.inner.purge()

    def exclusive(self, name: str) -> Any:
        return self.inner.exclusive(name)

    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        return self.inner.listen(heard)

    async def aclose(self) -> None:
        """Nothing is held."""


class Bench:
    """A writer at work on a store, and turns that write."""

    def __init__(self, store: SlowStore, writer: TurnLogWriter) -> None:
        self.store = store
        self.writer = writer

    async def turn(self) -> tuple[OpenLog, TurnFeed]:
        """A running turn with its open log."""
        thread = a_thread()
        turn = a_turn(thread)
        started = TurnStarted(turn.id, thread.id, thread.agent_id)

        def change(tx: Transaction) -> None:
            tx.agents.publish(CATALOG.by_domain[Domain.CAREER])
            tx.users.ensure("ada", NOW)
            tx.threads.add(thread)
            tx.turns.add(turn, request(), owner="me")
            tx.log.begin(turn.id, [started])

        await self.store.inner.write(change)
        feed = TurnFeed([LogEntry(1, started)])
        return self.writer.open(turn, feed), feed

    async def stored(self, log: OpenLog) -> str:
        """The committed text of a turn."""
        return text_of(await self.store.read(lambda tx: tx.log.read(log.turn_id)))


def text_of(entries: Any) -> str:
    return "".join(entry.event.text for entry in entries if isinstance(entry.event, TextDelta))


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    store = SlowStore()
    writer = TurnLogWriter(store)
    writing = asyncio.create_task(writer.run())
    try:
        yield Bench(store, writer)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


def now() -> float:
    return asyncio.get_running_loop().time()


async def elapsed(what: Awaitable[object]) -> float:
    begun = now()
    await what
    return now() - begun


@in_virtual_time
async def test_first_text_waits_for_its_own_commit_and_for_no_timer() -> None:
    async with bench() as it:
        other, _ = await it.turn()
        other.add(TextDelta("x"))
        await other.flush()  # a commit has just been made: the tick has begun
        log, feed = await it.turn()
        log.add(TextDelta("a"))
        assert await elapsed(feed.changed(1)) == pytest.approx(COMMIT)
        log.add(TextDelta("b"))
        assert await elapsed(feed.changed(2)) == pytest.approx(TICK + COMMIT)


@in_virtual_time
async def test_a_tool_call_before_the_first_text_takes_nothing_from_it() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        log.add(ToolCalled("c", "note", "{}"))
        await log.flush()
        log.add(TextDelta("a"))
        assert await elapsed(feed.changed(2)) == pytest.approx(COMMIT)


@in_virtual_time
async def test_an_idle_writer_commits_nothing_and_waits_for_nothing() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        await asyncio.sleep(60)
        assert it.store.commits == 0
        log.add(TextDelta("a"))
        await log.flush()
        await asyncio.sleep(60)
        assert it.store.commits == 1
        log.add(TextDelta("b"))  # the last commit is long ago: no timer either
        assert await elapsed(feed.changed(2)) == pytest.approx(COMMIT)


@pytest.mark.parametrize("turns", [1, 10, 400])
@pytest.mark.parametrize("per_second", [20, 2_000])
@in_virtual_time
async def test_commits_grow_with_time_and_not_with_tokens(turns: int, per_second: int) -> None:
    async with bench() as it:
        logs = [await it.turn() for _ in range(turns)]
        for log, _ in logs:
            log.add(TextDelta("-"))
        for log, _ in logs:
            await log.flush()
        first, begun = it.store.commits, now()
        seconds = 1
        for _ in range(per_second * seconds):
            for log, _ in logs[:20]:
                log.add(TextDelta("x"))
            await asyncio.sleep(1 / per_second)
        took = now() - begun
        tick = max(TICK, min(0.18, 0.0005 * turns) / 6)
        assert it.store.commits - first <= took / tick + 2
        assert it.store.commits - first >= min(per_second, took / (tick + COMMIT)) * 0.8
        for log, feed in logs[:20]:
            await log.flush()
            assert await it.stored(log) == text_of(feed.after(0)) == "-" + "x" * per_second * seconds


@pytest.mark.parametrize(("turns", "pace"), [(1, 0.0), (7, 0.0), (50, 0.025), (200, 0.1), (5_000, 0.18)])
@in_virtual_time
async def test_more_text_is_fetched_at_a_pace_that_grows_with_the_live_turns(turns: int, pace: float) -> None:
    async with bench() as it:
        (log, _), *others = [await it.turn() for _ in range(turns)]
        log.add(TextDelta("a"))
        assert await elapsed(log.pause()) == 0.0
        for between in (0.0, 0.003, 0.2):
            await asyncio.sleep(between)  # the agent takes its time
            log.add(TextDelta("b"))
            waited = await elapsed(log.pause())
            least = max(0.0, pace - between)
            # Up to a thirtieth more, so that those go together whose time has nearly come.
            assert least - 1e-9 <= waited <= least + (pace / 30 if least else 0.0) + 1e-9
        for other, _ in others:
            it.writer.close(other)
        log.add(TextDelta("c"))
        assert await elapsed(log.pause()) == 0.0


@in_virtual_time
async def test_turns_fetch_more_together() -> None:
    async with bench() as it:
        logs = [(await it.turn())[0] for _ in range(400)]
        for log in logs:
            await log.pause()
            await asyncio.sleep(0.0001)  # they come 40 ms apart in all

        async def fetch(log: OpenLog) -> float:
            await log.pause()
            return now()

        times = await asyncio.gather(*map(fetch, logs))
        assert len(set(times)) <= 12


@in_virtual_time
async def test_first_texts_that_come_together_share_commits() -> None:
    async with bench() as it:
        logs = [await it.turn() for _ in range(500)]
        for log, _ in logs:
            log.add(TextDelta("a"))
        for log, feed in logs:
            await log.flush()
            assert text_of(feed.after(0)) == "a"
        assert it.store.commits <= 2


@in_virtual_time
async def test_nothing_is_shown_before_it_is_committed() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        shown: list[str] = []
        it.store.before = lambda _: shown.append(text_of(feed.after(0)))
        for letter in "abc":
            log.add(TextDelta(letter))
            await log.flush()
        assert shown == ["", "a", "ab"]


@in_virtual_time
async def test_a_fault_in_a_group_hits_its_turn_alone() -> None:
    class BadDataError(Exception):
        pass

    async with bench() as it:
        logs = [await it.turn() for _ in range(5)]
        culprit = logs[2][0]

        def refuse(change: Any) -> None:
            if any(append.turn_id == culprit.turn_id for append in change.args[0]):
                raise BadDataError

        it.store.before = refuse
        for log, _ in logs:
            log.add(TextDelta("a"))
        for log, feed in logs:
            if log is culprit:
                with pytest.raises(BadDataError):
                    await log.flush()
                with pytest.raises(BadDataError):
                    log.add(TextDelta("more"))
                with pytest.raises(BadDataError):
                    await log.settle()
                assert text_of(feed.after(0)) == await it.stored(log) == ""
            else:
                await log.flush()
                assert text_of(feed.after(0)) == await it.stored(log) == "a"
        it.store.before = lambda _: None
        logs[0][0].add(TextDelta("b"))
        await logs[0][0].flush()
        assert await it.stored(logs[0][0]) == "ab"


@in_virtual_time
async def test_an_outage_is_waited_out_and_shows_nothing() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        back = now() + 30

        def down(_: object) -> None:
            if now() < back:
                raise StoreUnavailable

        it.store.before = down
        log.add(TextDelta("a"))
        flush = asyncio.create_task(log.flush())
        while now() < back - 2:
            await asyncio.sleep(1)
            log.add(TextDelta("b"))
            assert text_of(feed.after(0)) == ""
            assert not flush.done()
        assert it.store.commits < 60  # it does not hammer
        took = await elapsed(flush)
        assert took < 4
        text = await it.stored(log)
        assert text == text_of(feed.after(0)) == "a" + "b" * (len(text) - 1)
        assert len(text) >= 28


@pytest.mark.parametrize("how", ["committed", "lost"])
@in_virtual_time
async def test_a_commit_of_unknown_outcome_is_neither_lost_nor_doubled(how: str) -> None:
    async with bench() as it:
        logs = [await it.turn() for _ in range(3)]
        failures = iter([True, True, False])

        def fail() -> None:
            if next(failures, False):
                raise StoreUnavailable

        if how == "committed":
            it.store.after = fail  # the commit happened and its answer got lost
        else:
            it.store.before = lambda _: fail()
        for log, _ in logs:
            log.add(TextDelta("abc"))
            log.add(ToolCalled("c", "note", "{}"))
        for log, feed in logs:
            await log.flush()
            assert await it.stored(log) == text_of(feed.after(0)) == "abc"
            assert log.position == 5
        logs[0][0].add(TextDelta("d"))
        await logs[0][0].flush()
        assert await it.stored(logs[0][0]) == "abcd"


@in_virtual_time
async def test_a_turn_that_another_writer_holds_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[str] = set()
    append = TurnLog.append

    def skip_held(log: TurnLog, batch: Sequence[LogAppend]) -> Appended:
        free = [each for each in batch if each.turn_id not in held]
        busy = frozenset(each.turn_id for each in batch if each.turn_id in held)
        return Appended(append(log, free).accepted, busy)

    monkeypatch.setattr(TurnLog, "append", skip_held)
    async with bench() as it:
        (log, feed), (other, others_feed) = await it.turn(), await it.turn()
        held.add(log.turn_id)
        for each in (log, other):
            each.add(TextDelta("a"))
        flush = asyncio.create_task(log.flush())
        for number in range(20):
            other.add(TextDelta("b"))
            assert await elapsed(other.flush()) < 0.01 + 2 * COMMIT, number
        log.add(TextDelta("b"))
        assert (text_of(feed.after(0)), text_of(others_feed.after(0))) == ("", "a" + 20 * "b")
        assert not flush.done()
        held.clear()
        assert await elapsed(flush) < 0.1
        assert await it.stored(log) == text_of(feed.after(0)) == "ab"
        assert it.store.commits < 60  # it does not hammer


@pytest.mark.parametrize("why", ["ended", "other epoch", "other position"])
@in_virtual_time
async def test_a_turn_that_belongs_to_somebody_else_is_lost_and_others_go_on(why: str) -> None:
    async with bench() as it:
        (log, feed), (other, _) = await it.turn(), await it.turn()

        def take(tx: Transaction) -> None:
            turn = tx.turns.find(log.turn_id)
            assert turn is not None
            changes: dict[str, dict[str, Any]] = {
                "ended": {"state": TurnState.CANCELLED},
                "other epoch": {"epoch": 2},
                "other position": {"last_position": 9},
            }
            tx.turns.save_ending(replace(turn, **changes[why]))

        await it.store.inner.write(take)
        for each in (log, other):
            each.add(TextDelta("a"))
        with pytest.raises(LeaseLost):
            await log.flush()
        await other.flush()
        assert text_of(feed.after(0)) == ""
        with pytest.raises(LeaseLost):
            log.add(TextDelta("b"))
        with pytest.raises(LeaseLost):
            await log.settle()


@in_virtual_time
async def test_settling_waits_for_what_is_on_its_way_and_gives_back_the_rest() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        log.add(TextDelta("a"))
        await until(lambda: log.in_flight)
        events: list[TurnEvent] = [TextDelta("b"), TextDelta("c"), TextDelta("d", refusal=True)]
        for event in events:
            log.add(event)
        assert await log.settle() == (TextDelta("bc"), TextDelta("d", refusal=True))
        assert await it.stored(log) == text_of(feed.after(0)) == "a"
        assert await log.settle() == ()
        await asyncio.sleep(1)
        assert it.store.commits == 1


@in_virtual_time
async def test_what_comes_while_a_commit_is_on_its_way_needs_no_more_to_be_committed() -> None:
    async with bench() as it:
        log, feed = await it.turn()
        log.add(TextDelta("a"))
        await until(lambda: log.in_flight)
        log.add(TextDelta("b"))
        assert await elapsed(feed.changed(2)) <= TICK + 2 * COMMIT
        assert await it.stored(log) == "ab"


@in_virtual_time
async def test_a_slow_store_holds_the_turn_back() -> None:
    async with bench() as it:
        log, _ = await it.turn()
        log.add(TextDelta("a"))
        await log.flush()
        for _ in range(16):
            log.add(TextDelta("x" * 4_096))
            assert await elapsed(log.drain()) == 0
        log.add(TextDelta("y"))
        assert await elapsed(log.drain()) > 0
        assert len(await it.stored(log)) == 1 + 16 * 4_096 + 1
