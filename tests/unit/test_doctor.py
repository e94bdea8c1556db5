"""`vida-coach doctor`: what it looks at, what it says, and what it keeps to itself."""

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from adapters.catalog.loader import SHIPPED
from adapters.openai import models, probe
from adapters.openai.errors import ProviderFault
from adapters.openai.models import KeyRefused, ModelMissing
from adapters.openai.probe import Abilities, Found
from adapters.sql import engines
from adapters.sql.engines import writer_engine
from adapters.sql.schema import migrate
from core.model.turn import TurnReason
from entrypoints.cli import doctor
from entrypoints.cli.main import main
from entrypoints.ownership import Ownership
from entrypoints.settings import StateMode, load_settings
from fake_provider import FakeProvider

SECRET = "sk-canary-0123456789"


@dataclass
class Report:
    """What the command printed and how it ended."""

    code: int
    ok: bool
    checks: list[dict[str, str]]
    printed: str

    def of(self, name: str) -> dict[str, str]:
        """The one check of this name."""
        (check,) = [check for check in self.checks if check["name"] == name]
        return check

    def status(self, name: str) -> str:
        """What the one check of this name found."""
        return self.of(name)["status"]


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Any:
    def examined() -> Report:
        code = main(["doctor", "--format", "json"])
        printed = capsys.readouterr().out
        parsed = json.loads(printed)
        assert set(parsed) == {"ok", "checks"}
        for check in parsed["checks"]:
            assert list(check) == ["name", "status", "detail", "advice"]
            assert check["status"] in {"ok", "warn", "fail", "info"}
        assert code == (0 if parsed["ok"] else 1)
        return Report(code, parsed["ok"], parsed["checks"], printed)

    return examined


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An embedded database that is not there yet."""
    made = tmp_path / "kept" / "record.db"
    monkeypatch.setenv("VIDA_DATABASE_URL", f"sqlite:///{made}")
    return made


def test_with_nothing_set_all_is_well_and_nothing_is_made(examine: Any, tmp_path: Path) -> None:
    report = examine()
    assert report.ok
    assert report.status("settings") == "ok"
    assert report.status("agents") == "ok"
    assert "set_goal" in report.of("tools")["detail"]
    assert "USD, of gpt-6-luna" in report.of("prices")["detail"]
    assert report.status("database") == "info"
    assert "needs nothing" in report.of("provider")["detail"]
    assert list(tmp_path.iterdir()) == []


def test_text_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_LISTEN", "nowhere")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "fail  settings  VIDA_LISTEN" in printed
    assert ".env" in printed


def test_an_unknown_option_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--fix"])
    assert left.value.code == 2


def test_all_faults_of_the_settings_are_listed_at_once(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_LISTEN", "nowhere")
    monkeypatch.setenv("VIDA_TURN_BUDGET", "-1")
    monkeypatch.setenv("VIDA_LIZTEN", "x")
    report = examine()
    faults = [check["detail"] for check in report.checks if check["status"] == "fail"]
    assert sorted(fault.split(":")[0] for fault in faults) == ["VIDA_LISTEN", "VIDA_LIZTEN", "VIDA_TURN_BUDGET"]


def test_faults_of_agents_and_tools_are_told(
    examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIDA_TOOLS", "no.such:thing")
    assert examine().status("tools") == "fail"
    monkeypatch.delenv("VIDA_TOOLS")
    monkeypatch.setenv("OPENAI_ASSISTANT_ID", "asst_1")
    report = examine()
    assert report.status("agents") == "fail"
    assert report.status("database") == "info"
    (tmp_path / "prices.toml").write_text('currency = "euro"')
    monkeypatch.setenv("VIDA_PRICES", str(tmp_path / "prices.toml"))
    assert examine().status("prices") == "fail"


def test_a_current_database_that_nobody_uses_is_well_and_left_alone(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    migrate(f"sqlite:///{file}")
    before = file.read_bytes()
    report = examine()
    assert report.ok
    assert (report.status("database"), report.status("schema")) == ("ok", "ok")
    assert file.read_bytes() == before


def test_what_is_left_at_a_provider_is_told(examine: Any, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.parent.mkdir()
    migrate(f"sqlite:///{file}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("VIDA_PROVIDER", "practice")
    assert examine().status("erasures") == "ok"
    row = "INSERT INTO copies VALUES ('openai', ?, 't', '2026-01-01 00:00:00', 1, ?)"
    with sqlite3.connect(file) as connection:
        connection.execute(row, ("conv_1", ""))
    assert examine().status("erasures") == "info"
    with sqlite3.connect(file) as connection:
        connection.execute(row, ("conv_2", "401 PROVIDER_CONFIG"))
    connection.close()
    report = examine()
    assert report.ok
    assert report.status("erasures") == "warn"
    assert report.of("erasures")["detail"].startswith("2 objects")
    assert "users erasures" in report.of("erasures")["advice"]
    monkeypatch.delenv("OPENAI_API_KEY")
    report = examine()
    assert report.status("erasures") == "warn"
    assert "2 at openai, which is not configured here" in report.of("erasures")["detail"]
    assert "OPENAI_API_KEY" in report.of("erasures")["advice"]


def test_an_outdated_embedded_database_is_migrated_by_whatever_opens_it(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE something (x)")
    connection.close()
    report = examine()
    assert report.ok
    assert report.status("schema") == "info"
    assert "migrate" in report.of("schema")["advice"]


def test_a_newer_database_fails(examine: Any, file: Path) -> None:
    url = f"sqlite:///{file}"
    migrate(url)
    engine = writer_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    engine.dispose()
    report = examine()
    assert not report.ok
    assert report.status("schema") == "fail"


def test_a_file_of_somebody_elses_is_refused_and_left_exactly_as_it_is(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    file.write_text("Dear diary,")
    os.utime(file, (0, 0))
    report = examine()
    assert report.status("database") == "fail"
    assert "is not a SQLite database" in report.of("database")["detail"]
    assert file.stat().st_mtime == 0
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_an_empty_file_is_where_a_database_will_be(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    file.touch()
    report = examine()
    assert report.ok
    assert report.status("database") == "info"
    assert "is empty" in report.of("database")["detail"]
    assert file.read_bytes() == b""


def test_a_file_that_can_not_be_opened_is_told_with_the_systems_own_word(examine: Any, file: Path) -> None:
    file.mkdir(parents=True)
    check = examine().of("database")
    assert check["status"] == "fail"
    assert check["detail"] == f"{file}: Is a directory"
    assert "the right to read and write it" in check["advice"]


def test_a_database_that_another_program_writes_to_is_told_with_the_drivers_own_word(
    examine: Any, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate(f"sqlite:///{file}")
    monkeypatch.setattr(engines, "BUSY_TIMEOUT", 1)
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        report = examine()
    assert report.status("database") == "fail"
    assert report.of("database")["detail"] == f"{file}: database is locked"
    assert "schema" not in {check["name"] for check in report.checks}


def test_a_damaged_database_fails(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"SQLite format 3\0" + b"\xff" * 4_096)
    report = examine()
    assert report.status("database") == "fail"


def test_a_folder_that_is_none_fails(examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("VIDA_DATABASE_URL", f"sqlite:///{tmp_path}/taken/record.db")
    assert examine().status("database") == "fail"


def test_an_owner_is_named_and_one_that_does_not_answer_is_a_warning(examine: Any, file: Path) -> None:
    file.parent.mkdir()
    migrate(f"sqlite:///{file}")
    with Ownership(file, "serve"):
        report = examine()
    assert report.ok
    assert report.status("database") == "warn"
    assert f"`vida-coach serve` (process {os.getpid()})" in report.of("database")["detail"]


def test_an_owner_that_answers_is_well(examine: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from entrypoints.cli.embedded import EmbeddedServer

    with EmbeddedServer(load_settings(), "serve"):
        report = examine()
    assert report.status("database") == "ok"
    assert "which answers" in report.of("database")["detail"]


def test_the_state_of_a_server_database_is_told(
    examine: Any, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", postgres_url)
    report = examine()
    assert (report.status("database"), report.status("schema")) == ("ok", "ok")


def test_a_server_database_without_the_schema_must_be_migrated(
    examine: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"vida_doctor_{os.getpid()}"
    monkeypatch.setenv("VIDA_DATABASE_URL", postgres.empty(name))
    try:
        report = examine()
    finally:
        postgres.drop(name)
    assert report.status("schema") == "fail"
    assert "vida-coach migrate" in report.of("schema")["advice"]


def test_a_server_database_with_something_else_in_it_is_told_from_one_that_is_away(
    examine: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"vida_doctor_other_{os.getpid()}"
    monkeypatch.setenv("VIDA_DATABASE_URL", url := postgres.empty(name))
    try:
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE alembic_version (another_ones integer)")
        report = examine()
    finally:
        postgres.drop(name)
    assert report.status("database") == "fail"
    assert "answers, but can't be read" in report.of("database")["detail"]
    assert "the right to read this one" in report.of("database")["advice"]


def test_a_server_database_that_is_away_fails_without_its_password(
    examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", f"postgresql://ada:{SECRET}@127.0.0.1:1/x?sslpassword={SECRET}")
    report = examine()
    assert report.status("database") == "fail"
    assert "postgresql://ada:***@127.0.0.1:1/x" in report.of("database")["detail"]
    assert SECRET not in report.printed


def test_an_address_that_can_not_be_read_fails_without_a_word_of_it(
    examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", f"postgresql://ada:x@host:{SECRET}/x")
    report = examine()
    assert not report.ok
    assert SECRET not in report.printed


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ((3, 40, 1), "info"),
        ((3, 44, 5), "info"),
        ((3, 44, 6), "ok"),
        ((3, 45, 0), "info"),
        ((3, 50, 6), "info"),
        ((3, 50, 7), "ok"),
        ((3, 51, 2), "info"),
        ((3, 51, 3), "ok"),
        ((4, 0, 0), "ok"),
    ],
)
def test_versions_of_sqlite_with_the_wal_defect_are_told(
    examine: Any, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], status: str
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    assert examine().status("sqlite") == status


def provider_says(monkeypatch: pytest.MonkeyPatch, answer: date | Exception | None) -> list[str]:
    """OpenAI as the provider; returns the models that are asked for."""
    asked: list[str] = []

    async def model_sunset(client: Any, model: str) -> date | None:
        asked.append(model)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def abilities(_: Any) -> Abilities:
        return Abilities(responses=Found.YES, conversations=Found.YES, chains=Found.YES)

    monkeypatch.setattr(models, "model_sunset", model_sunset)
    monkeypatch.setattr(probe, "abilities", abilities)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    return asked


def test_a_key_and_a_model_that_are_good(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = provider_says(monkeypatch, None)
    monkeypatch.setenv("OPENAI_MODEL", "some-model")
    report = examine()
    assert report.status("provider") == "ok"
    assert asked == ["some-model"]
    assert report.status("state") == "ok"
    assert SECRET not in report.printed


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyRefused(401), "fail"),
        (ModelMissing(404), "fail"),
        (ProviderFault(TurnReason.PROVIDER_UNAVAILABLE), "fail"),
        (ProviderFault(TurnReason.PROVIDER_TIMEOUT), "fail"),
        (ProviderFault(TurnReason.PROVIDER_RATE_LIMITED, status=429), "warn"),
        (RuntimeError(f"Bearer {SECRET}"), "fail"),
    ],
)
def test_what_the_provider_refuses(
    examine: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    provider_says(monkeypatch, error)
    report = examine()
    assert report.status("provider") == status
    assert SECRET not in report.printed


def test_every_model_that_an_agent_replies_with_is_asked_for(
    examine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = provider_says(monkeypatch, None)
    career = (SHIPPED / "career.toml").read_text()
    named = career.replace('model = "default"', 'model = "another-model"').replace("version = 1", "version = 2")
    (tmp_path / "career.toml").write_text(named)
    monkeypatch.setenv("VIDA_AGENTS_DIR", str(tmp_path))
    report = examine()
    assert asked == ["another-model", "gpt-6-luna"]
    told = [check["detail"] for check in report.checks if check["name"] == "provider"]
    assert [model in detail for model, detail in zip(asked, told, strict=True)] == [True, True]
    provider_says(monkeypatch, ModelMissing(404))
    report = examine()
    assert [check["status"] for check in report.checks if check["name"] == "provider"] == ["fail", "fail"]


def test_a_compatible_server_that_does_not_know_of_models_is_a_warning(
    examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider_says(monkeypatch, ModelMissing(404))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://models.example/v1")
    report = examine()
    assert report.status("provider") == "warn"
    assert "models.example" in report.of("provider")["detail"]


def test_a_model_that_leaves_soon_is_a_warning_and_one_that_left_a_failure(
    examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = datetime.now(UTC).date()
    monkeypatch.setenv("OPENAI_MODEL", "gpt-4o")
    soon = today + timedelta(days=53)
    provider_says(monkeypatch, soon)
    check = examine().of("model")
    assert check["status"] == "warn"
    assert "gpt-4o" in check["detail"]
    assert soon.isoformat() in check["detail"]
    assert "OPENAI_MODEL" in check["advice"]
    provider_says(monkeypatch, today - timedelta(days=1))
    assert examine().status("model") == "fail"
    provider_says(monkeypatch, today + timedelta(days=61))
    assert examine().status("provider") == "ok"


def provider_has(monkeypatch: pytest.MonkeyPatch, found: Abilities | Exception) -> None:
    """A server with a good key and model; what else it has."""
    provider_says(monkeypatch, None)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://models.example/v1")

    async def abilities(_: Any) -> Abilities:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(probe, "abilities", abilities)


@pytest.mark.parametrize("mode", list(StateMode))
@pytest.mark.parametrize(
    ("found", "works", "others"),
    [
        (Abilities(Found.YES, Found.YES, Found.YES), {"conversation", "response_chain", "stateless"}, ()),
        (Abilities(Found.YES, Found.NO, Found.YES), {"response_chain", "stateless"}, ("stateless",)),
        (Abilities(Found.YES, Found.NO, Found.NO), {"stateless"}, ("stateless",)),
    ],
)
def test_a_state_mode_that_the_server_lacks_fails_and_one_that_works_is_named(
    examine: Any,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    found: Abilities,
    works: set[str],
    others: tuple[str, ...],
) -> None:
    provider_has(monkeypatch, found)
    monkeypatch.setenv("OPENAI_STATE", mode)
    report = examine()
    check = report.of("state")
    assert check["status"] == ("ok" if mode in works else "fail")
    assert report.ok is (mode in works)
    if mode not in works:
        assert all(f"OPENAI_STATE={other}" in check["advice"] for other in others)
        assert f"OPENAI_STATE={mode}" not in check["advice"]


def test_what_the_server_does_not_tell_is_no_failure(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    provider_has(monkeypatch, Abilities(responses=Found.YES))
    report = examine()
    assert (report.ok, report.status("state")) == (True, "warn")
    assert "OPENAI_STATE=stateless" in report.of("state")["advice"]
    provider_has(monkeypatch, ProviderFault(TurnReason.PROVIDER_TIMEOUT))
    report = examine()
    assert (report.ok, report.status("state")) == (True, "warn")


@pytest.mark.parametrize(("chat", "words"), [(Found.YES, "Chat Completions only"), (Found.NO, "no Responses API")])
def test_a_server_without_the_responses_api_fails_whatever_the_mode(
    examine: Any, monkeypatch: pytest.MonkeyPatch, chat: Found, words: str
) -> None:
    provider_has(monkeypatch, Abilities(Found.NO, Found.NO, Found.NO, chat))
    for mode in StateMode:
        monkeypatch.setenv("OPENAI_STATE", mode)
        check = examine().of("state")
        assert check["status"] == "fail"
        assert words in check["detail"]
        assert "OPENAI_BASE_URL" in check["advice"]


@pytest.mark.parametrize(
    ("like", "mode", "status", "words"),
    [
        ("openai", "conversation", "ok", ""),
        ("openai", "stateless", "ok", ""),
        ("vllm", "conversation", "fail", "Set OPENAI_STATE=stateless."),
        ("ollama", "stateless", "ok", ""),
        ("chat-only", "stateless", "fail", "Update it"),
    ],
)
async def test_a_server_as_it_is(
    examine: Any, monkeypatch: pytest.MonkeyPatch, like: str, mode: str, status: str, words: str
) -> None:
    async with FakeProvider(like=like, api_key=SECRET) as provider:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
        monkeypatch.setenv("OPENAI_STATE", mode)
        report = await asyncio.to_thread(examine)
        assert not provider.responses
        assert not provider.conversations
    assert report.status("state") == status
    assert report.of("state")["advice"].startswith(words)
    assert SECRET not in report.printed


async def test_a_server_that_refuses_the_key_is_asked_nothing_else(
    examine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeProvider(api_key="another") as provider:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
        report = await asyncio.to_thread(examine)
        assert {request.path for request in provider.requests} == {"/v1/models/gpt-6-luna"}
    assert report.status("provider") == "fail"
    assert "state" not in {check["name"] for check in report.checks}


def test_checks_hold_nothing_but_text() -> None:
    for check in doctor.examined():
        assert all(isinstance(value, str) for value in (check.name, check.detail, check.advice))
