"""`serve`, `chat` and `doctor` with certificates and tokens, as they are run from a shell."""

import asyncio
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from certificates import Pair
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.cli.main import main
from entrypoints.client import AsyncCoachClient, CoachClient, ServiceError, TokenFile, connect, connect_async, tls
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import AgentServiceStub
from harness import message
from identity_lab import APP, BATCH, Lab, bearer

COMMAND = [sys.executable, "-m", "entrypoints.cli.main"]
SRC = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def lab(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("PYTHONPATH", SRC)
    return Lab(tmp_path, monkeypatch)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends with a usage error."""
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_serve_on_the_network_needs_tls_and_somebody_to_trust(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = ("serve", "--listen", "0.0.0.0:0")
    assert "without VIDA_TLS_CERT" in refused(capsys, *serve)
    lab.set(client_ca=False, policy=False)
    monkeypatch.delenv("VIDA_TLS_CERT")
    monkeypatch.delenv("VIDA_TLS_KEY")
    assert "every token" in refused(capsys, *serve)  # tokens in the clear
    lab.set(client_ca=False, tokens=False, policy=False)
    for name in ("ISSUER", "AUDIENCE", "JWKS"):
        monkeypatch.delenv(f"VIDA_AUTH_{name}")
    said = refused(capsys, *serve)
    assert "without VIDA_TLS_CLIENT_CA or VIDA_AUTH_ISSUER" in said
    assert "--insecure" in said


def test_serve_tells_all_faults_of_its_files(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.set()
    lab.key.write_bytes(lab.pair(APP).key)
    lab.jwks.unlink()
    lab.policy.write_text("x = 1")
    said = refused(capsys, "serve")
    for name in ("VIDA_TLS_KEY", "VIDA_AUTH_JWKS", "VIDA_AUTH_POLICY"):
        assert f"  {name}: " in said


@asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A process that serves, and its port."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*COMMAND, "serve", *arguments, stdout=pipe, stderr=pipe)
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"listening on .*:(\d+)\n", line)
        assert found is not None, (await process.communicate())[1].decode()
        yield int(found[1]), process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize("others", [(True, False), (False, True)], ids=["certificates", "tokens"])
async def test_serve_on_the_network_with_an_identity(others: tuple[bool, bool], lab: Lab) -> None:
    lab.set(client_ca=others[0], tokens=others[1], policy=False)
    async with (
        serving("--listen", "0.0.0.0:0") as (port, process),
        lab.channel(f"127.0.0.1:{port}", APP if others[0] else None) as channel,
    ):
        token = lab.issuer.token("ada") if others[1] else None
        client = AsyncCoachClient(channel, "ada", token=(lambda: token) if token else None)
        assert len(await client.agents()) == 4
        process.terminate()
        _, said = await process.communicate()
        assert b"warning" not in said


async def test_insecure_serves_with_a_warning(lab: Lab) -> None:
    async with serving("--listen", "0.0.0.0:0", "--insecure") as (port, process):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert len(await AsyncCoachClient(channel, "ada").agents()) == 4
        process.terminate()
        _, said = await process.communicate()
        assert b"vida-coach: warning: 0.0.0.0 is not a loopback address" in said


async def chat(lines: str, *arguments: str) -> tuple[int, str, str]:
    """Runs `vida-coach chat`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "chat", *arguments, stdin=pipe, stdout=pipe, stderr=pipe, env={**os.environ, "PYTHONPATH": SRC}
    )
    out, err = await process.communicate(lines.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_chat_shows_a_certificate_and_a_token(lab: Lab, tmp_path: Path) -> None:
    lab.set()
    ca, cert, key, token = (tmp_path / name for name in ("ca", "cert", "key", "token"))
    ca.write_bytes(lab.authority.pem)
    lab.pair(APP).write(cert, key)
    token.write_text(f"{lab.issuer.token('ada')}\n")
    async with lab.served(ScriptedAgent(["Hello Ada", DONE])) as client:
        server = ("--server", client.address, "--user", "ada")
        files = ("--ca", str(ca), "--cert", str(cert), "--key", str(key))
        assert await chat("hi\n", *server, *files, "--token-file", str(token)) == (0, "Hello Ada\n", "")
        code, out, said = await chat("hi\n", *server, *files)
        assert (code, out) == (1, "")
        assert "UNAUTHENTICATED" in said
        code, out, said = await chat("hi\n", *server)
        assert (code, out) == (1, "")
        assert "no service answers" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cert", "x"), "--cert and --key need each other"),
        (("--key", "x", "--ca", "x"), "--cert and --key need each other"),
        (("--key", "x", "--cert", "x"), "--cert needs --ca"),
        (("--server", "vida.example:1", "--token-file", "x"), "--token-file needs --ca"),
        (("--token-file", "x"), "name it with --server"),
    ],
    ids=str,
)
def test_chat_sends_nothing_in_the_clear(
    arguments: tuple[str, ...], words: str, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "chat", *arguments)


