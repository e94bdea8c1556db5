"""`vida-coach chat` against real servers: what is shown, what is asked of the service, and how it ends."""

import asyncio
import io
import os
import pty
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from adapters.sql.engines import database_file
from entrypoints.cli import connection
from entrypoints.cli import embedded as server
from entrypoints.cli.connection import EmbeddedService, ServiceAt, open_channel, service
from entrypoints.cli.embedded import EmbeddedServer
from entrypoints.cli.failure import Failure
from entrypoints.cli.session import Session
from entrypoints.cli.terminal import Lines, Screen
from entrypoints.client import CoachClient, Patience, is_serving
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import (
    AgentServiceServicer,
    add_AgentServiceServicer_to_server,
)
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import (
    ThreadServiceServicer,
    add_ThreadServiceServicer_to_server,
)
from entrypoints.ownership import DatabaseOwnedError, Ownership
from entrypoints.settings import SettingsError, load_settings
from harness import until

SECONDS = 20.0
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Gate:
    """A step of a script that waits for the test."""

    def __init__(self) -> None:
        self.open = asyncio.Event()


@dataclass
class Script:
    """A reply: pieces of text, gates, other events, and how it ends."""

    steps: list[str | Gate | dict[str, Any]]
    state: pb.TurnState.ValueType = pb.TURN_STATE_COMPLETED
    error: pb.TurnError | None = None


@dataclass
class Log:
    """A turn of the scripted service. It outlives the servers."""

    number: int
    thread_id: str
    message: str
    domain: pb.Domain.ValueType
    events: list[pb.TurnEvent] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    playing: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return f"turn-{self.number}"

    @property
    def position(self) -> int:
        return self.events[-1].position if self.events else 0

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].HasField("finished")

    async def add(self, **kind: Any) -> None:
        """Appends an event."""
        text = kind.get("text_delta")
        extent = len(text.text) if text is not None else 1
        async with self.changed:
            self.events.append(pb.TurnEvent(position=self.position + extent, **kind))
            self.changed.notify_all()

    async def end(self, state: pb.TurnState.ValueType, error: pb.TurnError | None = None) -> None:
        """Appends the last event."""
        turn = pb.Turn(id=self.id, thread_id=self.thread_id, state=state, error=error)
        await self.add(finished=pb.TurnFinished(turn=turn))

    async def play(self, script: Script) -> None:
        """Follows a script."""
        for step in script.steps:
            match step:
                case str():
                    await self.add(text_delta=pb.TextDelta(text=step))
                case Gate():
                    await step.open.wait()
                case _:
                    await self.add(**step)
        await self.end(script.state, script.error)

    async def after(self, position: int) -> AsyncIterator[pb.TurnEvent]:
        """The exact suffix, then live."""
        number = 0
        while True:
            async with self.changed:
                while number == len(self.events):
                    await self.changed.wait()
            for event in self.events[number:]:
                number += 1
                if event.position <= position:
                    continue
                shown = pb.TurnEvent()
                shown.CopyFrom(event)
                if event.HasField("text_delta"):
                    shown.text_delta.text = event.text_delta.text[-(event.position - position) :]
                position = event.position
                yield shown
                if event.HasField("finished"):
                    return


