"""What can be wrong with a database as a whole, and what a database's errors mean."""

import sqlite3

import psycopg
from sqlalchemy import exc

from core.model.errors import StoreUnavailable
from core.ports.store import Conflict

FAULTS = (exc.SQLAlchemyError, sqlite3.Error, psycopg.Error)
"""Whatever a database, its driver or the library may raise."""

_OUTAGES = (
    exc.TimeoutError,
    sqlite3.OperationalError,
    sqlite3.InterfaceError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
)
_VIOLATIONS = (sqlite3.IntegrityError, psycopg.IntegrityError)
_COLLISIONS = frozenset({"40001", "40P01"})
"""A serialization failure, a deadlock."""
_OUT_OF_TIME = frozenset({"55P03", "57014"})
"""A lock or a statement that took too long: one change's trouble, not its group's."""
_READ_ONLY = "25006"
"""What a PostgreSQL says that is a standby, or has just become one."""


class DatabaseFault(Exception):
    """The database can't be used as it is. The text says why and what to do."""


class SchemaTooNewError(DatabaseFault):
    """It was written by a later version of this code, which alone may open it."""

    def __init__(self) -> None:
        super().__init__("the database is newer than this version of vida-coach: run the newer version")


class UnreadableDatabaseError(DatabaseFault):
    """It is no database, or a damaged one. Nothing of it was changed."""

    def __init__(self) -> None:
        super().__init__("VIDA_DATABASE_URL names something that is no database, or a damaged one: check it")


class SchemaOutdatedError(DatabaseFault):
    """A server database must be migrated first."""

    def __init__(self) -> None:
        super().__init__("the database does not have this version's schema: run `vida-coach migrate`")


class StoreFaultError(Exception):
    """The database refused a statement. Names the kind of refusal only: its text may hold what a user wrote."""


def is_outage(error: BaseException) -> bool:
    """Whether the database does not answer, or can't do its work as a whole."""
    cause = _cause(error)
    return isinstance(cause, _OUTAGES) or _sqlstate(cause) == _READ_ONLY


def ends_group(error: BaseException) -> bool:
    """Whether nothing can be done any more in the same transaction, whatever is asked for."""
    return is_outage(error) and not collided(error) and _sqlstate(_cause(error)) not in _OUT_OF_TIME


def collided(error: BaseException) -> bool:
    """Whether another process was faster: unique violation, deadlock, serialization failure."""
    cause = _cause(error)
    return isinstance(cause, _VIOLATIONS) or _sqlstate(cause) in _COLLISIONS


def translated(error: BaseException) -> Exception:
    """The error of the port that says the same."""
    if is_outage(error):
        return StoreUnavailable()
    cause = _cause(error)
    if isinstance(cause, _VIOLATIONS):
        return Conflict()
    return StoreFaultError(type(cause).__name__)


def _cause(error: BaseException) -> BaseException:
    """What the driver said."""
    orig = getattr(error, "orig", None)
    return orig if isinstance(orig, BaseException) else error


def _sqlstate(error: BaseException) -> str | None:
    state: str | None = getattr(error, "sqlstate", None)
    return state