async def test_a_token_may_be_renewed_while_it_is_in_use(lab: Lab, tmp_path: Path) -> None:
    lab.set()
    ca, cert, key, file = (tmp_path / name for name in ("ca", "cert", "key", "token"))
    ca.write_bytes(lab.authority.pem)
    lab.pair(APP).write(cert, key)
    file.write_text(lab.issuer.token("ada", seconds=-60))
    async with lab.served(ScriptedAgent()) as service:
        credentials = tls(ca, cert, key)
        async with connect_async(service.address, credentials=credentials) as channel:
            client = AsyncCoachClient(channel, "ada", token=TokenFile(file))
            with pytest.raises(ServiceError) as error:
                await client.agents()
            assert error.value.reason == "UNAUTHENTICATED"
            file.write_text(lab.issuer.token("ada") + "\n")
            assert len(await client.agents()) == 4
            async with client.say("Hello") as reply:
                events = [event async for event in reply]
            assert isinstance(events[-1], pb.TurnFinished)

        def synchronously() -> object:
            with connect(service.address, credentials=credentials) as channel:
                client = CoachClient(channel, "ada", token=TokenFile(file))
                with client.say("Hello", thread_id=reply.thread_id) as other:
                    return list(other)[-1]

        assert isinstance(await asyncio.to_thread(synchronously), pb.TurnFinished)


async def test_a_certificate_alone_is_enough_where_it_is(lab: Lab, tmp_path: Path) -> None:
    lab.set()
    ca, cert, key = (tmp_path / name for name in ("ca", "cert", "key"))
    ca.write_bytes(lab.authority.pem)
    lab.pair(BATCH).write(cert, key)
    async with (
        lab.served(ScriptedAgent()) as service,
        connect_async(service.address, credentials=tls(ca, cert, key)) as channel,
    ):
        assert (await AsyncCoachClient(channel, "ada").threads())[0] == []


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]], str]:
    code = main(["doctor", "--format", "json"])
    printed = capsys.readouterr().out
    return code, {check["name"]: check for check in json.loads(printed)["checks"]}, printed


