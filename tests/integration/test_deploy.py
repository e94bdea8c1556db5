"""What is in deploy/ agrees with the code: names of settings, commands, ports, and how long things take."""

import asyncio
import configparser
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier
from typing import Any

import psycopg
import pytest
import yaml
from grpc_health.v1 import health_pb2
from pydantic import SecretStr

import http2
from adapters.sql.engines import READERS, SESSION_SETTINGS
from entrypoints.cli.main import command_line
from entrypoints.cli.serve import _FILES_BESIDE_TURNS
from entrypoints.container import _stream_seconds
from entrypoints.hosting import _LAST_CALLS
from entrypoints.settings import Settings
from faults.process import pythonpath
from harness import served

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
MARGIN = 5.0
"""Seconds that a process may take to leave when it waits for nothing more."""


@pytest.fixture
def defaults() -> Settings:
    """The settings of an environment without any."""
    return Settings()


def text(name: str) -> str:
    """One of the files."""
    return (DEPLOY / name).read_text(encoding="utf-8")


def compose() -> dict[str, Any]:
    """The services of the compose file."""
    services: dict[str, Any] = yaml.safe_load(text("compose.yaml"))["services"]
    return services


def kubernetes(kind: str) -> list[dict[str, Any]]:
    """The objects of a kind."""
    objects = [each for path in DEPLOY.glob("kubernetes/*") for each in yaml.safe_load_all(path.read_text())]
    found = [each for each in objects if each["kind"] == kind]
    assert found
    return found


def unit(name: str) -> configparser.ConfigParser:
    """A unit of systemd."""
    parsed = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=", comment_prefixes="#")
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(text(f"systemd/{name}"))
    return parsed


def instructions(name: str) -> list[str]:
    """What follows an instruction of the image's, wherever it is given."""
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def pods() -> list[dict[str, Any]]:
    """What all pods are made after."""
    made = [each["spec"]["template"]["spec"] for each in kubernetes("Deployment")]
    made += [each["spec"]["jobTemplate"]["spec"]["template"]["spec"] for each in kubernetes("CronJob")]
    return made


def commands() -> Iterator[list[str]]:
    """Every command line that something runs."""
    yield json.loads(instructions("CMD")[-1])
    yield from (service["command"] for service in compose().values() if "command" in service)
    yield from (container["args"] for pod in pods() for container in containers(pod))
    for name in ("vida-coach@.service", "vida-coach-cleanup.service"):
        for key, line in unit(name)["Service"].items():
            if key.startswith("Exec"):
                program, *arguments = shlex.split(line.replace("%i", "50051"))
                assert Path(program).name == "vida-coach"
                yield arguments


def seconds(words: str) -> float:
    """A time as it is written there: 200s."""
    return float(words.removesuffix("s"))


def test_every_setting_that_is_named_is_one() -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    named = {name for path in FILES for name in re.findall(r"\b(?:VIDA|OPENAI|OTEL)_[A-Z_]+\b", path.read_text())}
    assert "VIDA_DATABASE_URL" in named
    assert named <= known


def test_every_command_line_is_understood() -> None:
    found = [command_line().parse_args(arguments).run.__module__ for arguments in commands()]
    assert {module.rpartition(".")[2] for module in found} == {"serve", "migrate", "cleanup"}


def test_who_stops_a_process_waits_until_it_has_drained(defaults: Settings) -> None:
    for service in (compose()["replica-a"], compose()["replica-b"]):
        assert seconds(service["stop_grace_period"]) >= defaults.drain + _LAST_CALLS + MARGIN
    stop = float(unit("vida-coach@.service")["Service"]["TimeoutStopSec"])
    assert stop >= defaults.drain + _LAST_CALLS + MARGIN
    (settings,), (deployment,) = kubernetes("ConfigMap"), kubernetes("Deployment")
    pod = deployment["spec"]["template"]["spec"]
    before = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    there = Settings(**settings["data"])
    assert there.drain >= there.turn_budget
    assert pod["terminationGracePeriodSeconds"] >= before + there.drain + _LAST_CALLS + MARGIN


def test_the_proxy_is_more_patient_than_any_stream(defaults: Settings) -> None:
    found = dict(re.findall(r"^    timeout (client|server) (\w+)$", text("haproxy.cfg"), re.MULTILINE))
    assert set(found) == {"client", "server"}
    assert min(map(seconds, found.values())) > _stream_seconds(defaults)
    assert seconds(compose()["proxy"]["stop_grace_period"]) > _stream_seconds(defaults)


def test_the_proxy_asks_for_the_health_of_each_replica() -> None:
    sent = "".join(re.findall(r"tcp-check send-binary (\w+)", text("haproxy.cfg")))
    headers = http2.request_headers("proxy", "/grpc.health.v1.Health/Check")
    asked = [
        http2.PREFACE,
        http2.settings(),
        http2.frame(http2.HEADERS, http2.END_HEADERS, 1, headers),
        http2.frame(http2.DATA, http2.END_STREAM, 1, http2.message(b"")),
    ]
    assert bytes.fromhex(sent) == b"".join(asked)
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    (expected,) = re.findall(r"tcp-check expect binary (\w+)", text("haproxy.cfg"))
    assert bytes.fromhex(expected) == http2.message(serving.SerializeToString())
    assert re.findall(r"\$\{REPLICA_\w-(.*):\d+\}", text("haproxy.cfg")) == ["replica-a", "replica-b"]
    assert {"replica-a", "replica-b"} < set(compose())


