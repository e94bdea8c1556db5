"""Whatever comes in over the wire: a documented status, nothing written, and a server that goes on."""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf import field_mask_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from core.model.attachment import MAX_IMAGE
from doubles import ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from faults.figures import FIGURES, chance, sized
from harness import DEADLINE, Client, detail, message, reason, served
from mutations import mutated
from samples import PDF, PNG, photo

FUZZED = sized("MALFORMED_REQUESTS", 5_000, 20_000, 400_000)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

TABLES = ["users", "assistant_threads", "turns", "messages", "attachments", "turn_log", "goals"]


@dataclass(frozen=True)
class Method:
    """A method as the wire knows it."""

    path: str
    streams_out: bool
    streams_in: bool = False

    async def call(self, client: Client, payload: bytes, seconds: float = DEADLINE) -> list[bytes]:
        """Calls it with raw bytes; returns raw answers."""
        channel: Any = client.channel  # its types want messages
        if self.streams_in:
            both = channel.stream_stream(self.path)(iter([payload]), timeout=seconds)
            return [bytes(answer) async for answer in both]
        if self.streams_out:
            stream = channel.unary_stream(self.path)(payload, timeout=seconds)
            return [bytes(answer) async for answer in stream]
        return [bytes(await channel.unary_unary(self.path)(payload, timeout=seconds))]


def methods() -> Iterator[Method]:
    """Every method of the public API."""
    for file in (api, threads_api):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield Method(f"/{service.full_name}/{method.name}", bool(method.server_streaming))
    yield Method("/grpc.health.v1.Health/Check", streams_out=False)
    yield Method("/grpc.health.v1.Health/Watch", streams_out=True)
    yield Method(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", streams_out=True, streams_in=True
    )


METHODS = {method.path.rpartition("/")[2]: method for method in methods()}


@pytest.fixture
def url(sqlite_url: str) -> str:
    """The database of a test."""
    return sqlite_url


