"""What is written for callers and operators: every field has what it is named after, and nothing is left out.

No two values are alike, so none can stand in another's place.
"""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message as Written

from core.model import events as ev
from core.model.agent import AgentDefinition, Domain
from core.model.attachment import Detail, FilePart, ImagePart
from core.model.erasure import Copy, Counts, Receipt
from core.model.goal import Goal
from core.model.ledger import Dimension, LedgerKey, LedgerLine, QuotaStanding, Tally
from core.model.message import Message, RefusalPart, Role, TextPart, ToolExchange
from core.model.thread import UNSYNCED, ProviderState, Thread, ThreadState
from core.model.turn import BusyPolicy, Turn, TurnReason, TurnState, Usage
from core.model.user import User
from core.ports.threads import NewMessage
from core.ports.turns import Holder
from core.use_cases.end_turn import Ended
from core.use_cases.export_user import AttachmentPiece, ExportedTurn
from core.use_cases.oversee import Stuck, ThreadFacts, TurnFacts
from core.use_cases.publish_agents import Outcome, Publication
from core.use_cases.read_erasures import Erasures
from core.use_cases.report_usage import ReportLine, ReportQuery
from entrypoints.grpc_api import facts, mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.services.admin import to_erasures


def at(second: int) -> datetime:
    """A moment."""
    return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)


def stamp(second: int) -> str:
    """The same moment as it is written."""
    return f"2026-01-01T00:00:{second:02}Z"


def shown(written: Written) -> dict[str, Any]:
    """The fields that are set; integers of 64 bits are strings there."""
    return MessageToDict(written, preserving_proto_field_name=True)


def whole(written: Written) -> dict[str, Any]:
    """The same of a message of whose fields none may be unset."""
    found = shown(written)
    assert set(found) == {field.name for field in written.DESCRIPTOR.fields}
    return found


USAGE = Usage(input_tokens=1, cached_input_tokens=2, cache_write_tokens=3, output_tokens=4, reasoning_tokens=5)
USAGE_SHOWN = {
    "input_tokens": "1",
    "cached_input_tokens": "2",
    "cache_write_tokens": "3",
    "output_tokens": "4",
    "reasoning_tokens": "5",
}
TALLY = Tally(turns=6, unmetered_turns=7, usage=USAGE)
TURN = Turn(
    id="turn",
    thread_id="thread",
    user_id="user",
    agent_id="agent",
    state=TurnState.FAILED,
    attempt=2,
    epoch=3,
    last_position=4,
    usage=USAGE,
    reason=TurnReason.PROVIDER_TIMEOUT,
    model="model",
    provider="provider",
    accepted_at=at(1),
    claimed_at=at(2),
    finished_at=at(3),
)
TURN_SHOWN = {
    "id": "turn",
    "thread_id": "thread",
    "agent_id": "agent",
    "state": "TURN_STATE_FAILED",
    "attempt": 2,
    "last_position": "4",
    "usage": USAGE_SHOWN,
    "error": {
        "reason": "PROVIDER_TIMEOUT",
        "message": "The provider did not answer in time.",
        "retryable": True,
    },
    "model": "model",
    "provider": "provider",
    "accepted_at": stamp(1),
    "finished_at": stamp(3),
}
THREAD = Thread(
    id="thread",
    user_id="user",
    domain=Domain.HEALTH,
    agent_id="agent",
    title="title",
    state=ThreadState.INACTIVE,
    metadata={"key": "value"},
    last_message_at=at(2),
    created_at=at(1),
    message_count=9,
)
MESSAGE = Message(
    id="message",
    thread_id="thread",
    turn_id="turn",
    index=1,
    role=Role.ASSISTANT,
    content=(TextPart("text"), RefusalPart("refusal")),
    partial=True,
    created_at=at(1),
)
MESSAGE_SHOWN = {
    "id": "message",
    "thread_id": "thread",
    "turn_id": "turn",
    "role": "ROLE_ASSISTANT",
    "content": [{"text": "text"}, {"refusal": "refusal"}],
    "partial": True,
    "created_at": stamp(1),
}
DEFINITION = AgentDefinition(
    slug="slug",
    version=2,
    domain=Domain.RELATIONSHIP,
    name="name",
    instructions="instructions",
    model="model",
    effort="high",
    verbosity="low",
    max_output_tokens=3,
    tools=("tool", "other"),
)


