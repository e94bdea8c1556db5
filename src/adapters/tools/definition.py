"""From a typed async function to a tool: its name, its description, the schema of its arguments."""

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, create_model
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from core.ports.tools import ToolContext, ToolSpec

P = ParamSpec("P")
R = TypeVar("R")
ToolFunction = Callable[..., Awaitable[Any]]

DEFAULT_TIMEOUT = 10.0

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SECTION = re.compile(r"^(Args|Arguments|Parameters):\s*$")
_ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_ATTRIBUTE = "__vida_tool__"


class ToolDefinitionError(Exception):
    """A function can't be a tool. `faults` says of each what to do."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class ToolOptions:
    """What a function's author says of it as a tool.

    `name` is None for the function's own, `timeout` is in seconds.
    """

    name: str | None = None
    timeout: float = DEFAULT_TIMEOUT
    idempotent: bool = False


@overload
def tool(function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...


@overload
def tool(
    *, name: str | None = None, timeout: float = DEFAULT_TIMEOUT, idempotent: bool = False
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    idempotent: bool = False,
) -> Callable[..., Any]:
    """Attaches options to a tool's function and returns that function. Works bare, too.

    `idempotent` promises that a call repeated with the same `ToolContext.idempotency_key` takes effect once.
    """
    options = ToolOptions(name, timeout, idempotent)

    def attach(decorated: Callable[..., Any]) -> Callable[..., Any]:
        setattr(decorated, _ATTRIBUTE, options)
        return decorated

    return attach if function is None else attach(function)


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool, ready to be called.

    `arguments` validates what the model wrote. Its fields are numbered, because a parameter may have a name
    that a pydantic model can't have; `fields` says which parameter each belongs to.
    """

    spec: ToolSpec
    function: ToolFunction
    timeout: float
    arguments: type[BaseModel]
    fields: Mapping[str, str]
    context_parameters: tuple[str, ...]

    @property
    def parameter_names(self) -> frozenset[str]:
        return frozenset(self.fields.values())


def define(function: ToolFunction) -> ToolDefinition:
    """Reads a function's signature and docstring. Raises ToolDefinitionError with all that is wrong."""
    label = getattr(function, "__qualname__", repr(function))
    options: ToolOptions = getattr(function, _ATTRIBUTE, ToolOptions())
    name = options.name or str(getattr(function, "__name__", ""))
    faults = []
    if not inspect.iscoroutinefunction(function):
        faults.append("is not an async function: define it with `async def`")
    if not _NAME.fullmatch(name):
        faults.append(f"has the name {name!r}: give it one that matches {_NAME.pattern} with @tool(name=...)")
    if not options.timeout > 0:
        faults.append("has a timeout that is not above 0 seconds")
    description, notes = _read_docstring(inspect.getdoc(function) if callable(function) else None)
    if not description:
        faults.append("has no docstring: say there what it does and when to use it, the model reads it")
    fields: dict[str, tuple[str, Any, FieldInfo]] = {}
    contexts: tuple[str, ...] = ()
    if not faults or inspect.isroutine(function):
        fields, contexts = _read_signature(function, notes, faults)
    arguments = _model(name, fields, faults) if not faults else None
    if faults or arguments is None:
        raise ToolDefinitionError([f"tool {label} {fault}" for fault in faults])
    try:
        parameters = arguments.model_json_schema(schema_generator=_Schema)
    except PydanticUserError as error:
        raise ToolDefinitionError(
            [f"tool {label} has a parameter that JSON schema can't describe: use plain types ({error.code})"]
        ) from error
    parameters.pop("title", None)
    parameters.pop("description", None)
    parameters.setdefault("properties", {})
    return ToolDefinition(
        spec=ToolSpec(name=name, description=description, parameters=parameters, idempotent=options.idempotent),
        function=function,
        timeout=options.timeout,
        arguments=arguments,
        fields={field: parameter for field, (parameter, _, _) in fields.items()},
        context_parameters=contexts,
    )


class _Schema(GenerateJsonSchema):
    """Without titles, which repeat the names and cost tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        described = super().model_schema(schema)
        described.pop("title", None)
        return described

    def enum_schema(self, schema: core_schema.EnumSchema) -> dict[str, Any]:
        described = super().enum_schema(schema)
        described.pop("title", None)
        return described


def _read_signature(
    function: ToolFunction, notes: Mapping[str, str], faults: list[str]
) -> tuple[dict[str, tuple[str, Any, FieldInfo]], tuple[str, ...]]:
    try:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except Exception as error:  # noqa: BLE001 - annotations are foreign code, and some are run only now
        faults.append(f"has annotations that can't be resolved: define the types at module level ({error})")
        return {}, ()
    fields: dict[str, tuple[str, Any, FieldInfo]] = {}
    contexts = []
    for parameter in parameters:
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            faults.append(f"takes *{parameter.name}: name every parameter")
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            faults.append(f"has the positional-only parameter {parameter.name!r}: remove the slash")
        elif parameter.name not in hints:
            faults.append(f"has the parameter {parameter.name!r} without a type: annotate it")
        elif hints[parameter.name] is ToolContext:
            contexts.append(parameter.name)
        elif _holds_context(hints[parameter.name]):
            faults.append(
                f"has ToolContext within the type of {parameter.name!r}: annotate it as ToolContext alone, "
                "or the model could write it"
            )
        else:
            default = ... if parameter.default is parameter.empty else parameter.default
            note = notes.get(parameter.name)
            info: FieldInfo = Field(default, alias=parameter.name, description=note)
            fields[f"parameter_{len(fields)}"] = (parameter.name, hints[parameter.name], info)
    return fields, tuple(contexts)


def _holds_context(hint: Any) -> bool:
    """Whether a type has the context somewhere in it, where pydantic would read it from what the model wrote."""
    return hint is ToolContext or any(map(_holds_context, get_args(hint)))


def _model(
    name: str, fields: Mapping[str, tuple[str, Any, FieldInfo]], faults: list[str]
) -> type[BaseModel] | None:
    definitions: dict[str, Any] = {field: (hint, info) for field, (_, hint, info) in fields.items()}
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid"), **definitions)
    except PydanticUserError as error:
        faults.append(f"has a parameter of a type that can't be validated: use plain types ({error.code})")
        return None
    except Exception as error:  # noqa: BLE001 - a pattern may be none, a type may bring code of its own
        why = " ".join(str(error).split())
        faults.append(f"has a parameter that can't be validated: mend its type or its pattern ({why})")
        return None


def _read_docstring(text: str | None) -> tuple[str, dict[str, str]]:
    """The description for the model, and what a Google-style Args section says of each argument."""
    description: list[str] = []
    notes: dict[str, str] = {}
    inside, indent, current = False, 0, ""
    for line in (text or "").splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if not inside:
            if _SECTION.match(line):
                inside, indent, current = True, 0, ""
            else:
                description.append(line)
            continue
        if stripped and depth == 0:
            inside = bool(_SECTION.match(line))
            if not inside:
                description.append(line)
            continue
        indent = indent or depth
        match = _ARGUMENT.match(stripped)
        if match and depth <= indent:
            current = match.group(1)
            notes[current] = match.group(2).strip()
        elif current and stripped:
            notes[current] = f"{notes[current]} {stripped}".strip()
    return "\n".join(description).strip(), notes
