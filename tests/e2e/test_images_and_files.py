"""Images and files through the service: sent both ways, shown in the history, nowhere else."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from core.model.attachment import MAX_IMAGE, Detail, FilePart, ImagePart
from core.model.message import TextPart
from doubles import ScriptedAgent
from entrypoints.client import AsyncCoachClient, connect_async
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import DEADLINE, Client, reason, served
from samples import IMAGES, JPEG, PDF, PNG, TEXT, photo

URL = "https://pictures.example.org/a.png?signature=kanarienvogel"
SENT = [
    pb.ContentPart(text="Look"),
    pb.ContentPart(image=pb.ImagePart(data=PNG, detail="high")),
    pb.ContentPart(image=pb.ImagePart(url=URL)),
    pb.ContentPart(file=pb.FilePart(data=PDF, filename="kanarienvogel.pdf", mime_type="application/pdf")),
    pb.ContentPart(file=pb.FilePart(data=TEXT, mime_type="Text/Markdown")),
    pb.ContentPart(file=pb.FilePart(url=URL, filename="notes")),
]
SHOWN = [
    pb.ContentPart(text="Look"),
    pb.ContentPart(image=pb.ImagePart(data=PNG, mime_type="image/png", detail="high")),
    pb.ContentPart(image=pb.ImagePart(url=URL, detail="auto")),
    pb.ContentPart(file=pb.FilePart(data=PDF, filename="kanarienvogel.pdf", mime_type="application/pdf")),
    pb.ContentPart(file=pb.FilePart(data=TEXT, mime_type="text/markdown")),
    pb.ContentPart(file=pb.FilePart(url=URL, filename="notes")),
]


@pytest.fixture
def agent() -> ScriptedAgent:
    """A coach that says the same to everything."""
    return ScriptedAgent()


@pytest.fixture
async def client(
    database_url: str, agent: ScriptedAgent, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Client]:
    """A server on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    async with served(agent) as client:
        yield client


async def chat(client: Client, *content: pb.ContentPart, **more: Any) -> pb.TurnStarted:
    """Chats to the end of the stream."""
    request = api.ChatRequest(user_id="ada", content=content, **more)
    events = [response.event async for response in client.agents.Chat(request, timeout=DEADLINE)]
    assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
    started: pb.TurnStarted = events[0].started
    return started


async def history(client: Client, thread_id: str, **more: Any) -> threads_api.ListMessagesResponse:
    """A page of a thread."""
    request = threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id, **more)
    page: threads_api.ListMessagesResponse = await client.threads.ListMessages(request, timeout=DEADLINE)
    return page


async def test_both_ways_of_sending_bring_the_same_to_coach_and_history(
    client: Client, agent: ScriptedAgent
) -> None:
    started = await chat(client, *SENT)
    answer = await client.agents.SendMessage(
        api.SendMessageRequest(user_id="ada", content=SENT, thread_id=started.thread_id), timeout=DEADLINE
    )
    assert answer.turn.state == pb.TURN_STATE_COMPLETED
    for request in agent.requests:
        assert request.message.content == (
            TextPart("Look"),
            ImagePart(PNG, "image/png", Detail.HIGH),
            ImagePart(URL),
            FilePart(PDF, "kanarienvogel.pdf", "application/pdf"),
            FilePart(TEXT, "", "text/markdown"),
            FilePart(URL, "notes"),
        )
    page = await history(client, started.thread_id)
    assert [message.role for message in page.messages] == [pb.ROLE_USER, pb.ROLE_ASSISTANT] * 2
    assert [list(message.content) for message in page.messages[::2]] == [SHOWN, SHOWN]


@pytest.mark.parametrize("mime_type", IMAGES)
async def test_an_image_alone_is_a_message(client: Client, mime_type: str) -> None:
    started = await chat(client, pb.ContentPart(image=pb.ImagePart(data=IMAGES[mime_type])))
    (question, reply) = (await history(client, started.thread_id)).messages
    assert question.content[0].image == pb.ImagePart(data=IMAGES[mime_type], mime_type=mime_type, detail="auto")
    assert reply.content[0].text == "All right."


async def test_the_same_request_id_with_another_picture(client: Client) -> None:
    picture = pb.ContentPart(image=pb.ImagePart(data=PNG))
    started = await chat(client, picture, request_id="r1")
    assert (await chat(client, picture, request_id="r1")).turn_id == started.turn_id
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await chat(client, pb.ContentPart(image=pb.ImagePart(data=JPEG)), request_id="r1")
    assert (error.value.code(), reason(error.value)) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


async def test_a_usual_client_can_read_pages_of_pictures(client: Client) -> None:
    thread_id = ""
    for number in range(5):
        picture = pb.ContentPart(image=pb.ImagePart(data=photo(1_000_000 + number)))
        thread_id = (await chat(client, picture, thread_id=thread_id)).thread_id
    for newest_first in (False, True):
        pages = [await history(client, thread_id, newest_first=newest_first)]
        while token := pages[-1].next_page_token:
            pages.append(await history(client, thread_id, newest_first=newest_first, page_token=token))
        assert len(pages) == 2
        lines = [line for page in pages for line in page.messages]
        sizes = [len(line.content[0].image.data) for line in lines if line.role == pb.ROLE_USER]
        assert sizes == sorted(range(1_000_000, 1_000_005), reverse=newest_first)


async def test_a_large_picture_needs_a_client_that_takes_it_as_ours_does(client: Client) -> None:
    large = photo(MAX_IMAGE)
    async with connect_async(client.address) as channel:
        ours = AsyncCoachClient(channel, user_id="ada")
        attachments = [pb.ContentPart(image=pb.ImagePart(data=large)), pb.ContentPart(file=pb.FilePart(data=PDF))]
        async with ours.say("", attachments=attachments) as reply:
            events = [event async for event in reply]
        assert isinstance(events[-1], pb.TurnFinished)
        assert events[-1].turn.state == pb.TURN_STATE_COMPLETED
        lines = [message async for message in ours.messages(reply.thread_id)]
        assert lines[0].content[0].image.data == large
        assert lines[0].content[1].file.data == PDF
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await history(client, reply.thread_id)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # What stands beside it is within everybody's reach.
        page = await history(client, reply.thread_id, newest_first=True)
        assert [line.role for line in page.messages] == [pb.ROLE_ASSISTANT]


async def test_nothing_of_it_is_in_logs_and_errors(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await chat(client, *SENT)
        for bad in (
            pb.ContentPart(image=pb.ImagePart(url="http://kanarienvogel.example")),
            pb.ContentPart(image=pb.ImagePart(data=b"kanarienvogel")),
            pb.ContentPart(image=pb.ImagePart(data=PNG, mime_type="kanarienvogel")),
            pb.ContentPart(image=pb.ImagePart(data=PNG, detail="kanarienvogel")),
            pb.ContentPart(file=pb.FilePart(data=b"\0kanarienvogel")),
            pb.ContentPart(file=pb.FilePart(data=PDF, filename="kanarienvogel\0")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await chat(client, bad)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            told = f"{error.value.details()} {error.value.trailing_metadata()!r}"
            assert "kanarienvogel" not in told
            assert "content[0]" in told
    assert "kanarienvogel" not in caplog.text
    assert PNG[:8].decode("latin-1") not in caplog.text
