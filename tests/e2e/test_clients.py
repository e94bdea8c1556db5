"""Both clients against a scripted service that lets go of them at every point, in every way that there is.

What is asked of a client is asked of both: the synchronous one runs in a thread.
"""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core.model.events import AttemptRestarted, LogEntry, TextDelta, ToolAnswered, ToolCalled, TurnStarted, place
from entrypoints.client import (
    AsyncCoachClient,
    AsyncReply,
    CoachClient,
    ConnectionLost,
    Event,
    Patience,
    Reply,
    Resuming,
    ServiceError,
    TokenFile,
    connect,
    connect_async,
)
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
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

SECONDS = 20.0
QUICK = Patience(seconds=SECONDS, first_wait=0.001, longest_wait=0.05)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Cut: TypeAlias = Callable[["Coach", _Context], Awaitable[None]]
"""What happens to a stream instead of going on."""

_PLACED: Sequence[LogEntry] = place(
    [
        TurnStarted("turn", "thread", "career-v1"),
        TextDelta("Grü"),
        ToolCalled("c1", "note", "{}"),
        ToolAnswered("c1", "noted", False),
        TextDelta("lost"),
        AttemptRestarted(2, "INTERRUPTED"),
        TextDelta("ße "),
        TextDelta("👋🏽"),
    ],
    0,
)
_LAST = _PLACED[-1].position + 1
_END = pb.Turn(id="turn", thread_id="thread", state=pb.TURN_STATE_COMPLETED, attempt=2, last_position=_LAST)
LOG = [
    *(mapping.to_event(entry) for entry in _PLACED),
    pb.TurnEvent(position=_LAST, finished=pb.TurnFinished(turn=_END)),
]


async def unavailable(coach: "Coach", context: _Context) -> None:
    """As a process that is shutting down ends its streams."""
    await context.abort(UNAVAILABLE, "Going away.")


async def in_silence(coach: "Coach", context: _Context) -> None:
    """A stream that ends OK and is not whole."""


async def dropped(coach: "Coach", context: _Context) -> None:
    """As a process that is killed, or a network: what was written may have arrived or not."""
    coach.line.cut()
    await asyncio.Event().wait()


async def stalled(coach: "Coach", context: _Context) -> None:
    """Held open, and nothing comes."""
    await asyncio.Event().wait()


