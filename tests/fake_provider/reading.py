"""Scripts in JSON.

Everything is an object with one key, the name of what it is, and the fields of the class of that name in
`script`; the value may be the first field alone. So `{"text": "Hello"}` is `Text(text="Hello")`, and
`{"call": {"name": "goals"}}` is `Call(name="goals")`. Steps are `answer`, `load`, and any refusal of the table of
faults as a string.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fake_provider.faults import REFUSALS, rule_from
from fake_provider.script import (
    Answer,
    Break,
    Call,
    ErrorEvent,
    Failed,
    HttpError,
    Incomplete,
    Load,
    Pause,
    Reasoning,
    Step,
    Text,
)

KINDS: Mapping[str, type] = {
    "answer": Answer,
    "load": Load,
    "http_error": HttpError,
    "text": Text,
    "call": Call,
    "reasoning": Reasoning,
    "incomplete": Incomplete,
    "failed": Failed,
    "error": ErrorEvent,
    "break": Break,
    "pause": Pause,
}
_ANY = ConfigDict(extra="forbid", arbitrary_types_allowed=True)  # gates: a script cannot name them


def _check(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(tuple[kind], config=_ANY)  # a dataclass by itself takes no configuration


_CHECKS = {name: _check(kind) for name, kind in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Script:
    """A script file: `steps`, the answer behind them, rules of faults, and settings."""

    steps: list[Step]
    default: Answer | Load | None
    faults: list[Any]
    settings: dict[str, Any]


def read_script(given: object) -> Script:
    """A whole script: {"steps": […], "default": …, "faults": […], "settings": {…}}. Raises ValueError."""
    if isinstance(given, list):
        given = {"steps": given}
    if not isinstance(given, dict) or not given.keys() <= {"steps", "default", "faults", "settings"}:
        raise ValueError("a script is a list of steps, or an object of steps, default, faults and settings")
    default = given.get("default")
    return Script(
        read_steps(given.get("steps", [])),
        None if default is None else read_default(default),
        [rule_from(fault) for fault in given.get("faults", [])],
        dict(given.get("settings", {})),
    )


def read_steps(given: object) -> list[Step]:
    """Steps of a script. Raises ValueError."""
    if not isinstance(given, list):
        raise ValueError("steps are a list")  # noqa: TRY004 -- a script's fault, not a caller's
    return [_step(step) for step in given]


def read_default(given: object) -> Answer | Load:
    """The answer behind the script. Raises ValueError."""
    step = _step(given)
    if isinstance(step, HttpError):
        raise ValueError("the default is an answer or a load")  # noqa: TRY004
    return step


def _step(given: object) -> Step:
    if isinstance(given, str):
        rule = rule_from(given)
        if not isinstance(rule.effect, HttpError):
            names = ", ".join(REFUSALS)
            raise ValueError(f"{given!r} is not a step; of the faults these are: {names}")  # noqa: TRY004
        return rule.effect
    step = _build(given)
    if not isinstance(step, Answer | Load | HttpError):
        raise ValueError(f"not a step: {given!r}")  # noqa: TRY004
    return step


def _build(given: object) -> Any:
    if isinstance(given, list):
        return tuple(_build(one) for one in given)
    if isinstance(given, dict) and len(given) == 1 and (name := next(iter(given))) in KINDS:
        content = given[name]
        if not isinstance(content, dict):
            first = fields(KINDS[name])[0].name
            content = {first: content}
        try:
            return _CHECKS[name].validate_python(({key: _build(value) for key, value in content.items()},))[0]
        except ValidationError as error:
            raise ValueError(f"{name}: {error.errors(include_url=False)[0]}") from error
    return given
