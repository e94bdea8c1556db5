"""The synchronous client against a channel whose other side the test plays, call by call."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc_testing
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from entrypoints.client import CoachClient, ConnectionLost, Event, Patience, Reply, Resuming, ServiceError
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as agents_api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import thread_service_pb2 as threads_api

AGENTS = agents_api.DESCRIPTOR.services_by_name["AgentService"]
THREADS = threads_api.DESCRIPTOR.services_by_name["ThreadService"]
AT_ONCE = Patience(seconds=60, first_wait=0, longest_wait=0)
SECONDS = 10.0


class OtherSide:
    """Plays the service."""

    def __init__(self) -> None:
        self.channel = grpc_testing.channel([AGENTS, THREADS], grpc_testing.strict_real_time())

    def stream(self, name: str) -> tuple[Any, Any]:
        """The next call of a streaming method: its request, and how to answer it."""
        _, request, call = self.channel.take_unary_stream(AGENTS.methods_by_name[name])
        return request, call

    def unary(self, name: str) -> tuple[Any, Any]:
        """The next call of a unary method."""
        service = AGENTS if name in AGENTS.methods_by_name else THREADS
        _, request, call = self.channel.take_unary_unary(service.methods_by_name[name])
        return request, call


class Reading:
    """Iterates a reply in another thread, as a program would in its own."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self._seen: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Event:
        """The next event, as soon as there is one."""
        seen = self._seen.get(timeout=SECONDS)
        if isinstance(seen, BaseException):
            raise seen
        assert seen is not None
        return seen

    def is_at_its_end(self) -> bool:
        """Whether nothing follows."""
        return self._seen.get(timeout=SECONDS) is None

    def _read(self) -> None:
        try:
            for event in self.reply:
                self._seen.put(event)
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self._seen.put(error)
        else:
            self._seen.put(None)


@pytest.fixture
def other() -> OtherSide:
    return OtherSide()


@pytest.fixture
def client(other: OtherSide) -> CoachClient:
    return CoachClient(other.channel, "ada", patience=AT_ONCE)


def event(position: int, **kind: Any) -> pb.TurnEvent:
    return pb.TurnEvent(position=position, **kind)


STARTED = event(1, started=pb.TurnStarted(turn_id="turn", thread_id="thread", agent_id="career-v1"))


def text(position: int, words: str) -> pb.TurnEvent:
    return event(position, text_delta=pb.TextDelta(text=words))


def finished(position: int, state: pb.TurnState.ValueType = pb.TURN_STATE_COMPLETED) -> pb.TurnEvent:
    turn = pb.Turn(id="turn", thread_id="thread", state=state, last_position=position)
    return event(position, finished=pb.TurnFinished(turn=turn))


def chatted(*events: pb.TurnEvent) -> Iterator[Any]:
    return (agents_api.ChatResponse(event=one) for one in events)


def followed(*events: pb.TurnEvent) -> Iterator[Any]:
    return (agents_api.FollowTurnResponse(event=one) for one in events)


def end(call: Any, code: grpc.StatusCode = grpc.StatusCode.OK, message: str = "", *details: Any) -> None:
    """Ends a streaming call."""
    call.terminate(*_ending(code, message, details))


def answer(call: Any, response: Any, code: grpc.StatusCode = grpc.StatusCode.OK, *details: Any) -> None:
    """Answers a unary call."""
    call.terminate(response, *_ending(code, "", details))


def _ending(code: grpc.StatusCode, message: str, details: tuple[Any, ...]) -> tuple[Any, grpc.StatusCode, str]:
    if not details:
        return (), code, message
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status).trailing_metadata, code, message


def error_info(reason: str, **facts: str) -> Any:
    return error_details_pb2.ErrorInfo(reason=reason, domain="agents.vidacoach", metadata=facts)


class Asking:
    """A unary call in another thread."""

    def __init__(self, client: CoachClient, call: Callable[[CoachClient], Any]) -> None:
        self._outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                self._outcome.put(call(client))
            except ServiceError as error:
                self._outcome.put(error)

        threading.Thread(target=ask, daemon=True).start()

    def outcome(self) -> Any:
        """What it returned or raised."""
        return self._outcome.get(timeout=SECONDS)


