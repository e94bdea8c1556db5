"""The bound on a provider's silence."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable

import pytest
import uvloop

from adapters.openai.stream import Silence, Watchdog
from virtual_time import in_virtual_time

SILENCE = Silence(first_event=30.0, idle=45.0, last_event=10.0)


def now() -> float:
    return asyncio.get_running_loop().time()


async def said_after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "said"


async def silent_after(watchdog: Watchdog) -> float:
    """For how long it waits for what never comes."""
    began = now()
    with pytest.raises(TimeoutError):
        await watchdog.wait(asyncio.Event().wait())
    return now() - began


@in_virtual_time
async def test_each_silence_has_its_bound() -> None:
    with Watchdog(SILENCE) as watchdog:
        assert await silent_after(watchdog) == pytest.approx(30)
        watchdog.heard()
        assert await silent_after(watchdog) == pytest.approx(45)
        watchdog.heard(all_said=True)
        assert await silent_after(watchdog) == pytest.approx(10)


@in_virtual_time
async def test_a_shorter_bound_holds_at_once() -> None:
    with Watchdog(SILENCE) as watchdog:
        assert await watchdog.wait(said_after(1)) == "said"
        watchdog.heard(all_said=True)
        assert await silent_after(watchdog) == pytest.approx(10)


@in_virtual_time
async def test_only_an_event_ends_a_silence() -> None:
    with Watchdog(SILENCE) as watchdog:
        for _ in range(2):  # comments, say
            assert await watchdog.wait(said_after(12)) == "said"
        assert await silent_after(watchdog) == pytest.approx(6)
        assert await silent_after(watchdog) == pytest.approx(0)


@in_virtual_time
async def test_a_reply_may_take_long_as_a_whole() -> None:
    with Watchdog(SILENCE) as watchdog:
        for _ in range(20):
            assert await watchdog.wait(said_after(29)) == "said"
            watchdog.heard()
        assert await silent_after(watchdog) == pytest.approx(45)


@in_virtual_time
async def test_the_time_between_two_waits_is_the_readers() -> None:
    with Watchdog(SILENCE) as watchdog:
        for _ in range(3):
            assert await watchdog.wait(said_after(1)) == "said"
            await asyncio.sleep(100)
        assert await silent_after(watchdog) == pytest.approx(27)


@in_virtual_time
async def test_whoever_is_cancelled_is_not_told_of_a_silence() -> None:
    with Watchdog(SILENCE) as watchdog:

        async def read() -> None:
            await watchdog.wait(asyncio.Event().wait())

        for seconds in (0, 1, 30):  # the last one just when it strikes
            reading = asyncio.create_task(read())
            await asyncio.sleep(seconds)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            watchdog.heard(all_said=False)


@in_virtual_time
async def test_a_bound_of_somebody_else_is_told_from_this_one() -> None:
    with Watchdog(SILENCE) as watchdog:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5) as bound:
                await watchdog.wait(asyncio.Event().wait())
        assert bound.expired()
        assert await silent_after(watchdog) == pytest.approx(25)
        async with asyncio.timeout(60) as bound:
            assert await silent_after(watchdog) == pytest.approx(0)
            await asyncio.sleep(1)  # nothing of the strike is left
        assert not bound.expired()


@in_virtual_time
async def test_what_is_left_leaves_no_timer() -> None:
    with Watchdog(SILENCE) as watchdog:
        await watchdog.wait(said_after(1))
    left = weakref.ref(watchdog)
    del watchdog
    gc.collect()
    assert left() is None


def test_it_strikes_on_the_loop_that_serves() -> None:
    async def run() -> tuple[float, str]:
        with Watchdog(Silence(first_event=0.02, idle=30.0, last_event=30.0)) as watchdog:
            struck: Awaitable[float] = silent_after(watchdog)
            waited = await struck
            watchdog.heard()
            return waited, await watchdog.wait(said_after(0.03))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        waited, said = runner.run(run())
    assert waited >= 0.019
    assert said == "said"
