"""Random sequences of everything that users can do, side by side, on servers that share a database: nobody ever
sees what is another's, and another's looks like nothing at all."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.protobuf.message import Message

from adapters.system import Ids
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, chance, sized, stores
from faults.scripted import expected
from harness import reason
from identity_lab import stubs

SUITE = "isolation"
STEPS = sized("ISOLATION_STEPS", 150, 2_000, 20_000)
"""What each user does."""
USERS = ("ada", "eve", "Ada")
STRANGER = "stranger"
MOST = 6
"""Threads that a user has at a time."""

IDS = Ids()
NOT_FOUND = {"THREAD_NOT_FOUND", "TURN_NOT_FOUND"}


@dataclass
class Turn:
    """A turn of a user's."""

    id: str
    thread_id: str
    message: str


@dataclass
class Person:
    """A user, what they have, and what every text of theirs holds."""

    name: str
    threads: dict[str, list[Turn]] = field(default_factory=dict)
    gone: list[Turn] = field(default_factory=list)

    @property
    def mark(self) -> str:
        """What nobody else may ever see."""
        return f"secret-of-{self.name}-"

    @property
    def turns(self) -> list[Turn]:
        """All turns that can still be seen."""
        return [turn for turns in self.threads.values() for turn in turns]


@dataclass
class Seen:
    """What became of a call: answers, or the reason of a refusal and all of it that a caller sees."""

    answers: list[Any]
    reason: str = ""
    refusal: tuple[object, ...] = ()


class World:
    """Everybody, and the servers."""

    def __init__(self, channels: list[grpc.aio.Channel], draw: random.Random) -> None:
        self.people = {name: Person(name) for name in (*USERS, STRANGER)}
        self.draw = draw
        self.counts: Counter[str] = Counter()
        self.refusals: dict[str, tuple[object, ...]] = {}
        self._stubs = [stubs(channel) for channel in channels]

    async def call(self, who: Person, name: str, request: Message) -> Seen:
        """Calls a method on any server. Nothing that comes back may have anything of anybody else in it."""
        service, _, method = name.partition("/")
        call = getattr(self.draw.choice(self._stubs)[service], method)(request, timeout=DEADLINE)
        try:
            answers = [answer async for answer in call] if hasattr(call, "__aiter__") else [await call]
        except grpc.aio.AioRpcError as error:
            sent = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            shown = (error.code(), error.details(), sorted((*pair,) for pair in sent))
            seen = Seen([], reason(error), shown)
        else:
            seen = Seen(answers)
        told = str([answer.SerializeToString() for answer in seen.answers]) + str(seen.refusal)
        asked = str(request.SerializeToString())
        for other in self.people.values():
            if other is not who:
                assert other.mark not in told, (who.name, name, other.name)
                theirs = {each for turn in (*other.turns, *other.gone[-20:]) for each in (turn.id, turn.thread_id)}
                assert not [each for each in theirs if each in told and each not in asked], (name, other.name)
        return seen


Deed = Callable[[World, Person], Awaitable[None]]


async def speaks(world: World, who: Person) -> None:
    """Says something, on a thread or a new one."""
    thread_id = (
        world.draw.choice([*who.threads, ""]) if len(who.threads) < MOST else world.draw.choice([*who.threads])
    )
    text = f"words:{world.draw.randint(1, 4)} {who.mark}{world.draw.randrange(10**9)}"
    more = {} if thread_id else {"metadata": {"k": f"{who.mark}metadata"}}
    content = [pb.ContentPart(text=text)]
    said: dict[str, Any] = {
        "user_id": who.name,
        "thread_id": thread_id,
        "content": content,
        "request_id": text[-9:],
        **more,
    }
    if world.draw.random() < 0.5:
        seen = await world.call(who, "AgentService/Chat", api.ChatRequest(**said))
        started, reply = seen.answers[0].event.started, seen.answers[-1].event.finished.reply
        turn = Turn(started.turn_id, started.thread_id, text)
    else:
        (answer,) = (await world.call(who, "AgentService/SendMessage", api.SendMessageRequest(**said))).answers
        turn, reply = Turn(answer.turn.id, answer.turn.thread_id, text), answer.reply
    assert reply.content[0].text == expected(text)
    assert not thread_id or turn.thread_id == thread_id
    who.threads.setdefault(turn.thread_id, []).append(turn)


async def reads(world: World, who: Person) -> None:
    """Looks at all that they have."""
    states = [pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE]
    request = threads_api.ListThreadsRequest(user_id=who.name, states=states, page_size=200)
    (page,) = (await world.call(who, "ThreadService/ListThreads", request)).answers
    assert {thread.id for thread in page.threads} == set(who.threads)
    assert {thread.user_id for thread in page.threads} <= {who.name}
    for thread_id, turns in who.threads.items():
        listed = threads_api.ListMessagesRequest(user_id=who.name, thread_id=thread_id, page_size=200)
        (lines,) = (await world.call(who, "ThreadService/ListMessages", listed)).answers
        said = [line.content[0].text for line in lines.messages if line.role == pb.ROLE_USER]
        assert said == [turn.message for turn in turns][: len(said)]
        assert len(said) == min(len(turns), 100)


async def follows(world: World, who: Person) -> None:
    """Looks at one of their turns."""
    if who.turns:
        turn = world.draw.choice(who.turns)
        followed = api.FollowTurnRequest(user_id=who.name, turn_id=turn.id)
        seen = await world.call(who, "AgentService/FollowTurn", followed)
        text = "".join(answer.event.text_delta.text for answer in seen.answers)
        assert text == expected(turn.message)


