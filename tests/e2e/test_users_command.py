"""`vida-coach users`: beside a running service and alone, on both databases."""

import asyncio
import json
from typing import Any

import pytest

from doubles import ScriptedAgent
from entrypoints.cli.main import main
from harness import served


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_DRAIN", "0")


async def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs a command line as a process of its own would; returns its exit code, output and errors."""
    capsys.readouterr()
    code = await asyncio.to_thread(main, ["users", *arguments])
    return code, *capsys.readouterr()


async def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Runs one that must succeed; returns what it prints."""
    code, output, errors = await command(capsys, *arguments, "--format", "json")
    assert (code, errors) == (0, "")
    return json.loads(output)


async def the_whole_story(capsys: pytest.CaptureFixture[str]) -> None:
    """Holds, exports, releases and erases a user who has one thread."""
    code, output, _ = await command(capsys, "export", "ada")
    pieces = [json.loads(line) for line in output.splitlines()]
    assert code == 0
    assert [next(iter(piece)) for piece in pieces] == ["user", "thread", "turn", "message", "message"]
    assert pieces[3]["message"]["message"]["content"] == [{"text": "Remember me"}]

    assert await command(capsys, "hold", "ada") == (0, "", "held\n")
    code, output, errors = await command(capsys, "erase", "ada")
    assert (code, output) == (1, "")
    assert "users release" in errors
    assert await command(capsys, "release", "ada") == (0, "", "released\n")

    counts = {"threads": 1, "turns": 1, "messages": 2, "attachments": 0, "goals": 0}
    forecast = await as_json(capsys, "erase", "ada", "--dry-run")
    assert (forecast["id"], forecast["erased"]) == ("", counts)
    receipt = await as_json(capsys, "erase", "ada")
    assert (receipt["state"], receipt["erased"], receipt["copies_left"]) == ("done", counts, 0)
    assert await as_json(capsys, "erasures") == {"receipts": [receipt], "copies_left": 0, "copies": []}
    assert await command(capsys, "export", "ada") == (0, "", "")
    code, output, _ = await command(capsys, "erase", "ada")
    assert (code, "erased 0 threads" in output) == (0, True)
    code, output, _ = await command(capsys, "erasures")
    assert len(output.splitlines()) == 3


async def test_beside_a_running_service(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(ScriptedAgent()) as client:
        await client.chat("Remember me")
        await client.chat("Me too", "eve")
        await the_whole_story(capsys)
        assert len((await command(capsys, "export", "eve"))[1].splitlines()) == 5


async def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(ScriptedAgent()) as client:
        await client.chat("Remember me")
    await the_whole_story(capsys)


async def test_an_id_that_none_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("export", "erase", "hold"):
        code, output, errors = await command(capsys, name, "x" * 129)
        assert (code, output) == (2, "")
        assert "128 characters" in errors
