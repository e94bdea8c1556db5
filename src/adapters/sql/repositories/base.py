"""What the repositories share."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, Table, Text, bindparam, cast, func, select
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


def each_of(name: str) -> Mapping[str, Any]:
    """For each dialect, a SELECT of the strings in one parameter, a JSON array: there may be more of them than a
    statement can have parameters."""
    strings = bindparam(name, type_=Text)
    return {
        "sqlite": select(func.json_each(strings).table_valued("value").c.value),
        "postgresql": select(func.json_array_elements_text(cast(strings, JSON)).column_valued("value")),
    }
