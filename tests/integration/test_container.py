"""The composition: every part can be made, for every provider and database."""

import asyncio
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from dependency_injector import errors, providers
from openai import AsyncOpenAI

from adapters.openai import make_client
from core.model.erasure import ErasureState
from core.model.errors import Overloaded, QuotaExceeded
from core.model.message import TextPart
from core.ports.agent import Agent
from core.ports.store import Store, Transaction
from core.ports.tools import Tools
from core.use_cases.accept_message import AcceptMessage, IncomingMessage
from core.use_cases.clean_up_threads import Cleanup
from doubles import Gate
from entrypoints.container import Container, opened, running
from entrypoints.grpc_api.server import Bounds, Server
from entrypoints.settings import SettingsError, load_settings
from records import a_thread

ANY_KEY = "none"


async def make(container: Container) -> dict[str, object]:
    """Every part, by name."""
    try:
        return {name: provider() for name, provider in container.providers.items()}
    finally:
        await container.agent().aclose()
        await container.store().aclose()


@pytest.mark.parametrize("provider", ["practice", "openai"])
async def test_every_part_is_made(provider: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_PROVIDER", provider)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    container = Container(settings=load_settings())
    container.check_dependencies()
    parts = await make(container)
    assert set(parts) >= {"settings", "store", "agent", "tools", "accept", "follow", "cancel", "server", "cleanup"}
    assert not any(part is None for part in parts.values())
    assert isinstance(parts["server"], Server)
    agent = container.agent()
    assert agent.provider == provider
    tools = container.tools()
    missing = {
        name for offered in container.catalog().agents() for name in offered.tools if name not in tools.names
    }
    assert missing == set()


async def test_parts_are_shared_except_servers(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    container = Container(settings=load_settings())
    for name, provider in container.providers.items():
        if isinstance(provider, providers.Singleton):
            assert provider() is provider(), name
    assert container.server() is not container.server()
    assert container.owner() != Container(settings=load_settings()).owner()
    await container.agent().aclose()
    await container.store().aclose()


def test_settings_are_what_is_missing() -> None:
    with pytest.raises(errors.Error, match="settings"):
        Container().check_dependencies()


async def test_commands_get_the_record_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    async with opened(load_settings()) as container:
        report = await container.cleanup()(Cleanup(ttl_days=1))
        assert report.expired == 0


async def test_a_running_service_is_ready_and_leaves_cleanly(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    for _ in range(2):  # a second start finds the agents published
        async with running(load_settings()) as container:
            store: Store = container.store()
            for offered in container.catalog().agents():
                assert await store.read(lambda tx, of=offered: tx.agents.get(of.id)) == offered  # type: ignore[misc]
            agent: Agent = container.agent()
            tools: Tools = container.tools()
            assert agent.provider == "practice"
            assert tools.names


async def test_leaving_waits_for_what_is_under_way_and_leaves_no_task(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")  # whose models are asked after
    settings = load_settings()
    before = asyncio.all_tasks()
    async with running(settings, watching=True) as container:
        threads = [a_thread() for _ in range(50)]

        def fill(tx: Transaction) -> None:
            tx.users.ensure("ada", tx.now())
            for thread in threads:
                tx.threads.add(thread)

        await container.store().write(fill)
        caller = asyncio.create_task(container.erase_user()("ada"))
        while not container.erase_user()._here:  # noqa: ASYNC110 - what is waited for is no event of ours
            await asyncio.sleep(0)
        caller.cancel()
    assert asyncio.all_tasks() - {caller} == before
    async with opened(settings) as container:
        (receipt,) = (await container.erasures()()).receipts
        assert (receipt.state, receipt.erased.threads) == (ErasureState.DONE, 50)


async def test_leaving_waits_for_a_message_that_is_being_accepted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    settings, gate, settle = load_settings(), Gate(), AcceptMessage.settle

    async def settled(self: AcceptMessage) -> None:
        gate.open()
        await settle(self)

    monkeypatch.setattr(AcceptMessage, "settle", settled)
    before = asyncio.all_tasks()
    async with running(settings) as container:
        accept: AcceptMessage = container.accept()
        write = container.store().write

        async def held(change: Any) -> Any:
            await gate.wait()
            return await write(change)

        monkeypatch.setattr(accept, "_store", SimpleNamespace(write=held))
        message = IncomingMessage(user_id="ada", content=(TextPart("Hello"),))
        caller = asyncio.create_task(accept(message))
        await gate.reached.wait()
    assert caller.done()
    assert asyncio.all_tasks() == before
    async with opened(settings) as container:
        turn, _ = await container.threads().turn("ada", caller.result().turn.id)
        assert turn.provider == "practice"


@pytest.mark.parametrize("provider", ["practice", "openai"])
async def test_leaving_closes_the_client_whoever_writes_the_replies(
    provider: str, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_PROVIDER", provider)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    async with running(load_settings()) as container:
        client: AsyncOpenAI = container.client()
        assert not client.is_closed()
    assert client.is_closed()


AGENT = """
slug = "strict"
version = {version}
domain = "career"
name = "Strict coach"
instructions = "{instructions}"
tools = [{tools}]
"""


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (AGENT.format(version=1, instructions="Coach.", tools='"no_such_tool"'), "no_such_tool"),
        ("slug = 7", "slug"),
    ],
    ids=["a tool that is not there", "bad definition"],
)
async def test_faults_of_agents_are_settings_faults(
    file: str, words: str, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "agents"
    folder.mkdir()
    (folder / "strict.toml").write_text(file)
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_AGENTS_DIR", str(folder))
    with pytest.raises(SettingsError, match=words):
        async with running(load_settings()):
            pytest.fail("it started")


async def test_a_changed_agent_needs_a_new_version(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "agents"
    folder.mkdir()
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_AGENTS_DIR", str(folder))
    for version, instructions, starts in ((1, "One.", True), (1, "Two.", False), (2, "Two.", True)):
        text = AGENT.format(version=version, instructions=instructions, tools="")
        (folder / "strict.toml").write_text(text)
        if starts:
            async with running(load_settings()) as container:
                assert "strict" in {offered.slug for offered in container.catalog().agents()}
        else:
            with pytest.raises(SettingsError, match="strict-v1"):
                async with running(load_settings()):
                    pytest.fail("it started")


async def test_tools_that_can_not_be_loaded_are_settings_faults(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_TOOLS", "no.such.module:tool")
    with pytest.raises(SettingsError, match="tools"):
        async with running(load_settings()):
            pytest.fail("it started")


async def test_what_is_set_reaches_the_parts(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows in no short test of the whole service: its seconds are many, or its bounds are wide."""
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    for name, value in {
        "OPENAI_API_KEY": ANY_KEY,
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "VIDA_TURN_BUDGET": "3600",
        "VIDA_LEASE": "7",
        "VIDA_MAX_TURNS": "1000",
        "VIDA_MAX_REQUEST_BYTES": "300000",
        "VIDA_MAX_CONNECTION_AGE": "90",
    }.items():
        monkeypatch.setenv(name, value)
    bounds: list[Bounds] = []
    connections: list[int] = []

    class Noted(Server):
        def __init__(self, **parts: Any) -> None:
            bounds.append(parts["bounds"])
            super().__init__(**parts)

    def noted(api_key: str, base_url: str | None, max_connections: int) -> AsyncOpenAI:
        connections.append(max_connections)
        return make_client(api_key, base_url, max_connections)

    monkeypatch.setattr("entrypoints.grpc_api.server.Server", Noted)
    monkeypatch.setattr("adapters.openai.make_client", noted)
    container = Container(settings=load_settings())
    await make(container)
    assert connections == [1_010]  # each turn has one, and there are some to spare
    assert bounds[0] == Bounds(
        request_bytes=300_000,
        connections=1_100,
        streams=1_100,  # a proxy brings all of them on one connection
        calls=2_100,
        stream_seconds=3_660,  # a stream outlives the longest turn
        connection_seconds=90,
    )
    streams = container.agent_service()._streams
    assert streams._seconds == 3_660
    assert (container.oversee()._budget, container.oversee()._lease) == (3_600, 7)
    with ExitStack() as held:
        for _ in range(200):  # a tenth of those of all
            held.enter_context(streams.place("ada"))
        with pytest.raises(QuotaExceeded):
            held.enter_context(streams.place("ada"))
        for number in range(1_800):
            held.enter_context(streams.place(f"u{number}"))
        with pytest.raises(Overloaded):
            held.enter_context(streams.place("eve"))


async def test_a_small_service_lets_a_user_follow_from_many_places(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_MAX_TURNS", "40")
    container = Container(settings=load_settings())
    await make(container)
    with ExitStack() as held:
        for _ in range(64):
            held.enter_context(container.agent_service()._streams.place("ada"))
        with pytest.raises(QuotaExceeded):
            held.enter_context(container.agent_service()._streams.place("ada"))


async def test_an_erasure_is_taken_over_when_its_process_must_be_gone(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_LEASE", "7")
    container = Container(settings=load_settings())
    await make(container)
    alone = database_url.startswith("sqlite")
    assert container.erase_user()._left_after == timedelta(seconds=0 if alone else 14)
    assert container.recover()._alone is alone
    if not alone:
        assert container.recover()._lease == 7


async def test_a_server_needs_a_free_address(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    async with running(load_settings()) as container:
        first, second = container.server(), container.server()
        port = await first.start("127.0.0.1:0")
        with pytest.raises(OSError, match=str(port)):
            await second.start(f"127.0.0.1:{port}")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
        await first.stop(0)
