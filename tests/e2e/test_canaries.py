"""Erasure is real: canaries in every field, none in any file, log or at the provider afterwards."""

import asyncio
import base64
import io
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf import field_mask_pb2
from psycopg import sql

from adapters.sql.repositories import threads as repository
from adapters.sql.tables import metadata
from core.model.erasure import Copy, user_hash
from core.use_cases import finish_erasures
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from entrypoints.grpc_api.services import users
from fake_provider import Answer, Break, Call, FakeProvider, Gate, HttpError, Text
from harness import DEADLINE, Client, message, reason, rest_of, served, until
from loud import loud_logging
from samples import PNG, photo

USER = "kanarienvogel-user-ada"


class Canaries:
    """Words that occur nowhere else, by the place where they were put."""

    def __init__(self) -> None:
        self.all: dict[str, str] = {"user": USER}
        self._numbers = count(1)

    def new(self, place: str) -> str:
        """A word for a place."""
        word = f"kanarienvogel{next(self._numbers):05}x"
        self.all[f"{place} {word}"] = word
        return word

    def within(self, heap: bytes) -> set[str]:
        """The places whose words are there, plain or as base64 at any offset."""
        return {place for place, word in self.all.items() if any(form in heap for form in _forms(word))}


def _forms(word: str) -> Iterator[bytes]:
    yield word.encode()
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + word.encode())
        yield encoded[4 if before else 0 : -4]


@pytest.fixture
async def provider(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeProvider]:
    """A provider that the settings point to, either database, and what follows an erasure without long waits."""
    for name, seconds in (("_FIRST_WAIT", 0.01), ("_SHORTEST_PAUSE", 0.01), ("_PERIOD", 0.05)):
        monkeypatch.setattr(finish_erasures, name, seconds)
    async with FakeProvider() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
        monkeypatch.setenv("VIDA_DRAIN", "0")
        yield fake


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, provider: FakeProvider) -> Iterator[io.StringIO]:
    """What the service's own logging writes at its most talkative."""
    with loud_logging(monkeypatch) as written:
        yield written


def rows(url: str) -> bytes:
    """Every row of every table, as text."""
    found: list[Any] = []
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)) as file:
            for table in metadata.tables:
                found += file.execute(f"SELECT * FROM {table}").fetchall()
    else:
        with psycopg.connect(url) as server:
            for table in metadata.tables:
                found += server.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))).fetchall()
    cells = (cell if isinstance(cell, bytes) else str(cell).encode() for row in found for cell in row)
    return b"\n".join(cells)


def files(url: str) -> bytes:
    """Every file beside an embedded database, as it lies on the disk."""
    if not url.startswith("sqlite"):
        return b""
    folder = Path(url.removeprefix("sqlite:///")).parent
    return b"\n".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


def kept(provider: FakeProvider) -> bytes:
    """All that the provider has."""
    conversations = [(each.metadata, each.items) for each in provider.conversations.values()]
    everything = [conversations, provider.items, provider.responses, provider.inputs, provider.contexts]
    return json.dumps(everything).encode()


async def fill(client: Client, provider: FakeProvider, canaries: Canaries, user: str = USER) -> pb.TurnStarted:
    """A conversation with a canary in every field that a user, a coach or a tool writes."""
    new = canaries.new
    goal = json.dumps({"goal": new("goal"), "commitment": new("commitment")})
    provider.then(
        Answer(output=(Call("set_goal", goal),)),
        Answer(output=(Text(text=new("reply")),)),
        Answer(output=(Text(text=new("second reply")),)),
    )
    request = api.ChatRequest(
        user_id=user,
        content=[
            pb.ContentPart(text=new("text")),
            pb.ContentPart(image=pb.ImagePart(data=PNG + new("image").encode())),
            pb.ContentPart(
                file=pb.FilePart(data=new("file").encode(), filename=new("name"), mime_type="text/plain")
            ),
        ],
        request_id=new("request id"),
        metadata={new("metadata key"): new("metadata value")},
    )
    events = [response.event async for response in client.agents.Chat(request, timeout=DEADLINE)]
    assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
    started: pb.TurnStarted = events[0].started
    await client.threads.UpdateThread(
        threads_api.UpdateThreadRequest(
            user_id=user,
            thread=pb.Thread(id=started.thread_id, title=new("title")),
            update_mask=field_mask_pb2.FieldMask(paths=["title"]),
        )
    )
    await client.chat(new("second text"), user, thread_id=started.thread_id)
    return started


async def erase(client: Client, user: str = USER, **more: Any) -> users_api.ErasureReceipt:
    """Erases a user."""
    request = users_api.EraseUserRequest(user_id=user, **more)
    answer: users_api.EraseUserResponse = await client.users.EraseUser(request, timeout=DEADLINE)
    return answer.receipt


