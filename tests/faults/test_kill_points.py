"""A server kills itself at a named point, another one takes over: each point has one exact outcome."""

import asyncio
from dataclasses import dataclass

import grpc
import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from faults.checker import Tables, go_on, judge
from faults.client import Client, Told, chat_request, stubs, why
from faults.cluster import DEADLINE, Cluster
from faults.figures import chance, chosen, sized, stores
from faults.points import COMMITS, OPERATIONS, TOOLS
from faults.scripted import Effects, expected
from harness import until

SUITE = "kill points"
REPEATS = sized("POINT_REPEATS", 1, 1, 10)

COMPLETED = pb.TURN_STATE_COMPLETED
INCOMPLETE = pb.TURN_STATE_INCOMPLETE
FAILED = pb.TURN_STATE_FAILED

pytestmark = pytest.mark.timeout(60 * REPEATS)


@dataclass(frozen=True)
class Case:
    """A point, the message whose turn passes it, and what must become of that turn.

    `cut` is the last position at which the stream may break. `tool` counts calls and effects. `words` are those
    that are kept where the turn does not complete.
    """

    point: str
    message: str
    state: "pb.TurnState.ValueType" = COMPLETED
    attempt: int = 1
    cut: int | None = None
    reason: str = ""
    tool: tuple[int, int] = (0, 0)
    words: int = 0
    restart: bool = False
    quick: bool = False

    @property
    def id(self) -> str:
        """A name for the report."""
        return " ".join([self.point, *self.message.split()[:2], *(["restart"] if self.restart else [])])


# A word for each commit, and the first one only after `started` has been read.
_SLOW = "words:6 pace:10 slow-start:0.2"
_TOOL = "tool:{} words:3 slow-start:0.2"
_SPOKEN = "tool:{} before:2 words:3 slow-start:0.2"
_UNKNOWN = "TOOL_OUTCOME_UNKNOWN"

CASES = [
    Case("accept.before-commit", "words:5", cut=0),
    Case("accept.after-commit", "words:5", attempt=2, cut=0),
    Case("state.before-commit", f"state:1 {_SLOW}", attempt=2, cut=1),
    Case("state.after-commit", f"state:1 {_SLOW}", attempt=2, cut=1),
    Case("first-text.before-commit", _SLOW, attempt=2, cut=1),
    Case("first-text.after-commit", _SLOW, INCOMPLETE, cut=1, reason="INTERRUPTED", words=1),
    Case("first-text.after-commit", _SLOW, attempt=2, cut=1, restart=True),
    Case("later-text.before-commit", _SLOW, INCOMPLETE, reason="INTERRUPTED", words=1),
    Case("later-text.after-commit", _SLOW, INCOMPLETE, reason="INTERRUPTED", words=2),
    Case("later-text.before-commit#3", _SLOW, INCOMPLETE, reason="INTERRUPTED", words=3),
    Case("later-text.after-commit#3", _SLOW, attempt=2, restart=True),
    Case("tool-call.before-commit", _TOOL.format("plain"), attempt=2, cut=1, tool=(1, 1)),
    Case("tool-call.after-commit", _TOOL.format("plain"), FAILED, cut=1, reason=_UNKNOWN),
    Case("tool-call.after-commit", _TOOL.format("idempotent"), attempt=2, cut=1, tool=(1, 1)),
    Case("tool.before-effect", _TOOL.format("plain"), FAILED, cut=2, reason=_UNKNOWN, tool=(1, 0)),
    Case("tool.before-effect", _TOOL.format("idempotent"), attempt=2, cut=2, tool=(2, 1)),
    Case("tool.after-effect", _TOOL.format("plain"), FAILED, cut=2, reason=_UNKNOWN, tool=(1, 1), quick=True),
    Case("tool.after-effect", _TOOL.format("idempotent"), attempt=2, cut=2, tool=(2, 1), quick=True),
    Case("tool.after-effect", _SPOKEN.format("plain"), INCOMPLETE, reason=_UNKNOWN, tool=(1, 1), words=2),
    Case(
        "tool.after-effect",
        _SPOKEN.format("plain"),
        INCOMPLETE,
        reason=_UNKNOWN,
        tool=(1, 1),
        words=2,
        restart=True,
    ),
    Case(
        "tool.after-effect", _SPOKEN.format("idempotent"), INCOMPLETE, reason="INTERRUPTED", tool=(1, 1), words=2
    ),
    Case("tool.after-effect", _SPOKEN.format("idempotent"), attempt=2, tool=(2, 1), restart=True),
    Case("tool-answer.before-commit", _TOOL.format("plain"), FAILED, cut=2, reason=_UNKNOWN, tool=(1, 1)),
    Case("tool-answer.before-commit", _TOOL.format("idempotent"), attempt=2, cut=2, tool=(2, 1)),
    Case("tool-answer.after-commit", _TOOL.format("plain"), FAILED, cut=2, reason="INTERRUPTED", tool=(1, 1)),
    Case("tool-answer.after-commit", _TOOL.format("idempotent"), attempt=2, cut=2, tool=(1, 1)),
    Case("ending.before-commit", f"{_SLOW} slow-end:0.3", INCOMPLETE, reason="INTERRUPTED", words=6),
    Case("ending.after-commit", _SLOW),
]


