"""The schema: what version a database has, and how it is brought to ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, exc, text

from adapters.sql.engines import is_embedded, migration_engine
from adapters.sql.errors import SchemaOutdatedError, SchemaTooNewError, UnreadableDatabaseError
from adapters.sql.tables import metadata
from core.model.errors import StoreUnavailable

_MIGRATIONS = Path(__file__).parent / "migrations"
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
            command.upgrade(_config(connection), "head")
        return before


def drift(url: str) -> list[str]:
    """What a new migration would have to change to reach the tables as they are in the code."""
    with _engine(url) as engine, engine.connect() as connection:
        return [repr(change) for change in compare_metadata(MigrationContext.configure(connection), metadata)]


def new_revision(url: str, message: str) -> None:
    """Writes a migration from the database's schema to the code's tables."""
    with _engine(url) as engine, engine.begin() as connection:
        command.revision(_config(connection), message, autogenerate=True)


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
    revision = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory(str(_MIGRATIONS))
    if revision is None:
        return SchemaState.EMPTY
    if revision == script.get_current_head():
        return SchemaState.CURRENT
    known = {known.revision for known in script.walk_revisions()}
    return SchemaState.OUTDATED if revision in known else SchemaState.NEWER


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
