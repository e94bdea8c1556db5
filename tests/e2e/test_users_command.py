"""`vida-coach users`: beside a running service and alone, on both databases."""

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest

from core.ports.store import Transaction
from doubles import ScriptedAgent
from entrypoints.cli.main import main
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from harness import served
from records import a_thread


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
    assert [next(iter(piece)) for piece in pieces] == ["user", "thread", "turn", "message", "message", "usage"]
    assert pieces[3]["message"]["message"]["content"] == [{"text": "Remember me"}]
    assert pieces[3]["message"]["message"]["thread_id"] == pieces[1]["thread"]["id"]
    assert pieces[5]["usage"]["turns"] == "1"

    assert await command(capsys, "hold", "ada") == (0, "", "held\n")
    code, output, errors = await command(capsys, "erase", "ada")
    assert (code, output) == (1, "")
    assert "users release" in errors
    assert await command(capsys, "release", "ada") == (0, "", "released\n")

    counts = {"threads": 1, "turns": 1, "messages": 2, "attachments": 0, "goals": 0}
    forecast = await as_json(capsys, "erase", "ada", "--dry-run")
    assert (forecast["id"], forecast["erased"]) == ("", counts)
    told = "1 threads, 1 turns, 2 messages, 0 attachments, 0 goals; 0 objects at the provider to delete\n"
    assert await command(capsys, "erase", "ada", "--dry-run") == (0, f"would erase {told}", "")
    receipt = await as_json(capsys, "erase", "ada")
    assert (receipt["state"], receipt["erased"], receipt["copies_left"]) == ("done", counts, 0)
    assert await as_json(capsys, "erasures") == {
        "receipts": [receipt],
        "copies_left": 0,
        "copies": [],
        "waiting": {},
    }
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
        assert len((await command(capsys, "export", "eve"))[1].splitlines()) == 6


async def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(ScriptedAgent()) as client:
        await client.chat("Remember me")
    await the_whole_story(capsys)


async def test_what_waits_at_a_provider_that_is_not_configured_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    async with served(ScriptedAgent()) as client:
        await client.container.store().write(lambda tx: tx.copies.keep("gone", "openai", ["conv_1"]))
        code, output, _ = await command(capsys, "erasures", "--format", "json")
        assert (code, json.loads(output)["waiting"]) == (0, {"openai": 1})
    code, output, _ = await command(capsys, "erasures")
    assert code == 0
    assert "1 of them wait: openai is not configured here. Give the service OPENAI_API_KEY" in output


async def test_an_id_that_none_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("export", "erase", "hold"):
        code, output, errors = await command(capsys, name, "x" * 129)
        assert (code, output) == (2, "")
        assert "128 characters" in errors


@pytest.mark.parametrize("beside", [True, False], ids=["beside a service", "alone"])
async def test_cleanup_erases_what_is_old_and_not_held(capsys: pytest.CaptureFixture[str], beside: bool) -> None:
    def fill(tx: Transaction) -> None:
        old = tx.now() - timedelta(days=10)
        for user in ("ada", "ada", "eve"):
            tx.users.ensure(user, old)
            tx.threads.add(a_thread(user, last_message_at=old))
        tx.users.hold("eve", old)

    async def clean_up(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        arguments = ["cleanup", "--ttl-days", "5", "--delete-after-days", "7", "--format", "json", *more]
        assert await asyncio.to_thread(main, arguments) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return report

    async def both() -> None:
        plan = await clean_up("--dry-run")
        assert (plan["expired"], plan["deleted"], plan["held"], plan["batches"]) == (3, 2, 1, 0)
        report = await clean_up()
        assert (report["expired"], report["deleted"], report["held"]) == (3, 2, 1)
        again = await clean_up()
        assert (again["expired"], again["deleted"], again["held"]) == (0, 0, 1)
        assert await asyncio.to_thread(main, ["cleanup", "--ttl-days", "5", "--delete-after-days", "7"]) == 0
        assert "erased 0 threads; 1 more are kept by a legal hold\n" in capsys.readouterr().out
        assert await asyncio.to_thread(main, ["cleanup", "--ttl-days", "5", "--delete-after-days", "4"]) == 2
        assert "--delete-after-days" in capsys.readouterr().err

    async with served(ScriptedAgent()) as client:
        await client.container.store().write(fill)
        if beside:
            await both()
    if not beside:
        await both()


async def test_a_cleanup_without_a_time_takes_the_services_own(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_THREAD_TTL", "20")
    ages = (10, 19, 21, 30)

    def fill(tx: Transaction) -> None:
        tx.users.ensure("ada", tx.now())
        for days in ages:
            tx.threads.add(a_thread(last_message_at=tx.now() - timedelta(days=days)))

    written: list[api.CleanupResponse] = []

    class Context:
        async def write(self, response: api.CleanupResponse) -> None:
            written.append(response)

    async with served(ScriptedAgent()) as client:
        await client.container.store().write(fill)
        service: Any = client.container.admin_service()
        for expired, request in (
            (2, api.CleanupRequest(dry_run=True)),
            (3, api.CleanupRequest(dry_run=True, ttl_days=15)),
            (4, api.CleanupRequest(dry_run=True, ttl_days=0)),
            (0, api.CleanupRequest(dry_run=True, ttl_days=0, domain=pb.DOMAIN_HEALTH)),
            (2, api.CleanupRequest()),
        ):
            await service.Cleanup(request, Context())
            assert (written[-1].report.expired, written[-1].report.dry_run) == (expired, request.dry_run)
            assert written[-1].report.deleted == 0
