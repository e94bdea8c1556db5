"""A message for a thread that has a turn: refused, put in line, or put in its place."""

import asyncio
from contextlib import suppress
from itertools import pairwise
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from core.model.turn import TurnReason
from core.ports.agent import AgentFailed
from doubles import DONE, Gate, ScriptedAgent
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api
from harness import DEADLINE, Client, detail, message, reason, rest_of, served, text_of

QUEUE, INTERRUPT = pb.BUSY_POLICY_QUEUE, pb.BUSY_POLICY_INTERRUPT
WAITING = 8


@pytest.fixture(autouse=True)
def database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds on both databases."""
    monkeypatch.setenv("VIDA_DATABASE_URL", database_url)
    monkeypatch.setenv("VIDA_DRAIN", "0")  # a failure shows at once, whatever turn still waits


class Said:
    """A message that was accepted, and the stream of its turn."""

    def __init__(self, call: Any, started: pb.TurnStarted, *, attached: bool) -> None:
        self.call = call
        self.turn_id = started.turn_id
        self.thread_id = started.thread_id
        self.attached = attached

    async def events(self) -> list[pb.TurnEvent]:
        """What follows `started`, to the end."""
        return [response.event for response in await rest_of(self.call)]

    async def end(self) -> pb.TurnFinished:
        """How its turn ended."""
        return (await self.events())[-1].finished


async def say(client: Client, text: str, **more: Any) -> Said:
    """Says something and reads `started`."""
    call = client.agents.Chat(message(text, **more), timeout=DEADLINE)
    response = await call.read()
    assert response.event.position == 1
    return Said(call, response.event.started, attached=response.attached)


async def get(client: Client, turn_id: str) -> api.GetTurnResponse:
    """Reads a turn."""
    found: api.GetTurnResponse = await client.agents.GetTurn(api.GetTurnRequest(user_id="ada", turn_id=turn_id))
    return found


async def cancel(client: Client, turn_id: str) -> pb.Turn:
    """Cancels a turn."""
    request = api.CancelTurnRequest(user_id="ada", turn_id=turn_id)
    answer: api.CancelTurnResponse = await client.agents.CancelTurn(request)
    return answer.turn


async def history(client: Client, thread_id: str) -> list[str]:
    """The transcript: what was said, a reply that broke off marked so."""
    request = threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id)
    lines = (await client.threads.ListMessages(request)).messages
    return [line.content[0].text + ("…" if line.partial else "") for line in lines]


async def refused(client: Client, **more: Any) -> grpc.aio.AioRpcError:
    """How a message is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.chat("refused", **more)
    return error.value


async def test_messages_in_line_are_answered_in_order() -> None:
    gate = Gate()
    agent = ScriptedAgent(["a", gate, "A", DONE], ["B", DONE], ["C", DONE])
    async with served(agent) as client:
        first = await say(client, "one", on_busy=QUEUE)  # a new thread: nothing to wait for
        await gate.reached.wait()
        second = await say(client, "two", thread_id=first.thread_id, on_busy=QUEUE)
        third = await say(client, "three", thread_id=first.thread_id, on_busy=QUEUE, request_id="r3")
        for waiting in (second, third):
            turn = (await get(client, waiting.turn_id)).turn
            assert (turn.state, turn.last_position) == (pb.TURN_STATE_ACCEPTED, 1)
        assert (await get(client, first.turn_id)).turn.state == pb.TURN_STATE_RUNNING
        assert await history(client, first.thread_id) == ["one"]
        again = await say(client, "three", thread_id=first.thread_id, request_id="r3")
        assert (again.attached, again.turn_id) == (True, third.turn_id)
        gate.open()
        for said, reply in ((first, "aA"), (second, "B"), (third, "C"), (again, "C")):
            events = await said.events()
            assert text_of(events) == reply
            finished = events[-1].finished
            assert (finished.turn.state, finished.turn.attempt) == (pb.TURN_STATE_COMPLETED, 1)
            assert text_of(await client.follow(said.turn_id)) == reply
        assert await history(client, first.thread_id) == ["one", "aA", "two", "B", "three", "C"]
        assert [line.text for line in await agent.requests[2].history()] == ["one", "aA", "two", "B"]
        free = await say(client, "four", thread_id=first.thread_id, on_busy=QUEUE)
        assert (await free.end()).turn.state == pb.TURN_STATE_COMPLETED