class ScriptedCoach(AgentServiceServicer, ThreadServiceServicer):
    """The service, played after scripts. What it knows outlives any one server."""

    def __init__(self, *scripts: Script | list[str | Gate | dict[str, Any]]) -> None:
        self.scripts = [one if isinstance(one, Script) else Script(one) for one in scripts]
        self.turns: list[Log] = []
        self.requests: list[agents_api.ChatRequest] = []
        self.follows: list[agents_api.FollowTurnRequest] = []
        self.cancelled: list[str] = []
        self.refusals: list[tuple[grpc.StatusCode, str] | None] = []
        self.cancels: Gate | None = None
        self.hesitation: Gate | None = None
        self.said: list[pb.Message] = []
        self.inactive: set[str] = set()
        self.agents = [pb.Agent(id="g-v1", domain=pb.DOMAIN_GENERAL, name="Life coach", provider="practice")]
        self.overlapping = False

    async def ListAgents(self, request: Any, context: Any) -> agents_api.ListAgentsResponse:
        return agents_api.ListAgentsResponse(agents=self.agents)

    async def Chat(self, request: agents_api.ChatRequest, context: _Context) -> None:  # type: ignore[override]
        self.requests.append(request)
        if self.hesitation is not None:
            await self.hesitation.open.wait()
        if self.refusals and (refusal := self.refusals.pop(0)) is not None:
            await context.abort(*refusal)
        for turn in self.turns:
            if self.requests[turn.number].request_id == request.request_id:
                break
        else:
            self.overlapping |= any(not turn.ended for turn in self.turns)
            thread_id = request.thread_id or f"thread-{len(self.turns)}"
            domain = request.domain or pb.DOMAIN_GENERAL
            turn = Log(len(self.turns), thread_id, request.content[0].text, domain)
            started = pb.TurnStarted(turn_id=turn.id, thread_id=turn.thread_id, agent_id="g-v1")
            await turn.add(started=started)
            turn.playing = asyncio.create_task(turn.play(self.scripts[turn.number]))
            self.turns.append(turn)
        async for event in turn.after(0):
            await context.write(agents_api.ChatResponse(event=event))

    async def FollowTurn(  # type: ignore[override]
        self, request: agents_api.FollowTurnRequest, context: _Context
    ) -> None:
        self.follows.append(request)
        async for event in self._turn(request.turn_id).after(request.after_position):
            await context.write(agents_api.FollowTurnResponse(event=event))

    async def CancelTurn(self, request: agents_api.CancelTurnRequest, context: Any) -> Any:
        self.cancelled.append(request.turn_id)
        if self.cancels is not None:
            await self.cancels.open.wait()
        turn = self._turn(request.turn_id)
        if not turn.ended:
            assert turn.playing is not None
            turn.playing.cancel()
            error = pb.TurnError(reason="CANCELLED_BY_CALLER", message="The turn was cancelled.")
            await turn.end(pb.TURN_STATE_CANCELLED, error)
        return agents_api.CancelTurnResponse(turn=turn.events[-1].finished.turn)

    async def ListThreads(self, request: Any, context: Any) -> threads_api.ListThreadsResponse:
        newest_first = dict.fromkeys(turn.thread_id for turn in reversed(self.turns))
        threads = [self._thread(thread_id) for thread_id in newest_first]
        page = threads[: request.page_size]
        return threads_api.ListThreadsResponse(
            threads=page, next_page_token="more" if len(page) < len(threads) else ""
        )

    async def GetThread(self, request: Any, context: _Context) -> threads_api.GetThreadResponse:
        if any(turn.thread_id == request.thread_id for turn in self.turns):
            return threads_api.GetThreadResponse(thread=self._thread(request.thread_id))
        await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such thread.")
        raise AssertionError

    async def ListMessages(self, request: Any, context: Any) -> threads_api.ListMessagesResponse:
        said = self.said or [
            pb.Message(role=pb.ROLE_USER, content=[pb.ContentPart(text=turn.message)])
            for turn in self.turns
            if turn.thread_id == request.thread_id
        ]
        return threads_api.ListMessagesResponse(messages=said[:: -1 if request.newest_first else 1])

    async def SendMessage(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetTurn(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def UpdateThread(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def DeleteThread(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    @asynccontextmanager
    async def serving(self, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
        """On a port until left; leaving cuts every call off."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_AgentServiceServicer_to_server(self, server)
        add_ThreadServiceServicer_to_server(self, server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        port = server.add_insecure_port(address)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)

    def _turn(self, turn_id: str) -> Log:
        return next(turn for turn in self.turns if turn.id == turn_id)

    def _thread(self, thread_id: str) -> pb.Thread:
        state = pb.THREAD_STATE_INACTIVE if thread_id in self.inactive else pb.THREAD_STATE_ACTIVE
        domain = next(turn.domain for turn in self.turns if turn.thread_id == thread_id)
        return pb.Thread(id=thread_id, domain=domain, state=state, message_count=2)


class Screenful(io.StringIO):
    """A stream that a test can look at, and that may claim to be a terminal."""

    def __init__(self, text: str = "", terminal: bool = False) -> None:
        super().__init__(text)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Place(ServiceAt):
    """A service that counts how often it was to be revived."""

    revived = 0

    def revive(self) -> None:
        self.revived += 1


@dataclass
class Talk:
    """A session with its streams."""

    out: Screenful
    err: Screenful
    place: Place
    done: "asyncio.Future[bool]"


PATIENT = Patience(seconds=30, first_wait=0.01, longest_wait=0.05)
IMPATIENT = Patience(seconds=0)


@contextmanager
def talking(
    address: str, typed: str, *, terminal: bool = False, patience: Patience = PATIENT, **options: str
) -> Iterator[Talk]:
    """A session that runs in another thread."""
    out, err = Screenful(terminal=terminal), Screenful(terminal=terminal)
    screen = Screen(out, err)
    place = Place(address, "")
    with open_channel(address) as channel:
        client = CoachClient(channel, "ada", patience=patience)
        session = Session(client, place, screen, Lines(Screenful(typed, terminal), screen), **options)
        done = asyncio.ensure_future(asyncio.to_thread(session.run))
        yield Talk(out, err, place, done)


class Command:
    """`vida-coach chat` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, terminal: int | None = None) -> None:
        self.process = process
        self.terminal = terminal
        self.seen = ""

    async def until_seen(self, text: str) -> None:
        """Reads the terminal until it shows this."""
        assert self.terminal is not None
        while text not in self.seen:
            more = await asyncio.to_thread(os.read, self.terminal, 4_096)
            self.seen += more.decode()
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        """Types."""
        assert self.terminal is not None
        os.write(self.terminal, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)


@asynccontextmanager
async def command(*arguments: str, terminal: bool = False) -> AsyncIterator[Command]:
    """Runs the command, with pipes or on a pseudo-terminal."""
    line = [sys.executable, "-m", "entrypoints.cli.main", "chat", "--user", "ada", *arguments]
    source = str(Path(__file__).parents[2] / "src")
    environ = {**os.environ, "PYTHONPATH": source, "TERM": "dumb"}
    ours: int | None = None
    if terminal:
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *line, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
        )
        os.close(theirs)
    else:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *line, stdin=pipe, stdout=pipe, stderr=pipe, env=environ, start_new_session=True
        )
    try:
        async with asyncio.timeout(SECONDS):
            yield Command(process, ours)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if ours is not None:
            os.close(ours)


# From a pipe


async def test_a_pipe_gets_the_replies_and_nothing_else() -> None:
    call = {"tool_call": pb.ToolCall(call_id="c", name="set_goal", arguments_json="{}")}
    coach = ScriptedCoach(["Good", call, " morning.\n", "\n"], ["Two\n\n", "lines \N{PARTY POPPER}"], ["\n"])
    async with coach.serving() as address, command("--server", address) as chat:
        out, err = await chat.process.communicate(b"caf\xe9 \xff\r\n\n  \t \n  second\rthird")
    assert out.decode() == "Good morning.\nTwo\n\nlines \N{PARTY POPPER}\n\n"
    assert err == b""
    assert chat.process.returncode == 0
    assert [turn.message for turn in coach.turns] == ["caf\ufffd \ufffd", "  second", "third"]
    assert [turn.thread_id for turn in coach.turns] == ["thread-0"] * 3
    assert not coach.overlapping


async def test_a_turn_that_does_not_complete_shows_in_the_exit_code_and_the_next_line_is_still_said() -> None:
    cut = pb.TurnError(reason="PROVIDER_TRUNCATED", message="The answer broke off.", retryable=True)
    config = pb.TurnError(reason="PROVIDER_CONFIG", message="The configuration is refused.")
    coach = ScriptedCoach(
        Script(["Half"], pb.TURN_STATE_INCOMPLETE, cut), Script([], pb.TURN_STATE_FAILED, config), ["Whole"]
    )
    async with coach.serving() as address:
        with talking(address, "one\ntwo\nthree\n") as talk:
            assert await talk.done is False
    assert talk.out.getvalue() == "Half\nWhole\n"
    half, none = talk.err.getvalue().splitlines()
    assert half == "(The answer broke off. What came of the reply is kept. Sending it again may help.)"
    assert none == "(The configuration is refused.)"


async def test_a_refused_message_is_told_and_the_next_line_is_still_said() -> None:
    coach = ScriptedCoach(["Yes"])
    coach.refusals = [(grpc.StatusCode.INVALID_ARGUMENT, "A field is invalid.")]
    async with coach.serving() as address:
        with talking(address, "bad\ngood\n") as talk:
            assert await talk.done is False
    assert talk.out.getvalue() == "Yes\n"
    assert talk.err.getvalue() == "A field is invalid. [INVALID_ARGUMENT]\n"


async def test_a_message_that_was_refused_for_now_is_sent_again_under_its_request_id() -> None:
    coach = ScriptedCoach(["Yes"])
    coach.refusals = [(grpc.StatusCode.UNAVAILABLE, "The service is at its limit.")] * 2
    async with coach.serving() as address:
        with talking(address, "Hello\n") as talk:
            assert await talk.done is True
    assert talk.out.getvalue() == "Yes\n"
    assert talk.err.getvalue() == "(the connection is lost; trying again …)\n"
    assert len(coach.requests) == 3
    assert len({request.request_id for request in coach.requests}) == 1


async def test_a_restarted_reply_begins_anew() -> None:
    restart = {"attempt_restarted": pb.AttemptRestarted(attempt=2, reason="INTERRUPTED")}
    coach = ScriptedCoach(["Wro", restart, "Right"])
    async with coach.serving() as address:
        with talking(address, "Hello\n") as talk:
            assert await talk.done is True
    assert talk.out.getvalue() == "Wro\nRight\n"
    assert talk.err.getvalue() == "(starting over)\n"


async def test_a_reply_goes_on_when_the_service_is_restarted_in_the_middle() -> None:
    first, second = Gate(), Gate()
    coach = ScriptedCoach(["One \N{PARTY POPPER}", first, " two", second, " three."])
    with ExitStack() as stack:
        async with coach.serving() as address:
            talk = stack.enter_context(talking(address, "Hello\n"))
            await until(lambda: "\N{PARTY POPPER}" in talk.out.getvalue())
        first.open.set()  # the turn goes on while nobody serves it
        async with coach.serving(address):
            await until(lambda: "two" in talk.out.getvalue())
        async with coach.serving(address):
            second.open.set()
            assert await talk.done is True
    assert talk.out.getvalue() == "One \N{PARTY POPPER} two three.\n"
    assert talk.err.getvalue().count("trying again") == 2
    assert talk.place.revived >= 2
    assert len(coach.turns) == 1
    assert {request.after_position for request in coach.follows} == {6, 10}


async def test_where_the_service_is_lost_a_pipe_ends_and_says_what_became_of_the_message() -> None:
    coach = ScriptedCoach(["One", Gate()])
    coach.refusals = [(grpc.StatusCode.UNAVAILABLE, "The service is at its limit.")]
    with ExitStack() as stack:
        async with coach.serving() as address:
            talk = stack.enter_context(talking(address, "Hello\nnever\n", patience=IMPATIENT))
            with pytest.raises(Failure, match="It will not be doubled"):
                await talk.done
            talk = stack.enter_context(talking(address, "Hello\nnever\n", patience=IMPATIENT))
            await until(lambda: talk.out.getvalue() == "One")
        with pytest.raises(Failure, match=r"is safe.* --thread thread-0"):
            await talk.done
    assert len(coach.requests) == 2


async def test_a_message_of_which_nobody_knows_whether_it_arrived_is_not_doubled() -> None:
    coach = ScriptedCoach(["One"], ["Two"], ["Three"])
    away = (grpc.StatusCode.UNAVAILABLE, "The service is at its limit.")
    coach.refusals = [None, away, away]
    async with coach.serving() as address:
        with talking(address, "Hi\nHello\nBye\nBye\nBye\n", terminal=True, patience=IMPATIENT) as talk:
            assert await talk.done is True
    _, hello, bye, again, anew = (request.request_id for request in coach.requests)
    assert bye == again
    assert len({hello, bye, anew}) == 3


async def test_the_same_words_about_something_else_are_another_message() -> None:
    coach = ScriptedCoach(["Yes"])
    coach.refusals = [(grpc.StatusCode.UNAVAILABLE, "The service is at its limit.")]
    async with coach.serving() as address:
        typed = "/new career\nHello\n/new health\nHello\n"
        with talking(address, typed, terminal=True, patience=IMPATIENT) as talk:
            assert await talk.done is True
    career, about_health = coach.requests
    assert (career.domain, about_health.domain) == (pb.DOMAIN_CAREER, pb.DOMAIN_HEALTH)
    assert career.request_id != about_health.request_id


async def test_commands_work_in_a_pipe_and_their_output_is_no_reply() -> None:
    coach = ScriptedCoach(["One"], ["Two"], ["Three"], ["Four"])
    typed = "first\n/new career\nsecond\n/threads\n/thread 2\n/history\nthird\n/unknown is said\n/quit\nnever\n"
    async with coach.serving() as address:
        with talking(address, typed) as talk:
            assert await talk.done is True
    assert talk.out.getvalue() == "One\nTwo\nThree\nFour\n"
    assert [request.domain for request in coach.requests] == [0, pb.DOMAIN_CAREER, 0, 0]
    assert [turn.thread_id for turn in coach.turns] == ["thread-0", "thread-1", "thread-0", "thread-0"]
    assert coach.turns[3].message == "/unknown is said"
    shown = talk.err.getvalue()
    assert "thread-1  second" in shown
    assert "> first" in shown


@pytest.mark.parametrize("line", ["/thread 7", "/thread nobody", "/thread", "/new astrology"])
async def test_a_command_that_fails_in_a_pipe_ends_it(line: str) -> None:
    coach = ScriptedCoach()
    async with coach.serving() as address:
        with (
            talking(address, f"{line}\nmeant for another thread\n") as talk,
            pytest.raises(Failure, match=line.split()[0]),
        ):
            await talk.done
    assert coach.requests == []


@pytest.mark.parametrize("which", ["0", "00", "2", "999", "1000", "-1"])
async def test_a_number_that_no_conversation_has_is_told(which: str) -> None:
    coach = ScriptedCoach(["Yes"])
    async with coach.serving() as address:
        with (
            talking(address, f"first\n/thread {which}\nmeant for another thread\n") as talk,
            pytest.raises(Failure, match=r"/thread: There is no"),
        ):
            await talk.done
    assert len(coach.requests) == 1


async def test_conversations_are_gone_on_with_by_the_number_that_was_shown_or_by_id() -> None:
    coach = ScriptedCoach(*(Script(["Yes"]) for _ in range(6)))
    typed = [
        *("/new career", "first", "/new health", "second"),
        *("/thread 2", "third"),  # nothing has been listed: they are counted now
        *("/threads", "/new relationship", "fourth"),
        *("/thread 2", "fifth"),  # the one that was listed, although another one has begun since
        *("/thread thread-0", "/new", "sixth"),  # about the same as the one that is left
    ]
    async with coach.serving() as address:
        with talking(address, "\n".join(typed)) as talk:
            assert await talk.done is True
    threads = ["thread-0", "thread-1", "thread-0", "thread-3", "thread-1", "thread-5"]
    assert [turn.thread_id for turn in coach.turns] == threads
    domains = [pb.DOMAIN_CAREER, pb.DOMAIN_HEALTH, 0, pb.DOMAIN_RELATIONSHIP, 0, pb.DOMAIN_CAREER]
    assert [request.domain for request in coach.requests] == domains
    shown = talk.err.getvalue()
    assert "You are in the conversation about health: second (2 messages; /history shows them).\n" in shown
    assert "A new conversation about career begins with your next message.\n" in shown


async def test_twenty_conversations_are_listed_the_newest_first() -> None:
    coach = ScriptedCoach(*(Script(["Yes"]) for _ in range(21)))
    coach.inactive = {"thread-1"}
    lines = [*(f"line {number}" for number in range(20)), f"one  two\t{'x' * 40}"]
    typed = [each for line in lines for each in ("/new", line)]
    async with coach.serving() as address:
        with talking(address, "\n".join([*typed, "/threads"])) as talk:
            assert await talk.done is True
    *rows, more = talk.err.getvalue().splitlines()[-21:]
    assert more == "These are the newest 20."
    assert rows[0].startswith(" 1* general       active    ")
    assert rows[0].endswith(f"  thread-20  one two {'x' * 31}…")
    assert rows[1].startswith(" 2  general       active    ")
    assert rows[19].startswith("20  general       inactive  ")
    assert rows[19].endswith("  thread-1  line 1")
    assert talk.place.revived == 22  # each command looks whether the service is there


async def test_a_conversation_of_a_later_version_is_no_trouble() -> None:
    coach = ScriptedCoach(["Yes"], ["Yes"])
    async with coach.serving() as address:
        with talking(address, "first\n") as talk:
            await talk.done
        coach.turns[0].domain = 99  # type: ignore[assignment] # none that this client knows
        with talking(address, "/thread 1\n/new\nsecond\n") as talk:
            assert await talk.done is True
    first, second = talk.err.getvalue().splitlines()
    assert first.startswith("You are in the conversation about something newer: first ")
    assert second == "A new conversation about general begins with your next message."
    assert [turn.thread_id for turn in coach.turns] == ["thread-0", "thread-1"]


async def test_the_history_says_who_said_what_and_what_is_not_whole() -> None:
    def line(role: pb.Role.ValueType, *, partial: bool = False, **part: str) -> pb.Message:
        return pb.Message(role=role, partial=partial, content=[pb.ContentPart(**part)])  # type: ignore[arg-type]

    coach = ScriptedCoach(["Yes"])
    coach.said = [
        line(pb.ROLE_USER, text="Hello"),
        line(pb.ROLE_TOOL, text="saved"),
        line(pb.ROLE_ASSISTANT, text="Half", partial=True),
        line(pb.ROLE_USER, text="Do harm"),
        line(pb.ROLE_ASSISTANT, refusal="No."),
    ]
    async with coach.serving() as address:
        with talking(address, "first\n/history\n") as talk:
            assert await talk.done is True
    assert talk.err.getvalue() == "> Hello\nHalf (broken off)\n\n> Do harm\nNo.\n\n"


async def test_a_reader_that_leaves_ends_the_turn_and_the_command_quietly() -> None:
    gate = Gate()
    coach = ScriptedCoach(["One\n", "two\n", gate, "three"])
    async with coach.serving() as address, command("--server", address) as chat:
        assert chat.process.stdin is not None
        assert chat.process.stdout is not None
        assert chat.process.stderr is not None
        chat.process.stdin.write(b"Hello\n")
        await chat.process.stdin.drain()
        assert await chat.process.stdout.readline() == b"One\n"
        chat.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined] # no other way
        gate.open.set()
        assert await chat.process.wait() in (1, 141)
        assert await chat.process.stderr.read() == b""
    assert coach.cancelled == ["turn-0"]


async def test_the_newest_fifty_lines_are_shown_in_their_order() -> None:
    lines = [f"line {number}" for number in range(52)]
    coach = ScriptedCoach(*(Script(["Yes"]) for _ in lines))
    async with coach.serving() as address:
        with talking(address, "\n".join([*lines, "/history"])) as talk:
            assert await talk.done is True
    assert talk.err.getvalue().splitlines() == ["(the newest 50 lines)", *(f"> {line}" for line in lines[2:])]


async def test_the_history_says_what_was_broken_off_and_leaves_the_tools_out() -> None:
    class Remembering(ScriptedCoach):
        async def ListMessages(self, request: Any, context: Any) -> threads_api.ListMessagesResponse:
            lines = [(pb.ROLE_USER, "Hello"), (pb.ROLE_TOOL, "{}"), (pb.ROLE_ASSISTANT, "Half a")]
            said = [
                pb.Message(role=role, content=[pb.ContentPart(text=text)], partial=role == pb.ROLE_ASSISTANT)
                for role, text in lines
            ]
            return threads_api.ListMessagesResponse(messages=said[:: -1 if request.newest_first else 1])

    coach = Remembering(["Half a"])
    async with coach.serving() as address:
        with talking(address, "Hello\n/history\n") as talk:
            assert await talk.done is True
    assert talk.err.getvalue() == "> Hello\nHalf a (broken off)\n\n"


# In a terminal


async def test_a_terminal_is_greeted_and_sees_tools_and_how_to_go_on() -> None:
    call = {"tool_call": pb.ToolCall(call_id="c", name="set_goal", arguments_json="{}")}
    coach = ScriptedCoach(["Noted", call, ": go."])
    async with coach.serving() as address:
        with talking(address, "Hello\n/nonsense\n", terminal=True) as talk:
            assert await talk.done is True
    assert talk.out.getvalue() == "Noted\n: go.\n"
    shown = talk.err.getvalue()
    assert "Life coach (the practice coach" in shown
    assert "/help" in shown
    assert f"kept in the service at {address}" in shown
    assert "· set_goal" in shown
    assert "There is no command /nonsense" in shown
    assert "--thread thread-0" in shown


async def test_what_is_no_command_is_said_with_a_space_before_it() -> None:
    coach = ScriptedCoach(["Yes"])
    async with coach.serving() as address:
        with talking(address, "/nonsense\n /nonsense\n", terminal=True) as talk:
            assert await talk.done is True
    assert "With a space before it, it is said." in talk.err.getvalue()
    assert [turn.message for turn in coach.turns] == [" /nonsense"]


@pytest.mark.parametrize(
    ("domain", "greeting"),
    [("", "Life coach (the practice coach: built in, no AI"), ("career", "Career coach (openai, gpt-6-luna)")],
)
async def test_who_answers_says_what_it_is(domain: str, greeting: str) -> None:
    coach = ScriptedCoach()
    career = pb.Agent(domain=pb.DOMAIN_CAREER, name="Career coach", provider="openai", model="gpt-6-luna")
    coach.agents.insert(0, career)
    async with coach.serving() as address:
        with talking(address, "", terminal=True, domain=domain) as talk:
            assert await talk.done is True
    assert talk.err.getvalue().startswith(greeting)


async def test_in_a_terminal_a_turn_that_fails_is_told_and_leaving_is_well() -> None:
    error = pb.TurnError(reason="PROVIDER_CONFIG", message="The configuration is refused.")
    coach = ScriptedCoach(Script([], pb.TURN_STATE_FAILED, error))
    async with coach.serving() as address:
        with talking(address, "Hello\n", terminal=True) as talk:
            assert await talk.done is True
    assert "The configuration is refused." in talk.err.getvalue()


async def test_a_thread_is_gone_on_with() -> None:
    coach = ScriptedCoach(["One"], ["Two"])
    async with coach.serving() as address:
        with talking(address, "first\n") as talk:
            await talk.done
        with talking(address, "second\n", thread_id="thread-0", domain="general") as talk:
            assert await talk.done is True
        with (
            talking(address, "third\n", thread_id="thread-0", domain="health") as talk,
            pytest.raises(Failure, match="is about general, not health"),
        ):
            await talk.done
        with (
            talking(address, "third\n", thread_id="nobody's") as talk,
            pytest.raises(Failure, match="There is no such thread"),
        ):
            await talk.done
    assert [turn.thread_id for turn in coach.turns] == ["thread-0", "thread-0"]


async def test_in_a_terminal_a_command_that_fails_changes_nothing() -> None:
    coach = ScriptedCoach(["One"], ["Two"])
    async with coach.serving() as address:
        with talking(address, "first\n/thread 2\n/thread\nsecond\n", terminal=True) as talk:
            assert await talk.done is True
    assert [turn.thread_id for turn in coach.turns] == ["thread-0", "thread-0"]
    shown = talk.err.getvalue()
    assert "There is no conversation 2; /threads lists them.\n" in shown
    assert "Which one? /thread N with a number of /threads, or /thread ID.\n" in shown


async def test_interrupting_a_reply_cancels_it_and_the_conversation_goes_on() -> None:
    coach = ScriptedCoach(["Half a", Gate()], ["Whole"])
    async with coach.serving() as address, command("--server", address, terminal=True) as chat:
        await chat.until_seen("> ")
        chat.type("first\n")
        await chat.until_seen("Half a")
        chat.interrupt()
        await chat.until_seen("The turn was cancelled.")
        await chat.until_seen("> ")
        chat.type("second\n")
        await chat.until_seen("Whole")
        await chat.until_seen("> ")
        while chat.process.returncode is None:
            # The line editor misses an interrupt between its prompt and its first look at the keyboard.
            chat.interrupt()
            await asyncio.wait([asyncio.ensure_future(chat.process.wait())], timeout=1)
        assert chat.process.returncode == 130
    assert coach.cancelled == ["turn-0"]
    assert [turn.message for turn in coach.turns] == ["first", "second"]


async def test_interrupting_twice_leaves() -> None:
    coach = ScriptedCoach(["Half a", Gate()])
    coach.cancels = Gate()
    async with coach.serving() as address, command("--server", address, terminal=True) as chat:
        await chat.until_seen("> ")
        chat.type("first\n")
        await chat.until_seen("Half a")
        chat.interrupt()
        await until(lambda: coach.cancelled)
        chat.interrupt()
        assert await chat.process.wait() == 130


async def test_interrupting_a_pipe_cancels_the_turn_and_leaves_the_rest_unsaid() -> None:
    coach = ScriptedCoach(["Half a\n", "reply", Gate()], ["never"])
    async with coach.serving() as address, command("--server", address) as chat:
        assert chat.process.stdin is not None
        chat.process.stdin.write(b"first\nsecond\n")
        assert chat.process.stdout is not None
        assert await chat.process.stdout.readexactly(6) == b"Half a"
        chat.interrupt()
        assert await chat.process.stdout.read() == b"\nreply\n"
        assert await chat.process.wait() == 130
    assert coach.cancelled == ["turn-0"]
    assert len(coach.turns) == 1


async def test_interrupting_a_pipe_leaves_the_rest_unsaid_also_if_the_line_is_refused() -> None:
    coach = ScriptedCoach(["never"])
    coach.refusals = [(grpc.StatusCode.INVALID_ARGUMENT, "A field is invalid.")]
    coach.hesitation = Gate()
    async with coach.serving() as address, command("--server", address) as chat:
        assert chat.process.stdin is not None
        assert chat.process.stderr is not None
        chat.process.stdin.write(b"first\nsecond\n")
        chat.process.stdin.write_eof()
        await until(lambda: coach.requests)
        chat.interrupt()
        assert await chat.process.stderr.readline() == b"(cancelling; Ctrl-C again leaves)\n"
        coach.hesitation.open.set()
        assert await chat.process.stderr.read() == b"A field is invalid. [INVALID_ARGUMENT]\n"
        assert await chat.process.wait() == 130
    assert len(coach.requests) == 1


# Screen


def shown(*pieces: str, terminal: bool) -> str:
    out = Screenful(terminal=terminal)
    screen = Screen(out, Screenful())
    for piece in pieces:
        screen.text(piece)
    screen.end()
    return out.getvalue()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a\r", "\nb"], "a\nb\n"),
        (["a\rb"], "a\nb\n"),
        (["\x1b]0;title\x07", "\x9b2J"], "\ufffd]0;title\ufffd\ufffd2J\n"),
        (["\tindented\n\n", "\n"], "\tindented\n"),
        ([], ""),
    ],
)
def test_a_terminal_gets_no_control_characters(pieces: list[str], expected: str) -> None:
    assert shown(*pieces, terminal=True) == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_said_beside_replies_is_harmless_in_a_terminal_too(terminal: bool) -> None:
    err = Screenful(terminal=terminal)
    Screen(Screenful(), err).note("My \x1b]0;title\x07\n\x9b2J")
    assert err.getvalue() == (
        "My \ufffd]0;title\ufffd\n\ufffd2J\n" if terminal else "My \x1b]0;title\x07\n\x9b2J\n"
    )


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [(["a\r", "\nb"], "a\r\nb\n"), (["a\n", "\n", "b\n\n"], "a\n\nb\n"), (["\n"], "\n"), ([], "")],
)
def test_a_pipe_gets_the_text_as_it_is_with_one_newline_at_its_end(pieces: list[str], expected: str) -> None:
    assert shown(*pieces, terminal=False) == expected


