"""Metrics and traces as they leave the service, on the page that Prometheus scrapes and at a collector."""

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics, rpc_metrics
from opentelemetry.semconv.attributes import error_attributes
from prometheus_client.parser import text_string_to_metric_families

from adapters.openai import retry
from collector import Collector, values
from core.model.events import ToolCalled
from core.model.turn import TurnReason
from core.ports.agent import AgentFailed
from core.ports.telemetry import UNMEASURED
from core.ports.tools import ToolOutput
from doubles import DONE, Gate, NotedTools, ScriptedAgent
from entrypoints.container import running
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.settings import SettingsError, load_settings
from fake_provider import FakeProvider, HttpError
from harness import DEADLINE, Client, message, rest_of, served, until

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "0a" * 16, "0b" * 8
USER = "user-of-this-test"
TO_A_GOAL = (
    "Hi",
    "I want to find work that counts for something",
    "I would look forward to Mondays",
    "I send one application a month",
    "I'm too tired in the evening",
    "ask Dana, or rewrite my CV",
    "asking Dana",
    "I'll write to Dana on Thursday morning",
)
"""A conversation with the practice coach in whose course it calls a tool."""


@pytest.fixture(autouse=True)
def database(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured does not depend on the database."""
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> "Page":
    """The page that Prometheus scrapes, of the service that is started in the test."""
    monkeypatch.setenv("VIDA_METRICS_LISTEN", "127.0.0.1:0")
    caplog.set_level(logging.INFO, "entrypoints.telemetry")
    return Page(caplog)


class Page:
    """Reads samples by their names."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def address(self) -> str:
        """Where the service says that it is."""
        (said,) = [record for record in self._caplog.records if record.name == "entrypoints.telemetry"]
        assert said.args
        return f"http://127.0.0.1:{said.args[0]}/metrics"  # type: ignore[index]

    async def read(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """All samples."""

        def scrape() -> str:
            with urllib.request.urlopen(self.address, timeout=DEADLINE) as answer:
                text: str = answer.read().decode()
                return text

        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(await asyncio.to_thread(scrape)):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples

    async def total(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels."""
        samples = (await self.read()).get(name, [])
        return sum(value for has, value in samples if labels.items() <= has.items())


@asynccontextmanager
async def everything(page: Page) -> AsyncIterator[Client]:
    """A service with something to tell of all that is measured."""
    async with served() as client:
        thread_id = ""
        for text in TO_A_GOAL:
            thread_id = (await client.chat(text, thread_id=thread_id))[0].event.started.thread_id
        with pytest.raises(grpc.aio.AioRpcError):
            await client.chat(" ")
        # What a service does not meet in its good days: other tests see that it is told.
        client.container.telemetry().retried("practice", TurnReason.PROVIDER_UNAVAILABLE)
        await until_measured(page, "vida_event_loop_lag_seconds_count")
        yield client


async def until_measured(page: Page, name: str, **labels: str) -> None:
    """Waits until a sample is more than 0. The test's own time limit bounds it."""
    while not await page.total(name, **labels):  # noqa: ASYNC110 - what is waited for is no event of ours
        await asyncio.sleep(0.05)


def named(expression: str) -> set[str]:
    """The metrics that a PromQL expression asks for."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b(?!\s*\()", bare))


def test_names_are_found_in_expressions() -> None:
    assert named('sum by (le, a_b) (rate(x_y_bucket{a_b=~"c_d"}[$__rate_interval])) / max_of_it > 0.5') == {
        "x_y_bucket",
        "max_of_it",
    }
    assert named("histogram_quantile(0.9, label_values(a_b, job))") == {"a_b"}


def asked_for() -> dict[str, set[str]]:
    """The metrics that the dashboard and the alert rules ask for, by the place."""
    dashboard = json.loads((ROOT / "deploy/grafana/vida-coach.json").read_text())
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    found = {
        f"panel {panel['title']} {target['refId']}": named(target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    }
    found |= {variable["name"]: named(variable["query"]) for variable in dashboard["templating"]["list"]}
    found |= {rule["alert"]: named(rule["expr"]) for group in rules["groups"] for rule in group["rules"]}
    return found


async def test_page_dashboard_alerts_and_docs_name_the_same_metrics(page: Page) -> None:
    async with everything(page):
        exported = set(await page.read())
    asked = asked_for()
    assert sum(len(names) for names in asked.values()) > 30
    for place, names in asked.items():
        assert names <= exported, place
        assert names or place == "datasource"
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported}
    documented = set(re.findall(r"`((?:[a-z0-9]+_)+[a-z]+)`", (ROOT / "docs/observability.md").read_text()))
    assert families <= documented
    # The page tells nothing that the dashboard does not show, but for what is there for every process.
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for names in asked.values() for name in names}
    assert families - shown <= {"target_info", "process_virtual_memory_bytes", "process_start_time_seconds"}
    assert {name for name in documented if name.startswith(("vida_", "gen_ai_", "rpc_"))} <= families


async def test_labels_have_few_values_and_none_from_callers(page: Page) -> None:
    async with everything(page):
        samples = await page.read()
    labels = {name for all_of_it in samples.values() for has, _ in all_of_it for name in has}
    known = "job le error_type vida_attached vida_turn_state rpc_method rpc_response_status_code rpc_system_name"
    known += " gen_ai_operation_name gen_ai_provider_name gen_ai_request_model gen_ai_token_type gen_ai_tool_name"
    known += " vida_provider_reached"
    target = {name for has, _ in samples["target_info"] for name in has}
    assert labels - target <= set(known.split())
    assert "ada" not in {value for all_of_it in samples.values() for has, _ in all_of_it for value in has.values()}


async def test_what_calls_and_turns_come_to_is_counted(page: Page) -> None:
    gate = Gate()
    agent = ScriptedAgent(
        ["Hi", DONE],
        ["Half", AgentFailed(TurnReason.PROVIDER_STALLED)],
        [ToolCalled("c1", "note", "{}"), DONE],
        ["Done.", DONE],
        ["On ", gate, "and on.", DONE],
    )
    async with served(agent, NotedTools(lambda *_: ToolOutput("no", is_error=True))) as client:
        for _ in range(3):
            await client.chat()
        turns = "vida_turn_duration_seconds_count"
        assert await page.total(turns, vida_turn_state="completed") == 2
        assert await page.total(turns, vida_turn_state="incomplete", error_type="PROVIDER_STALLED") == 1
        rounds = "gen_ai_client_operation_duration_seconds_count"
        assert await page.total(rounds, gen_ai_provider_name="scripted", gen_ai_request_model="script-1") == 4
        assert await page.total(rounds, error_type="PROVIDER_STALLED") == 1
        assert await page.total("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 15
        assert await page.total("vida_tool_duration_seconds_count", error_type="TOOL_ERROR") == 1
        assert await page.total("vida_turn_first_text_seconds_count") == 3
        assert await page.total("vida_commit_duration_seconds_count") > 6

        stream = client.agents.Chat(message(), timeout=DEADLINE)
        await stream.read()
        await gate.reached.wait()
        await until_measured(page, "vida_turns_running")
        await until_measured(page, "vida_followers")
        stream.cancel()
        calls = "rpc_server_call_duration_seconds_count"
        await until_measured(page, calls, rpc_response_status_code="CANCELLED")
        gate.open()
        with pytest.raises(grpc.aio.AioRpcError):
            await client.follow("nobody's")
        chat = "vidacoach.agents.v1.AgentService/Chat"
        assert await page.total(calls, rpc_method=chat, rpc_response_status_code="OK") == 3
        assert await page.total(calls, rpc_response_status_code="NOT_FOUND") == 1


async def test_retries_and_the_breaker_are_counted(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", (0.01, 0.01))
    monkeypatch.setattr(retry, "MAX_WAIT", 0.05)
    async with FakeProvider([HttpError()] * 9) as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", provider.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        async with served() as client:
            for user in ("ada", "eve"):
                await client.chat(user=user)
            retried = {"gen_ai_provider_name": "openai", "error_type": "PROVIDER_UNAVAILABLE"}
            assert await page.total("vida_provider_retries_total", **retried) >= 2
            await until_measured(page, "vida_provider_refusing")
            assert await page.total("vida_provider_outages_total") == 1
            with pytest.raises(grpc.aio.AioRpcError):
                await client.chat()
            assert await page.total("vida_accept_refusals_total", error_type="PROVIDER_UNAVAILABLE") == 1


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the settings point to."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector


async def test_a_turn_is_a_trace_of_its_callers(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "coach-of-this-test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20t1")
    agent = ScriptedAgent([ToolCalled("c1", "note", "{}"), DONE], ["Noted.", DONE], ["Half", ValueError("x")])
    async with served(agent, NotedTools()) as client:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        call = client.agents.Chat(message(user=USER), timeout=DEADLINE, metadata=metadata)
        started = (await call.read()).event.started
        assert await rest_of(call)
        await client.agents.SendMessage(
            api.SendMessageRequest(user_id=USER, content=message().content),
            timeout=DEADLINE,
            metadata=(("traceparent", f"00-{TRACE}-nonsense"),),
        )
    spans: dict[str, list[Span]] = {}
    for span in collector.spans:
        spans.setdefault(span.name, []).append(span)
    assert {name: len(some) for name, some in spans.items()} == {
        f"invoke_agent {started.agent_id}": 2,
        "chat script-1": 3,
        "execute_tool note": 1,
    }
    turn, broken = sorted(spans[f"invoke_agent {started.agent_id}"], key=lambda span: span.start_time_unix_nano)
    assert (turn.trace_id.hex(), turn.parent_span_id.hex()) == (TRACE, PARENT)
    assert turn.status.code == Status.STATUS_CODE_UNSET
    facts = values(turn.attributes)
    assert len(str(facts.pop("vida.request.id"))) == 36
    assert facts == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "scripted",
        "gen_ai.request.model": "script-1",
        "gen_ai.agent.id": started.agent_id,
        "gen_ai.conversation.id": started.thread_id,
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "vida.turn.id": started.turn_id,
        "vida.turn.attempt": 1,
        "vida.turn.epoch": 1,
        "vida.turn.state": "completed",
    }
    assert [event.name for event in turn.events] == ["first text"]
    (tool,) = spans["execute_tool note"]
    rounds = [span for span in spans["chat script-1"] if span.trace_id == turn.trace_id]
    assert len(rounds) == 2
    for span in (*rounds, tool):
        assert span.parent_span_id == turn.span_id
        assert turn.start_time_unix_nano <= span.end_time_unix_nano <= turn.end_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert values(span.attributes)["vida.turn.id"] == started.turn_id
    assert broken.trace_id != turn.trace_id
    assert not broken.parent_span_id
    assert (broken.status.code, broken.status.message) == (Status.STATUS_CODE_ERROR, "INTERNAL")
    assert values(broken.attributes)["error.type"] == "INTERNAL"
    assert USER.encode() not in collector.bytes
    assert b"coach-of-this-test" in collector.bytes
    assert collector.tokens == {"Bearer t1"}


async def test_what_only_begins_like_a_trace_is_none(collector: Collector) -> None:
    async with served(ScriptedAgent()) as client:
        metadata = (("traceparent", f"01-{TRACE}-{PARENT}-01-more"),)
        assert [one async for one in client.agents.Chat(message(), timeout=DEADLINE, metadata=metadata)]
    assert len(collector.spans) == 2
    assert TRACE not in {span.trace_id.hex() for span in collector.spans}


def test_what_has_a_conventional_name_is_called_so() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src/adapters/telemetry").glob("*.py"))
    ours = set(re.findall(r'"((?:gen_ai|rpc|error)\.[a-z_.]+)"', source))
    theirs = {
        value
        for module in (gen_ai_attributes, rpc_attributes, error_attributes, gen_ai_metrics, rpc_metrics)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    assert len(ours) > 15
    assert ours <= theirs


async def test_the_collector_gets_the_metrics_that_the_page_has(collector: Collector, page: Page) -> None:
    async with everything(page):
        names = {name for name in await page.read() if name.startswith(("vida_", "gen_ai_", "rpc_"))}
    families = {re.sub(r"_(seconds)?(_?(bucket|count|sum|total))?$", "", name) for name in names}
    assert {name.replace(".", "_") for name in collector.names} == families
    assert collector.traces


async def test_either_can_be_left_out(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    async with served(ScriptedAgent()) as client:
        await client.chat()
    assert (len(collector.traces), len(collector.metrics)) == (0, 1)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    async with served(ScriptedAgent()) as client:
        await client.chat()
    assert (len(collector.traces), len(collector.metrics)) == (1, 1)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    async with served(ScriptedAgent()) as client:
        await client.chat()
        assert client.container.telemetry() is UNMEASURED
    assert (len(collector.traces), len(collector.metrics)) == (1, 1)


async def test_the_sampler_is_the_standard_one(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    async with served(ScriptedAgent()) as client:
        await client.chat()
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        assert [one async for one in client.agents.Chat(message(), timeout=DEADLINE, metadata=metadata)]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}


async def test_a_turn_that_had_to_wait_is_in_its_callers_trace(collector: Collector) -> None:
    gate = Gate()
    async with served(ScriptedAgent(["first", gate, DONE])) as client:
        first = client.agents.Chat(message(), timeout=DEADLINE)
        thread_id = (await first.read()).event.started.thread_id
        await gate.reached.wait()
        request = message(thread_id=thread_id, on_busy=pb.BUSY_POLICY_QUEUE)
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
        second = client.agents.Chat(request, timeout=DEADLINE, metadata=metadata)
        turn_id = (await second.read()).event.started.turn_id
        gate.open()
        assert await rest_of(first)
        assert await rest_of(second)
    parents = {
        values(span.attributes)["vida.turn.id"] == turn_id: (span.trace_id.hex(), span.parent_span_id.hex())
        for span in collector.spans
        if span.name.startswith("invoke_agent")
    }
    assert parents[True] == (TRACE, PARENT)
    assert parents[False] != parents[True]


@pytest.fixture(params=["refuses", "is silent"])
def deaf(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a collector that takes nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "is silent":
            yield f"http://127.0.0.1:{port}"
            return
    yield f"http://127.0.0.1:{port}"


async def test_a_collector_that_takes_nothing_keeps_nobody_waiting(
    deaf: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", deaf)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    caplog.set_level(logging.DEBUG)

    def warnings() -> list[str]:
        return sorted(record.getMessage() for record in caplog.records if "deliver" in record.getMessage())

    async with served(ScriptedAgent()) as client:
        await client.chat()
        await until(lambda: len(warnings()) == 2)
        begun = time.monotonic()
        for _ in range(20):
            await client.chat()
        assert time.monotonic() - begun < 5
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 5
    assert [words.split()[0] for words in warnings() if "can't be delivered" in words] == ["metrics", "traces"]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry.exporter")]


async def test_a_collector_that_comes_back_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    collector = Collector()  # has an address and does not answer yet
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    async with served(ScriptedAgent()):
        await until(lambda: "metrics can't be delivered" in caplog.text)
        with collector:
            await until(lambda: "metrics are delivered again" in caplog.text)


def test_nothing_of_it_is_imported_where_nobody_measures(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from harness import served\n"
        "async def main():\n"
        "    async with served() as client:\n"
        "        assert len(await client.chat()) > 2\n"
        "asyncio.run(main())\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    path = f"{ROOT / 'src'}:{ROOT / 'tests'}"
    environ = {
        "PYTHONPATH": path,
        "PATH": "",
        "XDG_DATA_HOME": str(tmp_path),
        "VIDA_PRACTICE_WORDS_PER_SECOND": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.split())
    assert "grpc" in modules
    assert modules & {"opentelemetry", "prometheus_client", "grpc_channelz"} == set()


async def test_the_page_ends_with_the_service(page: Page) -> None:
    async with served(ScriptedAgent()):
        assert await page.read()
    with pytest.raises(OSError, match="refused"):
        await page.read()


async def test_a_page_needs_a_free_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("VIDA_METRICS_LISTEN", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SettingsError, match="VIDA_METRICS_LISTEN"):
            async with running(load_settings(), watching=True):
                pytest.fail("it started")


@pytest.mark.parametrize(
    "settings",
    [
        {"TIMEOUT": "kanarienvogel"},
        {"COMPRESSION": "kanarienvogel"},
        {"ENDPOINT": "https://127.0.0.1:1", "CERTIFICATE": "/"},
    ],
    ids=["a number", "a choice", "a file"],
)
async def test_what_the_sdk_can_not_use_is_a_settings_fault(
    settings: dict[str, str], collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    with pytest.raises(SettingsError, match="an OTEL_ setting") as error:
        async with running(load_settings(), watching=True):
            pytest.fail("it started")
    assert "kanarienvogel" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"VIDA_METRICS_LISTEN": "0.0.0.0:0"}, [], "--insecure"),
        ({"VIDA_CHANNELZ": "true"}, ["--listen", "0.0.0.0:0", "--insecure"], "VIDA_CHANNELZ"),
    ],
    ids=["page", "channelz"],
)
def test_nothing_of_it_is_shown_to_everybody(settings: dict[str, str], arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "entrypoints.cli.main", "serve", *arguments]
    environ = {"PYTHONPATH": str(ROOT / "src"), **settings}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


async def channelz(client: Client) -> Any:
    """What gRPC says of its servers."""
    stub: Any = channelz_pb2_grpc.ChannelzStub(client.channel)
    return await stub.GetServers(channelz_pb2.GetServersRequest(), timeout=DEADLINE)


async def test_channelz_is_behind_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(ScriptedAgent()) as client:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channelz(client)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    monkeypatch.setenv("VIDA_CHANNELZ", "true")
    async with served(ScriptedAgent()) as client:
        await client.chat()
        found = await channelz(client)
        assert sum(server.data.calls_succeeded for server in found.server) >= 1