class Line:
    """A TCP line to the service that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Resets every connection; new ones are put through."""
        for end in self._ends:
            end.transport.abort()

    async def put_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection until it ends, which it does when the test does."""
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        ends = {writer, back}
        self._ends |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pipe(reader, back))
                both.create_task(_pipe(there, writer))
        finally:
            self._ends -= ends


async def _pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while some := await source.read(65_536):
            target.write(some)
            await target.drain()
    target.transport.abort()


@dataclass
class Coach(AgentServiceServicer, ThreadServiceServicer):
    """One turn with a fixed log. Each stream sends as many events as the next of `portions` says and is then cut.

    When there are no more portions, a stream sends all.
    """

    cut: Cut = unavailable
    portions: list[int] = field(default_factory=list)
    log: list[pb.TurnEvent] = field(default_factory=lambda: LOG)
    chats: list[api.ChatRequest] = field(default_factory=list)
    follows: list[int] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    deletes: list[Message] = field(default_factory=list)
    lists: list[threads_api.ListThreadsRequest] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)
    refusals: list[status_pb2.Status] = field(default_factory=list)
    open: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    line: Line = field(default_factory=lambda: Line(0))

    async def Chat(self, request: api.ChatRequest, context: _Context) -> None:  # type: ignore[override]
        self.chats.append(request)
        await self._send(context, 0, lambda event: api.ChatResponse(event=event, attached=len(self.chats) > 1))

    async def FollowTurn(self, request: api.FollowTurnRequest, context: _Context) -> None:  # type: ignore[override]
        self.follows.append(request.after_position)
        await self._send(context, request.after_position, lambda event: api.FollowTurnResponse(event=event))

    async def CancelTurn(self, request: api.CancelTurnRequest, context: _Context) -> api.CancelTurnResponse:
        self.cancels.append(request.turn_id)
        return api.CancelTurnResponse(turn=_END)

    async def DeleteThread(
        self, request: threads_api.DeleteThreadRequest, context: _Context
    ) -> threads_api.DeleteThreadResponse:
        self.deletes.append(request)
        await self._refuse(context)
        return threads_api.DeleteThreadResponse()

    async def ListMessages(
        self, request: threads_api.ListMessagesRequest, context: _Context
    ) -> threads_api.ListMessagesResponse:
        await self._refuse(context)
        number = int(request.page_token or 0)
        page = [pb.Message(id=str(number)), pb.Message(id=str(number + 1))]
        return threads_api.ListMessagesResponse(
            messages=page, next_page_token=str(number + 2) if number < 4 else ""
        )

    async def ListAgents(self, request: Any, context: Any) -> Any:
        return api.ListAgentsResponse(agents=[pb.Agent(id="career-v1")])

    async def GetThread(self, request: Any, context: _Context) -> Any:
        self._time(context)
        await self._refuse(context)
        return threads_api.GetThreadResponse(thread=pb.Thread(id=request.thread_id, user_id=request.user_id))

    async def ListThreads(self, request: Any, context: Any) -> Any:
        self.lists.append(request)
        return threads_api.ListThreadsResponse(threads=[pb.Thread(id="thread")], next_page_token="more")

    async def SendMessage(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetTurn(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def UpdateThread(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until streams have come or gone."""
        async with self.changed:
            await self.changed.wait_for(condition)

    async def _refuse(self, context: _Context) -> None:
        if self.refusals:
            await context.abort_with_status(rpc_status.to_status(self.refusals.pop(0)))  # type: ignore[attr-defined]

    async def _send(self, context: _Context, after: int, response: Callable[[pb.TurnEvent], Message]) -> None:
        self._time(context)
        await self._count(1)
        try:
            await self._refuse(context)
            portion = self.portions.pop(0) if self.portions else None
            rest = [response(event) for event in self.log if event.position > after]
            for one in rest[:portion]:
                await context.write(one)
            if portion is not None:
                await self.cut(self, context)
        finally:
            await asyncio.shield(self._count(-1))

    def _time(self, context: _Context) -> None:
        """Notes how long a call would wait."""
        self.deadlines.append(context.time_remaining() or math.inf)

    async def _count(self, by: int) -> None:
        async with self.changed:
            self.open += by
            self.changed.notify_all()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """On a port until left; yields the address of the line to it."""
        server = grpc.aio.server()
        add_AgentServiceServicer_to_server(self, server)
        add_ThreadServiceServicer_to_server(self, server)
        self.line = Line(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        between = await asyncio.start_server(self.line.put_through, "127.0.0.1", 0)
        try:
            host, port = between.sockets[0].getsockname()
            yield f"{host}:{port}"
        finally:
            await server.stop(0)
            self.line.cut()
            between.close()
            await between.wait_closed()


class Caller:
    """A client of either kind, behind one asynchronous face."""

    def __init__(self, kind: str, channel: Any, **options: Any) -> None:
        made = {"sync": CoachClient, "async": AsyncCoachClient}[kind]
        self.client: Any = made(channel, "ada", patience=options.pop("patience", QUICK), **options)
        self.awaited = kind == "async"

    async def ask(self, name: str, *arguments: Any, **more: Any) -> Any:
        """Calls a method that is not a stream."""
        method = getattr(self.client, name)
        if self.awaited:
            return await method(*arguments, **more)
        return await asyncio.to_thread(method, *arguments, **more)

    async def read(self, reply: Any, enough: Callable[[Event], bool] = lambda _: False) -> list[Event]:
        """A reply's events, to the end or to the first that is enough."""
        if not self.awaited:
            return await asyncio.to_thread(self._read, reply, enough)
        events: list[Event] = []
        async with reply:
            async for event in reply:
                events.append(event)
                if enough(event):
                    break
        return events

    async def messages(self) -> list[str]:
        """The ids of all messages of a thread."""
        if self.awaited:
            return [message.id async for message in self.client.messages("thread", 2)]
        return await asyncio.to_thread(lambda: [message.id for message in self.client.messages("thread", 2)])

    @staticmethod
    def _read(reply: Reply, enough: Callable[[Event], bool]) -> list[Event]:
        events = []
        with reply:
            for event in reply:
                events.append(event)
                if enough(event):
                    break
        return events


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both clients."""
    found: str = request.param
    return found


@asynccontextmanager
async def calling(kind: str, address: str, **options: Any) -> AsyncIterator[Caller]:
    """A client of this kind on a channel of its own."""
    alone = ("grpc.use_local_subchannel_pool", 1)
    if kind == "async":
        async with connect_async(address, alone) as channel:
            yield Caller(kind, channel, **options)
    else:
        with connect(address, alone) as channel:
            yield Caller(kind, channel, **options)


def whole(events: Sequence[Event]) -> list[Message]:
    """The events without the client's own, which must be the log: nothing lost, nothing twice."""
    seen = [event for event in events if not isinstance(event, Resuming)]
    expected = [getattr(event, event.WhichOneof("event") or "") for event in LOG]
    assert seen == expected
    return expected


def refusal(code: grpc.StatusCode, reason: str = "", wait: float | None = None) -> status_pb2.Status:
    """A status with a reason, and the time after which to try again."""
    status = status_pb2.Status(code=code.value[0], message="No.")
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="agents.vidacoach"))
    if wait is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(round(wait * 1_000))
        status.details.add().Pack(info)
    return status