def test_there_is_one_port(defaults: Settings) -> None:
    port = int(defaults.listen.rpartition(":")[2])
    (settings,) = kubernetes("ConfigMap")
    ports = [Settings(**settings["data"]).listen.rpartition(":")[2], *instructions("EXPOSE")]
    ports += re.findall(r"VIDA_LISTEN=0\.0\.0\.0:(\d+)", text("Dockerfile"))
    ports += re.findall(r"\$\{[A-Z_]+-[a-z-]*:(\d+)\}", text("haproxy.cfg"))
    ports += compose()["proxy"]["ports"][0].split(":")[1:]
    ports += [each["port"] for service in kubernetes("Service") for each in service["spec"]["ports"]]
    (serving,) = kubernetes("Deployment")[0]["spec"]["template"]["spec"]["containers"]
    listening = {each["name"]: each["containerPort"] for each in serving["ports"]}
    ports.append(listening.pop("grpc"))
    assert Settings(**settings["data"]).metrics_address == ("0.0.0.0", listening.pop("metrics"))
    assert not listening
    probes = [serving[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    ports += [probe["grpc"]["port"] for probe in probes]
    assert {int(each) for each in ports} == {port}
    assert len(ports) == 14


def test_a_process_has_the_files_that_it_needs(defaults: Settings) -> None:
    limit = int(unit("vida-coach@.service")["Service"]["LimitNOFILE"])
    assert limit >= 2 * defaults.max_turns + _FILES_BESIDE_TURNS


def test_the_image_has_a_python_that_will_do() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (given,) = (line.removeprefix("PYTHON=") for line in instructions("ARG"))
    assert wanted.startswith(">=")
    assert tuple(map(int, given.split("."))) >= tuple(map(int, wanted[2:].split(".")))
    assert set(instructions("FROM")) == {"python:${PYTHON}-slim AS build", "python:${PYTHON}-slim"}
    copied = [each.split()[0] for each in instructions("COPY") if not each.startswith("--from")]
    let_in = {line[1:] for line in text("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    assert {name for line in instructions("COPY") for name in line.split() if (ROOT / name).exists()} >= let_in
    assert set(copied) <= let_in


async def test_the_image_knows_whether_it_is_well(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    (line,) = instructions("HEALTHCHECK")
    command, *arguments = json.loads(line.partition(" CMD ")[2])
    assert command == "vida-coach"

    async def is_well(address: str) -> bool:
        environ = {**os.environ, "PYTHONPATH": pythonpath(), "VIDA_LISTEN": address}
        check = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "entrypoints.cli.main"), *arguments, env=environ
        )
        return await check.wait() == 0

    async with served() as client:
        assert await is_well(client.address.replace("127.0.0.1", "0.0.0.0"))
    assert not await is_well(client.address)


def test_no_pod_may_do_what_it_need_not() -> None:
    names = {str(field.validation_alias): field.annotation for field in Settings.model_fields.values()}
    secret = {name for name, kind in names.items() if "SecretStr" in str(kind)}
    assert SecretStr.__name__ in str(names["VIDA_DATABASE_URL"])
    assert not secret & set(kubernetes("ConfigMap")[0]["data"])
    for pod in pods():
        assert pod["enableServiceLinks"] is False  # VIDA_COACH_PORT and its like would be refused
        assert pod["securityContext"]["runAsNonRoot"]
        assert f"{pod['securityContext']['runAsUser']}:10001" == instructions("USER")[-1]
        for container in containers(pod):
            confined = container["securityContext"]
            assert (confined["readOnlyRootFilesystem"], confined["allowPrivilegeEscalation"]) == (True, False)
            assert confined["capabilities"] == {"drop": ["ALL"]}


def test_the_cron_job_takes_another_cleanup_for_no_failure() -> None:
    (job,) = kubernetes("CronJob")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    rules = job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert {rule["action"]: rule["onExitCodes"]["values"] for rule in rules} == {"Ignore": [75], "FailJob": [2]}
    assert unit("vida-coach-cleanup.service")["Service"]["SuccessExitStatus"] == "75"


def test_kubernetes_gets_every_file() -> None:
    (every,) = kubernetes("Kustomization")
    assert {*every["resources"], "kustomization.yaml"} == {path.name for path in DEPLOY.glob("kubernetes/*")}
    images = {container["image"] for pod in pods() for container in containers(pod)}
    assert {each["name"] for each in every["images"]} == images


def test_a_pooler_is_told_what_sessions_ask_for() -> None:
    page = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^ALTER ROLE \w+ SET (\w+) = '(\w+)';$", page, re.MULTILINE)) == SESSION_SETTINGS


async def test_a_process_has_as_many_connections_to_postgresql_as_is_said(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", postgres_url)
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    page = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
    together = Barrier(READERS, timeout=10)
    async with served() as client:
        store = client.container.store()
        await asyncio.gather(*(store.read(lambda _: together.wait()) for _ in range(READERS)))
        await asyncio.gather(*(client.chat(user=f"user-{number}") for number in range(40)))
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with psycopg.connect(postgres_url) as connection:
            row = connection.execute(query).fetchone()
    assert row == (READERS + 2,)
    assert f"{READERS + 2} connections to PostgreSQL" in page
