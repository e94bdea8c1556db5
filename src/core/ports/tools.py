"""The port to the tools that a coach may call."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.model.agent import Domain


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a model is told of a tool. `parameters` is the JSON schema of its arguments.

    `idempotent` says that a call repeated with the same idempotency key takes effect once.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    idempotent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """On whose behalf a tool runs. Given by the service, never by the model.

    `epoch` is that of the claim under which this process works on the turn: what a tool writes to the record is
    conditional on it, in the same transaction.
    """

    user_id: str
    thread_id: str
    turn_id: str
    epoch: int
    call_id: str
    domain: Domain

    @property
    def idempotency_key(self) -> str:
        """The same for every repeat of one call."""
        return f"{self.turn_id}:{self.call_id}"


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """What the model is told."""

    text: str
    is_error: bool = False


class Tools(Protocol):
    """The tools of a deployment."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Every tool there is."""

    @abstractmethod
    def specs(self, names: Iterable[str]) -> Sequence[ToolSpec]:
        """Describes tools, in the order of `names`.

        A name that does not exist any more is left out: a thread pinned to an old agent must outlive a tool.
        """

    @abstractmethod
    async def call(self, name: str, arguments_json: str, context: ToolContext) -> ToolOutput:
        """Runs a tool within its own time limit.

        An unknown tool, bad arguments, an exception and a time-out are outputs marked as errors, in fixed words
        without the exception's text. Outputs are bounded. Only cancellation passes, and LeaseLost: there is nobody
        left whom an answer could be for.
        """
