"""Claiming a turn: the right to work on it, and all that is needed to begin, or to begin again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from core.model.agent import AgentDefinition
from core.model.errors import LeaseLost, ThreadNotFound, TurnNotFound
from core.model.events import (
    AttemptRestarted,
    LogEntry,
    Round,
    TextDelta,
    ToolAnswered,
    ToolCalled,
    TurnEvent,
    place,
    rounds_of,
)
from core.model.message import Message
from core.model.thread import UNSYNCED, ProviderState, Thread
from core.model.turn import Turn, TurnReason, TurnState
from core.ports.agent import Resumption
from core.ports.store import Transaction
from core.ports.system import Ids
from core.ports.turns import LogAppend
from core.use_cases.end_turn import Ended, Ending, end_turn

MAX_ATTEMPTS = 3
"""Fresh starts of a reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedTurn:
    """A turn that this process has claimed, with all that it needs to run.

    `log` is what is committed of it. `rounds` are the tool rounds on record that are kept; `resume` is the round
    behind them, if the provider is still at it. `budget_left` are the seconds that the turn may still take.
    """

    turn: Turn
    thread: Thread
    message: Message
    definition: AgentDefinition
    state: ProviderState | None
    log: Sequence[LogEntry]
    rounds: tuple[Round, ...] = ()
    resume: Resumption | None = None
    budget_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimant:
    """A process that claims turns, and what decides whether a turn may begin again.

    `is_idempotent` tells of a tool whether its call may be repeated; `restart` says that a reply whose text was
    cut off begins again; `budget` are the seconds that a turn may take from its first claim on; `served_by` gives
    the model and the provider.
    """

    owner: str
    budget: float
    restart: bool
    is_idempotent: Callable[[AgentDefinition, str], bool]
    served_by: Callable[[AgentDefinition], tuple[str, str]]
    definition: Callable[[Transaction, str], AgentDefinition]


class Why(Enum):
    """Why a turn may be claimed."""

    WAITING = "waiting"
    """It waits for a process."""
    ORPHANED = "orphaned"
    """The claimant itself holds it and does not work on it."""
    ABANDONED = "abandoned"
    """The lease of its holder has run out."""


def claim_turn(
    tx: Transaction, ids: Ids, turn_id: str, claimant: Claimant, why: Why, *, has_place: bool
) -> ClaimedTurn | Ended | None:
    """Claims a turn that waits for a process, or whose process is gone; ends it where it can't begin again.

    None where that is no longer so, or where the turn would have to run and there is no place.
    """
    turn = tx.turns.lock(turn_id)
    if turn is None or not is_free(tx, turn, claimant.owner, why):
        return None
    now = tx.now()
    definition = claimant.definition(tx, turn.agent_id)
    log = tx.log.read(turn_id)
    events = [entry.event for entry in log]
    model, provider = claimant.served_by(definition)
    resume = resumption(turn, events, provider)
    attempt = turn.attempt
    elapsed = max(0.0, (now - (turn.claimed_at or now)).total_seconds())
    if turn.epoch:
        hindrance = None if resume else why_not_again(events, attempt, claimant, definition)
        if hindrance is None and elapsed >= claimant.budget:
            hindrance = TurnReason.INTERRUPTED if resume and resume.text else TurnReason.BUDGET_EXCEEDED
        if hindrance is not None:
            return end_turn(tx, ids, turn_id, Ending(reason=hindrance))
        if resume is None:
            attempt += 1
    if not has_place:
        return None
    claimed = replace(
        turn,
        state=TurnState.RUNNING,
        epoch=turn.epoch + 1,
        attempt=attempt,
        model=model,
        provider=provider,
        claimed_at=turn.claimed_at or now,
    )
    waiting = tx.turns.waiting_message(turn_id)
    tx.turns.save_claim(claimed, claimant.owner)
    if waiting is not None:
        (message,) = tx.messages.append(turn.thread_id, [replace(waiting, created_at=now)])
    else:
        message = _required(tx.messages.question_of(turn_id))
    if resume is None and (again := restarting(events, attempt, TurnReason.INTERRUPTED)):
        appended = tx.log.append([LogAppend(turn_id, claimed.epoch, claimed.last_position, again)])
        assert turn_id in appended.accepted  # it is locked
        log = [*log, *place(again, claimed.last_position)]
        claimed = replace(claimed, last_position=log[-1].position)
    thread = tx.threads.find(turn.thread_id)
    if thread is None:
        raise ThreadNotFound
    state = tx.threads.provider_state(turn.thread_id)
    if state is not None and turn.epoch and resume is None:
        state = replace(state, synced_to=UNSYNCED)  # an earlier attempt may have left anything there
    return ClaimedTurn(
        turn=claimed,
        thread=thread,
        message=message,
        definition=definition,
        state=state,
        log=log,
        rounds=kept_rounds(events),
        resume=resume,
        budget_left=claimant.budget - elapsed,
    )