@pytest.mark.parametrize("cut", [unavailable, in_silence, dropped])
async def test_a_reply_is_whole_wherever_it_is_cut(kind: str, cut: Cut) -> None:
    coach = Coach(cut)
    async with coach.serving() as address, calling(kind, address) as caller:
        for point in range(len(LOG) + 1):
            coach.portions, coach.chats, coach.follows = [point], [], []
            reply = caller.client.say("Hello")
            whole(await caller.read(reply))
            assert (reply.turn_id, reply.thread_id, reply.position) == ("turn", "thread", _LAST)
            # Before the turn is known the message itself is sent again, afterwards never.
            assert len({chat.request_id for chat in coach.chats}) == 1
            if cut is not dropped:
                assert len(coach.chats) == (2 if point == 0 else 1)
                behind = LOG[point - 1].position
                assert coach.follows == ([behind] if 0 < point < len(LOG) else [])


@pytest.mark.parametrize("cut", [unavailable, in_silence, dropped])
async def test_a_reply_is_whole_if_it_is_cut_after_every_event(kind: str, cut: Cut) -> None:
    coach = Coach(cut, portions=[0, 0, 1, 0, *[1] * (len(LOG) - 1)])
    async with coach.serving() as address, calling(kind, address) as caller:
        events = await caller.read(caller.client.say("Hello"))
    whole(events)
    assert any(isinstance(event, Resuming) for event in events)
    assert len({chat.request_id for chat in coach.chats}) == 1


async def test_an_event_of_a_later_version_counts_and_is_not_passed_on(kind: str) -> None:
    newer = [pb.TurnEvent(position=2), pb.TurnEvent(position=3)]
    last = pb.TurnEvent(position=4, finished=pb.TurnFinished(turn=_END))
    coach = Coach(log=[LOG[0], *newer, last], portions=[2])
    async with coach.serving() as address, calling(kind, address) as caller:
        events = await caller.read(caller.client.say("Hello"))
    assert [type(event) for event in events] == [pb.TurnStarted, Resuming, pb.TurnFinished]
    assert coach.follows == [2]


async def test_its_own_deadline_ends_a_call_and_not_the_reply(kind: str) -> None:
    coach = Coach(stalled, portions=[0, 1, 2, 0, 3])
    async with coach.serving() as address, calling(kind, address, stream_seconds=0.2) as caller:
        events = await caller.read(caller.client.say("Hello"))
        whole(events)
        codes = [event.cause.code for event in events if isinstance(event, Resuming)]
        assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert len(coach.chats) == 2
        assert coach.follows == [LOG[0].position, LOG[2].position, LOG[2].position, LOG[5].position]
        await coach.until(lambda: coach.open == 0)


async def test_a_restarted_attempt_is_passed_on_where_it_stands(kind: str) -> None:
    coach = Coach()
    text = ""
    async with coach.serving() as address, calling(kind, address) as caller:
        for event in await caller.read(caller.client.follow("turn", 4)):
            match event:
                case pb.TextDelta():
                    text += event.text
                case pb.AttemptRestarted():
                    assert text == "lost"[-(LOG[4].position - LOG[3].position) :]
                    assert (event.attempt, event.reason) == (2, "INTERRUPTED")
                    text = ""
    assert text == "ße 👋🏽"


