"""Connections, metadata, tokens and arguments of tools that were tampered with: a documented status or an answer,
nothing is believed that is not so, and the service goes on. Mutated requests are in `e2e/test_malformed_input.py`,
the provider's bytes in `integration/test_openai_streams.py`."""

import asyncio
import base64
import binascii
import json
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import grpc
import pytest
from pydantic import Field

from adapters.tools.definition import tool
from adapters.tools.registry import Registry
from core.model.agent import Domain
from core.ports.tools import ToolContext
from doubles import ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from faults.client import Client, Told
from faults.cluster import Cluster
from faults.figures import FIGURES, chance, sized
from harness import DEADLINE, message, reason
from http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, frame, request_headers, settings
from http2 import message as framed
from identity_lab import Lab, bearer
from mutations import mutated

SUITE = "malformed"
ARGUMENTS = sized("MALFORMED_ARGUMENTS", 2_000, 20_000, 200_000)
METADATA = sized("MALFORMED_METADATA", 500, 5_000, 100_000)
CONNECTIONS = sized("MALFORMED_CONNECTIONS", 200, 2_000, 20_000)

CANARY = "heartfelt"


# Arguments of tools


@dataclass
class Step:
    """Something nested."""

    title: str
    days: int = 1


@tool
async def plan(steps: list[Step], notes: dict[str, float], who: str | None = None) -> str:
    """Takes what is not flat."""
    return f"{len(steps)} steps, {len(notes)} notes"


@tool
async def remember(goal: Annotated[str, Field(max_length=40, pattern=r"\S")], due: date | None = None) -> str:
    """Takes what has bounds, and gives it back."""
    return f"{goal} {due}"


CALLS = [
    ("remember", {"goal": CANARY, "due": "2026-12-24"}),
    ("remember", {"goal": f"{CANARY} 👋"}),
    ("plan", {"steps": [{"title": CANARY, "days": 3}], "notes": {"a": 1.5}, "who": CANARY}),
    ("plan", {"steps": [], "notes": {}}),
]