@pytest.mark.parametrize("case", chosen(CASES, *(case for case in CASES if case.quick)), ids=lambda case: case.id)
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_a_turn(case: Case, database_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, case.id, number)
        restart = {"VIDA_RESTART_INTERRUPTED": "true"} if case.restart else {}
        server = await cluster.start(database_url, case.point, **restart)
        told = Told("ada", f"{case.message} n{number}")
        chat = asyncio.create_task(Client(cluster, draw).chat(told))
        await cluster.struck(server, case.point)
        await cluster.start(database_url, **restart)
        await chat
        assert (told.turn.state, told.turn.error.reason, told.turn.attempt) == (
            case.state,
            case.reason,
            case.attempt,
        )
        # A process that is short of time may refuse besides: it does not know whether its lease still holds.
        by_the_kill = [
            cut for cut, why in zip(told.cuts, told.refusals, strict=False) if why != "STORE_UNAVAILABLE"
        ]
        # Who comes back before the dead one is off the list meets it once more: at the same position.
        assert len(set(by_the_kill)) == 1
        assert case.cut is None or by_the_kill[0] <= case.cut, "more was shown than was committed"
        whole = expected(told.message)
        assert told.text == (whole if case.state == COMPLETED else _first_words(whole, case.words))
        lines = Effects(cluster.folder / "effects").lines(f"{told.turn_id}:")
        assert sum(line.startswith("called") for line in lines) == case.tool[0]
        assert sum(line.startswith("took") for line in lines) == case.tool[1]
        assert len({line.split(" ")[2] for line in lines}) <= 1, "the call was repeated with another key"
        if not case.point.startswith(("state.", "accept.before")):
            assert cluster.strikes()[-1][1] == told.turn_id, "it was another turn that was struck"
        await judge(SUITE, database_url, cluster.addresses, [told], draw, restarts=case.restart)
        await go_on(cluster.addresses[-1], [told])
        await _stop(cluster)


def _first_words(text: str, count: int) -> str:
    return "".join(f"{word} " for word in text.split(" ")[:count])


@pytest.mark.parametrize("commit", chosen(COMMITS, "after-commit"))
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_a_claim_by_recovery(commit: str, database_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, "claim", commit, number)
        server = await cluster.start(database_url, "first-text.before-commit")
        told = Told("ada", f"{_SLOW} n{number}")
        chat = asyncio.create_task(Client(cluster, draw).chat(told))
        await cluster.struck(server, "first-text.before-commit")
        second = await cluster.start(database_url, f"claim.{commit}")
        await cluster.struck(second, f"claim.{commit}")
        await cluster.start(database_url)
        await chat
        assert told.turn.state == COMPLETED
        assert told.turn.attempt == (2 if commit == "before-commit" else 3)
        await judge(SUITE, database_url, cluster.addresses, [told], draw)
        await _stop(cluster)


@pytest.mark.parametrize("commit", chosen(COMMITS, "after-commit"))
@pytest.mark.parametrize("operation", chosen(("enqueue", "claim"), "claim"))
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_a_queued_turn(operation: str, commit: str, database_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, "queued", operation, commit, number)
        point = f"{operation}.{commit}"
        server = await cluster.start(database_url, point)
        first = Told("ada", f"words:8 pace:20 slow-start:0.1 n{number}")
        chats = [asyncio.create_task(Client(cluster, draw).chat(first))]
        await until(lambda first=first: first.text)
        second = Told("ada", f"words:4 n{number}", first.thread_id, on_busy=pb.BUSY_POLICY_QUEUE)
        chats.append(asyncio.create_task(Client(cluster, draw).chat(second)))
        await cluster.struck(server, point)
        await cluster.start(database_url)
        await asyncio.gather(*chats)
        if operation == "enqueue":
            assert second.cuts[0] == 0
            assert (first.turn.state, first.turn.error.reason) == (INCOMPLETE, "INTERRUPTED")
            assert (second.turn.state, second.turn.attempt) == (COMPLETED, 1)
        else:
            assert first.turn.state == COMPLETED
            assert second.cuts[0] == 1
            assert second.turn.state == COMPLETED
            assert second.turn.attempt == (1 if commit == "before-commit" else 2)
        await judge(SUITE, database_url, cluster.addresses, [first, second], draw)
        lines = Tables(database_url).rows("SELECT role, turn_id FROM messages ORDER BY thread_id, number")
        mine = [
            (row["role"], row["turn_id"]) for row in lines if row["turn_id"] in (first.turn_id, second.turn_id)
        ]
        assert mine == [(role, told.turn_id) for told in (first, second) for role in ("user", "assistant")]
        await _stop(cluster)


