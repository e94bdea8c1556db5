"""Images and files from acceptance to deletion, on every store."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from core.model.attachment import MAX_DATA, MAX_IMAGE, Detail, FilePart, ImagePart, Unread
from core.model.errors import InvalidField, RequestIdReused
from core.model.message import ContentPart, Message, Role, TextPart
from core.model.turn import BusyPolicy, TurnState
from core.ports.store import Store
from core.use_cases.accept_message import IncomingMessage
from core.use_cases.read_threads import MAX_PAGE_BYTES, MessageQuery
from doubles import DONE, Gate, ScriptedAgent, Service, service
from samples import JPEG, PDF, PNG, TEXT, photo

URL = "https://pictures.example.org/a.png"
CONTENT: tuple[ContentPart, ...] = (
    TextPart("Look"),
    ImagePart(PNG, "image/png", Detail.HIGH),
    ImagePart(URL),
    TextPart("and"),
    FilePart(PDF, "cv 👋.pdf", "application/pdf"),
    FilePart(TEXT, "", "text/markdown"),
    FilePart(URL, "notes", "text/plain"),
)


async def send(it: Service, *content: ContentPart, user: str = "ada", **more: Any) -> str:
    """Accepts a message; returns the turn's id."""
    return (await it.accept(IncomingMessage(user_id=user, content=content, **more))).turn.id


async def thread_of(it: Service, turn_id: str) -> str:
    """The thread of a turn."""
    return (await it.threads.turn("ada", turn_id))[0].thread_id


async def transcript(it: Service, thread_id: str, **more: bool) -> list[Message]:
    """A whole thread, page by page."""
    lines: list[Message] = []
    token = ""
    while True:
        query = MessageQuery(user_id="ada", thread_id=thread_id, **more)
        page, token = await it.threads.messages(query, 0, token)
        lines += page
        if not token:
            return lines


async def test_what_is_attached_reaches_coach_and_history_whole(store: Store) -> None:
    agent = ScriptedAgent()
    async with service(store, agent) as it:
        first = await send(it, *CONTENT)
        await it.events(first)
        thread_id = await thread_of(it, first)
        second = await send(it, ImagePart(JPEG), thread_id=thread_id)  # without a word
        await it.events(second)
        await it.events(await it.say("Only words", thread_id=thread_id))
        assert agent.requests[0].message.content == CONTENT
        assert agent.requests[0].message.text == "Lookand"
        assert agent.requests[1].message.content == (ImagePart(JPEG, "image/jpeg"),)
        before = await agent.requests[2].history(MAX_DATA)
        assert [line.content for line in before if line.role is Role.USER] == [
            CONTENT,
            (ImagePart(JPEG, "image/jpeg"),),
        ]
        lines = await transcript(it, thread_id)
        assert lines[:4] == list(before)
        assert lines[::-1] == await transcript(it, thread_id, newest_first=True)


async def test_a_repeat_must_bring_the_same(store: Store) -> None:
    async with service(store) as it:
        turn_id = await send(it, TextPart("Look"), ImagePart(PNG), request_id="r1")
        assert await send(it, TextPart("Look"), ImagePart(PNG, "image/png"), request_id="r1") == turn_id
        for other in ((ImagePart(PNG + b"x"),), (ImagePart(URL),), (FilePart(TEXT),), ()):
            with pytest.raises(RequestIdReused):
                await send(it, TextPart("Look"), *other, request_id="r1")
        await it.events(turn_id)
        (question, _) = await transcript(it, await thread_of(it, turn_id))
        assert question.content == (TextPart("Look"), ImagePart(PNG, "image/png"))


async def test_what_is_refused_leaves_no_trace(store: Store) -> None:
    async with service(store) as it:
        for bad in (ImagePart(b"MZ"), FilePart(b"\0"), ImagePart("http://example.org/x"), FilePart(b"")):
            with pytest.raises(InvalidField):
                await send(it, TextPart("Look"), bad, request_id="r1")
        assert await store.read(lambda tx: tx.turns.by_request("local", "ada", "r1")) is None
        assert it.engine.reserve("ada") is None  # every place is free