async def left_at_the_provider(client: Client) -> Sequence[Copy]:
    """What is still to be erased there."""
    return await client.container.store().read(lambda tx: tx.copies.left(1_000))


async def erased_at_the_provider(client: Client) -> None:
    """Waits until nothing is."""
    while await left_at_the_provider(client):  # noqa: ASYNC110 - no event of ours
        await asyncio.sleep(0.001)


async def exported(client: Client, user: str = USER) -> list[users_api.ExportUserDataResponse]:
    """A whole export."""
    request = users_api.ExportUserDataRequest(user_id=user)
    return [piece async for piece in client.users.ExportUserData(request, timeout=DEADLINE)]


async def test_no_canary_outlives_its_user(database_url: str, provider: FakeProvider, log: io.StringIO) -> None:
    gone, stays = Canaries(), Canaries()
    stays.all.clear()
    stays._numbers = count(50_000)
    async with served() as client:
        for _ in range(12):
            await fill(client, provider, gone)
            await fill(client, provider, stays, "eve")
        before = rows(database_url) + kept(provider)
        assert gone.within(before) == set(gone.all)  # none is looked for in vain
        assert not database_url.startswith("sqlite") or gone.within(files(database_url)) == set(gone.all)
        receipt = await erase(client)
        assert not gone.within(rows(database_url))
        assert await exported(client) == []
        erased = receipt.erased
        counts = (erased.threads, erased.turns, erased.messages, erased.attachments, erased.goals)
        assert counts == (12, 24, 60, 24, 12)
        assert receipt.user_hash == user_hash(receipt.id, USER)
        await erased_at_the_provider(client)
        assert not gone.within(kept(provider))
        await until(lambda: not gone.within(files(database_url)))
        found = await client.container.erasures()()
        assert [each.state for each in found.receipts] == ["done"]
        after = rows(database_url) + kept(provider)
        assert stays.within(after) == set(stays.all)  # and nothing of anybody else
    assert not gone.within(files(database_url))
    assert "kanarienvogel" not in log.getvalue()


async def test_a_deleted_thread_goes_with_every_response_and_item(
    provider: FakeProvider, database_url: str
) -> None:
    canaries, others = Canaries(), Canaries()
    others._numbers = count(50_000)
    async with served() as client:
        gone = await fill(client, provider, canaries)
        await fill(client, provider, others)
        assert len(provider.responses) == 6
        await client.threads.DeleteThread(
            threads_api.DeleteThreadRequest(user_id=USER, thread_id=gone.thread_id), timeout=DEADLINE
        )
        await erased_at_the_provider(client)
        assert canaries.within(kept(provider)) <= {"user"}
        assert len(provider.responses) == 3
        left = canaries.within(rows(database_url))
        assert {place.split()[0] for place in left} == {"user", "goal", "commitment"}  # those are the user's


async def test_what_the_provider_refuses_to_delete_is_tried_again_and_seen(provider: FakeProvider) -> None:
    async with served() as client:
        started = (await client.chat("Hello", USER))[0].event.started
        provider.refusals["deletions"] = [HttpError(status=status) for status in (500, 503, 429, 408) * 3]
        receipt = await erase(client)
        assert receipt.state == users_api.ERASURE_STATE_AT_PROVIDER
        assert receipt.copies_left == 2
        await erased_at_the_provider(client)
        assert not provider.refusals["deletions"]
        assert (provider.conversations, provider.responses, provider.items) == ({}, {}, {})
        provider.refusals["deletions"] = [HttpError(status=403, code="no_permission")] * 2
        await client.chat("Hello", USER)
        again = await erase(client)
        assert again.id != receipt.id

        async def reasons() -> set[str]:
            return {copy.reason for copy in await left_at_the_provider(client)}

        while await reasons() != {"403 no_permission PROVIDER_CONFIG"}:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
        found = await client.container.erasures()()
        assert [(each.id, each.state) for each in found.receipts] == [
            (again.id, "at_provider"),
            (receipt.id, "done"),
        ]
        assert started.thread_id not in {copy.thread_id for copy in found.copies}