@pytest.mark.parametrize("commit", chosen(COMMITS, "after-commit"))
async def test_a_release_at_a_stop(commit: str, postgres_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, "release", commit, number)
        server = await cluster.start(postgres_url, f"release.{commit}")
        told = Told("ada", f"words:4 slow-start:1.5 n{number}")
        chat = asyncio.create_task(Client(cluster, draw).chat(told))
        await until(lambda told=told: told.turn_id)
        await cluster.start(postgres_url)
        server.ask_to_stop()
        await cluster.struck(server, f"release.{commit}")
        await chat
        assert (told.turn.state, told.turn.attempt) == (COMPLETED, 2)
        await judge(SUITE, postgres_url, cluster.addresses, [told], draw)
        await _stop(cluster)


@pytest.mark.parametrize("commit", chosen(COMMITS, "before-commit"))
@pytest.mark.parametrize("database_url", stores(tiny="sqlite"), indirect=True)
async def test_a_deletion(commit: str, database_url: str, cluster: Cluster) -> None:
    for number in range(REPEATS):
        draw = chance(SUITE, "delete", commit, number)
        server = await cluster.start(database_url, f"delete.{commit}")
        user = f"ada{number}"  # the ledger keeps what turns have cost that are deleted here
        ended, told = Told(user, f"words:3 n{number}"), Told(user, f"words:4 slow-start:0.5 n{number}")
        await Client(cluster, draw).chat(ended)
        told.thread_id = ended.thread_id
        chat = asyncio.create_task(Client(cluster, draw).chat(told))
        await until(lambda told=told: told.turn_id)
        delete = threads_api.DeleteThreadRequest(user_id=user, thread_id=told.thread_id)
        async with stubs(server.address) as (_, threads):
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await threads.DeleteThread(delete, timeout=DEADLINE)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        await cluster.struck(server, f"delete.{commit}")
        survivor = await cluster.start(database_url)
        if commit == "before-commit":
            await chat
            assert (told.turn.state, told.turn.attempt) == (COMPLETED, 2)
            await judge(SUITE, database_url, cluster.addresses, [ended, told], draw)
            async with stubs(survivor.address) as (_, threads):
                await threads.DeleteThread(delete, timeout=DEADLINE)
        else:
            with pytest.raises(grpc.aio.AioRpcError) as gone:
                await chat
            assert (gone.value.code(), why(gone.value)) == (grpc.StatusCode.NOT_FOUND, "TURN_NOT_FOUND")
        await _nothing_left(database_url, survivor.address, told)
        await _stop(cluster)


async def _nothing_left(database_url: str, address: str, told: Told) -> None:
    async with stubs(address) as (agents, threads):
        get = threads_api.GetThreadRequest(user_id=told.user, thread_id=told.thread_id)
        turn = api.GetTurnRequest(user_id=told.user, turn_id=told.turn_id)
        calls = [threads.GetThread(get), agents.GetTurn(turn), agents.Chat(chat_request(told)).read()]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as gone:
                await call
            assert gone.value.code() is grpc.StatusCode.NOT_FOUND
    tables = Tables(database_url)
    for query in ("turns WHERE thread_id = ?", "messages WHERE thread_id = ?", "assistant_threads WHERE id = ?"):
        assert not tables.rows(f"SELECT id FROM {query}", told.thread_id)
    assert not tables.rows("SELECT turn_id FROM turn_log WHERE turn_id = ?", told.turn_id)


async def _stop(cluster: Cluster) -> None:
    for server in list(cluster.servers):
        assert await server.terminate() == 0
        cluster.forget(server)


def test_every_point_has_a_case() -> None:
    tested = {case.point.partition("#")[0] for case in CASES}
    tested |= {
        f"{operation}.{commit}" for operation in ("claim", "enqueue", "release", "delete") for commit in COMMITS
    }
    assert tested == {f"{operation}.{commit}" for operation in OPERATIONS for commit in COMMITS} | set(TOOLS)
