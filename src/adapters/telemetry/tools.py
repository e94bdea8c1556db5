"""Tools whose calls are measured."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from adapters.telemetry.agent import LEFT
from core.ports.tools import ToolContext, ToolOutput, Tools, ToolSpec

if TYPE_CHECKING:
    from adapters.telemetry.moments import Moments


class MeasuredTools(Tools):
    """The same tools, whose calls are told with their names, times and whether they failed."""

    def __init__(self, tools: Tools, moments: "Moments") -> None:
        self._tools = tools
        self._moments = moments

    @property
    def names(self) -> frozenset[str]:
        return self._tools.names

    def specs(self, names: Iterable[str]) -> Sequence[ToolSpec]:
        return self._tools.specs(names)

    async def call(self, name: str, arguments_json: str, context: ToolContext) -> ToolOutput:
        begun = self._moments.time()
        fault = LEFT
        try:
            output = await self._tools.call(name, arguments_json, context)
            fault = "TOOL_ERROR" if output.is_error else ""
        finally:
            self._moments.tool(context.turn_id, name, self._moments.time() - begun, fault)
        return output
