"""Nothing personal leaks sideways: canaries in every field, none in logs, metrics, traces, or in what callers are
told of errors."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2
from openai._utils._logs import setup_logging as setup_openai_logging

from adapters.openai import retry
from collector import Collector
from core.model.events import TextDelta, ToolCalled
from core.model.thread import ProviderState
from core.model.turn import TurnReason
from core.ports.agent import AgentFailed, StateChanged
from core.ports.tools import ToolContext, ToolOutput
from doubles import DONE, Gate, NotedTools, ScriptedAgent, Step
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from fake_provider import Answer, Break, Call, FakeProvider, HttpError, Text
from harness import DEADLINE, Client, detail, message, reason, served
from loud import loud_logging

CANARY = "kanarienvogel"
MARK = "a line that must be seen"


class Chatty(Exception):
    """An exception whose every form quotes its text."""

    def __repr__(self) -> str:
        return f"Chatty({self.args!r})"


def explode(text: str) -> Exception:
    """An exception with causes, notes and friends, all of which talk."""
    error = Chatty(f"{CANARY}-{text}")
    error.add_note(f"{CANARY}-note")
    error.__cause__ = ExceptionGroup(f"{CANARY}-group", [ValueError(f"{CANARY}-inner")])
    error.__cause__.__cause__ = UnicodeEncodeError("utf-8", f"{CANARY}-\ud800", 0, 1, f"{CANARY}-why")
    return error


@dataclass
class Outlets:
    """All that the service says of itself: its log, and what a collector has received."""

    log: io.StringIO
    collector: Collector


@pytest.fixture(params=["text", "json"])
def out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Iterator[Outlets]:
    """What is said at the most talkative."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={CANARY}-collector")
    monkeypatch.setenv("VIDA_LOG_FORMAT", request.param)
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    with loud_logging(monkeypatch) as written, Collector() as collector:
        monkeypatch.setenv("OPENAI_LOG", "debug")
        setup_openai_logging()  # which sets a level of its own
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield Outlets(written, collector)


def told(error: grpc.aio.AioRpcError) -> str:
    """Everything that a refused caller is given."""
    return repr((error.details(), error.debug_error_string(), error.trailing_metadata(), error.initial_metadata()))


