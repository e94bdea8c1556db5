"""Domain to protobuf and back: pure functions."""

import dataclasses
import re
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any, assert_never

from google.protobuf.timestamp_pb2 import Timestamp

from core.model import events as ev
from core.model.agent import AgentDefinition, Domain
from core.model.attachment import Detail, FilePart, ImagePart, Source, Unread
from core.model.erasure import ErasureState, Receipt
from core.model.errors import InvalidField
from core.model.goal import Goal
from core.model.ledger import Dimension, LedgerLine, QuotaStanding, Tally
from core.model.message import ContentPart, Message, RefusalPart, Role, TextPart
from core.model.thread import Thread, ThreadState
from core.model.trail import trail
from core.model.turn import BusyPolicy, Turn, TurnState, Usage
from core.model.user import User
from core.use_cases.accept_message import IncomingMessage
from core.use_cases.export_user import AttachmentPiece, Exported, ExportedTurn
from core.use_cases.report_usage import ReportLine, ReportQuery
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as admin
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api

_MAX_ID = 64
_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")

DOMAINS = {
    Domain.CAREER: pb.DOMAIN_CAREER,
    Domain.HEALTH: pb.DOMAIN_HEALTH,
    Domain.RELATIONSHIP: pb.DOMAIN_RELATIONSHIP,
    Domain.GENERAL: pb.DOMAIN_GENERAL,
}
_DOMAINS_BACK = {number: domain for domain, number in DOMAINS.items()}

TURN_STATES = {
    TurnState.ACCEPTED: pb.TURN_STATE_ACCEPTED,
    TurnState.RUNNING: pb.TURN_STATE_RUNNING,
    TurnState.WAITING_FOR_CLIENT: pb.TURN_STATE_WAITING_FOR_CLIENT,
    TurnState.COMPLETED: pb.TURN_STATE_COMPLETED,
    TurnState.INCOMPLETE: pb.TURN_STATE_INCOMPLETE,
    TurnState.CANCELLED: pb.TURN_STATE_CANCELLED,
    TurnState.FAILED: pb.TURN_STATE_FAILED,
}
THREAD_STATES = {
    ThreadState.ACTIVE: pb.THREAD_STATE_ACTIVE,
    ThreadState.INACTIVE: pb.THREAD_STATE_INACTIVE,
}
_THREAD_STATES_BACK = {number: state for state, number in THREAD_STATES.items()}
ROLES = {
    Role.USER: pb.ROLE_USER,
    Role.ASSISTANT: pb.ROLE_ASSISTANT,
    Role.TOOL: pb.ROLE_TOOL,
}
ERASURE_STATES = {
    ErasureState.RUNNING: users_api.ERASURE_STATE_RUNNING,
    ErasureState.HELD: users_api.ERASURE_STATE_HELD,
    ErasureState.AT_PROVIDER: users_api.ERASURE_STATE_AT_PROVIDER,
    ErasureState.DONE: users_api.ERASURE_STATE_DONE,
}
BUSY_POLICIES = {
    pb.BUSY_POLICY_UNSPECIFIED: BusyPolicy.REJECT,
    pb.BUSY_POLICY_REJECT: BusyPolicy.REJECT,
    pb.BUSY_POLICY_QUEUE: BusyPolicy.QUEUE,
    pb.BUSY_POLICY_INTERRUPT: BusyPolicy.INTERRUPT,
}


def domain_of(number: int) -> Domain | None:
    """None if unset. Raises InvalidField for a number that is no domain."""
    if number == pb.DOMAIN_UNSPECIFIED:
        return None
    try:
        return _DOMAINS_BACK[pb.Domain.ValueType(number)]
    except KeyError as error:
        raise InvalidField("domain", "is not a known value") from error


def states_of(numbers: Sequence[int]) -> frozenset[ThreadState]:
    """ACTIVE if empty. Raises InvalidField for a number that is no state."""
    try:
        found = frozenset(_THREAD_STATES_BACK[pb.ThreadState.ValueType(number)] for number in numbers)
    except KeyError as error:
        raise InvalidField("states", "is not a known value") from error
    return found or frozenset({ThreadState.ACTIVE})


