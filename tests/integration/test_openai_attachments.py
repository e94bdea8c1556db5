"""Images and files on their way to the provider, at first and when it has to be reminded."""

import asyncio
from base64 import b64decode
from binascii import b2a_base64
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI

from adapters.openai.agent import OpenAIAgent
from adapters.openai.context import tokens
from adapters.openai.items import history_items, turn_items
from adapters.openai.memory import StateMode
from core.model.attachment import Detail, FilePart, ImagePart, Unread
from core.model.message import ContentPart, Role, TextPart
from core.model.turn import TurnReason
from core.ports.agent import AgentFailed, ReplyRequest, RoundFinished
from fake_provider import FakeProvider, HttpError
from openai_thread import USER_KEY, Naps, ThreadOfTest, said
from samples import IMAGES, PDF, PNG, TEXT, photo

URL = "https://pictures.example.org/a.png"
CONTENT: tuple[ContentPart, ...] = (
    TextPart("Look"),
    ImagePart(PNG, "image/png", Detail.HIGH),
    ImagePart(URL),
    FilePart(PDF, "cv.pdf", "application/pdf"),
    FilePart(TEXT, "", "text/markdown"),
    FilePart(URL, "notes.txt", "text/plain"),
)


@pytest.fixture(params=list(StateMode))
def thread(request: pytest.FixtureRequest, client: AsyncOpenAI) -> ThreadOfTest:
    """A thread in each of the modes."""
    agent = OpenAIAgent(client, model="gpt-6-luna", user_key=USER_KEY, sleep=Naps(), state_mode=request.param)
    return ThreadOfTest(agent)


def asks(thread: ThreadOfTest, *content: ContentPart) -> ReplyRequest:
    """Accepts a message with attachments."""
    request = thread.begin("")
    thread.messages[-1] = replace(thread.messages[-1], content=content)
    return replace(request, message=thread.messages[-1])


async def answered(thread: ThreadOfTest, *content: ContentPart) -> None:
    """A turn with attachments, from its beginning to its end."""
    events = await thread.round(asks(thread, *content))
    thread.add(Role.ASSISTANT, said(events))
    finished = events[-1]
    assert isinstance(finished, RoundFinished)
    if finished.copy is not None:
        thread.state = replace(finished.copy, synced_to=len(thread.messages))


def check(content: list[dict[str, Any]]) -> None:
    """Everything of CONTENT is there, in the provider's words."""
    text, image, linked, document, notes, far = content
    assert text == {"type": "input_text", "text": "Look"}
    assert (image["type"], image["detail"]) == ("input_image", "high")
    assert decoded(image["image_url"]) == ("image/png", PNG)
    assert linked == {"type": "input_image", "image_url": URL, "detail": "auto"}
    assert (document["type"], document["filename"]) == ("input_file", "cv.pdf")
    assert decoded(document["file_data"]) == ("application/pdf", PDF)
    assert notes["filename"] == "document.txt"
    assert decoded(notes["file_data"]) == ("text/markdown", TEXT)
    assert far == {"type": "input_file", "file_url": URL}


def decoded(url: str) -> tuple[str, bytes]:
    """The type and the bytes in a data URL."""
    head, data = url.split(",")
    assert head.startswith("data:")
    assert head.endswith(";base64")
    return head[5:-7], b64decode(data, validate=True)


async def test_what_is_attached_is_sent_whole(provider: FakeProvider, thread: ThreadOfTest) -> None:
    await answered(thread, *CONTENT)
    (item,) = provider.posts[0]["input"]
    assert (item["type"], item["role"]) == ("message", "user")
    check(item["content"])


@pytest.mark.parametrize("mime_type", IMAGES)
async def test_every_kind_of_image(provider: FakeProvider, thread: ThreadOfTest, mime_type: str) -> None:
    await answered(thread, ImagePart(IMAGES[mime_type], mime_type))
    (part,) = provider.posts[0]["input"][0]["content"]
    assert decoded(part["image_url"]) == (mime_type, IMAGES[mime_type])


async def test_a_rebuilt_conversation_has_what_was_attached(provider: FakeProvider, thread: ThreadOfTest) -> None:
    await answered(thread, *CONTENT)
    provider.conversations.clear()
    provider.contexts.clear()
    await thread.round(asks(thread, TextPart("Do you remember?")))
    # Without a conversation the request says everything.
    copied = [item for conversation in provider.conversations.values() for item in conversation.items]
    items = copied or provider.posts[-1]["input"]
    check(items[0]["content"])
    assert items[2]["content"][0]["text"] == "Do you remember?"