async def refused(call: Any, why: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert reason(error.value) == why
    assert CANARY not in told(error.value)


async def answer(client: Client, **more: object) -> pb.Turn:
    """Says a canary; returns the ended turn, whose error may not repeat it."""
    request = api.SendMessageRequest(
        user_id="ada",
        content=[pb.ContentPart(text=f"{CANARY}-message")],
        **more,  # type: ignore[arg-type]
    )
    response = await client.agents.SendMessage(request, timeout=DEADLINE)
    assert CANARY not in str(response.turn)
    turn: pb.Turn = response.turn
    return turn


def checked(out: Outlets, *expected: str) -> None:
    """No canary, and not because nothing was written."""
    logging.getLogger("entrypoints.test").debug(MARK)
    lines = out.log.getvalue()
    for words in (MARK, *expected):
        assert words in lines
    assert CANARY not in lines
    assert "Traceback" not in lines
    assert CANARY.encode() not in out.collector.bytes


async def test_no_path_through_a_turn_writes_what_was_said(out: Outlets) -> None:
    state = ProviderState(provider="scripted", conversation_id=f"{CANARY}-conversation")
    scripts: list[list[Step]] = [
        [f"{CANARY}-reply", StateChanged(state), DONE],
        [ToolCalled("c1", "note", f'{{"a": "{CANARY}-arguments"}}'), DONE],
        [f"{CANARY}-after", DONE],
        [TextDelta(f"{CANARY}-refusal", refusal=True), DONE],
        [f"{CANARY}-half", explode("agent")],
        [explode("at once")],
        [AgentFailed(TurnReason.PROVIDER_PROTOCOL).with_traceback(None)],
        [f"{CANARY}-truncated"],
        [ToolCalled("c1", f"{CANARY}-tool", "{}"), DONE],
        [ToolCalled("c1", "note", "x" * 70_000 + CANARY), DONE],
        [StateChanged(ProviderState(provider="scripted", conversation_id=CANARY * 100))],
    ]

    def output(arguments: str, _: ToolContext) -> ToolOutput:
        return ToolOutput(f"{CANARY}-result")

    async with served(ScriptedAgent(*scripts), NotedTools(output)) as client:
        first = await answer(client, metadata={"k": f"{CANARY}-metadata"}, request_id=f"{CANARY}-request")
        assert first.state == pb.TURN_STATE_COMPLETED
        states = [(await answer(client)).error.reason for _ in range(8)]
        assert states.count("INTERNAL") >= 2
        assert "PROVIDER_PROTOCOL" in states
        assert "PROVIDER_TRUNCATED" in states
    checked(out, "Chatty at", " failed")
    assert len(out.collector.spans) == 9 + 11 + 1  # turns, their rounds, and a tool
    assert out.collector.metrics
    assert out.collector.tokens == {f"{CANARY}-collector"}


async def test_tools_that_fail_keep_it_to_themselves(out: Outlets) -> None:
    def fail(arguments: str, _: ToolContext) -> ToolOutput:
        raise explode("tool")

    script: list[Step] = [ToolCalled("c1", "note", f'"{CANARY}"'), DONE]
    async with served(ScriptedAgent(script), NotedTools(fail)) as client:
        turn = await answer(client)
        assert turn.error.reason == "INTERNAL"
    checked(out, "Chatty at")


async def test_no_refusal_repeats_what_was_sent(out: Outlets) -> None:
    async with served(ScriptedAgent()) as client:
        thread_id = (await answer(client, request_id=CANARY)).thread_id
        send = client.agents.SendMessage
        text = pb.ContentPart(text=f"{CANARY} \0")
        asked = threads_api.ListThreadsRequest
        mask = field_mask_pb2.FieldMask(paths=[CANARY])
        long_title = pb.Thread(id=thread_id, title=CANARY * 100)
        title = field_mask_pb2.FieldMask(paths=["title"])
        update = threads_api.UpdateThreadRequest
        update_thread, delete = client.threads.UpdateThread, client.threads.DeleteThread
        for call, why in (
            (send(api.SendMessageRequest(user_id=CANARY, content=[text])), "INVALID_FIELD"),
            (send(api.SendMessageRequest(user_id=CANARY * 100, content=[text])), "INVALID_FIELD"),
            (
                send(api.SendMessageRequest(user_id="ada", request_id=CANARY * 100, content=[text])),
                "INVALID_FIELD",
            ),
            (client.chat(CANARY, request_id=CANARY), "REQUEST_ID_REUSED"),
            (client.chat(CANARY, thread_id=CANARY), "THREAD_NOT_FOUND"),
            (client.chat(CANARY, thread_id=thread_id, metadata={"k": CANARY}), "INVALID_FIELD"),
            (client.chat(CANARY, metadata={CANARY * 20: ""}), "INVALID_FIELD"),
            (client.follow(CANARY), "TURN_NOT_FOUND"),
            (delete(threads_api.DeleteThreadRequest(user_id="ada", thread_id=CANARY)), "THREAD_NOT_FOUND"),
            (client.threads.ListThreads(asked(user_id="ada", page_token=CANARY)), "INVALID_FIELD"),
            (update_thread(update(user_id="ada", thread=long_title, update_mask=mask)), "INVALID_FIELD"),
            (update_thread(update(user_id="ada", thread=long_title, update_mask=title)), "INVALID_FIELD"),
        ):
            await refused(call, why)
        raw: Any = client.channel.unary_unary("/vidacoach.agents.v1.AgentService/SendMessage")
        await refused(raw(b"\x0a\xff" + CANARY.encode(), timeout=DEADLINE), "MALFORMED_REQUEST")
        headers = ("x-canary", "traceparent", "tracestate", "baggage")
        metadata = (*((header, CANARY) for header in headers), ("authorization", f"Bearer {CANARY}"))
        stream = client.agents.Chat(message(CANARY), timeout=DEADLINE, metadata=metadata)
        assert [response async for response in stream]
    checked(out)


async def test_what_nobody_foresaw_stays_inside(out: Outlets) -> None:
    async with served(ScriptedAgent()) as client:

        async def fail(*_: object, **__: object) -> None:
            raise explode("handler")

        class Broken:
            def __getattr__(self, name: str) -> Any:
                return fail

        agents: Any = client.container.agent_service()
        threads: Any = client.container.thread_service()
        agents._threads = threads._threads = Broken()
        agents._cancel = agents._accept = threads._delete = fail
        ids = {"user_id": "ada", "turn_id": CANARY}
        for call in (
            client.chat(CANARY),
            client.agents.SendMessage(api.SendMessageRequest(user_id=CANARY)),
            client.agents.GetTurn(api.GetTurnRequest(**ids)),
            client.agents.CancelTurn(api.CancelTurnRequest(**ids)),
            client.threads.GetThread(threads_api.GetThreadRequest(user_id="ada", thread_id=CANARY)),
            client.threads.ListMessages(threads_api.ListMessagesRequest(user_id="ada", thread_id=CANARY)),
            client.threads.ListThreads(threads_api.ListThreadsRequest(user_id=CANARY)),
            client.threads.DeleteThread(threads_api.DeleteThreadRequest(user_id="ada", thread_id=CANARY)),
        ):
            await refused(call, "INTERNAL")
    checked(out, "failed, request", "Chatty at", "ExceptionGroup")


async def test_a_store_that_refuses_words_does_not_repeat_them(out: Outlets) -> None:
    """Such as no check foresaw: the driver's own error quotes the statement's values."""
    async with served(ScriptedAgent()) as client:
        store = client.container.store()
        turn = await answer(client)

        def bad(tx: Any) -> None:
            tx.threads.describe(turn.thread_id, title=f"{CANARY}\ud800", metadata=None)

        for call in (store.write, store.read):
            with pytest.raises(Exception) as error:  # any, as long as it is quiet
                await call(bad)
            logging.getLogger("entrypoints.test").error("failed", exc_info=error.value)
    checked(out, "failed")


async def test_what_a_provider_says_stays_inside(out: Outlets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_BACKOFF", (0.01, 0.01))
    key = f"sk-{CANARY}"
    words = f"Incorrect API key provided: {key}. You said {CANARY}."
    async with FakeProvider(api_key=key) as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.base_url}")
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setenv("OPENAI_MODEL", "gpt-6-luna")
        provider.then(
            Answer(output=(Call("set_goal", f'{{"goal": "{CANARY}"}}'),)),
            Answer(output=(Text(text=f"{CANARY} it is."),)),
            HttpError(status=401, message=words, param=CANARY),
            HttpError(status=400, body=json.dumps({"error": f"{CANARY}"}).encode()),
            HttpError(status=500, body=f"{CANARY}".encode()),
            HttpError(status=429, message=words, headers={"x-request-id": "req_1", "retry-after": "0"}),
            Answer(output=(Text(text=f"{CANARY} breaks off"),), fault=Break(how="malformed")),
        )
        async with served() as client:
            reasons = [(await answer(client)).error.reason for _ in range(4)]
            assert reasons[0] == ""
            assert "PROVIDER_CONFIG" in reasons
        assert provider.requests
        monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}-wrong")
        async with served() as client:
            assert (await answer(client)).error.reason == "PROVIDER_CONFIG"
    checked(out, "provider fault")
    assert {span.name for span in out.collector.spans} >= {"chat gpt-6-luna", "execute_tool set_goal"}


