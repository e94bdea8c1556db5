"""Rows to values and back: pure functions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from sqlalchemy import Column, RowMapping

from adapters.sql import tables as t
from core.model.agent import AgentDefinition, Domain
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
from core.model.message import ContentPart, Message, RefusalPart, Role, TextPart, ToolExchange
from core.model.thread import ProviderState, Thread, ThreadState
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.ports.threads import NewMessage

Values = dict[Column[Any], Any]


def thread_of(row: RowMapping) -> Thread:
    """Reads a row of `assistant_threads`."""
    c = t.threads.c
    return Thread(
        id=row[c.id],
        user_id=row[c.user_id],
        domain=Domain(row[c.domain]),
        agent_id=row[c.assistant_id],
        title=row[c.title],
        state=ThreadState.ACTIVE if row[c.is_active] else ThreadState.INACTIVE,
        metadata=row[c.metadata_],
        last_message_at=row[c.last_message_at],
        created_at=row[c.created_at],
        message_count=row[c.message_count],
    )


def thread_values(thread: Thread) -> Values:
    """Writes a new row of `assistant_threads`."""
    c = t.threads.c
    return {
        c.id: thread.id,
        c.user_id: thread.user_id,
        c.assistant_id: thread.agent_id,
        c.domain: thread.domain.value,
        c.is_active: thread.state is ThreadState.ACTIVE,
        c.metadata_: dict(thread.metadata),
        c.last_message_at: thread.last_message_at,
        c.created_at: thread.created_at,
        c.title: thread.title,
        c.message_count: thread.message_count,
    }


def provider_state_of(conversation_id: str | None, state: Mapping[str, Any] | None) -> ProviderState | None:
    """Reads the two columns that know of the provider's copy."""
    if state is None:
        return None
    return ProviderState(
        provider=state["provider"],
        conversation_id=conversation_id,
        synced_to=state["synced_to"],
        retired=tuple(state["retired"]),
    )


def provider_state_values(state: ProviderState) -> Values:
    """Writes them."""
    return {
        t.threads.c.thread_id: state.conversation_id,
        t.threads.c.provider_state: {
            "provider": state.provider,
            "synced_to": state.synced_to,
            "retired": list(state.retired),
        },
    }


def turn_of(row: RowMapping) -> Turn:
    """Reads a row of `turns`."""
    c = t.turns.c
    return Turn(
        id=row[c.id],
        thread_id=row[c.thread_id],
        user_id=row[c.user_id],
        agent_id=row[c.agent_id],
        state=TurnState(row[c.state]),
        attempt=row[c.attempt],
        epoch=row[c.epoch],
        last_position=row[c.last_position],
        usage=Usage(
            input_tokens=row[c.input_tokens],
            cached_input_tokens=row[c.cached_input_tokens],
            output_tokens=row[c.output_tokens],
            reasoning_tokens=row[c.reasoning_tokens],
        ),
        reason=TurnReason(reason) if (reason := row[c.reason]) is not None else None,
        model=row[c.model],
        provider=row[c.provider],
        accepted_at=row[c.accepted_at],
        finished_at=row[c.finished_at],
    )


def turn_values(turn: Turn) -> Values:
    """Writes all that the core knows of a turn."""
    c = t.turns.c
    return {
        c.id: turn.id,
        c.thread_id: turn.thread_id,
        c.user_id: turn.user_id,
        c.agent_id: turn.agent_id,
        c.attempt: turn.attempt,
        c.model: turn.model,
        c.provider: turn.provider,
        c.accepted_at: turn.accepted_at,
        **ending_values(turn),
    }


def ending_values(turn: Turn) -> Values:
    """Writes what an ending changes."""
    c = t.turns.c
    return {
        c.state: turn.state.value,
        c.epoch: turn.epoch,
        c.last_position: turn.last_position,
        c.input_tokens: turn.usage.input_tokens,
        c.cached_input_tokens: turn.usage.cached_input_tokens,
        c.output_tokens: turn.usage.output_tokens,
        c.reasoning_tokens: turn.usage.reasoning_tokens,
        c.reason: turn.reason.value if turn.reason else None,
        c.finished_at: turn.finished_at,
    }


def message_of(row: RowMapping) -> Message:
    """Reads a row of `messages`."""
    c = t.messages.c
    tool = row[c.tool]
    return Message(
        id=row[c.id],
        thread_id=row[c.thread_id],
        turn_id=row[c.turn_id],
        index=row[c.number],
        role=Role(row[c.role]),
        content=tuple(_part_of(kind, text) for kind, text in row[c.content]),
        partial=row[c.partial],
        created_at=row[c.created_at],
        tool=ToolExchange(**tool) if tool else None,
    )


def message_values(thread_id: str, number: int, message: NewMessage) -> Values:
    """Writes a new row of `messages`."""
    c = t.messages.c
    return {
        c.id: message.id,
        c.thread_id: thread_id,
        c.turn_id: message.turn_id,
        c.number: number,
        c.role: message.role.value,
        c.content: [_part_values(part) for part in message.content],
        c.partial: message.partial,
        c.tool: dataclasses.asdict(message.tool) if message.tool else None,
        c.created_at: message.created_at,
    }


def _part_of(kind: str, text: str) -> ContentPart:
    match kind:
        case "text":
            return TextPart(text)
        case "refusal":
            return RefusalPart(text)
        case _:
            raise ValueError(f"unknown kind of content: {kind!r}")


def _part_values(part: ContentPart) -> list[str]:
    match part:
        case TextPart(text):
            return ["text", text]
        case RefusalPart(text):
            return ["refusal", text]
        case _:
            assert_never(part)


def definition_of(stored: Mapping[str, Any]) -> AgentDefinition:
    """Reads a stored agent version."""
    return AgentDefinition(**{**stored, "domain": Domain(stored["domain"]), "tools": tuple(stored["tools"])})


def definition_values(definition: AgentDefinition) -> dict[str, Any]:
    """Writes an agent version so that equal versions are equal JSON."""
    return {**dataclasses.asdict(definition), "domain": definition.domain.value, "tools": list(definition.tools)}


def goal_of(row: RowMapping) -> Goal:
    """Reads a row of `goals`."""
    c = t.goals.c
    return Goal(
        id=row[c.id],
        user_id=row[c.user_id],
        domain=Domain(row[c.domain]),
        text=row[c.text],
        commitment=row[c.commitment],
        due=row[c.due],
        created_at=row[c.created_at],
    )


def dump_events(events: Sequence[TurnEvent]) -> str:
    """Writes events as compact JSON. What an ended turn and its reply are stands in their own rows."""
    return json.dumps([_event_values(event) for event in events], ensure_ascii=False, separators=(",", ":"))


def load_events(stored: str, finished: TurnFinished | None) -> list[TurnEvent]:
    """Reads events. `finished` stands for the last one of a turn that has ended."""
    return [_event_of(values, finished) for values in json.loads(stored)]


def _event_values(event: TurnEvent) -> list[Any]:
    match event:
        case TextDelta(text, refusal=False):
            return ["t", text]
        case TextDelta(text):
            return ["r", text]
        case TurnStarted(turn_id, thread_id, agent_id):
            return ["s", turn_id, thread_id, agent_id]
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
        case ["s", turn_id, thread_id, agent_id]:
            return TurnStarted(turn_id, thread_id, agent_id)
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