def id_of(value: str, field: str) -> str:
    """An id as it is. Raises InvalidField for one that is empty, too long or contains U+0000."""
    if not value:
        raise InvalidField(field, "is required")
    if len(value) > _MAX_ID:
        raise InvalidField(field, f"must have at most {_MAX_ID} characters")
    if "\0" in value:
        raise InvalidField(field, "must not contain U+0000")
    return value


def day_of(value: str, field: str) -> date | None:
    """None if empty. Raises InvalidField for what is no day."""
    if not value:
        return None
    if not _DAY.fullmatch(value):
        raise InvalidField(field, "must be YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise InvalidField(field, "is no day") from error


def incoming_message(request: api.ChatRequest | api.SendMessageRequest, caller: str) -> IncomingMessage:
    """Reads a message to a coach. Raises InvalidField."""
    if request.on_busy not in BUSY_POLICIES:
        raise InvalidField("on_busy", "is not a known value")
    return IncomingMessage(
        caller=caller,
        traceparent=trail().traceparent,
        user_id=request.user_id,
        thread_id=id_of(request.thread_id, "thread_id") if request.thread_id else "",
        domain=domain_of(request.domain),
        content=tuple(_part_of(number, part) for number, part in enumerate(request.content)),
        request_id=request.request_id,
        on_busy=BUSY_POLICIES[request.on_busy],
        metadata=dict(request.metadata),
    )


def _part_of(number: int, part: pb.ContentPart) -> ContentPart:
    match part.WhichOneof("part"):
        case "text":
            return TextPart(part.text)
        case "refusal":
            return RefusalPart(part.refusal)
        case "image":
            return ImagePart(
                source=_source_of(part.image, f"content[{number}].image"),
                mime_type=part.image.mime_type,
                detail=_detail_of(part.image.detail, f"content[{number}].image.detail"),
            )
        case "file":
            return FilePart(
                source=_source_of(part.file, f"content[{number}].file"),
                filename=part.file.filename,
                mime_type=part.file.mime_type,
            )
        case None:
            raise InvalidField(f"content[{number}]", "must have one part set")
        case kind:
            assert_never(kind)


def _source_of(part: pb.ImagePart | pb.FilePart, field: str) -> Source:
    match part.WhichOneof("source"):
        case "data":
            return part.data
        case "url":
            return part.url
        case None:
            raise InvalidField(field, "must have data or url set")
        case source:
            assert_never(source)


def _detail_of(value: str, field: str) -> Detail:
    try:
        return Detail(value or Detail.AUTO)
    except ValueError as error:
        raise InvalidField(field, "must be auto, low or high") from error


def to_agent(definition: AgentDefinition, model: str, provider: str) -> pb.Agent:
    """Writes an agent on offer."""
    return pb.Agent(
        id=definition.id,
        domain=DOMAINS[definition.domain],
        version=definition.version,
        name=definition.name,
        model=model,
        tools=definition.tools,
        provider=provider,
    )


def to_thread(thread: Thread) -> pb.Thread:
    """Writes a thread."""
    return pb.Thread(
        id=thread.id,
        user_id=thread.user_id,
        domain=DOMAINS[thread.domain],
        agent_id=thread.agent_id,
        title=thread.title,
        state=THREAD_STATES[thread.state],
        metadata=thread.metadata,
        last_message_at=to_time(thread.last_message_at),
        created_at=to_time(thread.created_at),
        message_count=thread.message_count,
    )


def to_message(message: Message) -> pb.Message:
    """Writes a line of the transcript."""
    return pb.Message(
        id=message.id,
        thread_id=message.thread_id,
        turn_id=message.turn_id,
        role=ROLES[message.role],
        content=map(_to_part, message.content),
        partial=message.partial,
        created_at=to_time(message.created_at),
    )


def _to_part(part: ContentPart) -> pb.ContentPart:
    match part:
        case TextPart(text):
            return pb.ContentPart(text=text)
        case RefusalPart(text):
            return pb.ContentPart(refusal=text)
        case ImagePart(source, mime_type, detail):
            return pb.ContentPart(
                image=pb.ImagePart(mime_type=mime_type, detail=detail.value, **_to_source(source))
            )
        case FilePart(source, filename, mime_type):
            return pb.ContentPart(file=pb.FilePart(mime_type=mime_type, filename=filename, **_to_source(source)))
        case _:
            assert_never(part)


def _to_source(source: Source) -> dict[str, Any]:
    assert not isinstance(source, Unread)  # whoever shows messages reads whole ones
    return {"data": source} if isinstance(source, bytes) else {"url": source}


def to_turn(turn: Turn) -> pb.Turn:
    """Writes a turn."""
    return pb.Turn(
        id=turn.id,
        thread_id=turn.thread_id,
        agent_id=turn.agent_id,
        state=TURN_STATES[turn.state],
        attempt=turn.attempt,
        last_position=turn.last_position,
        usage=_to_usage(turn.usage),
        error=pb.TurnError(reason=turn.reason.value, message=turn.reason.message, retryable=turn.reason.retryable)
        if turn.reason
        else None,
        model=turn.model,
        provider=turn.provider,
        accepted_at=to_time(turn.accepted_at),
        finished_at=to_time(turn.finished_at) if turn.finished_at else None,
    )


def to_event(entry: ev.LogEntry) -> pb.TurnEvent:
    """Writes an event with its position."""
    position = entry.position
    match entry.event:
        case ev.TextDelta(text):
            delta = pb.TurnEvent(position=position)
            delta.text_delta.text = text  # a message for itself takes twice the time
            return delta
        case ev.TurnStarted(turn_id, thread_id, agent_id):
            started = pb.TurnStarted(turn_id=turn_id, thread_id=thread_id, agent_id=agent_id)
            return pb.TurnEvent(position=position, started=started)
        case ev.ToolCalled(call_id, name, arguments_json):
            call = pb.ToolCall(call_id=call_id, name=name, arguments_json=arguments_json)
            return pb.TurnEvent(position=position, tool_call=call)
        case ev.ToolAnswered(call_id, output, is_error):
            result = pb.ToolResult(call_id=call_id, output=output, is_error=is_error)
            return pb.TurnEvent(position=position, tool_result=result)
        case ev.AttemptRestarted(attempt, reason):
            restarted = pb.AttemptRestarted(attempt=attempt, reason=reason)
            return pb.TurnEvent(position=position, attempt_restarted=restarted)
        case ev.TurnFinished(turn, reply):
            finished = pb.TurnFinished(turn=to_turn(turn), reply=to_message(reply) if reply else None)
            return pb.TurnEvent(position=position, finished=finished)
        case event:
            assert_never(event)


def to_daily_usage(line: LedgerLine) -> users_api.DailyUsage:
    """Writes a line of the ledger."""
    return users_api.DailyUsage(
        day=line.key.day.isoformat(),
        agent_id=line.key.agent_id,
        model=line.key.model,
        turns=line.tally.turns,
        unmetered_turns=line.tally.unmetered_turns,
        usage=_to_usage(line.tally.usage),
    )


def to_quota(quota: QuotaStanding, resets_at: datetime) -> users_api.Quota:
    """Writes how a user stands to a quota."""
    return users_api.Quota(
        name=quota.name,
        limit=quota.limit,
        used=quota.used,
        remaining=quota.remaining,
        resets_at=to_time(resets_at),
    )


def report_query(request: admin.ReportUsageRequest) -> ReportQuery:
    """Reads what is to be added up. Raises InvalidField."""
    try:
        by = tuple(map(Dimension, request.by))
    except ValueError as error:
        raise InvalidField("by", "must be user, agent, model or day") from error
    return ReportQuery(
        by=by,
        user_id=request.user_id,
        agent_id=request.agent_id,
        since=day_of(request.since_day, "since_day"),
        until=day_of(request.until_day, "until_day"),
    )


def to_report_request(query: ReportQuery) -> admin.ReportUsageRequest:
    """Writes what is to be added up."""
    return admin.ReportUsageRequest(
        by=[dimension.value for dimension in query.by],
        user_id=query.user_id,
        agent_id=query.agent_id,
        since_day=query.since.isoformat() if query.since else "",
        until_day=query.until.isoformat() if query.until else "",
    )


def to_report_line(line: ReportLine) -> admin.UsageReportLine:
    """Writes a line of the operators' report."""
    return admin.UsageReportLine(
        group=line.group,
        turns=line.tally.turns,
        unmetered_turns=line.tally.unmetered_turns,
        usage=_to_usage(line.tally.usage),
        cost=f"{line.cost:f}",
        unpriced_tokens=line.unpriced_tokens,
    )


def report_line_of(line: admin.UsageReportLine) -> ReportLine:
    """Reads a line of the operators' report."""
    usage = Usage(
        input_tokens=line.usage.input_tokens,
        cached_input_tokens=line.usage.cached_input_tokens,
        cache_write_tokens=line.usage.cache_write_tokens,
        output_tokens=line.usage.output_tokens,
        reasoning_tokens=line.usage.reasoning_tokens,
    )
    tally = Tally(turns=line.turns, unmetered_turns=line.unmetered_turns, usage=usage)
    return ReportLine(tuple(line.group), tally, Decimal(line.cost), line.unpriced_tokens)


def _to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        cache_write_tokens=usage.cache_write_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def to_exported(piece: Exported) -> users_api.ExportUserDataResponse:
    """Writes a piece of what is kept of a user."""
    match piece:
        case User():
            user = users_api.ExportedUser(id=piece.id, created_at=to_time(piece.created_at))
            return users_api.ExportUserDataResponse(user=user)
        case Goal():
            goal = users_api.ExportedGoal(
                id=piece.id,
                domain=DOMAINS[piece.domain],
                text=piece.text,
                commitment=piece.commitment,
                due=piece.due.isoformat() if piece.due else "",
                created_at=to_time(piece.created_at),
            )
            return users_api.ExportUserDataResponse(goal=goal)
        case Thread():
            return users_api.ExportUserDataResponse(thread=to_thread(piece))
        case ExportedTurn():
            waiting = map(_to_part, piece.waiting.content) if piece.waiting is not None else ()
            turn = users_api.ExportedTurn(turn=to_turn(piece.turn), waiting=waiting)
            return users_api.ExportUserDataResponse(turn=turn)
        case Message(tool=tool):
            message = users_api.ExportedMessage(message=to_message(piece))
            if tool is not None:
                message.tool_call.MergeFrom(
                    pb.ToolCall(call_id=tool.call_id, name=tool.name, arguments_json=tool.arguments_json)
                )
                message.tool_result.MergeFrom(
                    pb.ToolResult(call_id=tool.call_id, output=tool.output, is_error=tool.is_error)
                )
            return users_api.ExportUserDataResponse(message=message)
        case AttachmentPiece():
            attachment = users_api.AttachmentPiece(
                turn_id=piece.turn_id,
                number=piece.number,
                offset=piece.offset,
                size=piece.size,
                data=piece.data,
            )
            return users_api.ExportUserDataResponse(attachment=attachment)
        case LedgerLine():
            return users_api.ExportUserDataResponse(usage=to_daily_usage(piece))
        case _:
            assert_never(piece)


def to_receipt(receipt: Receipt) -> users_api.ErasureReceipt:
    """Writes a receipt."""
    return users_api.ErasureReceipt(
        id=receipt.id,
        user_hash=receipt.user_hash,
        state=ERASURE_STATES[receipt.state],
        requested_at=to_time(receipt.requested_at),
        finished_at=to_time(receipt.finished_at) if receipt.finished_at else None,
        erased=users_api.ErasedCounts(**dataclasses.asdict(receipt.erased)),
        copies_left=receipt.copies_left,
    )


def to_time(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
