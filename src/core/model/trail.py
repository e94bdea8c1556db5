"""What the work at hand is for: the ids that its log lines carry, from the call on to all that comes of it."""

from contextvars import ContextVar
from dataclasses import dataclass, replace

from core.model.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """Ids and names that are known to be real: none is taken from a request as it came. Empty: not known.

    `request_id` is the call's, `caller` who made it, `traceparent` the W3C trace that it belongs to.
    """

    request_id: str = ""
    caller: str = ""
    traceparent: str = ""
    turn_id: str = ""
    thread_id: str = ""


_NOWHERE = Trail()
_TRAIL: ContextVar[Trail] = ContextVar("trail", default=_NOWHERE)


def trail() -> Trail:
    """Where the running task is."""
    return _TRAIL.get()


def begin_trail(trail: Trail) -> None:
    """Sets what the running task, and what it starts from here on, is for."""
    _TRAIL.set(trail)


def on_turn(turn: Turn) -> None:
    """Says that the running task is about this turn from here on."""
    _TRAIL.set(replace(_TRAIL.get(), turn_id=turn.id, thread_id=turn.thread_id))
