"""Another user's id looks exactly like one that does not exist, in every method."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2

from adapters.system import Ids
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import DEADLINE, Client, message, reason, rest_of, served

SEED = 20261122


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_DRAIN", "0")  # a failure shows at once, whatever turn still waits


@dataclass(frozen=True)
class Belongings:
    """What a user has."""

    thread_id: str
    turn_id: str


Call = Callable[[Client, str, Belongings], Awaitable[Any]]


async def chat(client: Client, user: str, of: Belongings) -> Any:
    return await client.chat("x", user, thread_id=of.thread_id)


async def send(client: Client, user: str, of: Belongings) -> Any:
    content = [pb.ContentPart(text="x")]
    request = api.SendMessageRequest(user_id=user, thread_id=of.thread_id, content=content)
    return await client.agents.SendMessage(request, timeout=DEADLINE)


async def chat_with_a_domain(client: Client, user: str, of: Belongings) -> Any:
    return await client.chat("x", user, thread_id=of.thread_id, domain=pb.DOMAIN_GENERAL)


async def chat_with_a_request_id(client: Client, user: str, of: Belongings) -> Any:
    return await client.chat("Hello", user, thread_id=of.thread_id, request_id="r1")


async def follow(client: Client, user: str, of: Belongings) -> Any:
    return await client.follow(of.turn_id, user=user)


async def follow_from_far_ahead(client: Client, user: str, of: Belongings) -> Any:
    return await client.follow(of.turn_id, after=2, user=user)


async def get_turn(client: Client, user: str, of: Belongings) -> Any:
    return await client.agents.GetTurn(api.GetTurnRequest(user_id=user, turn_id=of.turn_id))


async def cancel(client: Client, user: str, of: Belongings) -> Any:
    return await client.agents.CancelTurn(api.CancelTurnRequest(user_id=user, turn_id=of.turn_id))


async def get_thread(client: Client, user: str, of: Belongings) -> Any:
    return await client.threads.GetThread(threads_api.GetThreadRequest(user_id=user, thread_id=of.thread_id))


async def list_messages(client: Client, user: str, of: Belongings) -> Any:
    request = threads_api.ListMessagesRequest(user_id=user, thread_id=of.thread_id)
    return await client.threads.ListMessages(request)


async def update(client: Client, user: str, of: Belongings) -> Any:
    request = threads_api.UpdateThreadRequest(
        user_id=user,
        thread=pb.Thread(id=of.thread_id, title=f"{user}'s", metadata={"k": user}),
        update_mask=field_mask_pb2.FieldMask(paths=["title", "metadata"]),
    )
    return await client.threads.UpdateThread(request)


async def delete(client: Client, user: str, of: Belongings) -> Any:
    request = threads_api.DeleteThreadRequest(user_id=user, thread_id=of.thread_id)
    return await client.threads.DeleteThread(request)


READING: list[Call] = [get_turn, get_thread, list_messages, update]
CALLS: list[Call] = [
    *READING,
    chat,
    send,
    chat_with_a_domain,
    chat_with_a_request_id,
    follow,
    follow_from_far_ahead,
    cancel,
    delete,  # last: on one's own there is nothing to ask about afterwards
]
WITHOUT_IDS = {"ListAgents", "ListThreads"}


def test_every_method_is_here() -> None:
    names = {
        method.name
        for file in (api, threads_api)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    tried = {"Chat", "SendMessage", "FollowTurn", "GetTurn", "CancelTurn"}
    tried |= {"GetThread", "ListMessages", "UpdateThread", "DeleteThread"}
    assert names == tried | WITHOUT_IDS


async def looks(call: Call, client: Client, user: str, of: Belongings) -> tuple[object, ...]:
    """All that a caller sees of a refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(client, user, of)
    metadata = sorted((key, value) for key, value in error.value.trailing_metadata() or ())
    first = sorted((key, value) for key, value in error.value.initial_metadata() or ())
    assert reason(error.value) in {"THREAD_NOT_FOUND", "TURN_NOT_FOUND"}
    return error.value.code(), error.value.details(), metadata, first


def never() -> Belongings:
    ids = Ids()
    return Belongings(ids.new(), ids.new())


async def begin(client: Client, user: str, text: str = "Hello", **more: object) -> Belongings:
    started = (await client.chat(text, user, **more))[0].event.started
    return Belongings(started.thread_id, started.turn_id)


