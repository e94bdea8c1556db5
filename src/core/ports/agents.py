"""The repository of agent versions."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from core.model.agent import AgentDefinition


class AgentVersionChanged(Exception):
    """A stored version has other content. A change must get a new version number."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(f"agent {agent_id!r} is already stored with other content: raise its version")
        self.agent_id = agent_id


class AgentVersions(Protocol):
    """Immutable agent versions."""

    @abstractmethod
    def publish(self, definition: AgentDefinition) -> None:
        """Stores a version. Does nothing if it is stored already; raises AgentVersionChanged if it differs."""

    @abstractmethod
    def get(self, agent_id: str) -> AgentDefinition | None:
        """Reads a version."""

    @abstractmethod
    def all(self) -> Sequence[AgentDefinition]:
        """Every version, by slug, the newest first."""
