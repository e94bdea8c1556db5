"""`/delete` in the terminal client, against the real service."""

import asyncio
import io

import grpc
import pytest

from doubles import ScriptedAgent
from entrypoints.cli.connection import ServiceAt, open_channel
from entrypoints.cli.failure import Failure
from entrypoints.cli.session import Session
from entrypoints.cli.terminal import Lines, Screen
from entrypoints.client import CoachClient
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import Client, reason, served


class Terminal(io.StringIO):
    """A stream that may claim to be a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


async def talk(client: Client, typed: str, *, terminal: bool = True, thread_id: str = "") -> tuple[bool, str, str]:
    """Types; returns how it ended, the replies and the rest."""
    source, out, err = Terminal(typed), Terminal(), Terminal()
    source.terminal = out.terminal = err.terminal = terminal

    def run() -> bool:
        screen = Screen(out, err)
        with open_channel(client.address) as channel:
            session = Session(
                CoachClient(channel, "ada"),
                ServiceAt(client.address, ""),
                screen,
                Lines(source, screen),
                domain="career" if not thread_id else "",
                thread_id=thread_id,
            )
            return session.run()

    well = await asyncio.to_thread(run)
    return well, out.getvalue(), err.getvalue()


async def threads(client: Client) -> list[str]:
    """The ids of what is kept."""
    page = await client.threads.ListThreads(threads_api.ListThreadsRequest(user_id="ada"))
    return [thread.id for thread in page.threads]


async def test_a_conversation_is_deleted_when_it_is_confirmed() -> None:
    async with served(ScriptedAgent()) as client:
        well, _, shown = await talk(client, "/delete\nMy secret\n/delete\n/delete YES\n/history\n")
        assert well
        assert "There is nothing to delete" in shown
        assert shown.count("/delete yes deletes this conversation about career for good: My secret (2 mess") == 2
        (kept,) = await threads(client)
        well, _, shown = await talk(client, "/delete yes\n/history\n/threads\n", thread_id=kept)
        assert well
        assert "The conversation is deleted.\nA new conversation about career begins with your next" in shown
        assert "Nothing has been said yet." in shown
        assert "No conversations yet." in shown
        assert "--thread" not in shown
        assert await threads(client) == []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await client.threads.GetThread(threads_api.GetThreadRequest(user_id="ada", thread_id=kept))
        assert reason(error.value) == "THREAD_NOT_FOUND"


async def test_what_is_said_next_begins_another_conversation() -> None:
    async with served(ScriptedAgent()) as client:
        well, replies, _ = await talk(client, "One\n/delete yes\nTwo\n", terminal=False)
        assert well
        assert replies == "All right.\n" * 2
        (thread_id,) = await threads(client)
        lines = await client.threads.ListMessages(
            threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id)
        )
        assert [line.content[0].text for line in lines.messages] == ["Two", "All right."]


async def test_a_pipe_that_does_not_confirm_goes_no_further() -> None:
    async with served(ScriptedAgent()) as client:
        with pytest.raises(Failure, match="/delete yes"):
            await talk(client, "One\n/delete\nTwo\n", terminal=False)
        assert len(await threads(client)) == 1


async def test_help_names_the_command() -> None:
    async with served(ScriptedAgent()) as client:
        _, _, shown = await talk(client, "/help\n")
        assert "/delete  " in shown
