"""One ending for all: completion, failure, cancellation and recovery are one change, run by whoever asks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.model.errors import LeaseLost, TurnNotFound
from core.model.events import TurnEvent, TurnFinished, attempt_of, extent, merged, reply_of
from core.model.ledger import line_of
from core.model.message import Message, ReplyPart, Role, TextPart
from core.model.thread import ProviderState
from core.model.turn import Turn, TurnReason, TurnState, Usage
from core.ports.store import Transaction
from core.ports.system import Ids
from core.ports.threads import NewMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a turn is to end.

    `reason` None means that the provider said the reply is complete. `cancelled` ends it CANCELLED whatever
    text there is. `copy` is the provider's copy of the transcript, this reply included, if it has one.
    `usage` is what the turn has cost, None: what is on record; `all_told` says that the provider has said all of
    it.
    """

    reason: TurnReason | None = None
    cancelled: bool = False
    usage: Usage | None = None
    all_told: bool = False
    copy: ProviderState | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A turn in its terminal state. `already` says that it had ended before.

    `next_id` is the turn that waits in its thread and can be claimed now.
    """

    turn: Turn
    reply: Message | None
    already: bool
    next_id: str | None = None


def end_turn(
    tx: Transaction,
    ids: Ids,
    turn_id: str,
    ending: Ending,
    *,
    epoch: int | None = None,
    tail: Sequence[TurnEvent] = (),
) -> Ended:
    """Ends a turn: the last events, the reply, the terminal state, the folded log and the ledger in one change.

    Terminal states are never left: a turn that has ended is returned as it is. `tail` are events of the owner
    that are not yet in the log; `epoch` is the owner's. Raises LeaseLost where that epoch is over, and
    TurnNotFound.
    """
    turn = tx.turns.lock(turn_id)
    if turn is None:
        raise TurnNotFound
    if turn.state.is_terminal:
        return Ended(turn, tx.messages.reply_of(turn_id), already=True)
    if epoch is not None and turn.epoch != epoch:
        raise LeaseLost
    now = tx.now()
    events = [*(entry.event for entry in tx.log.read(turn_id)), *tail]
    reply = reply_of(events)
    state, reason = _verdict(ending, reply.parts)
    ended = replace(
        turn,
        state=state,
        reason=reason,
        attempt=attempt_of(tail) or turn.attempt,
        epoch=turn.epoch + 1,
        last_position=turn.last_position + sum(map(extent, tail)) + 1,
        usage=turn.usage if ending.usage is None else ending.usage,
        finished_at=now,
    )
    lines = [
        NewMessage(
            id=ids.new(),
            turn_id=turn_id,
            role=Role.TOOL,
            content=(TextPart(exchange.output),),
            created_at=now,
            tool=exchange,
        )
        for exchange in reply.exchanges
    ]
    if reply.parts:
        lines.append(
            NewMessage(
                id=ids.new(),
                turn_id=turn_id,
                role=Role.ASSISTANT,
                content=reply.parts,
                created_at=now,
                partial=state is not TurnState.COMPLETED,
            )
        )
    stored = tx.messages.append(turn.thread_id, lines) if lines else ()
    message = stored[-1] if reply.parts else None
    next_id = tx.turns.save_ending(ended)
    tx.log.fold(turn_id, merged([*events, TurnFinished(ended, message)]))
    if ending.copy and message and state is TurnState.COMPLETED:
        tx.threads.save_provider_state(turn.thread_id, replace(ending.copy, synced_to=message.index))
    tx.ledger.enter(line_of(ended, now, all_told=ending.all_told))  # last: others may want the same line
    return Ended(ended, message, already=False, next_id=next_id)


def _verdict(ending: Ending, parts: Sequence[ReplyPart]) -> tuple[TurnState, TurnReason | None]:
    if ending.cancelled:
        return TurnState.CANCELLED, ending.reason
    if ending.reason is None and parts:
        return TurnState.COMPLETED, None
    # A provider that says "complete" without a word has not answered.
    reason = ending.reason or TurnReason.PROVIDER_PROTOCOL
    return (TurnState.INCOMPLETE if parts else TurnState.FAILED), reason