async def test_what_the_provider_refused_spoils_no_later_turn(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    provider.then(HttpError(status=400, code="invalid_image"))
    with pytest.raises(AgentFailed) as refused:
        await thread.round(asks(thread, *CONTENT))
    assert refused.value.reason is TurnReason.PROVIDER_CONFIG
    await thread.round(asks(thread, TextPart("And now?")))
    sent = str([*provider.posts[-1]["input"], *(c.items for c in provider.conversations.values())])
    assert "Look" in sent
    assert "An image was sent here" in sent
    assert "A file was sent here" in sent
    assert "base64" not in sent
    assert URL not in sent


@pytest.mark.parametrize("thread", [StateMode.CONVERSATION], indirect=True)
async def test_a_conversation_with_attachments_is_known_again(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    """After a failure it is looked at, and what is attached does not make it another one."""
    await answered(thread, *CONTENT)
    (conversation,) = provider.conversations.values()
    before = list(conversation.items)
    provider.then(HttpError(status=400))
    with pytest.raises(AgentFailed):
        await thread.round(asks(thread, ImagePart(PNG, "image/png")))
    await thread.round(asks(thread, TextPart("And now?")))
    assert list(provider.conversations.values()) == [conversation]
    assert conversation.items[:2] == before
    check(conversation.items[0]["content"])
    texts = [[part["text"] for part in item["content"] if "text" in part] for item in conversation.items]
    assert texts[2] == ["(An image was sent here. It is not shown again.)"]
    assert texts[3] == ["And now?"]
    assert str(conversation.items).count("base64") == 3


@pytest.mark.parametrize("thread", [StateMode.CONVERSATION], indirect=True)
async def test_a_refused_picture_that_the_provider_kept_is_taken_out(
    provider: FakeProvider, thread: ThreadOfTest
) -> None:
    await answered(thread, TextPart("Hello"))
    (conversation,) = provider.conversations.values()
    before = list(conversation.items)
    provider.then(HttpError(status=400))
    request = asks(thread, TextPart("Look"), ImagePart(PNG, "image/png"))
    with pytest.raises(AgentFailed):
        await thread.round(request)
    conversation.items += [{"id": "msg_kept", **dict(item)} for item in turn_items(request)]
    await thread.round(asks(thread, TextPart("And now?")))
    assert list(provider.conversations.values()) == [conversation]
    assert conversation.items[:2] == before
    assert "base64" not in str(conversation.items)
    assert "An image was sent here" in str(conversation.items)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of each piece of base64, where it is made and of how many bytes."""
    made: list[tuple[str, int]] = []

    def noted(data: bytes, *, newline: bool) -> bytes:
        try:
            asyncio.get_running_loop()
            made.append(("loop", len(data)))
        except RuntimeError:
            made.append(("thread", len(data)))
        return b2a_base64(data, newline=newline)

    monkeypatch.setattr("adapters.openai.items.b2a_base64", noted)
    return made


async def test_the_loop_goes_on_while_much_becomes_base64(
    provider: FakeProvider, thread: ThreadOfTest, pieces: list[tuple[str, int]]
) -> None:
    """Sent at first, sent again to a provider that has lost it, and compared with what the provider has."""
    large = photo(1_000_000)

    async def remember() -> None:
        pieces.clear()
        await thread.round(asks(thread, TextPart("Do you remember?")))

    await answered(thread, ImagePart(large, "image/png"))
    assert sum(size for _, size in pieces) >= len(large)
    assert {where for where, _ in pieces} == {"thread"}
    provider.conversations.clear()
    provider.contexts.clear()
    await remember()
    assert sum(size for _, size in pieces) >= len(large)
    assert {where for where, _ in pieces} == {"thread"}
    assert max(size for _, size in pieces) < len(large) / 4  # between them the loop gets its turn
    provider.then(HttpError(status=400))
    with pytest.raises(AgentFailed):
        await thread.round(asks(thread, TextPart("Hello?")))
    await remember()
    assert {where for where, _ in pieces} == {"thread"}


async def test_a_little_base64_is_made_at_once(thread: ThreadOfTest, pieces: list[tuple[str, int]]) -> None:
    await answered(thread, ImagePart(PNG, "image/png"))
    assert {where for where, _ in pieces} == {"loop"}


def test_a_text_takes_as_much_room_as_it_has_words() -> None:
    def cost(*content: ContentPart) -> int:
        thread = ThreadOfTest(agent=None)  # type: ignore[arg-type] # nobody is asked
        thread.add(Role.USER, "", content=content)
        return tokens(history_items(thread.messages))

    said = cost(TextPart("x" * 30_000))
    assert said <= cost(FilePart(b"x" * 30_000, "", "text/plain")) <= said * 1.01
    assert cost(FilePart(PDF, "", "application/pdf")) == cost(ImagePart(PNG, "image/png")) == cost(ImagePart(URL))


async def test_what_is_too_old_is_named(provider: FakeProvider, thread: ThreadOfTest) -> None:
    thread.turns += 1
    thread.add(
        Role.USER,
        "",
        content=(ImagePart(Unread(5), "image/png"), FilePart(Unread(7), "x", "text/plain"), ImagePart(URL)),
    )
    thread.add(Role.ASSISTANT, "I see.")
    items: Any = history_items(thread.messages)
    assert items[0]["content"] == [
        {"type": "input_text", "text": "(An image was sent here. It is not shown again.)"},
        {"type": "input_text", "text": "(A file was sent here. It is not shown again.)"},
        {"type": "input_image", "image_url": URL, "detail": "auto"},
    ]
    await thread.round(asks(thread, TextPart("More")))
    assert len(provider.posts) == 1


@given(st.binary(min_size=1), st.sampled_from([1, 3 << 15, 3 << 16, 500_000]))
def test_a_data_url_is_the_bytes(some: bytes, least: int) -> None:
    data = some * -(-least // len(some))
    thread = ThreadOfTest(agent=None)  # type: ignore[arg-type] # nobody is asked
    thread.add(Role.USER, "", content=(FilePart(data, "a", "text/plain"),))
    thread.add(Role.ASSISTANT, "I see.")
    items: Any = history_items(thread.messages)
    assert decoded(items[0]["content"][0]["file_data"]) == ("text/plain", data)
