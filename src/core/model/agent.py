"""Agents: versioned definitions of coaches."""

from dataclasses import dataclass
from enum import StrEnum


class Domain(StrEnum):
    """What a coach is about."""

    CAREER = "career"
    HEALTH = "health"
    RELATIONSHIP = "relationship"
    GENERAL = "general"


DEFAULT_MODEL = "default"
"""The model name that stands for the deployment's own choice at each turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDefinition:
    """One version of a coach. It never changes; a change is a new version.

    `slug` names the coach over all versions and `id` is `<slug>-v<version>`. `model` is `default` or an
    explicit name. `effort` and `verbosity` are the provider's own words, empty for its default.
    """

    slug: str
    version: int
    domain: Domain
    name: str
    instructions: str
    model: str = DEFAULT_MODEL
    effort: str = ""
    verbosity: str = ""
    max_output_tokens: int = 2048
    tools: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.slug}-v{self.version}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """The agents on offer: which definition a new thread of each domain is pinned to."""

    by_domain: dict[Domain, AgentDefinition]

    def agents(self) -> list[AgentDefinition]:
        """Every definition on offer once, sorted by domain."""
        order = list(Domain)
        unique = {definition.id: definition for definition in self.by_domain.values()}
        return sorted(unique.values(), key=lambda definition: order.index(definition.domain))