def test_doctor_looks_at_certificates_and_keys(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {"tls", "tokens"} & examined(capsys)[1].keys()
    lab.set()

    def renewed(days: int) -> Pair:
        pair = lab.authority.issue(name="x", valid=timedelta(days=days, hours=1))
        pair.write(lab.certificate, lab.key)
        return pair

    for days, status, code in ((14, "ok", 0), (13, "warn", 0), (-2, "fail", 1)):
        pair = renewed(days)
        ended, checks, printed = examined(capsys)
        assert (ended, checks["tls"]["status"]) == (code, status)
        assert checks["tokens"]["status"] == "ok"
        assert pair.key.decode()[30:60] not in printed
    renewed(30)
    monkeypatch.setenv("VIDA_AUTH_JWKS", "http://127.0.0.1:1/keys")
    ended, checks, _ = examined(capsys)
    assert (ended, checks["tokens"]["status"]) == (1, "fail")
    lab.key.unlink()
    ended, checks, _ = examined(capsys)
    assert ended == 1
    assert checks["settings"]["detail"].startswith("VIDA_TLS_KEY: ")


def test_doctor_says_who_needs_a_certificate_and_what_is_in_the_clear(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.set()
    assert "clients need one too" in examined(capsys)[1]["tls"]["detail"]
    monkeypatch.delenv("VIDA_TLS_CLIENT_CA")
    assert "clients" not in examined(capsys)[1]["tls"]["detail"]
    for name in ("VIDA_TLS_CERT", "VIDA_TLS_KEY"):
        monkeypatch.delenv(name)
    code, checks, _ = examined(capsys)
    assert (code, checks["tls"]["status"]) == (0, "info")
    assert "in the clear" in checks["tls"]["detail"]


async def health(*arguments: str) -> int:
    """What the command ends with, run as a process of its own would."""
    return await asyncio.to_thread(main, ["health", *arguments])


async def test_health_is_asked_for_over_tls(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.set(client_ca=False)
    async with lab.served(ScriptedAgent(), None) as client:
        assert await health("--server", client.address) == 0
        assert capsys.readouterr().out == f"{client.address} is SERVING\n"
        with monkeypatch.context() as other:  # believed is our certificate, not whoever has one
            lab.authority.issue(name="other", hosts=("127.0.0.1",)).write(tmp_path / "o.pem", tmp_path / "o.key")
            other.setenv("VIDA_TLS_CERT", str(tmp_path / "o.pem"))
            assert await health("--server", client.address) == 1
        assert await health("--server", client.address.replace("127.0.0.1", "192.0.2.1")) == 2
    assert await health("--server", client.address) == 1


@pytest.mark.parametrize("hosts", [("coach.example",), ("*.example",), ()], ids=["a host", "a wildcard", "a name"])
async def test_health_believes_our_certificate_whatever_it_is_for(lab: Lab, hosts: tuple[str, ...]) -> None:
    lab.set(client_ca=False)
    lab.authority.issue(name="coach", hosts=hosts).write(lab.certificate, lab.key)
    async with lab.served(ScriptedAgent(), None) as client:
        assert await health("--server", client.address) == 0


async def test_health_is_asked_for_where_it_is_answered_or_where_one_says(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.set(client_ca=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("VIDA_HEALTH_LISTEN", f"127.0.0.1:{port}")
    async with lab.served(ScriptedAgent(), None) as client:
        assert await health() == 0  # in the clear
        assert await health("--server", client.address) == 0  # over TLS
    told = [f"{address} is SERVING" for address in (f"127.0.0.1:{port}", client.address)]
    assert capsys.readouterr().out.splitlines() == told


@pytest.mark.parametrize(("listen", "asked"), [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1")])
def test_health_of_every_address_is_asked_for_at_loopback(
    listen: str, asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDA_LISTEN", listen)
    assert main(["health"]) == 1
    assert f"no service at {asked} says that it is SERVING" in capsys.readouterr().err


async def test_health_has_an_address_of_its_own_where_clients_need_certificates(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.set()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with lab.served(ScriptedAgent()) as client:
        assert await health("--server", client.address) == 2
        assert "VIDA_HEALTH_LISTEN" in capsys.readouterr().err
    monkeypatch.setenv("VIDA_HEALTH_LISTEN", f"0.0.0.0:{port}")
    gate = Gate()
    monkeypatch.setenv("VIDA_DRAIN", "20")
    serving = lab.served(ScriptedAgent(["half", gate, " whole", DONE]))
    client = await serving.__aenter__()
    assert await health() == 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        nothing_else: Any = AgentServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await nothing_else.ListAgents(api.ListAgentsRequest())
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with lab.channel(client.address) as channel:
        chat: Any = AgentServiceStub(channel).Chat(message(), metadata=bearer(lab.issuer.token()))
        await gate.reached.wait()
        leaving = asyncio.create_task(serving.__aexit__(None, None, None))
        while await health() == 0:  # noqa: ASYNC110 - no event of ours
            await asyncio.sleep(0)
        assert not leaving.done()  # the service drains, and says so
        gate.open()
        assert [response async for response in chat][-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
        await leaving
    assert await health() == 1