@pytest.mark.timeout(60 + ARGUMENTS // 100)
async def test_tools_answer_whatever_they_are_called_with() -> None:
    draw = chance(SUITE, "arguments")
    registry = Registry([remember, plan])
    good = [(name, json.dumps(arguments, ensure_ascii=False).encode()) for name, arguments in CALLS]
    others = [payload for _, payload in good]
    outcomes: Counter[bool] = Counter()
    for number in range(ARGUMENTS):
        name, payload = good[number % len(good)]
        # What a model writes has become text before it comes here, with whatever is no character.
        arguments = mutated(draw, payload, others).decode("utf-8", draw.choice(["replace", "surrogateescape"]))
        context = ToolContext(
            user_id="ada",
            thread_id="thread",
            turn_id=f"turn {number}",
            epoch=1,
            call_id="call",
            domain=Domain.CAREER,
        )
        answer = await registry.call(name, arguments, context)
        answer.text.encode()
        assert "\0" not in answer.text
        if answer.is_error:
            assert json.loads(answer.text)["error"]
            assert CANARY not in answer.text, arguments
        outcomes[answer.is_error] += 1
    assert min(outcomes[True], outcomes[False]) > ARGUMENTS / 20
    FIGURES.add(SUITE, {"arguments of tools": ARGUMENTS})


# Metadata


def is_same(token: str, good: str) -> bool:
    """Whether a token is the good one: what is signed to the letter, the signature as loosely as base64 goes."""
    (signed, _, signature), (wanted, _, its) = (each.rpartition(".") for each in (token, good))
    with suppress(binascii.Error):
        return signed == wanted and _decoded(signature) == _decoded(its)
    return False


def _decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


@pytest.mark.timeout(60 + METADATA // 20)
async def test_no_mutated_token_is_believed_and_no_other_metadata_matters(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", sqlite_url)
    lab = Lab(tmp_path, monkeypatch)
    lab.set(policy=False)
    draw = chance(SUITE, "metadata")
    good = lab.issuer.token("ada", seconds=86_400)
    others = [good.encode(), lab.issuer.token("eve").encode(), b"Bearer ", b"traceparent"]
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    seen: Counter[str] = Counter()
    async with lab.served(ScriptedAgent()) as client:
        begun = [response async for response in client.agents.Chat(message(), metadata=bearer(good))]
        request = api.GetTurnRequest(user_id="ada", turn_id=begun[0].event.started.turn_id)
        for number in range(METADATA):
            token = _text(mutated(draw, good.encode(), others)) if number % 2 else good
            extra = [
                ("traceparent", _text(mutated(draw, trace, others))),
                (f"x-{draw.randrange(100)}", _text(draw.randbytes(draw.randrange(200)))),
                ("y-bin", draw.randbytes(draw.randrange(200))),
            ]
            metadata = [*bearer(token), *draw.sample(extra, draw.randrange(4))]
            draw.shuffle(metadata)
            fate = await _fate(client.agents.GetTurn(request, metadata=metadata, timeout=DEADLINE))
            if token == good:
                assert fate == "OK"
            elif fate == "OK":
                assert is_same(token, good), token
            else:
                assert fate == "UNAUTHENTICATED", token
            seen[fate] += 1
    assert min(seen["OK"], seen["UNAUTHENTICATED"]) > METADATA / 4
    FIGURES.add(SUITE, {"calls with mutated metadata": METADATA})


async def _fate(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return reason(error)
    return "OK"


def _text(data: bytes) -> str:
    """What of it a client may put into metadata."""
    return "".join(chr(byte) for byte in data if 0x20 < byte < 0x7F) or "x"


# Connections


@pytest.mark.timeout(60 + CONNECTIONS // 10)
async def test_mutated_connections_harm_nobody(sqlite_url: str, cluster: Cluster) -> None:
    draw = chance(SUITE, "connections")
    begun = time.monotonic()
    server = await cluster.start(sqlite_url)
    bystander = Client(cluster, draw)
    method = "/vidacoach.agents.v1.AgentService/GetTurn"
    call = frame(HEADERS, END_HEADERS, 1, request_headers(server.address, method))
    body = frame(DATA, END_STREAM, 1, framed(api.GetTurnRequest(user_id="eve", turn_id="x").SerializeToString()))
    good = PREFACE + settings() + call + body
    others = [call, body, settings(initial_window_size=0), settings(header_table_size=2**31)]
    heard: Counter[bool] = Counter()

    async def connect(data: bytes) -> None:
        heard[await _sent(server.address, data)] += 1

    for start in range(0, CONNECTIONS, 20):
        some = [PREFACE + mutated(draw, good[len(PREFACE) :], others) for _ in range(15)]
        some += [mutated(draw, good, others) for _ in range(5)]
        told = Told("ada", f"words:3 n{start}")
        await asyncio.gather(*map(connect, some), bystander.chat(told))
        assert told.finished is not None
    assert heard[True] > CONNECTIONS / 2
    assert server.alive
    # A path that is no UTF-8 is a library's to refuse, and to log: so much and no more.
    lines = (cluster.folder / "log").read_text().splitlines()
    assert not [line for line in lines if "Traceback" in line or re.search(r" (ERROR|WARNING) (?!grpc\.)", line)]
    errors = [line for line in lines if " ERROR grpc." in line]
    assert len(errors) <= 20 * (1 + (time.monotonic() - begun) / 60)
    if CONNECTIONS >= 2_000:
        assert len(errors) >= 20
    FIGURES.add(SUITE, {"mutated connections": CONNECTIONS})


async def _sent(address: str, data: bytes) -> bool:
    """Sends bytes on a connection of their own. Returns whether anything came back before it was closed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    heard: Any = b""
    with suppress(ConnectionError, TimeoutError):
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(DEADLINE):
            heard = await reader.read(1)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return bool(heard)