async def test_the_wait_that_the_service_asks_for_is_kept(kind: str) -> None:
    coach = Coach(refusals=[refusal(UNAVAILABLE, "OVERLOADED", 0.15), refusal(UNAVAILABLE, "STORE_UNAVAILABLE")])
    async with coach.serving() as address, calling(kind, address) as caller:
        events = await caller.read(caller.client.say("Hello"))
    whole(events)
    first, second = [event for event in events if isinstance(event, Resuming)]
    assert (first.cause.reason, first.wait) == ("OVERLOADED", 0.15)
    assert second.wait <= 0.01
    assert len(coach.chats) == 3


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.ABORTED, "TURN_IN_PROGRESS"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND"),
        (grpc.StatusCode.CANCELLED, ""),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "SOMETHING_NEW"),
    ],
)
async def test_no_other_status_is_tried_again(kind: str, code: grpc.StatusCode, reason: str) -> None:
    coach = Coach(refusals=[refusal(code, reason, 1.0)])
    async with coach.serving() as address, calling(kind, address) as caller:
        with pytest.raises(ServiceError) as refused:
            await caller.read(caller.client.say("Hello"))
        assert (refused.value.code, refused.value.reason) == (code, reason)
        if reason:
            assert refused.value.retry_after == 1.0
        assert len(coach.chats) == 1