@pytest.fixture
async def client(url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    """A server with a script for a coach."""
    monkeypatch.setenv("VIDA_DATABASE_URL", url)
    async with served(ScriptedAgent()) as client:
        yield client


def rows(url: str) -> dict[str, int]:
    """How many rows each table has."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)
        try:
            return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}
        finally:
            connection.close()
    with psycopg.connect(url) as server:
        found = {}
        for table in TABLES:
            row = server.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
            found[table] = row[0] if row else -1
        return found


async def refusal(client: Client, method: Method, payload: bytes) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await method.call(client, payload)
    return error.value


def blamed(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields that an error names."""
    found = detail(error, error_details_pb2.BadRequest)
    return [violation.field for violation in found.field_violations] if found else []


async def test_every_method_refuses_bytes_that_are_no_message(client: Client, url: str) -> None:
    before = rows(url)
    assert len(METHODS) >= 14
    for name, method in METHODS.items():
        payloads = [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0c", b"\x00", b"\x0a" + b"\xff" * 11]
        if name != "ListAgents":  # the first field of all others is text
            payloads.append(b"\x0a\x01\xff")
        for payload in payloads:
            error = await refusal(client, method, payload)
            assert (error.code(), reason(error)) == (INVALID, "MALFORMED_REQUEST"), (name, payload)
            assert error.details() == "The request could not be decoded."
    assert rows(url) == before
    await client.chat()


async def test_what_is_not_there_is_unimplemented(client: Client) -> None:
    for path in (
        "/vidacoach.agents.v1.AgentService/Nothing",
        "/vidacoach.agents.v1.Nothing/Chat",
        "/vidacoach.admin.v1.AdminService/Cleanup",  # on the owner's socket only
        "/",
        "/x",
    ):
        for streams_out in (False, True):
            error = await refusal(client, Method(path, streams_out), b"")
            assert error.code() is UNIMPLEMENTED
            assert "Traceback" not in (error.details() or "")


# What each method refuses. A case: the method, its request, the status, the reason, the field it blames.

Case = tuple[str, Callable[[pb.Thread], Message], grpc.StatusCode, str, str]
BOTH_STATES = [pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE]
UNKNOWN = "01a20441-0000-7000-8000-000000000000"


def part(**one: Any) -> pb.ContentPart:
    return pb.ContentPart(**one)


def message_cases() -> Iterator[Case]:
    """What a message may not be, for both methods that take one."""
    text = [part(text="Hello")]
    half = "x" * 32_768
    bad: list[tuple[dict[str, Any], grpc.StatusCode, str, str]] = [
        ({"content": []}, INVALID, "INVALID_FIELD", "content"),
        ({"content": [part(text="a")] * 33}, INVALID, "INVALID_FIELD", "content"),
        ({"content": [part()]}, INVALID, "INVALID_FIELD", "content[0]"),
        ({"content": [part(text="a"), part()]}, INVALID, "INVALID_FIELD", "content[1]"),
        ({"content": [part(text="")]}, INVALID, "INVALID_FIELD", "content"),
        (
            {"content": [part(text=" \t\r\n"), part(text="\u2003\u00a0\u3000")]},
            INVALID,
            "INVALID_FIELD",
            "content",
        ),
        ({"content": [part(text="a"), part(text="a\0b")]}, INVALID, "INVALID_FIELD", "content[1].text"),
        ({"content": [part(refusal="no")]}, INVALID, "INVALID_FIELD", "content[0].refusal"),
        ({"content": [part(text="x" * 65_537)]}, INVALID, "INVALID_FIELD", "content"),
        ({"content": [part(text="👋" * 65_537)]}, INVALID, "INVALID_FIELD", "content"),
        ({"content": [part(text=half), part(text=half), part(text="x")]}, INVALID, "INVALID_FIELD", "content"),
        *(
            ({"content": [*text, part(image=image)]}, INVALID, "INVALID_FIELD", f"content[1].image{field}")
            for image, field in (
                (pb.ImagePart(), ""),
                (pb.ImagePart(mime_type="image/png"), ""),
                (pb.ImagePart(data=b""), ".data"),
                (pb.ImagePart(data=b"x"), ".data"),
                (pb.ImagePart(data=PDF), ".data"),
                (pb.ImagePart(data=photo(MAX_IMAGE + 1)), ".data"),
                (pb.ImagePart(data=PNG, mime_type="image/gif"), ".mime_type"),
                (pb.ImagePart(data=PNG, mime_type="x" * 100_000), ".mime_type"),
                (pb.ImagePart(data=PNG, detail="original"), ".detail"),
                (pb.ImagePart(url=""), ".url"),
                (pb.ImagePart(url="http://example.org/x.png"), ".url"),
                (pb.ImagePart(url="https://ada:secret@example.org/"), ".url"),
                (pb.ImagePart(url="https://example.org/" + "x" * 2_048), ".url"),
            )
        ),
        *(
            ({"content": [part(file=file)]}, INVALID, "INVALID_FIELD", f"content[0].file{field}")
            for file, field in (
                (pb.FilePart(filename="cv.pdf"), ""),
                (pb.FilePart(data=b""), ".data"),
                (pb.FilePart(data=PNG), ".data"),
                (pb.FilePart(data=b"a\0"), ".data"),
                (pb.FilePart(data=PDF, mime_type="text/plain"), ".mime_type"),
                (pb.FilePart(data=PDF, filename="a\0"), ".filename"),
                (pb.FilePart(data=PDF, filename="x" * 256), ".filename"),
                (pb.FilePart(url="x"), ".url"),
            )
        ),
        (
            {"content": [part(image=pb.ImagePart(data=photo(13_000_000)))] * 2},
            INVALID,
            "INVALID_FIELD",
            "content",
        ),
        ({"content": [part(image=pb.ImagePart(data=PNG))] * 33}, INVALID, "INVALID_FIELD", "content"),
        ({"on_busy": 4}, INVALID, "INVALID_FIELD", "on_busy"),
        ({"on_busy": -1}, INVALID, "INVALID_FIELD", "on_busy"),
        ({"on_busy": 2**31 - 1}, INVALID, "INVALID_FIELD", "on_busy"),
        ({"domain": 5}, INVALID, "INVALID_FIELD", "domain"),
        ({"domain": -(2**31)}, INVALID, "INVALID_FIELD", "domain"),
        ({"request_id": "x" * 129}, INVALID, "INVALID_FIELD", "request_id"),
        ({"request_id": "a\0"}, INVALID, "INVALID_FIELD", "request_id"),
        ({"metadata": {str(number): "" for number in range(17)}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"metadata": {"": "v"}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"metadata": {"k" * 65: "v"}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"metadata": {"k": "v" * 513}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"metadata": {"k\0": "v"}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"metadata": {"k": "\0"}}, INVALID, "INVALID_FIELD", "metadata"),
        ({"thread_id": UNKNOWN}, NOT_FOUND, "THREAD_NOT_FOUND", ""),
        ({"thread_id": "x" * 65_536}, INVALID, "INVALID_FIELD", "thread_id"),
        ({"thread_id": "a\0b"}, INVALID, "INVALID_FIELD", "thread_id"),
        ({"thread_id": " "}, NOT_FOUND, "THREAD_NOT_FOUND", ""),
    ]
    for name, kind in (("Chat", api.ChatRequest), ("SendMessage", api.SendMessageRequest)):
        for fields, code, why, field in bad:
            values = {"user_id": "ada", "content": text, **fields}
            yield name, lambda _, kind=kind, values=values: kind(**values), code, why, field  # type: ignore[misc]
        for fields, field in (
            ({"metadata": {"k": "v"}}, "metadata"),
            ({"domain": pb.DOMAIN_HEALTH}, "domain"),
        ):
            values = {"user_id": "ada", "content": text, **fields}
            yield (
                name,
                lambda thread, kind=kind, values=values: kind(thread_id=thread.id, **values),  # type: ignore[misc]
                INVALID,
                "INVALID_FIELD",
                field,
            )


USERS = {"": "user_id", "x" * 129: "user_id", "👋" * 129: "user_id", "a\0": "user_id", "\0": "user_id"}


def reading_cases() -> Iterator[Case]:
    """What the other methods refuse, and a bad user on all."""
    mask = field_mask_pb2.FieldMask
    update = threads_api.UpdateThreadRequest
    good: dict[str, Callable[[str, pb.Thread], Message]] = {
        "Chat": lambda user, _: message("x", user),
        "SendMessage": lambda user, _: api.SendMessageRequest(user_id=user, content=[part(text="x")]),
        "FollowTurn": lambda user, _: api.FollowTurnRequest(user_id=user, turn_id=UNKNOWN),
        "GetTurn": lambda user, _: api.GetTurnRequest(user_id=user, turn_id=UNKNOWN),
        "CancelTurn": lambda user, _: api.CancelTurnRequest(user_id=user, turn_id=UNKNOWN),
        "GetThread": lambda user, thread: threads_api.GetThreadRequest(user_id=user, thread_id=thread.id),
        "ListThreads": lambda user, _: threads_api.ListThreadsRequest(user_id=user),
        "ListMessages": lambda user, thread: threads_api.ListMessagesRequest(user_id=user, thread_id=thread.id),
        "UpdateThread": lambda user, thread: update(
            user_id=user, thread=pb.Thread(id=thread.id, title="x"), update_mask=mask(paths=["title"])
        ),
        "DeleteThread": lambda user, thread: threads_api.DeleteThreadRequest(user_id=user, thread_id=thread.id),
    }
    assert {*good, "ListAgents", "Check", "Watch", "ServerReflectionInfo"} == set(METHODS)
    for name, make in good.items():
        for user, field in USERS.items():
            yield name, lambda thread, m=make, u=user: m(u, thread), INVALID, "INVALID_FIELD", field  # type: ignore[misc]
    for name, kind, field, unknown in (
        ("FollowTurn", api.FollowTurnRequest, "turn_id", "TURN_NOT_FOUND"),
        ("GetTurn", api.GetTurnRequest, "turn_id", "TURN_NOT_FOUND"),
        ("CancelTurn", api.CancelTurnRequest, "turn_id", "TURN_NOT_FOUND"),
        ("GetThread", threads_api.GetThreadRequest, "thread_id", "THREAD_NOT_FOUND"),
        ("ListMessages", threads_api.ListMessagesRequest, "thread_id", "THREAD_NOT_FOUND"),
        ("DeleteThread", threads_api.DeleteThreadRequest, "thread_id", "THREAD_NOT_FOUND"),
    ):
        yield name, lambda _, k=kind: k(user_id="ada"), INVALID, "INVALID_FIELD", field  # type: ignore[misc]
        for bad in ("x" * 65, "x" * 100_000, "a\0b"):
            made = {"user_id": "ada", field: bad}
            yield name, lambda _, k=kind, v=made: k(**v), INVALID, "INVALID_FIELD", field  # type: ignore[misc]
        for bad in (UNKNOWN, "👋", " "):
            made = {"user_id": "ada", field: bad}
            yield name, lambda _, k=kind, v=made: k(**v), NOT_FOUND, unknown, ""  # type: ignore[misc]

    def described(field: str, paths: list[str], **changes: Any) -> Case:
        return (
            "UpdateThread",
            lambda thread: update(
                user_id="ada", thread=pb.Thread(id=thread.id, **changes), update_mask=mask(paths=paths)
            ),
            INVALID,
            "INVALID_FIELD",
            field,
        )

    yield described("update_mask", [])
    yield described("update_mask", [""])
    yield described("update_mask", ["title", "state"], title="x")
    yield described("update_mask", ["thread.title"])
    yield described("update_mask", ["metadata.k"])
    yield described("update_mask", ["*"])
    yield described("thread.title", ["title"], title="x" * 201)
    yield described("thread.title", ["title"], title="\0")
    yield described("thread.metadata", ["metadata"], metadata={str(number): "" for number in range(17)})
    yield described("thread.metadata", ["metadata", "title"], metadata={"k": "v" * 513}, title="x")
    yield (
        "UpdateThread",
        lambda _: update(user_id="ada", update_mask=mask(paths=["title"])),
        INVALID,
        "INVALID_FIELD",
        "thread.id",
    )
    yield (
        "UpdateThread",
        lambda _: update(user_id="ada", thread=pb.Thread(id=UNKNOWN), update_mask=mask(paths=["title"])),
        NOT_FOUND,
        "THREAD_NOT_FOUND",
        "",
    )
    follow = api.FollowTurnRequest
    negative = -(2**63)
    yield (
        "FollowTurn",
        lambda _: follow(user_id="ada", turn_id=UNKNOWN, after_position=negative),
        INVALID,
        "INVALID_FIELD",
        "after_position",
    )
    listed = threads_api.ListThreadsRequest
    lines = threads_api.ListMessagesRequest
    for size in (-1, -(2**31)):
        yield (
            "ListThreads",
            lambda _, n=size: listed(user_id="ada", page_size=n),  # type: ignore[misc]
            INVALID,
            "INVALID_FIELD",
            "page_size",
        )
        yield (
            "ListMessages",
            lambda thread, n=size: lines(user_id="ada", thread_id=thread.id, page_size=n),  # type: ignore[misc]
            INVALID,
            "INVALID_FIELD",
            "page_size",
        )
    yield "ListThreads", lambda _: listed(user_id="ada", domain=9), INVALID, "INVALID_FIELD", "domain"  # type: ignore[arg-type]
    for states in ([0], [1, 9], [-1]):
        yield (
            "ListThreads",
            lambda _, s=states: listed(user_id="ada", states=s),  # type: ignore[misc]
            INVALID,
            "INVALID_FIELD",
            "states",
        )


@pytest.mark.parametrize("cases", [message_cases, reading_cases], ids=["messages", "the rest"])
async def test_bad_fields_are_named_and_nothing_is_written(
    cases: Callable[[], Iterator[Case]], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    wrong = []
    async with served(ScriptedAgent()) as client:
        begun = (await client.chat())[0].event.started
        thread = (
            await client.threads.GetThread(threads_api.GetThreadRequest(user_id="ada", thread_id=begun.thread_id))
        ).thread
        before = rows(database_url)
        for name, make, code, why, field in cases():
            request = make(thread)
            error = await refusal(client, METHODS[name], request.SerializeToString())
            got = error.code(), reason(error), blamed(error)
            if got != (code, why, [field] if code is INVALID else []):
                wrong.append((name, str(request)[:200], got, (code, why, field)))
            if code is UNIMPLEMENTED:
                info = detail(error, error_details_pb2.ErrorInfo)
                assert info is not None
                assert info.metadata["field"] == field
        assert wrong == []
        assert rows(database_url) == before
        again = await client.threads.GetThread(
            threads_api.GetThreadRequest(user_id="ada", thread_id=begun.thread_id)
        )
        assert again.thread == thread


async def test_what_is_just_within_the_bounds_is_taken(client: Client) -> None:
    texts = ["👋" * 65_505, *("x",) * 31]
    answers = await client.agents.SendMessage(
        api.SendMessageRequest(
            user_id="👋" * 128,
            content=[part(text=text) for text in texts],
            request_id="é" * 128,
            metadata={str(number).zfill(64): "v" * 512 for number in range(16)},
        )
    )
    assert answers.turn.state == pb.TURN_STATE_COMPLETED
    lines = await client.threads.ListMessages(
        threads_api.ListMessagesRequest(user_id="👋" * 128, thread_id=answers.turn.thread_id)
    )
    assert "".join(part.text for part in lines.messages[0].content).startswith("👋" * 65_505 + "xx")
    page = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="ada", page_size=2**31 - 1))
    assert len(page.threads) == 0


@pytest.mark.parametrize("name", ["Chat", "SendMessage", "UpdateThread", "ListThreads"])
async def test_a_request_that_is_too_large_is_refused(client: Client, url: str, name: str) -> None:
    before = rows(url)
    payload = api.ChatRequest(user_id="ada", content=[part(text="x" * (33 * 2**20))]).SerializeToString()
    assert (await refusal(client, METHODS[name], payload)).code() is EXHAUSTED
    assert rows(url) == before
    await client.chat()


async def test_a_page_token_is_of_one_query_of_one_user(client: Client, url: str) -> None:
    for user in ("ada", "eve"):
        first = (await client.chat(user=user))[0].event.started.thread_id
        await client.chat(user=user, thread_id=first)
        for _ in range(2):
            await client.chat(user=user, domain=pb.DOMAIN_HEALTH)
    listed, lines = threads_api.ListThreadsRequest, threads_api.ListMessagesRequest
    mine = (await client.threads.ListThreads(listed(user_id="ada"))).threads
    other = (await client.threads.ListThreads(listed(user_id="eve"))).threads
    oldest = mine[-1].id
    token = (await client.threads.ListThreads(listed(user_id="ada", page_size=1))).next_page_token
    line_token = (
        await client.threads.ListMessages(lines(user_id="ada", thread_id=oldest, page_size=1))
    ).next_page_token
    assert token
    assert line_token
    before = rows(url)
    flipped = [
        token[:number] + chr(ord(token[number]) ^ 1) + token[number + 1 :] for number in range(0, len(token), 5)
    ]
    garbage = ["x", "%", "é", "\0", "A" * 4_000, token[:-2], token[1:], token + "AAAA", line_token, *flipped]
    bad: list[tuple[str, Message]] = [
        *(("ListThreads", listed(user_id="ada", page_token=bad)) for bad in garbage),
        ("ListThreads", listed(user_id="eve", page_token=token)),
        ("ListThreads", listed(user_id="ada", page_token=token, domain=pb.DOMAIN_HEALTH)),
        ("ListThreads", listed(user_id="ada", page_token=token, states=[pb.THREAD_STATE_INACTIVE])),
        ("ListThreads", listed(user_id="ada", page_token=token, states=BOTH_STATES)),
        ("ListMessages", lines(user_id="ada", thread_id=oldest, page_token=token)),
        ("ListMessages", lines(user_id="ada", thread_id=mine[0].id, page_token=line_token)),
        ("ListMessages", lines(user_id="ada", thread_id=oldest, page_token=line_token, newest_first=True)),
        ("ListMessages", lines(user_id="eve", thread_id=other[-1].id, page_token=line_token)),
        *(("ListMessages", lines(user_id="ada", thread_id=oldest, page_token=bad)) for bad in garbage[:8]),
    ]
    wrong = []
    for name, request in bad:
        try:
            await METHODS[name].call(client, request.SerializeToString())
        except grpc.aio.AioRpcError as error:
            if (error.code(), reason(error), blamed(error)) == (INVALID, "INVALID_FIELD", ["page_token"]):
                continue
            wrong.append((str(request), error.code()))
        else:
            wrong.append((str(request), grpc.StatusCode.OK))
    assert wrong == []
    assert rows(url) == before
    good = await client.threads.ListThreads(listed(user_id="ada", page_token=token, page_size=200))
    assert [thread.id for thread in good.threads] == [thread.id for thread in mine[1:]]  # any page size


@pytest.mark.parametrize(
    "place",
    [
        ["2026-01-01T00:00:00", "x"],
        ["0001-01-01T00:00:00+23:59", "x"],
        ["9999-12-31T23:59:59-23:59", "x"],
        ["2026-01-01", "x"],
        ["2026-01-01T00:00:00+00:00", "a\0b"],
        ["2026-01-01T00:00:00+00:00", "\ud800"],
        ["2026-01-01T00:00:00+00:00", "x" * 300],
    ],
    ids=["no zone", "before time", "after time", "a day", "NUL", "surrogate", "long id"],
)
async def test_a_forged_page_token_does_no_harm(
    place: list[str | int], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format is public: whoever writes a token may get a page or a refusal, and nothing else."""
    from core.model.thread import ThreadState
    from core.use_cases.paging import make_token

    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    async with served(ScriptedAgent()) as client:
        await client.chat()
        token = make_token(["threads", "ada", None, [ThreadState.ACTIVE]], place)
        request = threads_api.ListThreadsRequest(user_id="ada", page_token=token)
        call = client.threads.ListThreads(request)
        if await call.code() is not grpc.StatusCode.OK:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert (error.value.code(), reason(error.value)) == (INVALID, "INVALID_FIELD")


# Mutations

FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
}


def seeds(thread_id: str, turn_id: str, doomed_id: str) -> list[tuple[str, bytes]]:
    """Requests that are good, and use every field."""
    content = [part(text="Grüße 👋"), part(text="b"), part(image=pb.ImagePart(data=b"x", mime_type="image/png"))]
    every: list[tuple[str, Message]] = [
        ("Chat", message(domain=pb.DOMAIN_HEALTH, metadata={"k": "v"}, request_id="r1")),
        ("Chat", message(thread_id=thread_id, request_id="r2", on_busy=pb.BUSY_POLICY_REJECT)),
        ("Chat", api.ChatRequest(user_id="ada", content=content)),
        ("SendMessage", api.SendMessageRequest(user_id="ada", content=content[:2], thread_id=thread_id)),
        ("FollowTurn", api.FollowTurnRequest(user_id="ada", turn_id=turn_id, after_position=3)),
        ("GetTurn", api.GetTurnRequest(user_id="ada", turn_id=turn_id)),
        ("CancelTurn", api.CancelTurnRequest(user_id="ada", turn_id=turn_id)),
        ("ListAgents", api.ListAgentsRequest()),
        ("GetThread", threads_api.GetThreadRequest(user_id="ada", thread_id=thread_id)),
        (
            "ListThreads",
            threads_api.ListThreadsRequest(
                user_id="ada", domain=pb.DOMAIN_HEALTH, states=BOTH_STATES, page_size=3
            ),
        ),
        (
            "ListMessages",
            threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id, newest_first=True, page_size=1),
        ),
        (
            "UpdateThread",
            threads_api.UpdateThreadRequest(
                user_id="ada",
                thread=pb.Thread(id=thread_id, title="t", metadata={"a": "b"}),
                update_mask=field_mask_pb2.FieldMask(paths=["title", "metadata"]),
            ),
        ),
        ("DeleteThread", threads_api.DeleteThreadRequest(user_id="ada", thread_id=doomed_id)),
        ("Chat", message(thread_id=thread_id, on_busy=pb.BUSY_POLICY_QUEUE)),
        ("Chat", message(thread_id=thread_id, on_busy=pb.BUSY_POLICY_INTERRUPT)),
        ("Check", health_pb2.HealthCheckRequest(service="vidacoach.agents.v1.AgentService")),
        ("ServerReflectionInfo", reflection_pb2.ServerReflectionRequest(list_services="x")),
    ]
    return [(name, request.SerializeToString()) for name, request in every]


@pytest.mark.timeout(60 + FUZZED // 40)
async def test_mutated_requests_get_documented_statuses(client: Client, url: str) -> None:
    begun = (await client.chat())[0].event.started
    doomed = (await client.chat())[0].event.started
    good = seeds(begun.thread_id, begun.turn_id, doomed.thread_id)
    others = [other for _, other in good]
    draw = chance("malformed requests")
    statuses: Counter[grpc.StatusCode] = Counter()
    wrong: list[tuple[str, str, object]] = []
    jobs = ((name, mutated(draw, payload, others)) for name, payload in islice(cycle(good), FUZZED))

    async def caller() -> None:
        for name, payload in jobs:
            try:
                await METHODS[name].call(client, payload)
                code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                code = error.code()
                if code not in FINE:
                    wrong.append((name, payload.hex(), (code, error.details())))
            statuses[code] += 1

    await asyncio.gather(*(caller() for _ in range(16)))
    assert wrong == []
    assert statuses.total() == FUZZED
    # Not in vain: there was something of everything.
    assert statuses[grpc.StatusCode.OK] > FUZZED / 25
    assert statuses[INVALID] > FUZZED / 5
    assert statuses[NOT_FOUND] > FUZZED / 50
    FIGURES.add("malformed", {"mutated requests": FUZZED})
    answer = await client.chat("Still there?")
    assert answer[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
    with closing(sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)) as record:
        assert record.execute("SELECT count(*) FROM turns WHERE finished_at IS NULL").fetchone() == (0,)
