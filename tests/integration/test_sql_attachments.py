"""Images and files in the databases: beside the rows of messages, and of no cost to whoever sends none."""

import json
import sqlite3
from typing import Any, cast

import psycopg
import pytest

from adapters.practice.agent import PracticeAgent
from adapters.sql.repositories import attachments, threads
from adapters.sql.repositories.turn_log import TurnLog
from adapters.sql.session import Session
from adapters.sql.store import SqlStore
from core.model.attachment import MAX_DATA, FilePart, ImagePart
from core.model.message import TextPart
from core.model.turn import BusyPolicy
from core.use_cases.accept_message import IncomingMessage
from core.use_cases.read_threads import MessageQuery
from doubles import DONE, Gate, ManualClock, ScriptedAgent, Service, service, text_of
from samples import PDF, PNG


async def send(it: Service, *content: TextPart | ImagePart | FilePart, thread_id: str = "", **more: object) -> str:
    message = IncomingMessage(user_id="ada", content=content, thread_id=thread_id, **more)  # type: ignore[arg-type]
    return (await it.accept(message)).turn.id


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The statements about attachments that are run."""
    about = {attachments._ADD, attachments._DROP_UNUSED, *attachments._OF.values(), threads._DELETE_ATTACHMENTS}
    found: list[object] = []
    for name in ("run", "rows"):

        def watched(
            session: Session, statement: object, *more: object, original: object = getattr(Session, name)
        ) -> object:
            if statement in about:
                found.append(statement)
            return original(session, statement, *more)  # type: ignore[operator]

        monkeypatch.setattr(Session, name, watched)
    return found


async def test_text_alone_costs_nothing(database_url: str, ran: list[object]) -> None:
    store = SqlStore(database_url, ManualClock())
    gate = Gate()
    agent = ScriptedAgent([gate, "one", DONE])
    async with service(store, agent) as it:
        first = await send(it, TextPart("a"))
        thread_id = (await it.threads.turn("ada", first))[0].thread_id
        second = await send(it, TextPart("b"), thread_id=thread_id, on_busy=BusyPolicy.QUEUE)
        await gate.reached.wait()
        gate.open()
        await it.events(second)
        assert len(await agent.requests[-1].history(MAX_DATA)) == 2
        await it.threads.messages(MessageQuery(user_id="ada", thread_id=thread_id), 0, "")
        assert ran == []
        await send(it, ImagePart(PNG), thread_id=thread_id)
        assert len(ran) == 1  # the watch works
    await store.aclose()


async def test_a_coach_that_looks_at_nothing_loads_nothing(database_url: str, ran: list[object]) -> None:
    store = SqlStore(database_url, ManualClock())
    async with service(store, cast("ScriptedAgent", PracticeAgent(0))) as it:
        first = await send(it, TextPart("I want to lead"), ImagePart(PNG), FilePart(PDF))
        await it.events(first)
        thread_id = (await it.threads.turn("ada", first))[0].thread_id
        ran.clear()
        reply = text_of(await it.events(await send(it, TextPart("My team"), thread_id=thread_id)))
        assert reply
        assert ran == []
        await it.threads.messages(MessageQuery(user_id="ada", thread_id=thread_id), 0, "")
        assert len(ran) == 1  # there was something to load
    await store.aclose()


async def test_a_page_is_read_with_one_statement_for_all_that_is_attached(
    database_url: str, ran: list[object]
) -> None:
    store = SqlStore(database_url, ManualClock())
    async with service(store) as it:
        first = await send(it, ImagePart(PNG), FilePart(PDF))
        await it.events(first)
        thread_id = (await it.threads.turn("ada", first))[0].thread_id
        for _ in range(5):
            await it.events(await send(it, TextPart("Look"), ImagePart(PNG), FilePart(PDF), thread_id=thread_id))
        ran.clear()
        page, _ = await it.threads.messages(MessageQuery(user_id="ada", thread_id=thread_id), 0, "")
        assert len(page) == 12
        assert len(ran) == 1
    await store.aclose()


async def test_rows_of_messages_hold_no_bytes(database_url: str) -> None:
    store = SqlStore(database_url, ManualClock())
    gate = Gate()
    image, file = ImagePart(PNG), FilePart(PDF, "cv.pdf")
    async with service(store, ScriptedAgent([gate, DONE])) as it:
        first = await send(it, TextPart("Look"), image, file)
        thread_id = (await it.threads.turn("ada", first))[0].thread_id
        await send(it, image, ImagePart("https://example.org/x"), thread_id=thread_id, on_busy=BusyPolicy.QUEUE)
        content, waiting = (
            rows(database_url, "SELECT content FROM messages"),
            rows(database_url, "SELECT waiting FROM turns WHERE waiting IS NOT NULL"),
        )
        assert content == [
            [
                ["text", "Look"],
                ["image", len(PNG), "image/png", "auto"],
                ["file", len(PDF), "application/pdf", "cv.pdf"],
            ]
        ]
        assert [kept[1] for kept in waiting] == [
            [["image", len(PNG), "image/png", "auto"], ["image", "https://example.org/x", "", "auto"]]
        ]
    await store.aclose()


def rows(url: str, query: str) -> list[Any]:
    """The JSON in the one column of a query."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True)
        try:
            return [json.loads(row[0]) for row in connection.execute(query)]
        finally:
            connection.close()
    with psycopg.connect(url) as server:
        return [row[0] for row in server.execute(query.encode())]


async def test_all_is_written_in_the_transaction_that_accepts(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it fails behind the bytes, they are not there either."""
    store = SqlStore(database_url, ManualClock())
    struck = []

    async with service(store) as it:

        def begin(self: TurnLog, turn_id: str, events: object) -> None:
            struck.append(attachments.Attachments(self._session).of([turn_id])[turn_id])
            raise ValueError("a fault")

        with monkeypatch.context() as patch:
            patch.setattr(TurnLog, "begin", begin)
            with pytest.raises(ValueError, match="a fault"):
                await send(it, ImagePart(PNG), request_id="r1")
        assert struck == [{0: PNG}]
        assert rows(database_url, "SELECT '1' FROM attachments") == []
        await it.events(await send(it, ImagePart(PNG), request_id="r1"))
    await store.aclose()