async def exports(world: World, who: Person) -> None:
    """Has all of it given out."""
    request = users_api.ExportUserDataRequest(user_id=who.name)
    pieces = (await world.call(who, "UserService/ExportUserData", request)).answers
    assert {piece.thread.id for piece in pieces if piece.HasField("thread")} == set(who.threads)
    assert {piece.turn.turn.id for piece in pieces if piece.HasField("turn")} == {turn.id for turn in who.turns}


async def describes(world: World, who: Person) -> None:
    """Renames a thread."""
    if who.threads:
        request = threads_api.UpdateThreadRequest(
            user_id=who.name,
            thread=pb.Thread(id=world.draw.choice([*who.threads]), title=f"{who.mark}title"),
            update_mask=field_mask_pb2.FieldMask(paths=["title"]),
        )
        (answer,) = (await world.call(who, "ThreadService/UpdateThread", request)).answers
        assert answer.thread.title == f"{who.mark}title"


async def deletes(world: World, who: Person) -> None:
    """Deletes a thread."""
    if len(who.threads) > 2:
        thread_id = world.draw.choice([*who.threads])
        request = threads_api.DeleteThreadRequest(user_id=who.name, thread_id=thread_id)
        assert (await world.call(who, "ThreadService/DeleteThread", request)).answers
        who.gone += who.threads.pop(thread_id)


async def leaves(world: World, who: Person) -> None:
    """Has everything erased."""
    if world.draw.random() < 0.2:
        (answer,) = (
            await world.call(who, "UserService/EraseUser", users_api.EraseUserRequest(user_id=who.name))
        ).answers
        assert answer.receipt.erased.threads == len(who.threads)
        who.gone += who.turns
        who.threads.clear()


async def pries(world: World, who: Person) -> None:
    """Asks for what is another's, what is gone, and what never was: all look alike."""
    others = [turn for other in world.people.values() if other is not who for turn in other.turns]
    never = Turn(IDS.new(), IDS.new(), "")
    for turn in (never, *(world.draw.choice(some) for some in (others, who.gone) if some)):
        name, request = world.draw.choice(_attempts(who.name, turn))
        seen = await world.call(who, name, request)
        assert seen.reason in NOT_FOUND, (name, seen)
        assert world.refusals.setdefault(name, seen.refusal) == seen.refusal
        world.counts["pried"] += turn is not never


def _attempts(user: str, turn: Turn) -> list[tuple[str, Message]]:
    thread: dict[str, Any] = {"user_id": user, "thread_id": turn.thread_id}
    one: dict[str, Any] = {"user_id": user, "turn_id": turn.id}
    content = [pb.ContentPart(text="words:1")]
    mask = field_mask_pb2.FieldMask(paths=["title"])
    renamed = pb.Thread(id=turn.thread_id, title="mine")
    return [
        ("AgentService/Chat", api.ChatRequest(content=content, **thread)),
        ("AgentService/SendMessage", api.SendMessageRequest(content=content, **thread)),
        ("AgentService/FollowTurn", api.FollowTurnRequest(after_position=2, **one)),
        ("AgentService/GetTurn", api.GetTurnRequest(**one)),
        ("AgentService/CancelTurn", api.CancelTurnRequest(**one)),
        ("ThreadService/GetThread", threads_api.GetThreadRequest(**thread)),
        ("ThreadService/ListMessages", threads_api.ListMessagesRequest(**thread)),
        (
            "ThreadService/UpdateThread",
            threads_api.UpdateThreadRequest(user_id=user, thread=renamed, update_mask=mask),
        ),
        ("ThreadService/DeleteThread", threads_api.DeleteThreadRequest(**thread)),
    ]


DEEDS: dict[Deed, int] = {
    speaks: 8, reads: 2, follows: 4, exports: 1, describes: 2, deletes: 2, leaves: 1, pries: 8
}  # fmt: skip


@asynccontextmanager
async def world_of(cluster: Cluster, database_url: str, draw: random.Random) -> AsyncIterator[World]:
    """One server, or two where they can share the database."""
    async with AsyncExitStack() as stack:
        channels = []
        for _ in range(1 if database_url.startswith("sqlite") else 2):
            server = await cluster.start(database_url)
            channels.append(await stack.enter_async_context(grpc.aio.insecure_channel(server.address)))
        yield World(channels, draw)


@pytest.mark.timeout(60 + STEPS // 2)
@pytest.mark.parametrize("database_url", stores(tiny="postgresql"), indirect=True)
async def test_nobody_sees_what_is_anothers_in_any_sequence(database_url: str, cluster: Cluster) -> None:
    async with world_of(cluster, database_url, chance(SUITE, database_url.partition(":")[0])) as world:

        async def live(who: Person) -> None:
            for _ in range(STEPS):
                (deed,) = world.draw.choices([*DEEDS], [*DEEDS.values()])
                await deed(world, who)
                world.counts[deed.__name__] += 1

        async def pry(who: Person) -> None:
            for _ in range(STEPS // 2):
                await pries(world, who)
                await reads(world, who)

        await asyncio.gather(*(live(world.people[name]) for name in USERS), pry(world.people[STRANGER]))
        for who in world.people.values():
            await reads(world, who)
    assert {deed.__name__ for deed in DEEDS} <= world.counts.keys()
    assert world.counts["pried"] > STEPS
    assert len(world.refusals) == len(_attempts("", Turn("", "", "")))
    FIGURES.add(SUITE, {"steps": 3 * STEPS, "looks at what is another's or gone": world.counts["pried"]})