def test_a_message_is_sent_and_its_reply_read_piece_by_piece(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello", domain=pb.DOMAIN_CAREER))
    request, call = other.stream("Chat")
    assert (request.user_id, request.thread_id, request.domain) == ("ada", "", pb.DOMAIN_CAREER)
    assert [part.text for part in request.content] == ["Hello"]
    assert request.request_id
    for response in chatted(STARTED):
        call.send_response(response)
    assert reading.next() == STARTED.started
    assert (reading.reply.turn_id, reading.reply.thread_id) == ("turn", "thread")
    for response in chatted(text(4, "One"), text(8, " two")):
        call.send_response(response)
        assert isinstance(reading.next(), pb.TextDelta)
    assert reading.reply.position == 8
    for response in chatted(finished(9)):
        call.send_response(response)
    seen = reading.next()
    assert isinstance(seen, pb.TurnFinished)
    assert seen.turn.state == pb.TURN_STATE_COMPLETED
    assert reading.is_at_its_end()


def test_every_message_has_a_request_id_of_its_own(other: OtherSide, client: CoachClient) -> None:
    ids = set()
    for words in ("Hello", "Hello"):
        Reading(client.say(words))
        request, call = other.stream("Chat")
        ids.add(request.request_id)
        end(call, grpc.StatusCode.INVALID_ARGUMENT)
    assert len(ids) == 2


def test_a_lost_stream_goes_on_exactly_behind_the_last_position(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    words = []
    for response in chatted(STARTED, text(3, "On"), text(5, "é\N{PARTY POPPER}")):
        call.send_response(response)
        seen = reading.next()
        words.append(seen.text if isinstance(seen, pb.TextDelta) else "")
    end(call, grpc.StatusCode.UNAVAILABLE, "Socket closed")
    lost = reading.next()
    assert isinstance(lost, Resuming)
    assert lost.cause.message == "Socket closed"
    request, call = other.stream("FollowTurn")
    assert (request.user_id, request.turn_id, request.after_position) == ("ada", "turn", 5)
    for response in followed(text(7, "!?")):
        call.send_response(response)
        seen = reading.next()
        words.append(seen.text if isinstance(seen, pb.TextDelta) else "")
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    request, call = other.stream("FollowTurn")
    assert request.after_position == 7
    for response in followed(finished(8)):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnFinished)
    assert reading.is_at_its_end()
    assert "".join(words) == "Oné\N{PARTY POPPER}!?"


def test_a_stream_that_ends_before_its_turn_is_resumed(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    for response in chatted(STARTED):
        call.send_response(response)
    end(call)
    assert isinstance(reading.next(), pb.TurnStarted)
    assert isinstance(reading.next(), Resuming)
    request, call = other.stream("FollowTurn")
    assert request.after_position == 1
    for response in followed(finished(2)):
        call.send_response(response)
    end(call)
    assert isinstance(reading.next(), pb.TurnFinished)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL])
def test_what_a_proxy_makes_of_a_dead_server_is_a_lost_connection(
    other: OtherSide, client: CoachClient, code: grpc.StatusCode
) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    end(call, code, "Stream removed")
    lost = reading.next()
    assert isinstance(lost, Resuming)
    assert lost.cause.code is code
    _, call = other.stream("FollowTurn")
    end(call, code, "Something went wrong in the service.", error_info("INTERNAL"))
    with pytest.raises(ServiceError) as last_word:
        reading.next()
    assert last_word.value.reason == "INTERNAL"
    assert not isinstance(last_word.value, ConnectionLost)


def test_an_acceptance_that_failed_is_repeated_with_the_same_request_id(
    other: OtherSide, client: CoachClient
) -> None:
    reading = Reading(client.say("Hello", thread_id="thread"))
    first, call = other.stream("Chat")
    retry = error_details_pb2.RetryInfo()
    end(call, grpc.StatusCode.UNAVAILABLE, "The service is shutting down.", error_info("DRAINING"), retry)
    lost = reading.next()
    assert isinstance(lost, Resuming)
    assert lost.cause.reason == "DRAINING"
    second, call = other.stream("Chat")
    assert second == first
    for response in chatted(STARTED, finished(2)):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    assert isinstance(reading.next(), pb.TurnFinished)


def test_the_service_is_given_the_time_that_it_asks_for() -> None:
    patience = Patience(first_wait=0.1, longest_wait=5.0)
    assert patience.wait(0, at_least=3.0) == 3.0
    assert 0.05 <= patience.wait(0, 0.0) <= 0.1
    assert 0.4 <= patience.wait(3, 0.0) <= 0.8
    assert 2.5 <= patience.wait(1_000, 0.0) <= 5.0
    assert len({patience.wait(3, 0.0) for _ in range(20)}) > 1


