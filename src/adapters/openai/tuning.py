"""Which of an agent's wishes a model takes: a model that does not know a parameter refuses the request."""

import re

from core.model.agent import DEFAULT_MODEL, AgentDefinition

_GPT = re.compile(r"gpt-(\d+)(?:\.(\d+))?(.*)")
_O_SERIES = re.compile(r"o\d")
_FIRST_REASONING_GPT = 5


def effort(definition: AgentDefinition, model: str) -> str:
    """The reasoning effort to send, "" for none at all.

    A definition that names its model is taken at its word. One that runs on whatever the deployment has chosen
    gets the nearest effort that model takes: GPT-4 and servers' own models have none; Sol and Astra begin at
    `low` and the first GPT-5 at `minimal` (developers.openai.com/api/docs/models).
    """
    wish = definition.effort
    if not wish or definition.model != DEFAULT_MODEL:
        return wish
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


def _generation(model: str) -> tuple[int, int] | None:
    """A GPT's generation if it is one that reasons."""
    found = _GPT.fullmatch(model)
    if found is None or int(found[1]) < _FIRST_REASONING_GPT:
        return None
    return int(found[1]), int(found[2] or 0)