def test_a_turn() -> None:
    assert whole(mapping.to_turn(TURN)) == TURN_SHOWN
    under_way = shown(mapping.to_turn(replace(TURN, reason=None, finished_at=None)))
    assert TURN_SHOWN.keys() - under_way.keys() == {"error", "finished_at"}
    declined = mapping.to_turn(replace(TURN, reason=TurnReason.CONTENT_FILTERED))
    assert (declined.error.reason, declined.error.retryable) == ("CONTENT_FILTERED", False)


def test_a_thread() -> None:
    assert whole(mapping.to_thread(THREAD)) == {
        "id": "thread",
        "user_id": "user",
        "domain": "DOMAIN_HEALTH",
        "agent_id": "agent",
        "title": "title",
        "state": "THREAD_STATE_INACTIVE",
        "metadata": {"key": "value"},
        "last_message_at": stamp(2),
        "created_at": stamp(1),
        "message_count": "9",
    }


def test_a_message_and_its_parts() -> None:
    assert whole(mapping.to_message(MESSAGE)) == MESSAGE_SHOWN
    image = ImagePart(source="https://example.org/x", mime_type="image/png", detail=Detail.LOW)
    file = FilePart(source=b"data", filename="cv.pdf", mime_type="application/pdf")
    parts = mapping.to_message(replace(MESSAGE, content=(image, file))).content
    assert [shown(part) for part in parts] == [
        {"image": {"url": "https://example.org/x", "mime_type": "image/png", "detail": "low"}},
        {"file": {"data": "ZGF0YQ==", "filename": "cv.pdf", "mime_type": "application/pdf"}},
    ]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (ev.TextDelta("text"), {"text_delta": {"text": "text"}}),
        (
            ev.TurnStarted("turn", "thread", "agent"),
            {"started": {"turn_id": "turn", "thread_id": "thread", "agent_id": "agent"}},
        ),
        (
            ev.ToolCalled("call", "name", "{}"),
            {"tool_call": {"call_id": "call", "name": "name", "arguments_json": "{}"}},
        ),
        (
            ev.ToolAnswered("call", "output", is_error=True),
            {"tool_result": {"call_id": "call", "output": "output", "is_error": True}},
        ),
        (
            ev.ToolAnswered("call", "output", is_error=False),
            {"tool_result": {"call_id": "call", "output": "output"}},
        ),
        (
            ev.AttemptRestarted(2, "PROVIDER_STALLED"),
            {"attempt_restarted": {"attempt": 2, "reason": "PROVIDER_STALLED"}},
        ),
        (ev.TurnFinished(TURN, MESSAGE), {"finished": {"turn": TURN_SHOWN, "reply": MESSAGE_SHOWN}}),
        (ev.TurnFinished(TURN, None), {"finished": {"turn": TURN_SHOWN}}),
    ],
    ids=[
        "text",
        "started",
        "tool call",
        "tool failed",
        "tool answered",
        "restarted",
        "finished",
        "finished without a reply",
    ],
)
def test_an_event(event: ev.TurnEvent, expected: dict[str, Any]) -> None:
    assert shown(mapping.to_event(ev.LogEntry(7, event))) == {"position": "7", **expected}


def test_an_agent() -> None:
    assert whole(mapping.to_agent(DEFINITION, "in use", "provider")) == {
        "id": DEFINITION.id,
        "domain": "DOMAIN_RELATIONSHIP",
        "version": 2,
        "name": "name",
        "model": "in use",
        "tools": ["tool", "other"],
        "provider": "provider",
    }


def test_usage_and_quotas() -> None:
    line = LedgerLine(LedgerKey("user", date(2026, 2, 3), "agent", "model"), TALLY)
    assert whole(mapping.to_daily_usage(line)) == {
        "day": "2026-02-03",
        "agent_id": "agent",
        "model": "model",
        "turns": "6",
        "unmetered_turns": "7",
        "usage": USAGE_SHOWN,
    }
    assert whole(mapping.to_quota(QuotaStanding("quota", 10, 3), at(1))) == {
        "name": "quota",
        "limit": "10",
        "used": "3",
        "remaining": "7",
        "resets_at": stamp(1),
    }


def test_a_report_is_read_as_it_was_written() -> None:
    line = ReportLine(("day", "user"), TALLY, Decimal("0.0000001"), 8)
    written = mapping.to_report_line(line)
    assert whole(written) == {
        "group": ["day", "user"],
        "turns": "6",
        "unmetered_turns": "7",
        "usage": USAGE_SHOWN,
        "cost": "0.0000001",
        "unpriced_tokens": "8",
    }
    assert mapping.report_line_of(written) == line
    query = ReportQuery(
        by=(Dimension.MODEL, Dimension.AGENT),
        user_id="user",
        agent_id="agent",
        since=date(2026, 1, 2),
        until=date(2026, 3, 4),
    )
    asked = mapping.to_report_request(query)
    assert whole(asked) == {
        "by": ["model", "agent"],
        "user_id": "user",
        "agent_id": "agent",
        "since_day": "2026-01-02",
        "until_day": "2026-03-04",
    }
    assert mapping.report_query(asked) == query
    assert mapping.report_query(mapping.to_report_request(ReportQuery())) == ReportQuery()


