"""Which of an agent's wishes a model takes: a model that does not know a parameter refuses the request."""

import re

from core.model.agent import DEFAULT_MODEL, AgentDefinition

_GPT = re.compile(r"gpt-(\d+)(?:\.(\d+))?(.*)")
_O_SERIES = re.compile(r"o\d")
_FIRST_REASONING_GPT = 5


def effort(definition: AgentDefinition, model: str) -> str:
    """The reasoning effort to send, "" for none at all.

    A definition that names its model is taken at its word. One that runs on whatever the deployment has chosen
    gets the nearest effort that model takes.
    """
    wish = definition.effort
    return nearest_effort(wish, model) if wish and definition.model == DEFAULT_MODEL else wish


def nearest_effort(wish: str, model: str) -> str:
    """The effort nearest to a wish that a model takes, "" for none at all.

    GPT-4 and servers' own models have none; Sol and Astra begin at `low` and the first GPT-5 at `minimal`
    (developers.openai.com/api/docs/models).
    """
    if _O_SERIES.match(model):
        return "low" if wish in ("none", "minimal") else wish
    generation = _generation(model)
    if generation is None:
        return ""
    if wish in ("none", "minimal") and re.search("sol|astra", model):
        return "low"
    if wish == "none" and generation == (5, 0):
        return "minimal"
    return wish


def verbosity(definition: AgentDefinition, model: str) -> str:
    """The verbosity to send, "" for none at all. GPT-5 was the first to take one."""
    if definition.model != DEFAULT_MODEL or _generation(model) is not None:
        return definition.verbosity
    return ""


_WINDOWS = (
    (re.compile(r"gpt-6-luna.*"), 922_000),
    (re.compile(r"gpt-4\.1.*"), 1_000_000),
    (re.compile(r"gpt-4o.*"), 128_000),
)
"""Tokens that models read (developers.openai.com/api/docs/models); others are not known."""


def window(model: str) -> int | None:
    """The tokens that a model reads, if that is known."""
    return next((size for name, size in _WINDOWS if name.fullmatch(model)), None)


def compact_at(model: str) -> int | None:
    """The tokens of context from which on the provider itself is to compact it, None where it is not asked to:
    a model or a server that does not know the parameter refuses the request."""
    size = window(model)
    return size * 8 // 10 if size and (_generation(model) or (0, 0)) >= (6, 0) else None


def _generation(model: str) -> tuple[int, int] | None:
    """A GPT's generation if it is one that reasons."""
    found = _GPT.fullmatch(model)
    if found is None or int(found[1]) < _FIRST_REASONING_GPT:
        return None
    return int(found[1]), int(found[2] or 0)
