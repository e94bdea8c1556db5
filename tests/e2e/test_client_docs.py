"""What docs/client.md shows is run as it stands, on another port."""

import asyncio
import re
from pathlib import Path

import pytest

from doubles import DONE, ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import served

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:50051"


def example(under: str) -> str:
    """The code under a heading."""
    _, _, rest = PAGE.partition(f"## {under}\n")
    found = re.search(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)
    assert found is not None
    assert found[1].count(ADDRESS) == 1
    return found[1]


async def run(code: str, address: str) -> None:
    """Runs an example in a thread, as a program of its own."""
    program = compile(code.replace(ADDRESS, address), "docs/client.md", "exec")
    await asyncio.to_thread(exec, program, {"__name__": "__main__"})


async def test_the_asynchronous_example_prints_the_reply(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    async with served(ScriptedAgent(["What would ", "help?", DONE])) as client:
        await run(example("In Python, asyncio"), client.address)
    assert capsys.readouterr().out == "TURN_STATE_COMPLETED\nWhat would help?\n"


async def test_the_synchronous_example_holds_a_conversation_and_deletes_it(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    async with served(ScriptedAgent(["One.", DONE], ["Two.", DONE])) as client:
        await run(example("In Python, without asyncio"), client.address)
        left = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="user-42"))
        assert not left.threads
    conversation = ["I feel stuck in my job", "One.", "I want to lead a team", "Two."]
    assert capsys.readouterr().out == f"One.\nTwo.\n{conversation}\n"


def test_every_example_is_run() -> None:
    assert PAGE.count("```python") == 2
