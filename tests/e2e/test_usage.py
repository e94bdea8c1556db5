"""Usage and quotas as callers and operators meet them: over the wire, and from the command line."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from core.model.ledger import Tally
from core.model.turn import Usage
from core.ports.agent import RoundFinished
from core.use_cases.report_usage import ReportLine, UsageReport
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.cli.main import main
from entrypoints.cli.usage import _as_text
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as admin_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api
from entrypoints.grpc_api.services import admin
from entrypoints.ownership import Ownership
from harness import Client, detail, message, reason, served

COMMAND = [sys.executable, "-m", "entrypoints.cli.main"]
BIG = RoundFinished(Usage(input_tokens=90, cached_input_tokens=40, output_tokens=10, reasoning_tokens=4))


async def usage_of(client: Client, user: str = "ada", **more: Any) -> api.GetUsageResponse:
    """What GetUsage says."""
    answer: api.GetUsageResponse = await client.users.GetUsage(
        api.GetUsageRequest(user_id=user, **more), timeout=9
    )
    return answer


def today() -> str:
    return datetime.now(UTC).date().isoformat()


async def test_a_users_usage_is_told_by_day_agent_and_model() -> None:
    async with served(ScriptedAgent(["Hi.", DONE], ["Hi.", BIG], ["Hi.", DONE])) as client:
        for domain in (1, 1, 2):
            await client.chat(domain=domain)
        answer = await usage_of(client)
        assert [(day.agent_id, day.model, day.turns, day.unmetered_turns) for day in answer.days] == [
            ("health-v1", "script-1", 1, 0),
            ("career-v1", "script-1", 2, 0),
        ]
        assert {day.day for day in answer.days} == {today()}
        sums = answer.days[1].usage
        figures = (sums.input_tokens, sums.cached_input_tokens, sums.output_tokens, sums.reasoning_tokens)
        assert figures == (93, 40, 15, 4)
        assert not answer.quotas
        assert (await usage_of(client, "bob")).days == []


async def test_usage_is_paged_and_cut_to_days() -> None:
    async with served(ScriptedAgent()) as client:
        for domain in (1, 2, 3):
            await client.chat(domain=domain)
        whole = await usage_of(client, since_day=today(), until_day=today())
        paged: list[api.DailyUsage] = []
        token = ""
        while True:
            page = await usage_of(client, since_day=today(), until_day=today(), page_size=1, page_token=token)
            paged += page.days
            token = page.next_page_token
            if not token:
                break
        assert paged == list(whole.days)
        assert len(paged) == 3
        tomorrow = (datetime.now(UTC).date() + timedelta(days=1)).isoformat()
        assert (await usage_of(client, since_day=tomorrow)).days == []
        assert (await usage_of(client, until_day="2025-12-31")).days == []
        token = (await usage_of(client, page_size=1)).next_page_token
        for field, request in {
            "user_id": api.GetUsageRequest(),
            "since_day": api.GetUsageRequest(user_id="ada", since_day="today"),
            "until_day": api.GetUsageRequest(user_id="ada", until_day="2026-02-30"),
            "page_size": api.GetUsageRequest(user_id="ada", page_size=-1),
            "page_token": api.GetUsageRequest(user_id="ada", page_token=token, since_day=today()),
        }.items():
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await client.users.GetUsage(request)
            assert (error.value.code(), reason(error.value)) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_FIELD",
            )
            bad = detail(error.value, error_details_pb2.BadRequest)
            assert bad is not None
            assert [violation.field for violation in bad.field_violations] == [field]


async def test_a_quota_that_is_used_up_is_refused_with_its_name_and_the_time_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDA_QUOTA_TURNS_PER_DAY", "2")
    monkeypatch.setenv("VIDA_QUOTA_TOKENS_PER_DAY", "1000")
    gate = Gate()
    async with served(ScriptedAgent(["Hi.", DONE], [gate, DONE])) as client:
        first = (await client.chat(request_id="first"))[-1].event.finished.turn
        at_work = asyncio.create_task(client.chat())
        await gate.reached.wait()
        sent = agents_api.SendMessageRequest(user_id="ada", content=message().content)
        for call in (client.agents.SendMessage(sent), client.chat(thread_id=first.thread_id)):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            refused = error.value
            assert (refused.code(), reason(refused)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
            retry = detail(refused, error_details_pb2.RetryInfo)
            quota = detail(refused, error_details_pb2.QuotaFailure)
            info = detail(refused, error_details_pb2.ErrorInfo)
            assert retry is not None
            assert quota is not None
            assert info is not None
            assert [violation.subject for violation in quota.violations] == ["turns_per_day"]
            assert dict(info.metadata) == {"quota": "turns_per_day", "limit": "2"}
            now = datetime.now(UTC)
            midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
            assert abs(retry.retry_delay.ToSeconds() - (midnight - now).total_seconds()) < 30
        again = await client.chat(request_id="first")
        assert again[-1].attached
        assert again[-1].event.finished.turn == first
        quotas = {quota.name: quota for quota in (await usage_of(client)).quotas}
        assert (quotas["turns_per_day"].limit, quotas["turns_per_day"].used) == (2, 2)
        assert quotas["turns_per_day"].remaining == 0
        assert (quotas["tokens_per_day"].used, quotas["tokens_per_day"].remaining) == (8, 992)
        assert quotas["turns_per_day"].resets_at.ToDatetime(UTC) == midnight
        assert {quota.used for quota in (await usage_of(client, "bob")).quotas} == {0}
        gate.open()
        await at_work


async def test_the_bound_on_turns_in_flight_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_MAX_TURNS_PER_USER", "1")
    gate = Gate()
    async with served(ScriptedAgent([gate, DONE])) as client:
        at_work = asyncio.create_task(client.chat())
        await gate.reached.wait()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.chat()
        quota = detail(error.value, error_details_pb2.QuotaFailure)
        assert quota is not None
        assert [violation.subject for violation in quota.violations] == ["in_progress"]
        gate.open()
        await at_work


async def test_a_long_report_comes_in_pieces(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setattr(admin, "_LINES", 2)
    written: list[admin_api.ReportUsageResponse] = []

    class Context:
        async def write(self, response: admin_api.ReportUsageResponse) -> None:
            written.append(response)

    async with served(ScriptedAgent()) as client:
        service: Any = client.container.admin_service()
        request = admin_api.ReportUsageRequest(by=["user"])
        await service.ReportUsage(request, Context())
        assert [len(piece.lines) for piece in written] == [0]  # what it is about is told all the same
        assert written[0].until_day == today()
        users = ["ada", "bob", "eve", "kim", "lea"]
        for user in users:
            await client.chat(user=user)
        written.clear()
        await service.ReportUsage(request, Context())
        assert [[*line.group] for piece in written for line in piece.lines] == [[user] for user in users]
        assert [len(piece.lines) for piece in written] == [2, 2, 1]


PRICES = """
currency = "EUR"
[[price]]
model = "practice-1"
since = 2026-01-01
input = 1000
cached_input = 100
cache_write = 1000
output = 10000
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A database of each kind, and a list of prices, set in the environment."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    (tmp_path / "prices.toml").write_text(PRICES)
    monkeypatch.setenv("VIDA_DATABASE_URL", url)
    monkeypatch.setenv("VIDA_PRICES", str(tmp_path / "prices.toml"))
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    return url


