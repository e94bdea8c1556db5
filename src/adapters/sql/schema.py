"""The schema: what version a database has, and how it is brought to ours.

Alembic is imported only where something has to change: that takes a twentieth of a second, which a start on a
current schema need not wait for.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, exc, inspect, text

from adapters.sql.engines import is_embedded, migration_engine
from adapters.sql.errors import SchemaOutdatedError, SchemaTooNewError, UnreadableDatabaseError
from adapters.sql.tables import metadata
from core.model.errors import StoreUnavailable

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).parent / "migrations"
_REVISIONS = sorted(path.name.partition("_")[0] for path in _MIGRATIONS.glob("versions/[0-9]*.py"))
"""Of all migrations, in their order: their files bear them."""
_MIGRATION_LOCK = 5_847_201_193


class SchemaState(StrEnum):
    """How a database's schema stands to this code's."""

    CURRENT = "current"
    EMPTY = "empty"
    OUTDATED = "outdated"
    NEWER = "newer"


def schema_state(url: str) -> SchemaState:
    """Compares a database with this code. Raises StoreUnavailable and UnreadableDatabaseError."""
    with _translated(), _engine(url) as engine, engine.connect() as connection:
        return _state(connection)


def require_current(url: str) -> None:
    """Raises SchemaTooNewError, SchemaOutdatedError, UnreadableDatabaseError, StoreUnavailable unless current."""
    state = schema_state(url)
    if state is SchemaState.NEWER:
        raise SchemaTooNewError
    if state is not SchemaState.CURRENT:
        raise SchemaOutdatedError


def migrate(url: str) -> SchemaState:
    """Brings a database to this code's schema, in one transaction; returns how it stood before.

    Safe beside itself. Raises SchemaTooNewError, UnreadableDatabaseError and StoreUnavailable.
    """
    with _translated(), _engine(url) as engine, engine.begin() as connection:
        if not is_embedded(url):
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        before = _state(connection)
        if before is SchemaState.NEWER:
            raise SchemaTooNewError
        if before is not SchemaState.CURRENT:
            from alembic import command

            command.upgrade(_config(connection), "head")
        return before


def drift(url: str) -> list[str]:
    """What a new migration would have to change to reach the tables as they are in the code."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with _engine(url) as engine, engine.connect() as connection, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipped unsupported reflection of expression-based index")
        options = {"include_object": having_dialect(connection.dialect.name)}
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        return [repr(change) for change in found]


def new_revision(url: str, message: str) -> None:
    """Writes a migration from the database's schema to the code's tables."""
    from alembic import command

    with _engine(url) as engine, engine.begin() as connection:
        command.revision(_config(connection), message, autogenerate=True, rev_id=f"{len(_REVISIONS) + 1:04}")


def having_dialect(dialect: str) -> Callable[..., bool]:
    """For Alembic: tells what a database with this dialect has of the tables in the code."""
    return lambda item, *_: item.info.get("dialect", dialect) == dialect


@contextmanager
def _engine(url: str) -> Iterator[Engine]:
    engine = migration_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError) as error:
        raise StoreUnavailable from error
    except exc.DatabaseError as error:
        raise UnreadableDatabaseError from error


def _state(connection: Connection) -> SchemaState:
    if not inspect(connection).has_table("alembic_version"):
        return SchemaState.EMPTY
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
    if revision is None:
        return SchemaState.EMPTY
    if revision == _REVISIONS[-1]:
        return SchemaState.CURRENT
    return SchemaState.OUTDATED if revision in _REVISIONS else SchemaState.NEWER


def _config(connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
