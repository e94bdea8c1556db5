"""Agent definitions by id: those on offer, and the older ones that threads are pinned to."""

from core.model.agent import AgentDefinition, Catalog
from core.model.errors import AgentNotFound
from core.ports.store import Transaction


class Definitions:
    """Looks agent versions up. They never change, so each is read from the store at most once."""

    def __init__(self, catalog: Catalog) -> None:
        self._known = {definition.id: definition for definition in catalog.agents()}

    def of(self, tx: Transaction, agent_id: str) -> AgentDefinition:
        """The definition with this id. Raises AgentNotFound."""
        definition = self._known.get(agent_id) or tx.agents.get(agent_id)
        if definition is None:
            raise AgentNotFound
        self._known[agent_id] = definition
        return definition
