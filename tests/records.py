"""Threads, turns and lines as a store keeps them, for tests that write them by hand."""

from datetime import UTC, datetime

from adapters.system import Ids
from core.model.agent import Domain
from core.model.message import Role, TextPart
from core.model.thread import Thread, ThreadState
from core.model.turn import Turn, TurnState, Usage
from core.ports.threads import NewMessage
from core.ports.turns import RequestKey

IDS = Ids()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def a_thread(user: str = "ada", **changes: object) -> Thread:
    """A new thread."""
    values: dict[str, object] = {
        "id": IDS.new(),
        "user_id": user,
        "domain": Domain.CAREER,
        "agent_id": "career-v1",
        "title": "",
        "state": ThreadState.ACTIVE,
        "metadata": {},
        "last_message_at": NOW,
        "created_at": NOW,
        "message_count": 0,
    }
    return Thread(**{**values, **changes})  # type: ignore[arg-type]


def a_turn(of: Thread, **changes: object) -> Turn:
    """A turn that has begun to run."""
    values: dict[str, object] = {
        "id": IDS.new(),
        "thread_id": of.id,
        "user_id": of.user_id,
        "agent_id": of.agent_id,
        "state": TurnState.RUNNING,
        "attempt": 1,
        "epoch": 1,
        "last_position": 1,
        "usage": Usage(),
        "reason": None,
        "model": "script-1",
        "provider": "scripted",
        "accepted_at": NOW,
    }
    return Turn(**{**values, **changes})  # type: ignore[arg-type]


def a_line(of: Turn, text: str = "Hello", role: Role = Role.USER, **changes: object) -> NewMessage:
    """A line of the transcript."""
    values: dict[str, object] = {
        "id": IDS.new(),
        "turn_id": of.id,
        "role": role,
        "content": (TextPart(text),),
        "created_at": NOW,
    }
    return NewMessage(**{**values, **changes})  # type: ignore[arg-type]


def request(user: str = "ada", request_id: str = "", fingerprint: str = "f", caller: str = "local") -> RequestKey:
    """What a turn was asked for with."""
    return RequestKey(caller=caller, user_id=user, request_id=request_id, fingerprint=fingerprint)
