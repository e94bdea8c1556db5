"""The tools of a deployment: typed async Python functions, called with arguments that a model wrote."""

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

from adapters.tools.definition import ToolDefinition, ToolDefinitionError, ToolFunction, define
from adapters.tools.loading import load_tools
from core.model.errors import LeaseLost
from core.ports.tools import ToolContext, ToolOutput, Tools, ToolSpec

__all__ = ["Registry", "ToolDefinitionError", "load_tools"]

MAX_ARGUMENTS = 65_536
"""Bytes of arguments, in UTF-8."""
MAX_OUTPUT = 65_536
"""Code points of an output, the mark included."""
TRUNCATED = "\n[truncated]"
GRACE = 1.0
"""Seconds that a tool has to end after its time is up or its turn was cancelled."""

_log = logging.getLogger(__name__)

_REPLACED = {0: "\N{REPLACEMENT CHARACTER}"}
_MOST_FIELDS = 20


class Registry(Tools):
    """Tools by name.

    A tool that goes on after its time limit is cancelled and gets GRACE seconds to clean up. One that swallows
    even that is left behind: its turn goes on, and the task runs until it ends by itself. A tool that blocks the
    event loop (no `await`) can't be stopped by anyone.
    """

    def __init__(self, functions: Iterable[ToolFunction] = ()) -> None:
        """Takes functions, with or without `@tool`. Raises ToolDefinitionError with all faults of all of them."""
        self._tools: dict[str, ToolDefinition] = {}
        self._left_behind: set[asyncio.Task[Any]] = set()
        faults: list[str] = []
        for function in functions:
            try:
                definition = define(function)
            except ToolDefinitionError as error:
                faults += error.faults
                continue
            if definition.spec.name in self._tools:
                faults.append(
                    f"there are two tools with the name {definition.spec.name!r}: rename one with @tool(name=...)"
                )
            self._tools[definition.spec.name] = definition
        if faults:
            raise ToolDefinitionError(faults)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tools)

    def specs(self, names: Iterable[str]) -> Sequence[ToolSpec]:
        return [self._tools[name].spec for name in names if name in self._tools]

    async def call(self, name: str, arguments_json: str, context: ToolContext) -> ToolOutput:
        definition = self._tools.get(name)
        if definition is None:
            return _error("There is no such tool.")
        arguments = _parsed(definition, arguments_json)
        if isinstance(arguments, ToolOutput):
            return arguments
        arguments |= dict.fromkeys(definition.context_parameters, context)
        task = asyncio.ensure_future(_run(definition, arguments))
        try:
            done, _ = await asyncio.wait({task}, timeout=definition.timeout)
        except asyncio.CancelledError:
            await self._stop(task)
            raise
        if not done:
            _log.warning("tool %s took longer than %s s", name, definition.timeout)
            await self._stop(task)
            return _error("The tool took too long.")
        return _outcome(name, task)

    async def _stop(self, task: asyncio.Task[Any]) -> None:
        """Cancels a tool and waits a little for it to end. Nothing that it raises is heard of again."""
        task.add_done_callback(_look_away)
        self._left_behind.add(task)
        task.add_done_callback(self._left_behind.discard)
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE)


async def _run(definition: ToolDefinition, arguments: dict[str, Any]) -> Any:
    return await definition.function(**arguments)


def _look_away(task: asyncio.Task[Any]) -> None:
    """Retrieves an exception, so that asyncio does not log it with its text."""
    if not task.cancelled():
        task.exception()


def _parsed(definition: ToolDefinition, arguments_json: str) -> dict[str, Any] | ToolOutput:
    if len(arguments_json) > MAX_ARGUMENTS or len(arguments_json.encode("utf-8", "replace")) > MAX_ARGUMENTS:
        return _error("The arguments are too large.")
    try:
        model = definition.arguments.model_validate_json(arguments_json.encode("utf-8", "replace"))
    except ValidationError as error:
        return _invalid(definition, error)
    except Exception as error:  # noqa: BLE001 - a validator of the tool's own may raise anything
        _log.warning("tool %s could not validate its arguments: %s", definition.spec.name, type(error).__name__)
        return _error("The arguments are invalid.")
    return {parameter: getattr(model, field) for field, parameter in definition.fields.items()}


def _invalid(definition: ToolDefinition, error: ValidationError) -> ToolOutput:
    """Says which arguments are wrong and in which way: parameter names and kinds of problems, never a value."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if any(problem["type"] == "json_invalid" for problem in problems):
        return _error("The arguments are not valid JSON.")
    # Beyond the parameter's name a location may hold keys that the model wrote.
    fields = [
        {"field": place if place in definition.parameter_names else "", "problem": problem["type"]}
        for problem in problems[:_MOST_FIELDS]
        for place in [next(iter(problem["loc"]), "")]
    ]
    return _error("The arguments are invalid.", fields=fields)


def _outcome(name: str, task: asyncio.Task[Any]) -> ToolOutput:
    if task.cancelled():
        _log.warning("tool %s cancelled itself", name)
        return _error("The tool failed.")
    error = task.exception()
    if error is not None:
        if isinstance(error, LeaseLost) or not isinstance(error, Exception):
            raise error
        # The text of an exception may hold what the user said, or a secret.
        _log.warning("tool %s failed: %s", name, type(error).__name__)
        return _error("The tool failed.")
    try:
        return ToolOutput(_bounded(_as_text(task.result())))
    except Exception as unreadable:  # noqa: BLE001 - whatever a tool returns, its turn goes on
        _log.warning("tool %s returned what JSON can't hold: %s", name, type(unreadable).__name__)
        return _error("The tool's result could not be read.")


def _as_text(result: object) -> str:
    if isinstance(result, str):
        return result
    try:
        return to_json(result).decode()
    except (PydanticSerializationError, UnicodeError):
        # Perhaps only lone surrogates, which are replaced later.
        return json.dumps(to_jsonable_python(result), ensure_ascii=False, separators=(",", ":"))


def _bounded(text: str) -> str:
    if len(text) > MAX_OUTPUT:
        text = text[: MAX_OUTPUT - len(TRUNCATED)] + TRUNCATED
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").translate(_REPLACED)


def _error(message: str, **details: object) -> ToolOutput:
    return ToolOutput(json.dumps({"error": message, **details}), is_error=True)
