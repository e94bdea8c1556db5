"""What operators are told, from the domain to protobuf and back: pure functions."""

from typing import Any

from core.model.agent import AgentDefinition
from core.model.errors import InvalidField
from core.model.thread import UNSYNCED, ProviderState
from core.use_cases.end_turn import Ended
from core.use_cases.oversee import ThreadFacts, TurnFacts
from core.use_cases.publish_agents import Publication
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api


def to_thread_facts(facts: ThreadFacts) -> api.ThreadFacts:
    """Writes a thread, without its title and metadata."""
    thread = facts.thread
    return api.ThreadFacts(
        thread_id=thread.id,
        user_id=thread.user_id,
        domain=mapping.DOMAINS[thread.domain],
        state=mapping.THREAD_STATES[thread.state],
        agent_id=thread.agent_id,
        message_count=thread.message_count,
        created_at=mapping.to_time(thread.created_at),
        last_message_at=mapping.to_time(thread.last_message_at),
        copy=None if facts.copy is None else _to_copy(facts.copy, thread.message_count),
        unfinished_turns=map(to_turn_facts, facts.unfinished),
    )


def _to_copy(copy: ProviderState, lines: int) -> api.CopyFacts:
    return api.CopyFacts(
        provider=copy.provider,
        mode="conversation" if copy.conversation_id is not None else "response_chain",
        ref=copy.conversation_id or copy.response_id or "",
        doubted=copy.synced_to == UNSYNCED,
        lines_behind=lines - max(copy.synced_to, 0),
    )


def to_turn_facts(facts: TurnFacts) -> api.TurnFacts:
    """Writes a turn that has not ended."""
    turn, holder = facts.turn, facts.holder
    return api.TurnFacts(
        turn_id=turn.id,
        thread_id=turn.thread_id,
        user_id=turn.user_id,
        agent_id=turn.agent_id,
        state=mapping.TURN_STATES[turn.state],
        attempt=turn.attempt,
        epoch=turn.epoch,
        owner=holder.owner,
        owner_alive=holder.alive,
        lease_until=None if holder.until is None else mapping.to_time(holder.until),
        accepted_at=mapping.to_time(turn.accepted_at),
        claimed_at=None if turn.claimed_at is None else mapping.to_time(turn.claimed_at),
        age_seconds=round(facts.age, 3),
        budget_used_seconds=round(facts.budget_used, 3),
        budget_seconds=facts.budget,
        stuck=facts.stuck.value if facts.stuck else "",
    )


def to_settled(ended: Ended) -> api.SettledTurn:
    """Writes how a turn ended."""
    turn = ended.turn
    return api.SettledTurn(
        turn_id=turn.id,
        thread_id=turn.thread_id,
        state=mapping.TURN_STATES[turn.state],
        reason=turn.reason.value if turn.reason else "",
        already=ended.already,
        has_reply=ended.reply is not None,
    )


def to_definition(definition: AgentDefinition) -> api.AgentDefinition:
    """Writes an agent version."""
    values: dict[str, Any] = {
        field.name: getattr(definition, field.name) for field in api.AgentDefinition.DESCRIPTOR.fields
    }
    return api.AgentDefinition(**{**values, "domain": mapping.DOMAINS[definition.domain]})


def definition_of(definition: api.AgentDefinition) -> AgentDefinition:
    """Reads an agent version. Raises InvalidField."""
    if not definition.slug or definition.version < 1:
        raise InvalidField("definitions", "must each have a slug and a version")
    domain = mapping.domain_of(definition.domain)
    if domain is None:
        raise InvalidField("definitions", "must each have a domain")
    values: dict[str, Any] = {
        field.name: getattr(definition, field.name) for field in definition.DESCRIPTOR.fields
    }
    return AgentDefinition(**{**values, "domain": domain, "tools": tuple(definition.tools)})


def to_publication(publication: Publication) -> api.Publication:
    """Writes how a definition stands to the record."""
    other = publication.compared_with
    return api.Publication(
        agent_id=publication.definition.id,
        outcome=publication.outcome.value,
        compared_with="" if other is None else other.id,
        fields=publication.fields,
    )
