"""A turn's events, their positions, and how a log folds into a reply.

A position is a coordinate in a turn's log: every code point of text advances it by 1, every other event by 1.
Text may therefore be cut or merged anywhere and a cursor stays exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from core.model.message import Message, RefusalPart, ReplyPart, TextPart, ToolExchange
from core.model.turn import Turn


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The turn is durable. First event of every log, at position 1.

    `traceparent` is the W3C trace that its message came with, for whoever claims it later; clients are not told.
    """

    turn_id: str
    thread_id: str
    agent_id: str
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the reply, at least one code point. `refusal` marks the words of a refusal."""

    text: str
    refusal: bool = False


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """The coach calls a tool. `arguments_json` is what the model wrote, valid JSON or not."""

    call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ToolAnswered:
    """A tool's answer to the model."""

    call_id: str
    output: str
    is_error: bool


@dataclass(frozen=True, slots=True)
class AttemptRestarted:
    """The reply begins anew; all text before is to be dropped."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The turn has ended. Last event of every log. `reply` is the stored reply, if there was any text."""

    turn: Turn
    reply: Message | None


TurnEvent = TurnStarted | TextDelta | ToolCalled | ToolAnswered | AttemptRestarted | TurnFinished


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An event and the log's position after it."""

    position: int
    event: TurnEvent


def extent(event: TurnEvent) -> int:
    """How far an event advances the position."""
    return len(event.text) if isinstance(event, TextDelta) else 1


def traceparent_of(log: Sequence[LogEntry]) -> str:
    """The trace that the message of a whole log came with; empty: none."""
    started = log[0].event
    assert isinstance(started, TurnStarted)  # the first of every log
    return started.traceparent


def attempt_of(events: Sequence[TurnEvent]) -> int | None:
    """The last attempt that begins within these events, if one does."""
    return next((event.attempt for event in reversed(events) if isinstance(event, AttemptRestarted)), None)


def place(events: Iterable[TurnEvent], start: int) -> list[LogEntry]:
    """Gives events their positions, the first one beginning at `start`."""
    entries = []
    for event in events:
        start += extent(event)
        entries.append(LogEntry(start, event))
    return entries


def merged(events: Iterable[TurnEvent]) -> list[TurnEvent]:
    """The same log in the fewest events: neighbouring text of one kind becomes one delta."""
    result: list[TurnEvent] = []
    run: list[TextDelta] = []

    def close_run() -> None:
        if run:
            result.append(run[0] if len(run) == 1 else TextDelta("".join(d.text for d in run), run[0].refusal))
            run.clear()

    for event in events:
        if isinstance(event, TextDelta):
            if run and run[0].refusal is not event.refusal:
                close_run()
            run.append(event)
        else:
            close_run()
            result.append(event)
    close_run()
    return result


def after(entries: Iterable[LogEntry], position: int) -> list[LogEntry]:
    """What follows `position`, exactly: an entry that straddles it is cut."""
    result = []
    for entry in entries:
        if entry.position <= position:
            continue
        event = entry.event
        if isinstance(event, TextDelta):
            surplus = len(event.text) - (entry.position - position)
            if surplus > 0:
                entry = LogEntry(entry.position, TextDelta(event.text[surplus:], event.refusal))
        result.append(entry)
    return result


@dataclass(frozen=True, slots=True)
class Reply:
    """What a log says, read as a conversation: the reply's parts and the tools that it used."""

    parts: tuple[ReplyPart, ...]
    exchanges: tuple[ToolExchange, ...]


def reply_of(events: Iterable[TurnEvent]) -> Reply:
    """Reads a log as a reply: everything after the last restart. A call without an answer is left out."""
    parts: list[ReplyPart] = []
    calls: dict[str, ToolCalled] = {}
    exchanges: list[ToolExchange] = []
    for event in merged(events):
        match event:
            case AttemptRestarted():
                parts.clear()
                exchanges.clear()
            case TextDelta(text, refusal):
                kind = RefusalPart if refusal else TextPart
                if parts and type(parts[-1]) is kind:
                    parts[-1] = kind(parts[-1].text + text)
                else:
                    parts.append(kind(text))
            case ToolCalled():
                calls[event.call_id] = event
            case ToolAnswered(call_id, output, is_error) if call := calls.get(call_id):
                exchanges.append(ToolExchange(call_id, call.name, call.arguments_json, output, is_error))
            case _:
                continue
    return Reply(tuple(parts), tuple(exchanges))


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a reply as its log has it: what was said, the tools called then, and their answers so far."""

    said: tuple[TextDelta, ...] = ()
    calls: tuple[ToolCalled, ...] = ()
    answers: tuple[ToolAnswered, ...] = ()

    @property
    def text(self) -> str:
        """All text and refusals, concatenated."""
        return "".join(delta.text for delta in self.said)

    @property
    def open_calls(self) -> tuple[ToolCalled, ...]:
        """The calls that have no answer."""
        answered = {answer.call_id for answer in self.answers}
        return tuple(call for call in self.calls if call.call_id not in answered)


def rounds_of(events: Iterable[TurnEvent]) -> tuple[Round, ...]:
    """Reads a log as rounds: everything after the last restart. Text or a call behind answers begins another."""
    rounds: list[Round] = []
    current = Round()
    for event in merged(events):
        if isinstance(event, TextDelta | ToolCalled) and (
            current.answers or (current.calls and isinstance(event, TextDelta))
        ):
            rounds.append(current)
            current = Round()
        match event:
            case AttemptRestarted():
                rounds.clear()
                current = Round()
            case TextDelta():
                current = replace(current, said=(*current.said, event))
            case ToolCalled():
                current = replace(current, calls=(*current.calls, event))
            case ToolAnswered():
                current = replace(current, answers=(*current.answers, event))
            case _:
                continue
    if current != Round():
        rounds.append(current)
    return tuple(rounds)
