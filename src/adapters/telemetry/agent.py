"""An agent whose rounds are measured."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from core.model.agent import AgentDefinition
from core.model.events import TextDelta, ToolCalled
from core.model.turn import Usage
from core.ports.agent import (
    Agent,
    AgentEvent,
    AgentFailed,
    CopyFound,
    JsonAnswer,
    JsonRequest,
    ReplyRequest,
    RoundFinished,
    StateChanged,
)

if TYPE_CHECKING:
    from adapters.telemetry.moments import Moments

T = TypeVar("T")

LEFT = "LEFT"
"""What is told of a round, or of a tool's call, that somebody had no more use for: its turn was stopped."""


class MeasuredAgent(Agent):
    """The same agent, whose rounds are told with their times, tokens and faults."""

    def __init__(self, agent: Agent, moments: "Moments") -> None:
        self._agent = agent
        self._moments = moments

    @property
    def provider(self) -> str:
        return self._agent.provider

    def model(self, definition: AgentDefinition) -> str:
        return self._agent.model(definition)

    def refusal(self) -> float | None:
        return self._agent.refusal()

    async def reply(self, request: ReplyRequest) -> AsyncGenerator[AgentEvent, None]:
        begun = self._moments.time()
        first = usage = None
        fault = LEFT
        try:
            async with aclosing(self._agent.reply(request)) as events:
                async for event in events:
                    if first is None and isinstance(event, TextDelta | ToolCalled):
                        first = self._moments.time() - begun
                    elif isinstance(event, RoundFinished):
                        usage = event.usage
                        fault = event.shortfall.value if event.shortfall else ""
                    yield event
        except AgentFailed as failure:
            fault = failure.reason.value
            raise
        except Exception as error:
            fault = type(error).__name__
            raise
        finally:
            self._moments.round(
                request.turn_id,
                provider=self.provider,
                model=self.model(request.definition),
                seconds=self._moments.time() - begun,
                first=first,
                usage=usage,
                fault=fault,
            )

    async def reconcile(
        self, request: ReplyRequest, *, dry_run: bool
    ) -> AsyncGenerator[CopyFound | StateChanged, None]:
        """Not measured: it is no round."""
        async with aclosing(self._agent.reconcile(request, dry_run=dry_run)) as steps:
            async for step in steps:
                yield step

    async def stop(self, handle: str) -> Usage | None:
        return await self._agent.stop(handle)

    async def complete_json(self, request: JsonRequest[T]) -> JsonAnswer[T]:
        """Not measured: it belongs to no turn."""
        return await self._agent.complete_json(request)

    async def aclose(self) -> None:
        await self._agent.aclose()