async def test_a_message_that_waits_keeps_what_is_attached(store: Store) -> None:
    gate = Gate()
    agent = ScriptedAgent([gate, "one", DONE])
    async with service(store, agent) as it:
        first = await it.say()
        thread_id = await thread_of(it, first)
        second = await send(it, *CONTENT, thread_id=thread_id, on_busy=BusyPolicy.QUEUE)
        waiting = await store.read(lambda tx: tx.turns.waiting_message(second))
        assert waiting is not None
        assert waiting.content == CONTENT
        assert len(await transcript(it, thread_id)) == 1
        await gate.reached.wait()
        gate.open()
        await it.events(second)
        assert agent.requests[1].message.content == CONTENT
        assert [line.content for line in await transcript(it, thread_id)][2] == CONTENT


async def left(store: Store, turn_id: str) -> dict[int, bytes]:
    """What is stored of a turn's images and files, wherever that is."""
    tables = getattr(store, "_tables", None)
    if tables is not None:
        return dict(tables.attachments.get(turn_id, {}))
    return dict(await store.read(lambda tx: tx.messages._attachments.of([turn_id])[turn_id]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("interrupted", [False, True], ids=["cancelled", "interrupted"])
async def test_a_message_that_never_joins_the_transcript_leaves_nothing(store: Store, interrupted: bool) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent([gate, "one", DONE])) as it:
        first = await send(it, ImagePart(PNG))
        thread_id = await thread_of(it, first)
        await gate.reached.wait()
        waiting = await send(it, *CONTENT, thread_id=thread_id, on_busy=BusyPolicy.QUEUE)
        assert len(await left(store, waiting)) == 3
        if interrupted:
            last = await send(it, ImagePart(JPEG), thread_id=thread_id, on_busy=BusyPolicy.INTERRUPT)
            await it.events(last)
            assert await left(store, last) == {0: JPEG}
        else:
            await it.cancel("ada", waiting)
            await it.cancel("ada", first)
        assert (await it.threads.turn("ada", waiting))[0].state is TurnState.CANCELLED
        assert await left(store, waiting) == {}
        assert await left(store, first) == {0: PNG}  # which has run, and stands in the transcript
        lines = await transcript(it, thread_id)
        assert [line.content for line in lines if line.turn_id == first] == [(ImagePart(PNG, "image/png"),)]


async def test_deletion_leaves_nothing_and_the_others(store: Store) -> None:
    gate = Gate()
    async with service(store, ScriptedAgent(["one", DONE], ["two", DONE], [gate, DONE])) as it:
        kept = await send(it, *CONTENT)
        await it.events(kept)
        gone = await send(it, *CONTENT)
        await it.events(gone)
        thread_id = await thread_of(it, gone)
        running = await send(it, ImagePart(PNG), thread_id=thread_id)
        waiting = await send(it, FilePart(PDF), thread_id=thread_id, on_busy=BusyPolicy.QUEUE)
        for turn_id, count in ((kept, 3), (gone, 3), (running, 1), (waiting, 1)):
            assert len(await left(store, turn_id)) == count
        await it.delete("ada", thread_id)
        for turn_id in (gone, running, waiting):
            assert await left(store, turn_id) == {}
        assert (await transcript(it, await thread_of(it, kept)))[0].content == CONTENT


async def test_a_turn_that_begins_again_has_what_is_attached(store: Store) -> None:
    lost = Gate()
    first = ScriptedAgent([lost])
    async with service(store, first, lease=15.0) as one:
        turn_id = await send(one, *CONTENT)
        await lost.reached.wait()
        await one.engine.drain(0)  # hands it on
    agent = ScriptedAgent()
    async with service(store, agent, lease=15.0) as other:
        await other.events(turn_id)
        assert agent.requests[0].message.content == CONTENT


# Bounds on what is read


def sizes(lines: Sequence[Message]) -> list[int]:
    """Bytes that come along with each line; -1 where they were left on record."""
    sources = [getattr(part, "source", b"") for line in lines for part in line.content]
    return [-1 if isinstance(source, Unread) else len(source) for source in sources]


async def test_a_list_reads_along_no_more_than_it_may(store: Store) -> None:
    async with service(store) as it:
        turn_id = await send(it, ImagePart(photo(100)))
        await it.events(turn_id)
        thread_id = await thread_of(it, turn_id)
        for size in (200, 300):
            await it.events(await send(it, ImagePart(photo(size)), thread_id=thread_id))

        async def read(data: int, *, newest_first: bool = False, after: int | None = None) -> list[int]:
            lines = await store.read(
                lambda tx: tx.messages.list(
                    thread_id, after=after, newest_first=newest_first, limit=None, data=data
                )
            )
            return [size for size in sizes(lines) if size]

        assert await read(0) == [-1, -1, -1]
        assert await read(99) == [-1, -1, -1]
        assert await read(100) == [100, -1, -1]
        assert await read(299) == [100, -1, -1]
        assert await read(300) == [100, 200, -1]
        assert await read(600) == [100, 200, 300]
        assert await read(300, newest_first=True) == [300, -1, -1]
        assert await read(299, newest_first=True) == [-1, -1, -1]  # none behind one that is too large
        assert await read(200, after=2) == [200, -1]


async def test_a_page_ends_before_it_grows_too_large(store: Store) -> None:
    small = MAX_PAGE_BYTES // 3
    async with service(store) as it:
        turn_id = await send(it, ImagePart(photo(MAX_PAGE_BYTES + 1)))
        await it.events(turn_id)
        thread_id = await thread_of(it, turn_id)
        for _ in range(4):
            await it.events(await send(it, TextPart("x" * 100), ImagePart(photo(small)), thread_id=thread_id))
        for newest_first in (False, True):
            pages: list[list[int]] = []
            token = ""
            while not pages or token:
                query = MessageQuery(user_id="ada", thread_id=thread_id, newest_first=newest_first)
                page, token = await it.threads.messages(query, 0, token)
                pages.append([line.index for line in page])
                found = sizes(page)
                assert -1 not in found
                assert sum(found) <= MAX_PAGE_BYTES or len(page) == 1
            if newest_first:
                # A reply, then a picture: two of them with their text are just within the bound, three are not.
                assert pages == [[10, 9, 8, 7, 6], [5, 4, 3, 2], [1]]
            else:
                assert pages == [[1], [2, 3, 4, 5, 6], [7, 8, 9, 10]]


async def test_a_coach_is_reminded_of_as_much_as_it_asks_for_and_of_the_newest(store: Store) -> None:
    agent = ScriptedAgent()
    large = photo(MAX_IMAGE)
    async with service(store, agent) as it:
        turn_id = await send(it, FilePart(TEXT), ImagePart(large))
        await it.events(turn_id)
        thread_id = await thread_of(it, turn_id)
        await it.events(await send(it, ImagePart(large), thread_id=thread_id))
        await it.events(await it.say("Do you remember?", thread_id=thread_id))
        before = await agent.requests[-1].history(MAX_DATA)
        assert [line.index for line in before] == [1, 2, 3, 4]
        unread = (
            FilePart(Unread(len(TEXT)), "", "text/plain"),
            ImagePart(Unread(MAX_IMAGE), "image/png"),
        )
        assert before[0].content == unread
        assert before[2].content == (ImagePart(large, "image/png"),)
        bare = await agent.requests[-1].history()
        assert bare[0].content == unread
        assert bare[2].content == (ImagePart(Unread(MAX_IMAGE), "image/png"),)
        assert [bare[1], bare[3]] == [before[1], before[3]]


async def test_as_much_as_a_message_may_have(store: Store) -> None:
    agent = ScriptedAgent()
    content = (FilePart(b"x" * (MAX_DATA - len(PNG)), "", "text/plain"), ImagePart(PNG, "image/png"))
    async with service(store, agent) as it:
        turn_id = await send(it, *content)
        await it.events(turn_id)
        assert agent.requests[0].message.content == content
        (question, reply) = await transcript(it, await thread_of(it, turn_id))
        assert question.content == content
        assert reply.text == "All right."


async def test_the_loop_goes_on_while_bytes_are_checked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other calls nor other changes wait for a large file to be looked through."""
    looks: list[tuple[str, str]] = []

    def noted(name: str) -> None:
        original = getattr(IncomingMessage, name)

        def look(message: IncomingMessage) -> Any:
            try:
                asyncio.get_running_loop()
                looks.append((name, "loop"))
            except RuntimeError:
                looks.append((name, threading.current_thread().name.partition("_")[0]))
            return original(message)

        monkeypatch.setattr(IncomingMessage, name, look)

    for name in ("checked", "fingerprint"):
        noted(name)
    async with service(store) as it:
        await it.events(await send(it, FilePart(TEXT), request_id="r1"))
        await it.events(await it.say(request_id="r2"))
    assert looks == [
        ("checked", "asyncio"), ("fingerprint", "asyncio"), ("checked", "loop"), ("fingerprint", "loop"),
    ]  # fmt: skip
