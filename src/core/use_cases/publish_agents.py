"""Agent versions on record: what there is, and what a catalog would add."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import partial

from core.model.agent import AgentDefinition
from core.model.errors import InvalidField
from core.ports.store import Store, Transaction

MAX_DEFINITIONS = 100


class Outcome(StrEnum):
    """How a definition stands to the record."""

    NEW = "NEW"
    UNCHANGED = "UNCHANGED"
    CHANGED = "CHANGED"
    """The version is on record with other content: it can't be put there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """How a definition stands to `compared_with`: its own version on record, or the newest one of its slug (None:
    there is none). `fields` are the names of those in which they differ."""

    definition: AgentDefinition
    outcome: Outcome
    compared_with: AgentDefinition | None
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionOnRecord:
    """An agent version, and how many threads are pinned to it."""

    definition: AgentDefinition
    threads: int


class PublishAgents:
    """Puts agent versions on record: all, or none where one is there already with other content."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def __call__(
        self, definitions: Sequence[AgentDefinition], *, dry_run: bool = False
    ) -> Sequence[Publication]:
        """How each of them stood to the record. Nothing is put there if one of them is CHANGED, or with a dry run.
        Raises InvalidField."""
        if len(definitions) > MAX_DEFINITIONS:
            raise InvalidField("definitions", f"must be at most {MAX_DEFINITIONS}")
        if dry_run:
            return await self._store.read(partial(_compare, definitions))
        return await self._store.write(partial(_publish, definitions))

    async def versions(self) -> Sequence[VersionOnRecord]:
        """All that is on record: by slug, the newest version first."""

        def read(tx: Transaction) -> Sequence[VersionOnRecord]:
            pinned = tx.threads.pinned()
            return [VersionOnRecord(one, pinned.get(one.id, 0)) for one in tx.agents.all()]

        return await self._store.read(read)


def _publish(definitions: Sequence[AgentDefinition], tx: Transaction) -> Sequence[Publication]:
    publications = _compare(definitions, tx)
    if all(publication.outcome is not Outcome.CHANGED for publication in publications):
        for definition in definitions:
            tx.agents.publish(definition)
    return publications


def _compare(definitions: Sequence[AgentDefinition], tx: Transaction) -> Sequence[Publication]:
    recorded = tx.agents.all()
    newest: Mapping[str, AgentDefinition] = {one.slug: one for one in reversed(recorded)}
    by_id = {one.id: one for one in recorded}
    return [_standing(one, by_id.get(one.id), newest.get(one.slug)) for one in definitions]


def _standing(
    definition: AgentDefinition, same: AgentDefinition | None, newest: AgentDefinition | None
) -> Publication:
    other = same or newest
    names = () if other is None else _differences(definition, other)
    outcome = Outcome.NEW if same is None else Outcome.CHANGED if names else Outcome.UNCHANGED
    return Publication(definition=definition, outcome=outcome, compared_with=other, fields=names)


def _differences(one: AgentDefinition, other: AgentDefinition) -> tuple[str, ...]:
    names = (field.name for field in fields(AgentDefinition))
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))
