"""The port to whoever writes the coach's replies."""

import math
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from core.model.agent import AgentDefinition, Domain
from core.model.events import TextDelta, ToolCalled
from core.model.message import Message, ToolExchange
from core.model.thread import ProviderState
from core.model.turn import TurnReason, Usage
from core.ports.tools import ToolSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolRound:
    """What one round of the reply said, and the tools that it called, all answered."""

    text: str
    exchanges: tuple[ToolExchange, ...]


@dataclass(frozen=True, slots=True)
class Resumption:
    """A round that another process began to read: the provider's name for it, and its text that is on record."""

    handle: str
    text: str


async def at_once() -> None:
    """Nobody wants an agent to wait."""


class History(Protocol):
    """Loads the lines of the transcript before a turn's message, oldest first."""

    @abstractmethod
    def __call__(self, data: int = 0) -> Awaitable[Sequence[Message]]:
        """At most `data` bytes of what is attached come along, the newest; the rest is `Unread`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyRequest:
    """All that an agent may know of a turn.

    An agent whose provider keeps the conversation need not call `history`. `rounds` holds the finished tool rounds
    of this turn: empty at first. `state` is what the agent last said of the provider's copy, None if it never did
    or if it was another provider's; in the later rounds of a turn it is the `copy` that came with the round
    before. `resume` asks for the rest of a round that was begun before. At `deadline`, in the loop's time, the
    turn's budget is spent. An agent that lets text gather where it comes from awaits `pause` before it fetches
    more: many live turns are many small pieces, each with a price.
    """

    turn_id: str
    thread_id: str
    user_id: str
    domain: Domain
    definition: AgentDefinition
    message: Message
    history: History
    tools: Sequence[ToolSpec]
    rounds: tuple[ToolRound, ...] = ()
    state: ProviderState | None = None
    resume: Resumption | None = None
    deadline: float = math.inf
    pause: Callable[[], Awaitable[None]] = at_once


@dataclass(frozen=True, slots=True)
class Begun:
    """The provider writes this round to its end, read or not; `handle` finds it again from any process.

    It is stored before the next event is asked for.
    """

    handle: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The provider keeps this round, under this name of its own, until it is deleted there. Not for one that was
    `Begun`: that goes without saying."""

    ref: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The provider's copy of the thread is now this. It is stored before the next event is asked for."""

    state: ProviderState


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """The provider said that its answer has ended. Last event of every round.

    `shortfall` is set where the provider itself says that the answer is not whole (`OUTPUT_LIMIT`,
    `CONTENT_FILTERED`). `copy` is the provider's copy with all of the turn so far in it, if there is one: it is
    handed to the next round, and stored with `synced_to` at the reply in the transaction that completes the turn.
    """

    usage: Usage
    shortfall: TurnReason | None = None
    copy: ProviderState | None = None


class Standing(StrEnum):
    """How the provider's copy of a thread stands to the transcript."""

    NO_COPY = "NO_COPY"
    """There is none, or none that could be out of step."""
    IN_STEP = "IN_STEP"
    OUT_OF_STEP = "OUT_OF_STEP"
    """So little that it can be repaired."""
    UNKNOWN = "UNKNOWN"
    """They differ by too much, or too little of it can be read, to repair it."""
    GONE = "GONE"
    """The provider does not know it any more."""


@dataclass(frozen=True, slots=True)
class CopyFound:
    """What the provider's copy lacks (`behind`) and has too much (`ahead`), in its own items, where it is
    OUT_OF_STEP; and the calls of tools in it that nobody has answered."""

    standing: Standing
    behind: int = 0
    ahead: int = 0
    orphaned_calls: int = 0


AgentEvent = TextDelta | ToolCalled | Begun | Stored | StateChanged | RoundFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonRequest(Generic[T]):
    """A question of the service's own about some text, to be answered in a fixed form.

    `into` is that form: a dataclass of plain fields, which are all asked for. The answer may take `seconds`, with
    all that is tried for it, and `max_output_tokens`. `user_id` is whose text it is.
    """

    user_id: str
    instructions: str
    text: str
    into: type[T]
    max_output_tokens: int = 1_000
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class JsonAnswer(Generic[T]):
    """The answer in its form, and what it cost."""

    value: T
    usage: Usage


class AgentFailed(Exception):
    """The agent can't go on with this turn. `reason` is what the caller is told; the cause stays in the log."""

    def __init__(self, reason: TurnReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class CannotResume(AgentFailed):
    """The provider does not know the round any more, or it has become another one than the text on record."""

    def __init__(self) -> None:
        super().__init__(TurnReason.INTERRUPTED)


class Agent(Protocol):
    """Writes replies. One instance serves every turn of the process, concurrently."""

    @property
    @abstractmethod
    def provider(self) -> str:
        """Name of the provider, as recorded on turns."""

    @abstractmethod
    def model(self, definition: AgentDefinition) -> str:
        """The model that would serve a turn of this definition begun now."""

    @abstractmethod
    def refusal(self) -> float | None:
        """Seconds after which a turn may succeed again; None where nothing speaks against one now."""

    @abstractmethod
    def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        """Writes one round of a reply.

        Text in order, any number of tool calls, then exactly one RoundFinished, last. If tools were called
        the caller runs them and asks again, with the round added to `rounds`. Text holds no U+0000 and no
        lone surrogates. Fails with AgentFailed, with what `history` raises, and nothing else. Closing the
        generator or cancelling the task frees what it holds and stops the provider's work, unless that was
        `Begun`: then only `stop` does. With `resume` it yields what follows the text on record, to the same end,
        or fails with CannotResume.
        """

    @abstractmethod
    async def stop(self, handle: str) -> Usage | None:
        """Stops a round that was `Begun` and that nobody will read. Never fails: what can't be stopped ends by
        itself. Returns what it has used if this, or an earlier stop, has cut it short and the provider says."""

    async def reconcile(
        self, request: ReplyRequest, *, dry_run: bool
    ) -> AsyncGenerator[CopyFound | StateChanged, None]:
        """Looks at the provider's copy of the thread before the request's message, whatever is known of it, and
        brings it into step.

        CopyFound first; then, unless it is a `dry_run` or there is no copy, StateChanged for each change, to be
        stored before the next is asked for. Where none comes, the state of the request is right. Fails with
        AgentFailed. Where the provider keeps no copy, as by default, there is nothing to do.
        """
        yield CopyFound(Standing.NO_COPY)

    @abstractmethod
    async def complete_json(self, request: JsonRequest[T]) -> JsonAnswer[T]:
        """Answers a question in a fixed form. Nothing of it is kept at the provider.

        Fails with AgentFailed, also where the answer is not whole or not of that form, and with NotSupported where
        nobody is there who could answer.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Frees connections. No reply may be running."""