async def test_a_thread_that_is_deleted_ends_the_reply_wherever_it_is(kind: str) -> None:
    gone = refusal(grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND")

    async def and_deleted(coach: Coach, context: _Context) -> None:
        coach.refusals.append(gone)
        await unavailable(coach, context)

    for point in range(1, len(LOG)):
        coach = Coach(and_deleted, portions=[point])
        async with coach.serving() as address, calling(kind, address) as caller:
            with pytest.raises(ServiceError, match="TURN_NOT_FOUND"):
                await caller.read(caller.client.say("Hello"))
        assert (len(coach.chats), len(coach.follows)) == (1, 1)


async def test_patience_ends(kind: str) -> None:
    impatient = Patience(seconds=0.05, first_wait=0.01, longest_wait=0.01)
    coach = Coach(portions=[1, *[0] * 1_000])
    async with coach.serving() as address, calling(kind, address, patience=impatient) as caller:
        with pytest.raises(ConnectionLost) as lost:
            await caller.read(caller.client.say("Hello"))
    assert (lost.value.turn_id, lost.value.request_id) == ("turn", coach.chats[0].request_id)


async def test_whoever_gives_up_is_told_for_how_long_to_stay_away(kind: str) -> None:
    coach = Coach(refusals=[refusal(UNAVAILABLE, "OVERLOADED", 60)])
    impatient = Patience(seconds=1)
    async with coach.serving() as address, calling(kind, address, patience=impatient) as caller:
        with pytest.raises(ConnectionLost) as lost:
            await caller.read(caller.client.say("Hello"))
    assert (lost.value.reason, lost.value.retry_after, lost.value.turn_id) == ("OVERLOADED", 60, "")
    assert len(coach.chats) == 1


async def test_a_message_is_sent_as_it_was_meant(kind: str) -> None:
    coach = Coach()
    async with coach.serving() as address, calling(kind, address) as caller:
        await caller.read(
            caller.client.say("Hello", thread_id="thread", on_busy=pb.BUSY_POLICY_QUEUE, request_id="mine")
        )
        await caller.read(caller.client.say("Hello", domain=pb.DOMAIN_HEALTH))
    first, second = coach.chats
    content = [pb.ContentPart(text="Hello")]
    assert first == api.ChatRequest(
        user_id="ada", thread_id="thread", content=content, request_id="mine", on_busy=pb.BUSY_POLICY_QUEUE
    )
    assert (second.domain, second.on_busy) == (pb.DOMAIN_HEALTH, pb.BUSY_POLICY_UNSPECIFIED)
    assert len(second.request_id) == 36


async def test_leaving_ends_the_call_and_nothing_else(kind: str) -> None:
    coach = Coach(stalled, portions=[2])
    async with coach.serving() as address, calling(kind, address) as caller:
        events = await caller.read(caller.client.say("Hello"), lambda event: isinstance(event, pb.TextDelta))
        assert len(events) == 2
        await coach.until(lambda: coach.open == 0)
        assert coach.cancels == []


async def test_a_reply_that_is_dropped_ends_its_call(kind: str) -> None:
    coach = Coach(stalled, portions=[2])
    calls = []  # held: that the library collects what nobody holds is not relied on

    async with coach.serving() as address, calling(kind, address) as caller:
        opened = caller.client.open

        def remember(request: Any) -> Any:
            calls.append(opened(request))
            return calls[-1]

        caller.client.open = remember
        if caller.awaited:
            async for event in caller.client.say("Hello"):
                if isinstance(event, pb.TextDelta):
                    break
        else:
            await asyncio.to_thread(_read_two, caller.client)
        gc.collect()
        await coach.until(lambda: coach.open == 0)
        assert len(calls) == 1


def _read_two(client: CoachClient) -> None:
    for event in client.say("Hello"):
        if isinstance(event, pb.TextDelta):
            break


async def test_cancelling_before_the_turn_is_known_ends_it_once_it_is(kind: str) -> None:
    coach = Coach()
    async with coach.serving() as address, calling(kind, address) as caller:
        reply = caller.client.say("Hello")
        if isinstance(reply, AsyncReply):
            await reply.cancel()
        else:
            reply.cancel()
        whole(await caller.read(reply))
        assert coach.cancels == ["turn"]


async def test_a_turn_that_is_being_cancelled_is_asked_for_no_faster(kind: str) -> None:
    coach = Coach(portions=[1])
    slow = Patience(seconds=SECONDS, first_wait=0.2, longest_wait=0.2)
    async with coach.serving() as address, calling(kind, address, patience=slow) as caller:
        reply = caller.client.say("Hello")
        if isinstance(reply, AsyncReply):
            await reply.cancel()
        else:
            reply.cancel()
        begun = time.monotonic()
        (lost,) = [event for event in await caller.read(reply) if isinstance(event, Resuming)]
        assert time.monotonic() - begun >= lost.wait / 2


async def test_a_reply_that_is_closed_as_its_call_begins_ends_at_once(kind: str) -> None:
    coach = Coach(in_silence, portions=[0])

    def closing() -> str:
        reply.close()
        return "t"

    async with coach.serving() as address, calling(kind, address, token=closing) as caller:
        reply = caller.client.say("Hello")
        assert await caller.read(reply) == []
        assert await caller.ask("agents"), "the channel is none the worse for it"


async def test_the_other_calls_ask_for_the_user_and_are_repeated(kind: str) -> None:
    coach = Coach()
    async with coach.serving() as address, calling(kind, address) as caller:
        assert (await caller.ask("thread", "x")) == pb.Thread(id="x", user_id="ada")
        assert [agent.id for agent in await caller.ask("agents")] == ["career-v1"]
        threads, more = await caller.ask("threads")
        assert ([thread.id for thread in threads], more) == (["thread"], True)
        (listed,) = coach.lists
        assert (listed.user_id, set(listed.states)) == ("ada", {pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE})
        assert (await caller.ask("cancel", "turn")) == _END
        coach.refusals = [refusal(UNAVAILABLE), refusal(UNAVAILABLE, "DRAINING", 0.01)]
        assert await caller.messages() == ["0", "1", "2", "3", "4", "5"]
        assert coach.refusals == []
        coach.refusals = [refusal(UNAVAILABLE, "OVERLOADED", 60)]
        with pytest.raises(ServiceError) as refused:  # more than its deadline leaves
            await caller.messages()
        assert refused.value.retry_after == 60


async def test_no_call_waits_for_ever(kind: str) -> None:
    coach = Coach()
    async with coach.serving() as address, calling(kind, address) as caller:
        await caller.read(caller.client.say("Hello"))
        await caller.read(caller.client.follow("turn"))
        await caller.ask("thread", "x")
    chat, follow, unary = coach.deadlines
    assert [round(seconds, -1) for seconds in (chat, follow)] == [240, 240]  # the library rounds them up
    assert 9 < unary < 11


async def test_a_call_and_its_repeats_have_one_deadline(kind: str) -> None:
    now = 0.0

    def seven_seconds_later() -> str:
        nonlocal now
        now += 7.0
        return "t"

    coach = Coach(refusals=[refusal(UNAVAILABLE)] * 3)
    async with (
        coach.serving() as address,
        calling(kind, address, clock=lambda: now, token=seven_seconds_later) as caller,
    ):
        with pytest.raises(ServiceError) as refused:
            await caller.ask("thread", "x")
    assert refused.value.code is UNAVAILABLE
    first, second = coach.deadlines
    assert 9 < first < 11
    assert 2 < second < 4


@pytest.mark.parametrize("content", [b"half\nof it", "caf\u00e9".encode(), b"\xff\xfe", b"a\0b"])
async def test_a_file_that_holds_no_token_is_named_and_no_lost_connection(
    kind: str, content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    coach = Coach()
    async with coach.serving() as address, calling(kind, address, token=TokenFile(file)) as caller:
        for asked in (caller.ask("agents"), caller.read(caller.client.say("Hello"))):
            with pytest.raises(OSError, match="must hold a token") as refused:
                await asked
            assert refused.value.filename == str(file)
        file.write_bytes(b" renewed\n")
        assert [agent.id for agent in await caller.ask("agents")] == ["career-v1"]
    assert coach.chats == []


async def test_a_deletion_whose_answer_was_lost_is_a_deletion(kind: str) -> None:
    gone = refusal(grpc.StatusCode.NOT_FOUND, "THREAD_NOT_FOUND")
    coach = Coach()
    async with coach.serving() as address, calling(kind, address) as caller:
        await caller.ask("delete_thread", "thread")
        coach.refusals = [refusal(UNAVAILABLE), gone]
        await caller.ask("delete_thread", "thread")
        assert coach.deletes == [threads_api.DeleteThreadRequest(user_id="ada", thread_id="thread")] * 3
        coach.refusals = [gone]
        with pytest.raises(ServiceError, match="THREAD_NOT_FOUND"):
            await caller.ask("delete_thread", "thread")


# What asyncio alone has: tasks that are cancelled, and readers beside each other.


async def test_cancelling_the_task_that_reads_ends_the_call() -> None:
    coach = Coach(stalled, portions=[2])
    async with coach.serving() as address, calling("async", address) as caller:
        reading = asyncio.create_task(caller.read(caller.client.say("Hello")))
        await coach.until(lambda: coach.open == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await coach.until(lambda: coach.open == 0)
        assert coach.cancels == []


async def test_closing_ends_the_iteration_of_another_task() -> None:
    coach = Coach(stalled, portions=[2])
    async with coach.serving() as address, calling("async", address) as caller:
        reply = caller.client.say("Hello")
        spoken = asyncio.Event()

        async def read() -> int:
            count = 0
            async for event in reply:
                count += 1
                if isinstance(event, pb.TextDelta):
                    spoken.set()
            return count

        async with reply:
            reading = asyncio.create_task(read())
            await spoken.wait()
        assert await reading == 2
        await coach.until(lambda: coach.open == 0)


async def test_cancelling_ends_a_turn_that_is_known_at_once() -> None:
    coach = Coach(stalled, portions=[2])
    async with coach.serving() as address, calling("async", address) as caller:
        async with caller.client.say("Hello") as reply:
            async for event in reply:
                if isinstance(event, pb.TextDelta):
                    await reply.cancel()
                    break
        assert coach.cancels == ["turn"]


async def test_cancelling_gives_up_a_message_that_can_not_be_delivered() -> None:
    long = Patience(seconds=10_000, first_wait=1_000, longest_wait=1_000)
    coach = Coach(portions=[0, 0])
    async with coach.serving() as address, calling("async", address, patience=long) as caller:
        reply = caller.client.say("Hello")
        events = aiter(reply)
        assert isinstance(await anext(events), Resuming)
        rest = asyncio.create_task(anext(events))
        await reply.cancel()
        with pytest.raises(ConnectionLost):
            await rest
        assert (len(coach.chats), coach.cancels) == (2, [])


async def test_closing_ends_the_wait_for_the_next_try() -> None:
    long = Patience(seconds=10_000, first_wait=1_000, longest_wait=1_000)
    coach = Coach(portions=[0])
    async with coach.serving() as address, calling("async", address, patience=long) as caller:
        reply = caller.client.say("Hello")
        events = aiter(reply)
        assert isinstance(await anext(events), Resuming)
        rest = asyncio.create_task(anext(events, None))
        reply.close()
        assert await rest is None
        assert len(coach.chats) == 1


async def test_a_channel_that_is_closed_is_no_cancellation() -> None:
    coach = Coach(stalled, portions=[1])
    async with coach.serving() as address:
        async with calling("async", address) as caller:
            reading = asyncio.create_task(caller.read(caller.client.say("Hello")))
            await coach.until(lambda: coach.open == 1)
        with pytest.raises(ServiceError, match="closed"):
            await reading
