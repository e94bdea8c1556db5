"""The port to whoever measures the service."""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from core.model.errors import CoreError
from core.model.turn import Turn, TurnReason
from core.ports.agent import Agent
from core.ports.tools import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What has a size at any time: turns that run, streams that follow turns, by how many positions the slowest of
    them is behind, whether the provider counts as down."""

    running: int
    followers: int
    lag: int
    refusing: bool


class Telemetry(Protocol):
    """Is told of moments, after they have happened and in whatever thread that was.

    Nothing that it is told can hold what was said: turns have ids, states, reasons and counts. There is no moment
    for each piece of text. Every method returns at once and never fails.
    """

    @abstractmethod
    def time(self) -> float:
        """Seconds by a clock that never goes back. Who does not measure does not look at it."""

    @abstractmethod
    def accepted(self, turn: Turn, seconds: float, *, attached: bool) -> None:
        """A message is on record, `attached` where it had been before, after so many seconds."""

    @abstractmethod
    def refused(self, error: type[CoreError]) -> None:
        """A message was not accepted."""

    @abstractmethod
    def began(self, turn: Turn) -> None:
        """This process has claimed a turn and works on it. Told where the turn was accepted, if that was here."""

    @abstractmethod
    def spoke(self, turn: Turn, seconds: float) -> None:
        """The first text of a turn is committed, so many seconds after it began here."""

    @abstractmethod
    def ended(self, turn: Turn) -> None:
        """A turn has ended, by this process. Told once, of turns that began here and of others."""

    @abstractmethod
    def left(self, turn: Turn) -> None:
        """This process works no more on a turn that began here. The last that is told of it here."""

    @abstractmethod
    def handed_over(self, turn: Turn) -> None:
        """A turn that began here waits for another process, as this one stops."""

    @abstractmethod
    def retried(self, provider: str, reason: TurnReason) -> None:
        """A request to the provider has failed and is made again."""

    @abstractmethod
    def committed(self, changes: int, seconds: float) -> None:
        """So many changes were committed to the record together, in so many seconds."""

    @abstractmethod
    def copies_left(self, provider: str, count: int, *, reached: bool) -> None:
        """Of what was erased from the record, a provider has so many objects; `reached` where this process can
        erase them."""

    @abstractmethod
    def called(self, method: str, status: str, seconds: float) -> None:
        """A call of the API has ended. `method` and `status` are the API's own names."""

    @abstractmethod
    def agent(self, agent: Agent) -> Agent:
        """The same agent; what its rounds take is measured."""

    @abstractmethod
    def tools(self, tools: Tools) -> Tools:
        """The same tools; what their calls take is measured."""

    @abstractmethod
    def watching(self, vitals: Callable[[], Vitals]) -> AbstractAsyncContextManager[None]:
        """Looks at the vitals every second until left, in the running loop."""


class Unmeasured(Telemetry):
    """Nobody measures: nothing is looked at, made or kept."""

    def time(self) -> float:
        return 0.0

    def accepted(self, turn: Turn, seconds: float, *, attached: bool) -> None:
        """Nothing."""

    def refused(self, error: type[CoreError]) -> None:
        """Nothing."""

    def began(self, turn: Turn) -> None:
        """Nothing."""

    def spoke(self, turn: Turn, seconds: float) -> None:
        """Nothing."""

    def ended(self, turn: Turn) -> None:
        """Nothing."""

    def left(self, turn: Turn) -> None:
        """Nothing."""

    def handed_over(self, turn: Turn) -> None:
        """Nothing."""

    def retried(self, provider: str, reason: TurnReason) -> None:
        """Nothing."""

    def committed(self, changes: int, seconds: float) -> None:
        """Nothing."""

    def copies_left(self, provider: str, count: int, *, reached: bool) -> None:
        """Nothing."""

    def called(self, method: str, status: str, seconds: float) -> None:
        """Nothing."""

    def agent(self, agent: Agent) -> Agent:
        return agent

    def tools(self, tools: Tools) -> Tools:
        return tools

    def watching(self, vitals: Callable[[], Vitals]) -> AbstractAsyncContextManager[None]:
        return nullcontext()


UNMEASURED = Unmeasured()