def test_patience_ends_after_a_minute_without_an_event_and_begins_anew_with_each(other: OtherSide) -> None:
    now = 0.0
    client = CoachClient(other.channel, "ada", patience=AT_ONCE, clock=lambda: now)
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    _, call = other.stream("FollowTurn")
    now = 59.0
    for response in followed(text(2, "O")):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TextDelta)
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    _, call = other.stream("FollowTurn")
    now = 118.0
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    _, call = other.stream("FollowTurn")
    now = 119.1
    end(call, grpc.StatusCode.UNAVAILABLE, "Connection refused")
    with pytest.raises(ConnectionLost) as lost:
        reading.next()
    assert lost.value.turn_id == "turn"
    assert "Connection refused" in str(lost.value)


def test_a_call_that_was_held_open_is_no_lost_connection(other: OtherSide) -> None:
    now = 0.0
    client = CoachClient(other.channel, "ada", patience=AT_ONCE, clock=lambda: now)
    reading = Reading(client.say("Hello", on_busy=pb.BUSY_POLICY_QUEUE))
    request, call = other.stream("Chat")
    assert request.on_busy == pb.BUSY_POLICY_QUEUE
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    for _ in range(5):  # a turn may wait its turn for many minutes, without an event
        now += 240.0
        end(call, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        waiting = reading.next()
        assert isinstance(waiting, Resuming)
        assert waiting.cause.code is grpc.StatusCode.DEADLINE_EXCEEDED
        request, call = other.stream("FollowTurn")
        assert (request.turn_id, request.after_position) == ("turn", 1)
    now += 59.9
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    _, call = other.stream("FollowTurn")
    now += 0.2
    end(call, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(ConnectionLost):
        reading.next()


def test_a_message_that_never_arrived_can_be_sent_again_with_its_request_id(other: OtherSide) -> None:
    client = CoachClient(other.channel, "ada", patience=Patience(seconds=0, first_wait=0.1))
    reading = Reading(client.say("Hello"))
    first, call = other.stream("Chat")
    end(call, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(ConnectionLost) as lost:
        reading.next()
    assert (lost.value.turn_id, lost.value.request_id) == ("", first.request_id)
    Reading(client.say("Hello", request_id=lost.value.request_id))
    second, call = other.stream("Chat")
    end(call, grpc.StatusCode.INVALID_ARGUMENT)
    assert second == first


def test_no_other_status_is_retried(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    end(call, grpc.StatusCode.ABORTED, "The thread has a turn.", error_info("TURN_IN_PROGRESS", turn_id="other"))
    with pytest.raises(ServiceError) as refused:
        reading.next()
    assert refused.value.code is grpc.StatusCode.ABORTED
    assert (refused.value.reason, refused.value.facts) == ("TURN_IN_PROGRESS", {"turn_id": "other"})
    assert str(refused.value) == "The thread has a turn. [TURN_IN_PROGRESS]"


def test_a_status_says_which_field_is_wrong(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    violation = error_details_pb2.BadRequest.FieldViolation(field="domain", description="is not the thread's")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    end(call, grpc.StatusCode.INVALID_ARGUMENT, "A field is invalid.", error_info("INVALID_FIELD"), bad)
    with pytest.raises(ServiceError) as refused:
        reading.next()
    assert refused.value.violations == (("domain", "is not the thread's"),)
    assert str(refused.value) == "A field is invalid. domain: is not the thread's. [INVALID_FIELD]"


def test_a_status_without_details_and_one_with_senseless_details_are_readable(
    other: OtherSide, client: CoachClient
) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    end(call, grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    with pytest.raises(ServiceError, match=r"Method not found! \[UNIMPLEMENTED\]"):
        reading.next()
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    lie = status_pb2.Status(code=5, message="other").SerializeToString()
    call.terminate((("grpc-status-details-bin", lie),), grpc.StatusCode.PERMISSION_DENIED, "Oh.")
    with pytest.raises(ServiceError, match=r"Oh\. \[PERMISSION_DENIED\]"):
        reading.next()


def test_an_unforeseen_failure_names_the_request_in_the_services_log(
    other: OtherSide, client: CoachClient
) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    known_as = error_details_pb2.RequestInfo(request_id="0192")
    end(call, grpc.StatusCode.INTERNAL, "Something went wrong.", error_info("INTERNAL"), known_as)
    with pytest.raises(ServiceError, match="0192"):
        reading.next()


def test_cancelling_ends_the_turn_and_the_stream_is_read_to_its_end(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    asking = Asking(client, lambda _: reading.reply.cancel())
    request, cancel = other.unary("CancelTurn")
    assert (request.user_id, request.turn_id) == ("ada", "turn")
    answer(cancel, agents_api.CancelTurnResponse())
    assert asking.outcome() is None
    for response in chatted(finished(2, pb.TURN_STATE_CANCELLED)):
        call.send_response(response)
    seen = reading.next()
    assert isinstance(seen, pb.TurnFinished)
    assert seen.turn.state == pb.TURN_STATE_CANCELLED


def test_cancelling_before_the_turn_is_known_ends_it_once_it_is(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    reading.reply.cancel()
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    request, cancel = other.unary("CancelTurn")
    assert request.turn_id == "turn"
    answer(cancel, agents_api.CancelTurnResponse())
    for response in chatted(finished(2, pb.TURN_STATE_CANCELLED)):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnFinished)


def test_cancelling_gives_up_a_message_that_can_not_be_delivered(other: OtherSide) -> None:
    client = CoachClient(other.channel, "ada", patience=Patience(seconds=1_000, first_wait=500, longest_wait=500))
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    reading.reply.cancel()
    _, call = other.stream("Chat")  # the wait is over at once
    end(call, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(ConnectionLost):
        reading.next()


def test_a_turn_that_is_being_cancelled_is_asked_for_no_faster(other: OtherSide) -> None:
    client = CoachClient(other.channel, "ada", patience=Patience(first_wait=0.5, longest_wait=0.5))
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    reading.reply.cancel()
    for response in chatted(STARTED):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnStarted)
    _, cancel = other.unary("CancelTurn")
    answer(cancel, agents_api.CancelTurnResponse())
    end(call, grpc.StatusCode.UNAVAILABLE)
    lost = reading.next()
    begun = time.monotonic()
    assert isinstance(lost, Resuming)
    other.stream("FollowTurn")
    assert time.monotonic() - begun >= lost.wait / 2


def test_closing_ends_the_wait_for_the_next_try(other: OtherSide) -> None:
    client = CoachClient(other.channel, "ada", patience=Patience(seconds=1_000, first_wait=500, longest_wait=500))
    reading = Reading(client.say("Hello"))
    _, call = other.stream("Chat")
    end(call, grpc.StatusCode.UNAVAILABLE)
    assert isinstance(reading.next(), Resuming)
    reading.reply.close()
    assert reading.is_at_its_end()


def test_leaving_closes_the_call_and_nothing_else(other: OtherSide, client: CoachClient) -> None:
    with client.say("Hello") as reply:
        reading = Reading(reply)
        _, call = other.stream("Chat")
        for response in chatted(STARTED):
            call.send_response(response)
        assert isinstance(reading.next(), pb.TurnStarted)
    call.cancelled()
    assert reading.is_at_its_end()


def test_following_reads_a_turn_of_before(other: OtherSide, client: CoachClient) -> None:
    reading = Reading(client.follow("turn", 7))
    request, call = other.stream("FollowTurn")
    assert request.after_position == 7
    for response in followed(finished(8)):
        call.send_response(response)
    assert isinstance(reading.next(), pb.TurnFinished)


def test_a_unary_call_is_repeated_while_the_service_is_away(other: OtherSide, client: CoachClient) -> None:
    asking = Asking(client, lambda client: client.thread("thread"))
    _, call = other.unary("GetThread")
    answer(call, threads_api.GetThreadResponse(), grpc.StatusCode.UNAVAILABLE)
    request, call = other.unary("GetThread")
    assert (request.user_id, request.thread_id) == ("ada", "thread")
    answer(call, threads_api.GetThreadResponse(thread=pb.Thread(id="thread")))
    assert asking.outcome() == pb.Thread(id="thread")


def test_a_unary_call_gives_up_when_its_deadline_leaves_no_time(other: OtherSide, client: CoachClient) -> None:
    asking = Asking(client, lambda client: client.thread("thread"))
    _, call = other.unary("GetThread")
    wait = error_details_pb2.RetryInfo()
    wait.retry_delay.FromSeconds(60)
    answer(call, threads_api.GetThreadResponse(), grpc.StatusCode.UNAVAILABLE, error_info("OVERLOADED"), wait)
    outcome = asking.outcome()
    assert isinstance(outcome, ServiceError)
    assert (outcome.reason, outcome.retry_after) == ("OVERLOADED", 60.0)


def test_messages_are_read_page_by_page(other: OtherSide, client: CoachClient) -> None:
    asking = Asking(client, lambda client: [message.id for message in client.messages("thread", 2)])
    request, call = other.unary("ListMessages")
    assert (request.page_size, request.page_token) == (2, "")
    page = [pb.Message(id="a"), pb.Message(id="b")]
    answer(call, threads_api.ListMessagesResponse(messages=page, next_page_token="more"))
    request, call = other.unary("ListMessages")
    assert request.page_token == "more"
    answer(call, threads_api.ListMessagesResponse(messages=[pb.Message(id="c")]))
    assert asking.outcome() == ["a", "b", "c"]
