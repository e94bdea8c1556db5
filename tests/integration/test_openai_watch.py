"""The daily look at the models: what it says, how often it asks, and that it holds up nobody."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from adapters.openai import watch
from adapters.openai.client import make_client
from adapters.openai.watch import DAY, RETRY, ModelWatch
from doubles import ManualClock
from entrypoints.hosting import hosted
from entrypoints.settings import load_settings
from fake_provider import FakeProvider, Gate, HttpError
from harness import DEADLINE, served, until

SECRET = "sk-canary-0123456789"


class Nights:
    """Sleep in the clock's own time: each ends when the test says so."""

    def __init__(self, clock: ManualClock) -> None:
        self.slept: list[float] = []
        self._clock = clock
        self._fallen: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        morning = asyncio.Event()
        self._fallen.put_nowait(morning)
        await morning.wait()
        self._clock.advance(seconds=seconds)

    async def next(self) -> Callable[[], None]:
        """Waits for the next night; what it returns ends that."""
        async with asyncio.timeout(DEADLINE):
            return (await self._fallen.get()).set


@asynccontextmanager
async def watching(
    provider: FakeProvider, nights: Nights, clock: ManualClock, *models: str
) -> AsyncIterator[ModelWatch]:
    async with make_client(SECRET, provider.base_url, 2) as client:
        made = ModelWatch(client, models, clock, nights)
        made.start()
        try:
            yield made
        finally:
            await made.stop()


@pytest.fixture
def nights(clock: ManualClock) -> Nights:
    return Nights(clock)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """What the watch has logged since it was last asked: level and text."""
    caplog.set_level(logging.DEBUG, watch.logger.name)

    def read() -> list[tuple[str, str]]:
        lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == watch.logger.name]
        caplog.clear()
        assert SECRET not in str(lines)
        return lines

    return read


def looked(provider: FakeProvider) -> int:
    """How often a model was asked for."""
    return sum(request.path.startswith("/v1/models/") for request in provider.requests)


Said = Callable[[], list[tuple[str, str]]]


async def test_each_model_is_asked_for_at_once_and_then_daily(
    nights: Nights, clock: ManualClock, said: Said
) -> None:
    async with FakeProvider() as provider:
        provider.models["gpt-4o"] = "2027-01-22"  # the third look is 59 days before
        async with watching(provider, nights, clock, "gpt-4o", "gpt-6-luna"):
            for looks in (2, 4):
                wake = await nights.next()
                assert looked(provider) == looks
                assert said() == []
                wake()
            await nights.next()
            ((level, text),) = said()
            assert (level, "gpt-4o" in text, "2027-01-22" in text) == ("WARNING", True, True)
    assert looked(provider) == 6
    assert all(0.9 * DAY <= seconds <= 1.1 * DAY for seconds in nights.slept)
    assert len(set(nights.slept)) == 3


async def test_a_model_that_is_gone_is_a_warning_every_day(nights: Nights, clock: ManualClock, said: Said) -> None:
    async with FakeProvider() as provider, watching(provider, nights, clock, "gpt-3"):
        for _ in range(2):
            wake = await nights.next()
            ((level, text),) = said()
            assert (level, "gpt-3" in text) == ("WARNING", True)
            wake()


async def test_a_key_that_is_refused_is_a_warning_without_the_key(
    nights: Nights, clock: ManualClock, said: Said
) -> None:
    async with FakeProvider(api_key="another") as provider, watching(provider, nights, clock, "gpt-4o"):
        await nights.next()
        ((level, text),) = said()
        assert (level, "refuses the key" in text, "401" in text) == ("WARNING", True, True)


@pytest.mark.parametrize(
    "refusal",
    [
        HttpError(status=503, headers={"x-should-retry": "false"}, message=f"Bearer {SECRET}"),
        HttpError(status=404, message="no such route"),
        HttpError(status=200, body=b"<html>"),
        HttpError(status=200, body=b"<html>", headers={"content-type": "text/html"}),
    ],
    ids=["down", "does not know of models", "no JSON", "a page"],
)
async def test_a_provider_that_can_not_be_asked_is_told_once_and_asked_again_soon(
    nights: Nights, clock: ManualClock, said: Said, refusal: HttpError
) -> None:
    async with FakeProvider() as provider:
        provider.refusals["models"] = [refusal, refusal]
        async with watching(provider, nights, clock, "gpt-6-luna"):
            wake = await nights.next()
            ((level, text),) = said()
            assert (level, "gpt-6-luna" in text) == ("INFO", True)
            wake()
            wake = await nights.next()
            assert said() == []
            assert provider.strikes.total() == 2
            wake()
            wake = await nights.next()  # it answers
            assert said() == []
            provider.refusals["models"] = [refusal]
            wake()
            await nights.next()
            assert [level for level, _ in said()] == ["INFO"]
    assert [seconds < 2 * RETRY for seconds in nights.slept] == [True, True, False, True]


async def test_one_model_that_can_not_be_asked_for_hides_no_other(
    nights: Nights, clock: ManualClock, said: Said
) -> None:
    async with FakeProvider() as provider:
        provider.models["gpt-4o"] = "2026-12-01"
        provider.refusals["models"] = [HttpError(status=503, headers={"x-should-retry": "false"})]
        async with watching(provider, nights, clock, "down", "gpt-4o"):
            await nights.next()
            assert [level for level, _ in said()] == ["INFO", "WARNING"]


async def test_a_look_that_hangs_ends_by_itself(
    nights: Nights, clock: ManualClock, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_PATIENCE", 0.1)
    async with FakeProvider() as provider:
        gate = Gate()
        provider.refusals["models"] = [HttpError(status=503, gate=gate)]
        async with watching(provider, nights, clock, "gpt-6-luna"):
            wake = await nights.next()
            while not gate.reached.is_set():  # on a slow machine a look may end before it gets there
                wake()
                wake = await nights.next()
            ((level, text),) = said()
            assert (level, "TimeoutError" in text) == ("INFO", True)


async def test_it_stops_in_its_sleep_and_before_it_has_begun(nights: Nights, clock: ManualClock) -> None:
    async with FakeProvider() as provider, watching(provider, nights, clock, "gpt-6-luna") as made:
        await made.stop()
        assert looked(provider) == 0
        made.start()
        await nights.next()
        await made.stop()
        assert looked(provider) == 1


# --- in the service


@pytest.fixture
async def provider(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeProvider]:
    """A provider that the settings point to."""
    async with FakeProvider() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
        yield fake


async def test_the_service_serves_and_stops_while_a_look_hangs(provider: FakeProvider) -> None:
    gate = Gate()
    provider.refusals["models"] = [HttpError(status=503, gate=gate)]
    async with asyncio.timeout(DEADLINE):
        async with served() as client:
            await gate.reached.wait()
            assert (await client.chat("Hello"))[-1].event.finished.turn.state
        assert gate.reached.is_set()
        assert not gate.released.is_set()
        await until(lambda: not provider.connections)
    assert looked(provider) == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "model-watch"]


async def test_the_service_warns_of_the_models_of_its_agents(
    provider: FakeProvider, said: Said, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_MODEL", "gpt-3")
    async with served(), asyncio.timeout(DEADLINE):
        await until(lambda: watch.logger.name in {record.name for record in caplog.records})
    ((level, text),) = said()
    assert (level, "gpt-3" in text) == ("WARNING", True)


async def test_a_command_looks_at_no_model(provider: FakeProvider) -> None:
    async with hosted(load_settings(), "chat", listen=None):
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "model-watch"]
    assert looked(provider) == 0