async def test_a_turn_that_runs_stops_and_leaves_nothing(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    monkeypatch.setattr(repository, "SETTLE", 0.01)
    gate = Gate()
    provider.then(
        Answer(
            output=(Text(text="kanarienvogel00001x and more", pieces=("kanarienvogel00001x", " and more")),),
            fault=Break(how="stall", after=1, gate=gate),
        )
    )
    canaries = Canaries()
    canaries.new("reply")
    async with served() as client:
        call = client.agents.Chat(message("Hello", USER), timeout=DEADLINE)
        await gate.reached.wait()
        while not (await call.read()).event.HasField("text_delta"):
            assert not canaries.within(kept(provider))
        receipt = await erase(client)
        assert (receipt.erased.threads, receipt.erased.turns, receipt.erased.messages) == (1, 1, 1)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await rest_of(call)
        assert reason(ended.value) == "TURN_NOT_FOUND"
        await provider.quiet()
        await erased_at_the_provider(client)
        assert not canaries.within(rows(database_url))
        assert not canaries.within(kept(provider))
        assert not provider.responses


async def test_what_is_held_stays(provider: FakeProvider, database_url: str) -> None:
    canaries = Canaries()
    async with served() as client:
        started = await fill(client, provider, canaries)
        hold = client.container.hold_user()
        await hold(USER, hold=True)
        delete = threads_api.DeleteThreadRequest(user_id=USER, thread_id=started.thread_id)
        for call in (
            client.users.EraseUser(users_api.EraseUserRequest(user_id=USER)),
            client.users.EraseUser(users_api.EraseUserRequest(user_id=USER, dry_run=True)),
            client.threads.DeleteThread(delete),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert reason(refused.value) == "LEGAL_HOLD"
        assert canaries.within(rows(database_url) + kept(provider)) == set(canaries.all)
        await hold(USER, hold=False)
        await erase(client)
        assert not canaries.within(rows(database_url))


async def test_a_forecast_changes_nothing_and_tells_the_same(provider: FakeProvider, database_url: str) -> None:
    canaries = Canaries()
    async with served() as client:
        await fill(client, provider, canaries)
        before = rows(database_url)
        forecast = await erase(client, dry_run=True)
        assert rows(database_url) == before
        receipt = await erase(client)
        assert forecast.id == ""
        assert (forecast.erased, forecast.copies_left) == (receipt.erased, receipt.copies_left)
        nothing = await erase(client)
        assert nothing.erased == users_api.ErasedCounts()
        assert nothing.state == users_api.ERASURE_STATE_DONE
        assert (await erase(client, "nobody")).erased == nothing.erased


async def test_an_export_has_every_canary_and_nobody_elses(provider: FakeProvider) -> None:
    ours, eves = Canaries(), Canaries()
    eves.all.clear()
    eves._numbers = count(50_000)
    async with served() as client:
        for _ in range(3):
            await fill(client, provider, ours)
            await fill(client, provider, eves, "eve")
        await client.agents.Chat(
            api.ChatRequest(user_id=USER, content=[pb.ContentPart(image=pb.ImagePart(data=photo(1_200_000)))]),
            timeout=DEADLINE,
        ).read()
        pieces = await exported(client)
        text = b"\n".join(piece.SerializeToString() for piece in pieces)
        missing = {place.split()[0] for place in set(ours.all) - ours.within(text)}
        assert missing == {"request"}  # request ids are the caller's own
        assert not eves.within(text)
        assert max(piece.ByteSize() for piece in pieces) < 1 << 20
        images: dict[tuple[str, int], bytes] = {}
        for piece in pieces:
            if piece.HasField("attachment"):
                part = piece.attachment
                key = (part.turn_id, part.number)
                assert part.offset == len(images.get(key, b""))
                images[key] = images.get(key, b"") + part.data
        assert photo(1_200_000) in images.values()
        assert pieces[0].user.id == USER
        assert await exported(client, "nobody") == []
        # What was deleted is still in the ledger, and so in the export.
        ended = sum(piece.usage.turns for piece in pieces)
        assert ended >= 3
        for thread in [piece.thread.id for piece in pieces if piece.HasField("thread")]:
            await client.threads.DeleteThread(threads_api.DeleteThreadRequest(user_id=USER, thread_id=thread))
        left = await exported(client)
        assert not any(piece.HasField("thread") for piece in left)
        assert sum(piece.usage.turns for piece in left) >= ended


async def test_exports_are_bounded_and_nobody_holds_one_for_ever(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "_STALLED", 0.3)
    photos = [pb.ContentPart(image=pb.ImagePart(data=photo(3_000_000))) for _ in range(2)]
    async with served() as client:
        for _ in range(2):
            await client.agents.Chat(api.ChatRequest(user_id=USER, content=photos), timeout=DEADLINE).read()
        request = users_api.ExportUserDataRequest(user_id=USER)
        stalled = [client.users.ExportUserData(request, timeout=DEADLINE) for _ in range(2)]
        for call in stalled:
            assert (await call.read()).user.id == USER
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await exported(client)
        assert reason(refused.value) == "QUOTA_EXCEEDED"
        service = client.container.user_service()
        await until(lambda: not service._places.taken)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await rest_of(stalled[0])
        assert reason(ended.value) == "OVERLOADED"
        assert len(await exported(client)) > 10
