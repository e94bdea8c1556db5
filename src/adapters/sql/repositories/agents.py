"""The repository of agent versions."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import bindparam, select

from adapters.sql import mapping as m
from adapters.sql import tables as t
from adapters.sql.repositories.base import Repository, insert_if_new
from adapters.sql.statement import Statement
from core.model.agent import AgentDefinition
from core.ports import agents
from core.ports.agents import AgentVersionChanged

_c = t.agents.c
_ADD = insert_if_new(t.agents)
_GET = Statement(select(_c.definition).where(_c.id == bindparam("agent_id")))

_ALL = Statement(select(_c.definition).order_by(_c.slug, _c.version.desc()))


class AgentVersions(Repository, agents.AgentVersions):
    """`agents`."""

    def publish(self, definition: AgentDefinition) -> None:
        values = {
            "id": definition.id,
            "slug": definition.slug,
            "version": definition.version,
            "domain": definition.domain.value,
            "definition": m.definition_values(definition),
            "created_at": datetime.now(UTC),
        }
        self._session.run(_ADD[self._session.dialect.name], values)
        if self.get(definition.id) != definition:
            raise AgentVersionChanged(definition.id)

    def get(self, agent_id: str) -> AgentDefinition | None:
        row = self._session.row(_GET, {"agent_id": agent_id})
        return None if row is None else m.definition_of(row.definition)

    def all(self) -> Sequence[AgentDefinition]:
        return [m.definition_of(row.definition) for row in self._session.rows(_ALL, {})]
