"""Rows to values and back: pure functions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from sqlalchemy import Row

from core.model.agent import AgentDefinition, Domain
from core.model.attachment import Detail, FilePart, ImagePart, Source, Unread
from core.model.erasure import Copy, Counts, Receipt
from core.model.events import (
    AttemptRestarted,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)
from core.model.goal import Goal
from core.model.ledger import LedgerKey, LedgerLine, Tally
from core.model.message import ContentPart, Message, RefusalPart, Role, TextPart, ToolExchange
from core.model.thread import ProviderState, Thread, ThreadState, Tombstone
from core.model.turn import Continuation, Turn, TurnReason, TurnState, Usage
from core.model.user import User
from core.ports.threads import NewMessage

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Writes compact JSON."""

AnyRow = Row[*tuple[Any, ...]]
Values = dict[str, Any]
"""The parameters of a statement: columns by their keys."""


def thread_of(row: AnyRow) -> Thread:
    """Reads a row of `assistant_threads`."""
    return Thread(
        id=row.id,
        user_id=row.user_id,
        domain=Domain(row.domain),
        agent_id=row.assistant_id,
        title=row.title,
        state=ThreadState.ACTIVE if row.is_active else ThreadState.INACTIVE,
        metadata=row.metadata,
        last_message_at=row.last_message_at,
        created_at=row.created_at,
        message_count=row.message_count,
    )


def thread_values(thread: Thread) -> Values:
    """Writes a new row of `assistant_threads`."""
    return {
        "id": thread.id,
        "user_id": thread.user_id,
        "assistant_id": thread.agent_id,
        "domain": thread.domain.value,
        "is_active": thread.state is ThreadState.ACTIVE,
        "metadata_": dict(thread.metadata),
        "last_message_at": thread.last_message_at,
        "created_at": thread.created_at,
        "title": thread.title,
        "message_count": thread.message_count,
    }


def provider_state_of(conversation_id: str | None, state: Mapping[str, Any] | None) -> ProviderState | None:
    """Reads the two columns that know of the provider's copy."""
    if state is None:
        return None
    return ProviderState(
        provider=state["provider"],
        conversation_id=conversation_id,
        response_id=state.get("response_id"),
        synced_to=state["synced_to"],
        begins_at=state.get("begins_at", 1),
    )


def provider_state_values(state: ProviderState) -> Values:
    """Writes them."""
    return {
        "thread_id": state.conversation_id,
        "provider_state": {
            "provider": state.provider,
            "response_id": state.response_id,
            "synced_to": state.synced_to,
            "begins_at": state.begins_at,
        },
    }


def tombstone_of(row: AnyRow) -> Tombstone:
    """Reads a row of `tombstones`."""
    return Tombstone(thread_id=row.thread_id, erasure_id=row.erasure_id, deleted_at=row.deleted_at)


def user_of(row: AnyRow) -> User:
    """Reads a row of `users`."""
    return User(id=row.id, created_at=row.created_at, held_since=row.held_since)


def receipt_of(row: AnyRow) -> Receipt:
    """Reads a row of `erasures`, with what is beside it."""
    return Receipt(
        id=row.id,
        user_hash=row.user_hash,
        requested_at=row.requested_at,
        finished_at=row.finished_at,
        held=bool(row.held),
        erased=Counts(**row.erased),
        copies_left=row.copies_left,
    )


def copy_of(row: AnyRow) -> Copy:
    """Reads a row of `copies`."""
    return Copy(provider=row.provider, ref=row.ref, thread_id=row.thread_id, tries=row.tries, reason=row.reason)


def turn_of(row: AnyRow) -> Turn:
    """Reads a row of `turns`."""
    return Turn(
        id=row.id,
        thread_id=row.thread_id,
        user_id=row.user_id,
        agent_id=row.agent_id,
        state=TurnState(row.state),
        attempt=row.attempt,
        epoch=row.epoch,
        last_position=row.last_position,
        usage=_usage_of(row),
        reason=TurnReason(reason) if (reason := row.reason) is not None else None,
        model=row.model,
        provider=row.provider,
        accepted_at=row.accepted_at,
        claimed_at=row.claimed_at,
        finished_at=row.finished_at,
        continuation=Continuation(*row.continuation) if row.continuation is not None else None,
    )