async def test_a_waiting_message_can_be_sent_for_one_answer() -> None:
    gate = Gate()
    async with served(ScriptedAgent([gate, "A", DONE], ["B", DONE])) as client:
        first = await say(client, "one")
        content = [pb.ContentPart(text="two")]
        request = api.SendMessageRequest(
            user_id="ada", thread_id=first.thread_id, content=content, on_busy=QUEUE, request_id="r"
        )
        sending = asyncio.ensure_future(client.agents.SendMessage(request, timeout=DEADLINE))
        joined = None
        while joined is None:  # it is accepted when its request id is known
            with suppress(grpc.aio.AioRpcError):
                joined = await say(client, "two", thread_id=first.thread_id, request_id="r")
        assert joined.attached
        gate.open()
        answer = await sending
        assert (answer.turn.state, answer.reply.content[0].text) == (pb.TURN_STATE_COMPLETED, "B")


async def test_eight_wait_and_no_more() -> None:
    gate = Gate()
    async with served(ScriptedAgent(["a", gate, DONE])) as client:
        first = await say(client, "one")
        thread = {"thread_id": first.thread_id}
        waiting = [
            await say(client, f"w{number}", **thread, on_busy=QUEUE, request_id=f"w{number}")
            for number in range(WAITING)
        ]
        error = await refused(client, **thread, on_busy=QUEUE, request_id="full")
        assert (error.code(), reason(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        retry = detail(error, error_details_pb2.RetryInfo)
        assert retry is not None
        assert retry.retry_delay.ToMilliseconds() > 0
        busy = await refused(client, **thread)
        assert (busy.code(), reason(busy)) == (grpc.StatusCode.ABORTED, "TURN_IN_PROGRESS")
        info = detail(busy, error_details_pb2.ErrorInfo)
        assert info is not None
        assert info.metadata["turn_id"] == first.turn_id
        repeated = await say(client, "w7", **thread, on_busy=QUEUE, request_id="w7")  # full, but not for this one
        assert (repeated.attached, repeated.turn_id) == (True, waiting[7].turn_id)
        # Whoever waits in one thread takes nothing from the others.
        assert (await client.chat("elsewhere"))[-1].event.finished.turn.state == pb.TURN_STATE_COMPLETED
        await cancel(client, waiting[3].turn_id)
        late = await say(client, "late", **thread, on_busy=QUEUE, request_id="full")  # nothing was written before
        assert not late.attached
        assert reason(await refused(client, **thread, on_busy=QUEUE)) == "QUEUE_FULL"
        gate.open()
        for said in (first, *waiting, late):
            state = (await said.end()).turn.state
            expected = pb.TURN_STATE_CANCELLED if said is waiting[3] else pb.TURN_STATE_COMPLETED
            assert state == expected
        questions = (await history(client, first.thread_id))[::2]
        assert questions == ["one", "w0", "w1", "w2", "w4", "w5", "w6", "w7", "late"]


async def test_a_waiting_turn_that_is_cancelled_leaves_no_message() -> None:
    gate = Gate()
    agent = ScriptedAgent(["a", gate, DONE], ["C", DONE])
    async with served(agent) as client:
        first = await say(client, "one")
        second = await say(client, "two", thread_id=first.thread_id, on_busy=QUEUE, request_id="r2")
        third = await say(client, "three", thread_id=first.thread_id, on_busy=QUEUE)
        cancelled = await cancel(client, second.turn_id)
        assert (cancelled.state, cancelled.error.reason) == (pb.TURN_STATE_CANCELLED, "CANCELLED_BY_CALLER")
        assert await cancel(client, second.turn_id) == cancelled
        assert (await second.end()).turn == cancelled  # at once: the first one still runs
        shown = await get(client, second.turn_id)
        assert shown.turn == cancelled
        assert not shown.HasField("reply")
        events = await client.follow(second.turn_id)
        assert [event.WhichOneof("event") for event in events] == ["started", "finished"]
        again = await say(client, "two", thread_id=first.thread_id, request_id="r2")
        assert (again.attached, again.turn_id) == (True, second.turn_id)
        assert (await get(client, third.turn_id)).turn.state == pb.TURN_STATE_ACCEPTED
        gate.open()
        assert (await third.end()).turn.state == pb.TURN_STATE_COMPLETED
        assert await history(client, first.thread_id) == ["one", "a", "three", "C"]
        assert len(agent.requests) == 2


async def test_a_turn_that_ends_badly_does_not_stop_the_line() -> None:
    gates = [Gate(), Gate()]
    failed = AgentFailed(TurnReason.PROVIDER_CONFIG)
    agent = ScriptedAgent([gates[0], failed], ["half", gates[1], DONE], ["C", DONE])
    async with served(agent) as client:
        first = await say(client, "one")
        second = await say(client, "two", thread_id=first.thread_id, on_busy=QUEUE)
        third = await say(client, "three", thread_id=first.thread_id, on_busy=QUEUE)
        gates[0].open()
        assert (await first.end()).turn.error.reason == "PROVIDER_CONFIG"
        await gates[1].reached.wait()
        await cancel(client, second.turn_id)
        assert (await second.end()).turn.error.reason == "CANCELLED_BY_CALLER"
        assert (await third.end()).turn.state == pb.TURN_STATE_COMPLETED
        assert await history(client, first.thread_id) == ["one", "two", "half…", "three", "C"]


async def test_an_interrupting_message_takes_the_place_of_all_before_it() -> None:
    gate, never = Gate(), Gate()
    agent = ScriptedAgent(["half", gate, " whole", DONE], ["D", never, DONE], ["E", DONE])
    async with served(agent) as client:
        first = await say(client, "one", on_busy=INTERRUPT)  # a new thread: nothing to end
        await gate.reached.wait()
        waiting = [await say(client, text, thread_id=first.thread_id, on_busy=QUEUE) for text in ("two", "three")]
        last = await say(client, "now", thread_id=first.thread_id, on_busy=INTERRUPT, request_id="i")
        interrupted = await first.events()
        finished = interrupted[-1].finished
        assert (finished.turn.state, finished.turn.error.reason) == (pb.TURN_STATE_CANCELLED, "INTERRUPTED")
        assert text_of(interrupted) == finished.reply.content[0].text == "half"
        assert finished.reply.partial
        for said in waiting:
            finished = await said.end()
            assert (finished.turn.state, finished.turn.error.reason) == (pb.TURN_STATE_CANCELLED, "INTERRUPTED")
            assert not finished.HasField("reply")
        await never.reached.wait()
        again = await say(client, "now", thread_id=first.thread_id, on_busy=INTERRUPT, request_id="i")
        assert (again.attached, again.turn_id) == (True, last.turn_id)  # a repeat does not interrupt itself
        assert (await get(client, last.turn_id)).turn.state == pb.TURN_STATE_RUNNING
        never.open()
        assert (await last.end()).turn.state == pb.TURN_STATE_COMPLETED
        assert await history(client, first.thread_id) == ["one", "half…", "now", "D"]
        free = await say(client, "after", thread_id=first.thread_id, on_busy=INTERRUPT)
        assert (await free.end()).turn.state == pb.TURN_STATE_COMPLETED


async def test_a_full_line_can_be_interrupted() -> None:
    gate = Gate()
    async with served(ScriptedAgent([gate, DONE])) as client:
        first = await say(client, "one")
        waiting = [await say(client, "w", thread_id=first.thread_id, on_busy=QUEUE) for _ in range(WAITING)]
        last = await say(client, "now", thread_id=first.thread_id, on_busy=INTERRUPT)
        assert (await last.end()).turn.state == pb.TURN_STATE_COMPLETED
        assert {(await said.end()).turn.error.reason for said in (first, *waiting)} == {"INTERRUPTED"}
        assert await history(client, first.thread_id) == ["one", "now", "All right."]


async def test_many_at_once_never_run_side_by_side() -> None:
    async with served(ScriptedAgent()) as client:
        thread_id = (await client.chat("begin"))[0].event.started.thread_id
        policies = [QUEUE, INTERRUPT, pb.BUSY_POLICY_REJECT] * 6
        outcomes = await asyncio.gather(
            *(
                client.chat(f"m{number}", thread_id=thread_id, on_busy=policy)
                for number, policy in enumerate(policies)
            ),
            return_exceptions=True,
        )
        ended = 0
        for outcome in outcomes:
            if isinstance(outcome, grpc.aio.AioRpcError):
                assert reason(outcome) in {"TURN_IN_PROGRESS", "QUEUE_FULL"}
            else:
                assert not isinstance(outcome, BaseException)
                ended += outcome[-1].event.HasField("finished")
        assert ended >= 1
        request = threads_api.ListMessagesRequest(user_id="ada", thread_id=thread_id, page_size=200)
        lines = (await client.threads.ListMessages(request)).messages
        # Question, answer, question: an interrupted turn may lack its answer, and none has two.
        turns = [line.turn_id for line in lines]
        assert turns == sorted(turns, key=turns.index)
        assert all(turns.count(turn) <= 2 for turn in turns)
        pairs = pairwise(line.role for line in lines)
        assert all(before == pb.ROLE_USER for before, role in pairs if role == pb.ROLE_ASSISTANT)


@pytest.mark.parametrize("policy", [4, 99, -1])
async def test_a_number_that_is_no_policy_is_refused(policy: int) -> None:
    async with served(ScriptedAgent()) as client:
        error = await refused(client, on_busy=policy)
        assert (error.code(), reason(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
