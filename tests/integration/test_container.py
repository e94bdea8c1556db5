"""The composition: every part can be made, for every provider and database."""

from pathlib import Path

import grpc
import pytest
from dependency_injector import errors, providers

from core.ports.agent import Agent
from core.ports.store import Store
from core.ports.tools import Tools
from core.use_cases.clean_up_threads import Cleanup
from entrypoints.container import Container, opened, running
from entrypoints.grpc_api.server import Server
from entrypoints.settings import SettingsError, load_settings


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