def test_what_is_exported() -> None:
    goal = Goal(
        id="goal",
        user_id="user",
        domain=Domain.CAREER,
        text="text",
        commitment="commitment",
        due=date(2026, 4, 5),
        created_at=at(1),
    )
    tool = ToolExchange("call", "name", "{}", "output", is_error=True)
    waiting = NewMessage(id="m", turn_id="turn", role=Role.USER, content=(TextPart("later"),), created_at=at(1))
    pieces: dict[str, tuple[Any, dict[str, Any]]] = {
        "user": (User(id="user", created_at=at(1)), {"id": "user", "created_at": stamp(1)}),
        "goal": (
            goal,
            {
                "id": "goal",
                "domain": "DOMAIN_CAREER",
                "text": "text",
                "commitment": "commitment",
                "due": "2026-04-05",
                "created_at": stamp(1),
            },
        ),
        "thread": (THREAD, shown(mapping.to_thread(THREAD))),
        "turn": (ExportedTurn(TURN, waiting), {"turn": TURN_SHOWN, "waiting": [{"text": "later"}]}),
        "message": (
            replace(MESSAGE, tool=tool),
            {
                "message": MESSAGE_SHOWN,
                "tool_call": {"call_id": "call", "name": "name", "arguments_json": "{}"},
                "tool_result": {"call_id": "call", "output": "output", "is_error": True},
            },
        ),
        "attachment": (
            AttachmentPiece(turn_id="turn", number=1, offset=2, size=3, data=b"data"),
            {"turn_id": "turn", "number": 1, "offset": "2", "size": "3", "data": "ZGF0YQ=="},
        ),
        "usage": (
            LedgerLine(LedgerKey("user", date(2026, 2, 3), "agent", "model"), TALLY),
            {
                "day": "2026-02-03",
                "agent_id": "agent",
                "model": "model",
                "turns": "6",
                "unmetered_turns": "7",
                "usage": USAGE_SHOWN,
            },
        ),
    }
    for name, (piece, expected) in pieces.items():
        written = mapping.to_exported(piece)
        assert shown(written) == {name: expected}
        whole(getattr(written, name))
    assert set(pieces) == {field.name for field in written.DESCRIPTOR.fields}
    assert "due" not in shown(mapping.to_exported(replace(goal, due=None)))["goal"]
    assert shown(mapping.to_exported(ExportedTurn(TURN, None)))["turn"] == {"turn": TURN_SHOWN}
    assert shown(mapping.to_exported(MESSAGE))["message"] == {"message": MESSAGE_SHOWN}


def test_how_erasures_stand() -> None:
    receipt = Receipt(
        id="receipt",
        user_hash="hash",
        requested_at=at(1),
        finished_at=at(2),
        erased=Counts(threads=1, turns=2, messages=3, attachments=4, goals=5),
        copies_left=6,
    )
    copy = Copy(provider="provider", ref="ref", thread_id="thread", tries=7, reason="reason")
    assert whole(to_erasures(Erasures([receipt], 8, [copy], {"other": 9}))) == {
        "receipts": [
            {
                "id": "receipt",
                "user_hash": "hash",
                "state": "ERASURE_STATE_AT_PROVIDER",
                "requested_at": stamp(1),
                "finished_at": stamp(2),
                "erased": {"threads": "1", "turns": "2", "messages": "3", "attachments": "4", "goals": "5"},
                "copies_left": "6",
            }
        ],
        "copies_left": "8",
        "copies": [{"provider": "provider", "ref": "ref", "thread_id": "thread", "tries": 7, "reason": "reason"}],
        "waiting": {"other": "9"},
    }
    under_way = mapping.to_receipt(replace(receipt, finished_at=None))
    assert (under_way.state, under_way.HasField("finished_at")) == (1, False)