def release_turn(tx: Transaction, ids: Ids, turn: Turn, claimant: Claimant) -> Ended | None:
    """Gives up a claim: the turn waits for another process where it can begin again, else it ends INTERRUPTED.

    None where it waits, or where it was no longer ours.
    """
    current = tx.turns.lock(turn.id)
    if current is None or current.epoch != turn.epoch or current.state.is_terminal:
        return None
    events = [entry.event for entry in tx.log.read(turn.id)]
    definition = claimant.definition(tx, current.agent_id)
    _, provider = claimant.served_by(definition)
    if resumption(current, events, provider) is None:
        hindrance = why_not_again(events, current.attempt, claimant, definition)
        if hindrance is not None:
            return end_turn(tx, ids, turn.id, Ending(reason=hindrance))
    tx.turns.save_claim(replace(current, state=TurnState.ACCEPTED, epoch=current.epoch + 1), "")
    return None


def resumption(turn: Turn, events: Sequence[TurnEvent], provider: str) -> Resumption | None:
    """The round that the provider goes on with by itself, if that is where the log of the turn stands."""
    kept = kept_rounds(events)
    continuation = turn.continuation
    if continuation is None or turn.provider != provider:
        return None
    if (continuation.attempt, continuation.round) != (turn.attempt, len(kept)):
        return None  # the log has gone on since
    if any(done.open_calls for done in kept):
        return None
    rounds = rounds_of(events)
    return Resumption(continuation.handle, rounds[-1].text if len(rounds) > len(kept) else "")


def why_not_again(
    events: Sequence[TurnEvent], attempt: int, claimant: Claimant, definition: AgentDefinition
) -> TurnReason | None:
    """Why a reply that was cut off can't begin again; None if it can.

    An effect that may have happened, and that a repeat would double, is never risked. Text that a reader may
    have seen is only taken back where that is configured.
    """

    def doubles(call: ToolCalled) -> bool:
        return not claimant.is_idempotent(definition, call.name)

    answered = {event.call_id for event in events if isinstance(event, ToolAnswered)}
    calls = [event for event in events if isinstance(event, ToolCalled)]
    if any(doubles(call) for call in calls if call.call_id not in answered):
        return TurnReason.TOOL_OUTCOME_UNKNOWN
    spoken = any(done.text for done in rounds_of(events))
    if attempt >= MAX_ATTEMPTS or any(map(doubles, calls)) or (spoken and not claimant.restart):
        return TurnReason.INTERRUPTED
    return None


def kept_rounds(events: Sequence[TurnEvent]) -> tuple[Round, ...]:
    """The rounds whose tools were called: a new attempt goes on behind them, with the answers on record."""
    return tuple(done for done in rounds_of(events) if done.calls)


def restarting(events: Sequence[TurnEvent], attempt: int, reason: TurnReason) -> tuple[TurnEvent, ...]:
    """What begins another attempt in a log: nothing as long as there is nothing in it to drop.

    The rounds that are kept follow the restart in the same change: an effect that is on record, or has to be
    repeated, is never forgotten.
    """
    if not any(isinstance(event, TextDelta | ToolCalled) for event in events):
        return ()
    result: list[TurnEvent] = [AttemptRestarted(attempt, reason.value)]
    for done in kept_rounds(events):
        result += [*done.said, *done.calls, *done.answers]
    return tuple(result)


def require_claim(tx: Transaction, turn_id: str, epoch: int) -> None:
    """Locks a turn for a write of whoever has claimed it in this epoch. Raises LeaseLost where that is over."""
    turn = tx.turns.lock(turn_id)
    if turn is None or turn.epoch != epoch or turn.state is not TurnState.RUNNING:
        raise LeaseLost


def is_free(tx: Transaction, turn: Turn, owner: str, why: Why) -> bool:
    """Whether that is still a reason to claim a locked turn."""
    if turn.state.is_terminal:
        return False
    if turn.state is TurnState.ACCEPTED:
        return tx.turns.unfinished(turn.thread_id)[0].id == turn.id
    holder = tx.turns.holder(turn.id)
    match why:
        case Why.WAITING:
            return False
        case Why.ORPHANED:
            return holder.owner == owner
        case Why.ABANDONED:
            return holder.owner != owner and not holder.alive


def _required(message: Message | None) -> Message:
    if message is None:
        raise TurnNotFound
    return message