def turn_values(turn: Turn) -> Values:
    """Writes all that the core knows of a turn."""
    return {
        "id": turn.id,
        "thread_id": turn.thread_id,
        "user_id": turn.user_id,
        "agent_id": turn.agent_id,
        "accepted_at": turn.accepted_at,
        "continuation": continuation_values(turn.continuation),
        **claim_values(turn),
        **ending_values(turn),
    }


def continuation_values(continuation: Continuation | None) -> list[Any] | None:
    """Writes what another process could go on with."""
    return None if continuation is None else [continuation.handle, continuation.attempt, continuation.round]


def claim_values(turn: Turn) -> Values:
    """Writes what a claim or a release changes."""
    return {
        "state": turn.state.value,
        "epoch": turn.epoch,
        "attempt": turn.attempt,
        "model": turn.model,
        "provider": turn.provider,
        "claimed_at": turn.claimed_at,
    }


def ending_values(turn: Turn) -> Values:
    """Writes what an ending changes."""
    return {
        "state": turn.state.value,
        "attempt": turn.attempt,
        "epoch": turn.epoch,
        "last_position": turn.last_position,
        **usage_values(turn.usage),
        "reason": turn.reason.value if turn.reason else None,
        "finished_at": turn.finished_at,
    }


def _usage_of(row: AnyRow) -> Usage:
    return Usage(
        input_tokens=row.input_tokens,
        cached_input_tokens=row.cached_input_tokens,
        cache_write_tokens=row.cache_write_tokens,
        output_tokens=row.output_tokens,
        reasoning_tokens=row.reasoning_tokens,
    )


def usage_values(usage: Usage) -> Values:
    """Writes tokens, of a turn or of a line in the ledger."""
    return {
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": usage.cached_input_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
    }


def tally_of(row: AnyRow) -> Tally:
    """Reads the sums in a row of `usage`, or of several."""
    return Tally(turns=row.turns, unmetered_turns=row.unmetered_turns, usage=_usage_of(row))


def ledger_line_of(row: AnyRow) -> LedgerLine:
    """Reads a row of `usage`."""
    return LedgerLine(LedgerKey(row.user_id, row.day, row.agent_id, row.model), tally_of(row))


def ledger_values(line: LedgerLine) -> Values:
    """Writes a row of `usage`."""
    return {
        "user_id": line.key.user_id,
        "day": line.key.day,
        "agent_id": line.key.agent_id,
        "model": line.key.model,
        "turns": line.tally.turns,
        "unmetered_turns": line.tally.unmetered_turns,
        **usage_values(line.tally.usage),
    }


def message_of(row: AnyRow) -> Message:
    """Reads a row of `messages`."""
    tool = row.tool
    return Message(
        id=row.id,
        thread_id=row.thread_id,
        turn_id=row.turn_id,
        index=row.number,
        role=Role(row.role),
        content=tuple(map(_part_of, row.content)),
        partial=row.partial,
        created_at=row.created_at,
        tool=ToolExchange(**tool) if tool else None,
    )


def message_values(thread_id: str, number: int, message: NewMessage) -> Values:
    """Writes a new row of `messages`."""
    return {
        "id": message.id,
        "thread_id": thread_id,
        "turn_id": message.turn_id,
        "number": number,
        "role": message.role.value,
        "content": [_part_values(part) for part in message.content],
        "partial": message.partial,
        "tool": dataclasses.asdict(message.tool) if message.tool else None,
        "created_at": message.created_at,
    }


def waiting_of(row: AnyRow) -> NewMessage:
    """Reads the message in a row of `turns` that waits."""
    message_id, content = row.waiting
    return NewMessage(
        id=message_id,
        turn_id=row.id,
        role=Role.USER,
        content=tuple(map(_part_of, content)),
        created_at=row.accepted_at,
    )


def waiting_values(message: NewMessage) -> list[Any]:
    """Writes it. What else is to be known of it stands in its turn's row."""
    return [message.id, [_part_values(part) for part in message.content]]


def _part_of(values: list[Any]) -> ContentPart:
    match values:
        case ["text", text]:
            return TextPart(text)
        case ["refusal", text]:
            return RefusalPart(text)
        case ["image", source, mime_type, detail]:
            return ImagePart(_source_of(source), mime_type, Detail(detail))
        case ["file", source, mime_type, filename]:
            return FilePart(_source_of(source), filename, mime_type)
        case _:
            raise ValueError(f"unknown kind of content: {values[:1]!r}")