async def test_what_nobody_waited_for_is_told_without_its_words(out: Outlets) -> None:
    async with served(ScriptedAgent()):
        asyncio.get_running_loop().call_exception_handler(
            {"message": "an exception was never retrieved", "exception": explode("task"), "task": CANARY}
        )
    checked(out, "event loop: an exception was never retrieved")


async def test_lines_say_which_call_turn_and_thread_they_are_about(out: Outlets) -> None:
    gone = Gate()
    async with served(ScriptedAgent(["Half", gone, explode("agent")])) as client:
        stream = client.agents.Chat(message(), timeout=DEADLINE)
        started = (await stream.read()).event.started
        stream.cancel()
        gone.open()
        await client.follow(started.turn_id)

        async def fail(*_: object) -> None:
            raise explode("handler")

        agents: Any = client.container.agent_service()
        agents._cancel = fail
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.agents.CancelTurn(api.CancelTurnRequest(user_id="ada", turn_id=started.turn_id))
        info = detail(error.value, error_details_pb2.RequestInfo)
    assert info is not None
    failed, unforeseen = (
        next(line for line in out.log.getvalue().splitlines() if words in line)
        for words in (f"turn {started.turn_id} failed", "CancelTurn failed")
    )
    if failed.startswith("{"):
        about, refused_call = json.loads(failed), json.loads(unforeseen)
    else:
        about, refused_call = (
            dict(word.split("=", 1) for word in line.split() if "=" in word) for line in (failed, unforeseen)
        )
    assert (about["turn_id"], about["thread_id"]) == (started.turn_id, started.thread_id)
    assert about["request_id"] != refused_call["request_id"] == info.request_id
    assert about["caller"] == refused_call["caller"] == "local"
    assert "turn_id" not in refused_call
    checked(out)


@pytest.mark.parametrize(
    "name", ["openai", "httpx2", "aiohttp", "sqlalchemy.engine", "asyncio", "grpc", "opentelemetry.sdk", "a.tool"]
)
@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG], ids=["as it comes", "talkative"])
def test_libraries_that_quote_are_quiet(out: Outlets, name: str, level: int) -> None:
    """Whatever level they have set for themselves, as some do where a variable of their own says so."""
    logging.getLogger(name).setLevel(level)
    logging.getLogger(name).debug(CANARY)
    logging.getLogger(name).info(CANARY)
    logging.getLogger(name).warning("something is wrong")
    checked(out, "something is wrong")