@contextmanager
def serving() -> Iterator[str]:
    """A real server and its address."""
    command = [*COMMAND, "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().removeprefix("listening on ").strip()
        finally:
            server.terminate()


def usage(*arguments: str) -> tuple[int, str, str]:
    """Runs the command to its end: the exit code, stdout and stderr."""
    done = subprocess.run([*COMMAND, "usage", *arguments], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def say(address: str, user: str) -> None:
    """Has a turn on a server."""
    chat = [*COMMAND, "chat", "--server", address, "--user", user]
    subprocess.run(chat, input="Hello\n", capture_output=True, text=True, timeout=60, check=True)


def test_the_command_reports_beside_the_server_and_without_it(database: str) -> None:
    with serving() as address:
        say(address, "ada")
        say(address, "bob")
        say(address, "ada")
        beside = usage("--format", "json")
        text = usage("--by", "user")
    alone = usage("--format", "json")
    assert beside == alone
    code, output, errors = alone
    assert (code, errors) == (0, "")
    report = json.loads(output)
    assert set(report) == {"since", "until", "currency", "lines", "total"}
    assert (report["until"], report["currency"]) == (today(), "EUR")
    assert [(line["day"], line["user"], line["turns"]) for line in report["lines"]] == [
        (today(), "ada", 2),
        (today(), "bob", 1),
    ]
    for line in (*report["lines"], report["total"]):
        cost = (line["input_tokens"] * 1_000 + line["output_tokens"] * 10_000) / 1_000_000
        assert float(line["cost"]) == pytest.approx(cost)
        assert cost > 0
        assert (line["unmetered_turns"], line["unpriced_tokens"]) == (0, 0)
    assert text[0] == 0
    header, ada, bob, total, *_ = text[1].splitlines()
    assert header.split() == ["user", "turns", "input", "cached", "written", "output", "reasoning", "EUR"]
    assert (ada.split()[:2], bob.split()[:2], total.split()[:2]) == (["ada", "2"], ["bob", "1"], ["total", "3"])
    assert json.loads(usage("--user", "bob", "--by", "", "--format", "json")[1])["lines"][0]["turns"] == 1
    assert json.loads(usage("--agent", "none-v1", "--format", "json")[1])["lines"] == []
    assert "no turns" in usage("--until", "2026-01-01")[1]


def test_a_cost_that_is_not_the_whole_is_said_to_be_the_least() -> None:
    ten = Usage(input_tokens=9, output_tokens=1)
    lines = [
        ReportLine(("whole",), Tally(turns=1, usage=ten), Decimal(4)),
        ReportLine(("cut off",), Tally(turns=2, unmetered_turns=1, usage=ten), Decimal(1)),
        ReportLine(("half",), Tally(turns=1, usage=ten), Decimal(2), unpriced_tokens=5),
        ReportLine(("unpriced",), Tally(turns=1, usage=ten), unpriced_tokens=10),
    ]
    day = date(2026, 11, 22)
    told = _as_text(("model",), UsageReport(since=day, until=day, currency="EUR", lines=lines))
    table, notes = told.split("\n\n")
    costs = [line.split()[-1] for line in table.splitlines()]
    assert costs == ["EUR", "4.000000", ">1.000000", ">2.000000", "?", ">7.000000"]
    assert notes.splitlines()[1:] == [
        "1 turns were cut off: the provider did not say all that they cost",
        "15 tokens are of models without a price: set VIDA_PRICES",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--by", "hour"),
        ("--by", "day,day"),
        ("--since", "yesterday"),
        ("--since", "2026-02-02", "--until", "2026-02-01"),
        ("--format", "xml"),
    ],
    ids=str,
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["usage", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert arguments[0] in capsys.readouterr().err


def test_prices_with_faults_keep_from_serving_and_reporting(database: str, tmp_path: Path) -> None:
    (tmp_path / "prices.toml").write_text(PRICES.replace("input = 1000", 'input = "much"', 1))
    for command in (["usage"], ["serve", "--listen", "127.0.0.1:0"]):
        done = subprocess.run([*COMMAND, *command], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "VIDA_PRICES: price 1: input" in done.stderr
        assert "much" not in done.stderr


def test_an_owner_that_does_not_answer_is_named(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setattr("entrypoints.cli.record._START_WAIT", 0.2)
    with Ownership(Path(sqlite_url.removeprefix("sqlite:///")), "cleanup"):
        assert main(["usage"]) == 1
    assert "in use by `vida-coach cleanup`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["usage"], ["doctor"], ["users", "export", "ada"]], ids=" ".join)
def test_what_can_not_be_written_is_told(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Its last words too: the interpreter would leave with a code of its own."""
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    with sqlite3.connect(sqlite_url.removeprefix("sqlite:///")) as connection:
        connection.execute("INSERT INTO users (id, created_at) VALUES ('ada', '2026-01-01')")
    connection.close()

    def written_to(place: int) -> tuple[int, str]:
        done = subprocess.run(
            [*COMMAND, *command], stdout=place, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
        return done.returncode, done.stderr

    with Path("/dev/full").open("w") as full:
        assert written_to(full.fileno()) == (1, "vida-coach: No space left on device\n")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert written_to(writing) == (141, "")  # whoever has read enough need not hear of it
    finally:
        os.close(writing)
