"""A bell wakes those who wait, once."""

import asyncio

from core.use_cases.bell import Bell
from harness import until


async def test_a_stroke_wakes_those_who_wait_and_nobody_later() -> None:
    bell = Bell()
    bell.ring()  # nobody hears it
    waiting = [asyncio.create_task(bell.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    bell.ring()
    late = asyncio.create_task(bell.wait())
    await asyncio.gather(*waiting)
    await asyncio.sleep(0)
    assert not late.done()
    bell.ring()
    await late


async def test_whoever_leaves_is_forgotten_and_wakes_nobody_else() -> None:
    bell = Bell()
    leaving, staying = (asyncio.create_task(bell.wait()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await until(leaving.done)
    assert not staying.done()
    assert len(bell._waiting) == 1
    bell.ring()
    await staying


async def test_whoever_leaves_as_it_rings_harms_nobody() -> None:
    bell = Bell()
    leaving, staying = (asyncio.create_task(bell.wait()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    bell.ring()
    await staying
    assert leaving.cancelled()
