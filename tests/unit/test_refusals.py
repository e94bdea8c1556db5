"""What the log says of refused calls, however many they are."""

import asyncio
import logging

import pytest

from core.model.trail import Trail, begin_trail
from entrypoints.grpc_api import refusals
from entrypoints.grpc_api.refusals import PERIOD, Refusals
from simulation.loop import simulate


def fail(error: BaseException) -> None:
    raise error


def test_a_flood_is_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def flood() -> None:
        noted = Refusals()
        begin_trail(Trail(request_id="of the first"))
        for _ in range(10_000):
            noted.note("/a/B", "no token")
            noted.note("/a/C", "no token")
            await asyncio.sleep(PERIOD / 5_000)
        noted.note("/a/D", "no rule for eve")
        noted.close()
        await asyncio.sleep(3 * PERIOD)

    simulate(flood(), surprised=fail)
    lines = caplog.messages
    assert lines[0] == "/a/B refused: no token"
    assert "/a/D refused: no rule for eve" in lines
    told = [int(line.split()[1]) for line in lines if line.endswith("times more within 60 s: no token")]
    assert len(told) in (2, 3)
    assert sum(told) == 20_000 - 1
    assert len(lines) == len(told) + 2


def test_who_calls_again_after_a_while_is_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def seldom() -> None:
        noted = Refusals()
        for _ in range(3):
            noted.note("/a/B", "no token")
            await asyncio.sleep(PERIOD + 1)

    simulate(seldom(), surprised=fail)
    assert caplog.messages == ["/a/B refused: no token"] * 3


def test_kinds_are_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(refusals, "_MOST", 3)

    async def many() -> None:
        noted = Refusals()
        for number in range(100):
            noted.note("/a/B", f"no rule for {number}")
        noted.close()

    simulate(many(), surprised=fail)
    assert caplog.messages == [
        *(f"/a/B refused: no rule for {number}" for number in range(4)),
        "refused 96 times more within 60 s: other reasons",
    ]
