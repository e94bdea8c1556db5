"""What the repositories share."""

from collections.abc import Mapping

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql, sqlite

from adapters.sql.session import Session
from adapters.sql.statement import Statement


class Repository:
    """A repository on one session."""

    def __init__(self, session: Session) -> None:
        self._session = session


def insert_if_new(table: Table) -> Mapping[str, Statement]:
    """For each dialect, an INSERT that does nothing where a row with a key of the new one is there."""
    return {
        "sqlite": Statement(sqlite.insert(table).on_conflict_do_nothing()),
        "postgresql": Statement(postgresql.insert(table).on_conflict_do_nothing()),
    }