def _part_values(part: ContentPart) -> list[Any]:
    """Of bytes no more than their number: they stand in `attachments`."""
    match part:
        case TextPart(text):
            return ["text", text]
        case RefusalPart(text):
            return ["refusal", text]
        case ImagePart(source, mime_type, detail):
            return ["image", _source_values(source), mime_type, detail.value]
        case FilePart(source, filename, mime_type):
            return ["file", _source_values(source), mime_type, filename]
        case _:
            assert_never(part)


def _source_of(value: str | int) -> Source:
    return Unread(value) if isinstance(value, int) else value


def _source_values(source: Source) -> str | int:
    match source:
        case bytes():
            return len(source)
        case Unread(size):
            return size
        case _:
            return source


def definition_of(stored: Mapping[str, Any]) -> AgentDefinition:
    """Reads a stored agent version."""
    return AgentDefinition(**{**stored, "domain": Domain(stored["domain"]), "tools": tuple(stored["tools"])})


def definition_values(definition: AgentDefinition) -> dict[str, Any]:
    """Writes an agent version so that equal versions are equal JSON."""
    return {**dataclasses.asdict(definition), "domain": definition.domain.value, "tools": list(definition.tools)}


def goal_of(row: AnyRow) -> Goal:
    """Reads a row of `goals`."""
    return Goal(
        id=row.id,
        user_id=row.user_id,
        domain=Domain(row.domain),
        text=row.text,
        commitment=row.commitment,
        due=row.due,
        created_at=row.created_at,
    )


def goal_values(goal: Goal, key: str) -> Values:
    """Writes a new row of `goals`."""
    return {
        "id": goal.id,
        "user_id": goal.user_id,
        "domain": goal.domain.value,
        "text": goal.text,
        "commitment": goal.commitment,
        "due": goal.due,
        "key": key,
        "created_at": goal.created_at,
    }


def dump_events(events: Sequence[TurnEvent]) -> str:
    """Writes events as compact JSON. What an ended turn and its reply are stands in their own rows."""
    match events:
        case [TextDelta(text, refusal=False)]:  # nearly every row of a running turn, in a fraction of the time
            return f'[["t",{encode(text)}]]'
    return encode([_event_values(event) for event in events])


def load_events(stored: Sequence[str], finished: TurnFinished | None) -> list[TurnEvent]:
    """Reads the events of rows, in their order. `finished` stands for the last one of a turn that has ended."""
    rows = json.loads(f"[{','.join(stored)}]")
    return [_event_of(values, finished) for row in rows for values in row]


def _event_values(event: TurnEvent) -> list[Any]:
    match event:
        case TextDelta(text, refusal=False):
            return ["t", text]
        case TextDelta(text):
            return ["r", text]
        case TurnStarted(turn_id, thread_id, agent_id, traceparent):
            return ["s", turn_id, thread_id, agent_id, *filter(None, [traceparent])]
        case ToolCalled(call_id, name, arguments_json):
            return ["c", call_id, name, arguments_json]
        case ToolAnswered(call_id, output, is_error):
            return ["a", call_id, output, is_error]
        case AttemptRestarted(attempt, reason):
            return ["x", attempt, reason]
        case TurnFinished():
            return ["f"]
        case _:
            assert_never(event)


def _event_of(values: list[Any], finished: TurnFinished | None) -> TurnEvent:
    match values:
        case ["t", text]:
            return TextDelta(text)
        case ["r", text]:
            return TextDelta(text, refusal=True)
        case ["s", turn_id, thread_id, agent_id, *traceparent]:
            return TurnStarted(turn_id, thread_id, agent_id, *traceparent)
        case ["c", call_id, name, arguments_json]:
            return ToolCalled(call_id, name, arguments_json)
        case ["a", call_id, output, is_error]:
            return ToolAnswered(call_id, output, is_error)
        case ["x", attempt, reason]:
            return AttemptRestarted(attempt, reason)
        case ["f"] if finished is not None:
            return finished
        case _:
            raise ValueError(f"unknown kind of event: {values[:1]!r}")