# Where the service is


def test_a_named_service_that_does_not_answer_is_a_failure() -> None:
    with pytest.raises(Failure, match=r"no service answers at 127\.0\.0\.1:1"), ServiceAt("127.0.0.1:1", "advice"):
        pass


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:http", "host:0", "host:65536"])
def test_an_address_that_is_none_is_a_usage_error(address: str) -> None:
    with pytest.raises(Failure) as failure:
        ServiceAt(address, "")
    assert failure.value.code == 2


def test_with_postgresql_the_service_of_the_settings_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", "postgresql://localhost/none")
    monkeypatch.setenv("VIDA_LISTEN", "127.0.0.1:1")
    place = service(load_settings())
    with pytest.raises(Failure, match="vida-coach serve"), place:
        pass


@pytest.mark.parametrize(
    ("listen", "target"),
    [("0.0.0.0:7", "127.0.0.1:7"), ("[::]:7", "[::1]:7"), ("192.0.2.1:7", "192.0.2.1:7")],
)
def test_a_service_on_every_address_is_asked_on_this_machine(
    listen: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDA_DATABASE_URL", "postgresql://localhost/none")
    monkeypatch.setenv("VIDA_LISTEN", listen)
    assert service(load_settings()).target == target


@contextmanager
def embedded() -> Iterator[EmbeddedService]:
    with EmbeddedService(load_settings()) as place:
        yield place


def serving(place: EmbeddedService) -> bool:
    with open_channel(place.target) as channel:
        return is_serving(channel, SECONDS)


def said(place: EmbeddedService, text: str) -> str:
    with open_channel(place.target) as channel:
        client = CoachClient(channel, "ada")
        with client.say(text) as reply:
            return "".join(event.text for event in reply if isinstance(event, pb.TextDelta))


def test_an_embedded_database_is_owned_or_its_owner_is_asked_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    with embedded() as first:
        with pytest.raises(DatabaseOwnedError, match="chat"):
            owned()
        with embedded() as second:
            assert said(second, "Hello")
            first.__exit__(None, None, None)
            assert not serving(second)
            second.revive()
            assert serving(second)
            assert said(second, "Hello again")
        first._server = None
    with EmbeddedService(load_settings()) as third:
        assert serving(third)


def owned() -> None:
    """Tries to take the database."""
    with Ownership(database_file(load_settings().database), "test"):
        pass


def test_an_owner_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_OWNER_SECONDS", 0.0)
    holder = rf"`vida-coach cleanup` \(process {os.getpid()}\)"
    with (
        Ownership(database_file(load_settings().database), "cleanup"),
        pytest.raises(Failure, match=holder),
        embedded(),
    ):
        pass


def test_the_record_is_named_as_a_person_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = EmbeddedService(load_settings())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place.record == "~/data/vida-coach/vida-coach.db"
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert place.record == str(tmp_path / "data/vida-coach/vida-coach.db")


class Waits:
    """The clock of a command that polls: each wait is a second long, and something may happen in the first."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        if not self.seconds:
            self.happens()
        self.seconds += 1


def test_an_owner_that_leaves_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Ownership(database_file(load_settings().database), "cleanup")
    waits = Waits(holder.release)
    monkeypatch.setattr(connection, "time", waits)
    holder.take()
    with embedded() as place:
        assert waits.seconds == 1
        assert serving(place)
        with pytest.raises(DatabaseOwnedError, match="chat"):
            owned()


def test_an_owner_that_is_only_starting_is_asked_once_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0")
    holder = Ownership(database_file(load_settings().database), "chat")
    other = EmbeddedServer(load_settings(), "serve")

    def start() -> None:
        holder.release()
        other.start()

    waits = Waits(start)
    monkeypatch.setattr(connection, "time", waits)
    holder.take()
    with embedded() as place:
        assert waits.seconds == 1
        assert said(place, "Hello")
        with pytest.raises(DatabaseOwnedError, match="serve"):
            owned()
    assert serving(place)  # whoever only asks leaves the owner alone
    other.stop()
    assert not serving(place)


def test_an_owner_that_never_answers_is_given_up_after_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(lambda: None)
    monkeypatch.setattr(connection, "time", waits)
    with (
        Ownership(database_file(load_settings().database), "chat"),
        pytest.raises(Failure, match="it does not answer on"),
        embedded(),
    ):
        pass
    assert waits.seconds == 10


def test_what_can_not_be_revived_is_no_error() -> None:
    place = EmbeddedService(load_settings())
    with Ownership(database_file(load_settings().database), "serve"):
        place.revive()
        assert not serving(place)
    place.revive()
    assert serving(place)
    place.__exit__(None, None, None)
    owned()


def test_who_leaves_waits_for_the_turns_of_others_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDA_PRACTICE_WORDS_PER_SECOND", "0.1")
    monkeypatch.setattr(server, "DRAIN_SECONDS", 0.2)
    with embedded() as place, open_channel(place.target) as channel:
        reply = iter(CoachClient(channel, "eve").say("Hello"))
        assert isinstance(next(reply), pb.TurnStarted)
        assert isinstance(next(reply), pb.TextDelta)
        begun = time.monotonic()
        place.__exit__(None, None, None)
        assert time.monotonic() - begun < SECONDS
        place._server = None


def test_what_goes_wrong_at_the_start_is_raised_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ASSISTANT_ID", "asst_1")
    with pytest.raises(SettingsError, match="OPENAI_ASSISTANT_ID"), EmbeddedServer(load_settings(), "chat"):
        pass