def test_what_operators_are_told_of_threads_and_turns() -> None:
    turn = TurnFacts(
        turn=TURN,
        holder=Holder(owner="owner", alive=True, until=at(4)),
        age=5.0004,
        budget_used=6.0004,
        budget=7.5,
        stuck=Stuck.OVER_TIME,
    )
    turn_shown = {
        "turn_id": "turn",
        "thread_id": "thread",
        "user_id": "user",
        "agent_id": "agent",
        "state": "TURN_STATE_FAILED",
        "attempt": 2,
        "epoch": 3,
        "owner": "owner",
        "owner_alive": True,
        "lease_until": stamp(4),
        "accepted_at": stamp(1),
        "claimed_at": stamp(2),
        "age_seconds": 5.0,
        "budget_used_seconds": 6.0,
        "budget_seconds": 7.5,
        "stuck": "OVER_TIME",
    }
    assert whole(facts.to_turn_facts(turn)) == turn_shown
    unclaimed = replace(turn, turn=replace(TURN, claimed_at=None), stuck=None)
    assert turn_shown.keys() - shown(facts.to_turn_facts(unclaimed)).keys() == {"claimed_at", "stuck"}
    copy = ProviderState(provider="provider", conversation_id="conv", synced_to=7)
    assert whole(facts.to_thread_facts(ThreadFacts(thread=THREAD, copy=copy, unfinished=[turn]))) == {
        "thread_id": "thread",
        "user_id": "user",
        "domain": "DOMAIN_HEALTH",
        "state": "THREAD_STATE_INACTIVE",
        "agent_id": "agent",
        "message_count": 9,
        "created_at": stamp(1),
        "last_message_at": stamp(2),
        "copy": {"provider": "provider", "mode": "conversation", "ref": "conv", "lines_behind": 2},
        "unfinished_turns": [turn_shown],
    }


@pytest.mark.parametrize(
    ("copy", "expected"),
    [
        (ProviderState(provider="p", response_id="resp", synced_to=9), ("response_chain", "resp", False, 0)),
        (
            ProviderState(provider="p", conversation_id="conv", synced_to=UNSYNCED),
            ("conversation", "conv", True, 9),
        ),
    ],
    ids=["in step", "doubted"],
)
def test_what_operators_are_told_of_a_copy(copy: ProviderState, expected: tuple[object, ...]) -> None:
    told = facts.to_thread_facts(ThreadFacts(thread=THREAD, copy=copy, unfinished=[])).copy
    assert (told.mode, told.ref, told.doubted, told.lines_behind) == expected


def test_how_a_turn_was_settled() -> None:
    assert whole(facts.to_settled(Ended(TURN, MESSAGE, already=True))) == {
        "turn_id": "turn",
        "thread_id": "thread",
        "state": "TURN_STATE_FAILED",
        "reason": "PROVIDER_TIMEOUT",
        "already": True,
        "has_reply": True,
    }


def test_a_definition_is_read_as_it_was_written() -> None:
    written = facts.to_definition(DEFINITION)
    whole(written)
    assert facts.definition_of(written) == DEFINITION
    other = replace(DEFINITION, version=1)
    change = Publication(definition=DEFINITION, outcome=Outcome.NEW, compared_with=other, fields=("name",))
    assert whole(facts.to_publication(change)) == {
        "agent_id": DEFINITION.id,
        "outcome": "NEW",
        "compared_with": other.id,
        "fields": ["name"],
    }


def test_a_message_to_a_coach() -> None:
    request = api.ChatRequest(
        user_id="user",
        thread_id="thread",
        domain=pb.DOMAIN_CAREER,
        content=[
            pb.ContentPart(text="text"),
            pb.ContentPart(image=pb.ImagePart(url="https://example.org/x", mime_type="image/png", detail="high")),
            pb.ContentPart(image=pb.ImagePart(data=b"image")),
            pb.ContentPart(file=pb.FilePart(data=b"file", filename="cv.pdf", mime_type="application/pdf")),
        ],
        request_id="request",
        on_busy=pb.BUSY_POLICY_INTERRUPT,
        metadata={"key": "value"},
    )
    whole(request)
    message = mapping.incoming_message(request, "caller")
    assert (message.caller, message.user_id, message.thread_id) == ("caller", "user", "thread")
    assert (message.request_id, message.metadata) == ("request", {"key": "value"})
    assert (message.domain, message.on_busy) == (Domain.CAREER, BusyPolicy.INTERRUPT)
    assert message.content == (
        TextPart("text"),
        ImagePart(source="https://example.org/x", mime_type="image/png", detail=Detail.HIGH),
        ImagePart(source=b"image", mime_type="", detail=Detail.AUTO),
        FilePart(source=b"file", filename="cv.pdf", mime_type="application/pdf"),
    )
