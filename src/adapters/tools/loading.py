"""Finds the tools that other packages bring: entry points, and the names in VIDA_TOOLS."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from adapters.tools.definition import ToolDefinitionError, ToolFunction

GROUP = "vida_coach.tools"


def load_tools(spec: str | None = None) -> list[ToolFunction]:
    """The functions behind the entry points of GROUP, sorted by name, then those of `spec`.

    An entry point names a function, a list of functions, or a factory: a plain function without arguments that
    returns either. `spec` holds names like `package.module:name`, separated by commas, each of a function or a
    list. A function that is named twice is returned once. Raises ToolDefinitionError with all faults.
    """
    faults: list[str] = []
    found: list[ToolFunction] = []
    for entry in sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value)):
        found += _from_entry_point(entry, faults)
    for name in (spec or "").split(","):
        if name.strip():
            found += _from_name(name.strip(), faults)
    if faults:
        raise ToolDefinitionError(faults)
    return list({id(function): function for function in found}.values())


def _from_entry_point(entry: EntryPoint, faults: list[str]) -> list[ToolFunction]:
    label = f"entry point {entry.name!r} ({entry.value})"
    loaded = _attempt(label, "can't be loaded", entry.load, faults)
    if inspect.isroutine(loaded) and not inspect.iscoroutinefunction(loaded):
        loaded = _attempt(label, "is no async function, and failed as a factory", loaded, faults)
    return _functions(label, loaded, faults)


def _from_name(name: str, faults: list[str]) -> list[ToolFunction]:
    label = f"VIDA_TOOLS names {name!r}, which"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        faults.append(f"{label} is not of the form package.module:name")
        return []
    module = _attempt(
        label,
        f"needs the module {module_name}, which can't be imported",
        lambda: import_module(module_name),
        faults,
    )
    if module is None:
        return []
    loaded: Any = module
    for part in attribute.split("."):
        if not hasattr(loaded, part):
            faults.append(f"{label} does not exist: {module_name} has no {attribute}")
            return []
        loaded = getattr(loaded, part)
    return _functions(label, loaded, faults)


def _attempt(label: str, failing: str, action: Callable[[], Any], faults: list[str]) -> Any:
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - foreign code at import may raise anything; start-up reports it all
        faults.append(f"{label} {failing}: {type(error).__name__}: {error}")
        return None


def _functions(label: str, loaded: Any, faults: list[str]) -> list[ToolFunction]:
    if loaded is None:
        if not any(fault.startswith(label) for fault in faults):
            faults.append(f"{label} gives nothing: it must give an async function or a list of them")
        return []
    functions = list(loaded) if isinstance(loaded, list | tuple) else [loaded]
    if not all(callable(function) for function in functions):
        faults.append(f"{label} must give an async function or a list of them")
        return []
    return functions