async def test_others_ids_look_like_ids_that_never_were() -> None:
    gate = Gate()
    async with served(ScriptedAgent(["done", DONE], ["mine", DONE], ["half", gate, " whole", DONE])) as client:
        ended = await begin(client, "ada", request_id="r1")
        eves = await begin(client, "eve")
        stream = client.agents.Chat(message(), timeout=DEADLINE)
        started = (await stream.read()).event.started
        running = Belongings(started.thread_id, started.turn_id)
        await gate.reached.wait()
        assert (await stream.read()).event.text_delta.text == "half"  # it is on record
        before = [
            [await call(client, "ada", of) for call in (get_turn, get_thread, list_messages)]
            for of in (ended, running)
        ]
        for call in CALLS:
            seen = [
                await looks(call, client, "eve", of)
                for of in (
                    ended,  # another's, whose turn has ended
                    running,  # another's, busy
                    never(),  # random
                    never(),
                    Belongings("nonsense", "nonsense"),  # never could have been
                    Belongings("x" * 64, "x" * 64),
                    Belongings(ended.turn_id, ended.thread_id),  # of the other kind
                    Belongings(eves.turn_id, eves.thread_id),
                )
            ]
            seen += [await looks(call, client, "nobody", of) for of in (ended, running, never())]
            assert all(one == seen[0] for one in seen), call.__name__
            assert seen[0][0] is grpc.StatusCode.NOT_FOUND
        after = [
            [await call(client, "ada", of) for call in (get_turn, get_thread, list_messages)]
            for of in (ended, running)
        ]
        assert after == before  # nothing of it was touched, and the turn goes on
        gate.open()
        events = [response.event for response in await rest_of(stream)]
        assert events[-1].finished.turn.state == pb.TURN_STATE_COMPLETED
        assert events[-1].finished.reply.content[0].text == "half whole"
        own = [call for call in CALLS if call not in (chat_with_a_domain, chat_with_a_request_id)]
        for call in own:  # the same calls on one's own
            await call(client, "ada", ended)
        assert await everything(client, "nobody") == []


async def everything(client: Client, user: str) -> list[pb.Thread]:
    """All threads that a user is shown."""
    states = [pb.THREAD_STATE_ACTIVE, pb.THREAD_STATE_INACTIVE]
    found: list[pb.Thread] = []
    token = ""
    while True:
        request = threads_api.ListThreadsRequest(user_id=user, states=states, page_size=2, page_token=token)
        page = await client.threads.ListThreads(request)
        found += page.threads
        token = page.next_page_token
        if not token:
            return found


async def test_a_request_id_is_its_users_own() -> None:
    async with served(ScriptedAgent()) as client:
        adas = await client.chat("Hello", "ada", request_id="r1")
        eves = await client.chat("Hello", "eve", request_id="r1")
        others = await client.chat("Something else", "bob", request_id="r1")
        ids = {each[0].event.started.turn_id for each in (adas, eves, others)}
        assert len(ids) == 3
        assert not any(each[0].attached for each in (adas, eves, others))


async def test_lists_and_histories_never_show_others_in_any_order_of_calls() -> None:
    chance = random.Random(SEED)
    users = ["ada", "eve", "Ada", "ada ", "a%", "👋"]
    own: dict[str, list[Belongings]] = {user: [] for user in users}
    async with served(ScriptedAgent()) as client:
        for number in range(80):
            user = chance.choice(users)
            others = [of for other in users if other != user for of in own[other]]
            match chance.randrange(4):
                case 0 | 1:
                    of = chance.choice(own[user]) if own[user] and chance.random() < 0.5 else None
                    more = {"thread_id": of.thread_id} if of else {}
                    begun = await begin(client, user, f"{user}|{number}", **more)
                    own[user].append(begun)
                case 2 if others:
                    await looks(chance.choice(CALLS), client, user, chance.choice(others))
                case _:
                    shown = await everything(client, user)
                    assert {thread.id for thread in shown} == {of.thread_id for of in own[user]}
                    assert {thread.user_id for thread in shown} <= {user}
                    for thread in shown:
                        request = threads_api.ListMessagesRequest(user_id=user, thread_id=thread.id)
                        lines = (await client.threads.ListMessages(request)).messages
                        said = [line.content[0].text for line in lines if line.role == pb.ROLE_USER]
                        assert said
                        assert all(text.startswith(f"{user}|") for text in said)
        assert all(own.values()), f"seed {SEED}"
