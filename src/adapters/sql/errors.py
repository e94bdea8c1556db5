"""What can be wrong with a database as a whole, and what a database's errors mean."""

import sqlite3
from pathlib import Path

import psycopg
from sqlalchemy import exc

from core.model.errors import StoreBusy, StoreUnavailable
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
_SERIALIZATION = "40001"
_UNMET = "22012"
"""Division by zero: what a statement counts on is not so."""
_HELD = frozenset({"55P03", "40P01"})
"""A lock that somebody else holds, or would for ever: one change's trouble, not its group's."""
_TOO_SLOW = "57014"
"""A statement that took too long: the same."""
_OVER = frozenset({"25006", "25P03", "25P04", "0A000"})
"""What PostgreSQL says where it is a standby, or may only be read; where it ends a session for standing still;
where a migration has changed what a prepared statement returns. In another session all may be well."""


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


class UnreadableCopyError(UnreadableDatabaseError):
    """A file that was to take a database's place is none, or a damaged one."""

    def __init__(self, copy: Path) -> None:
        DatabaseFault.__init__(self, f"{copy} is no database, or a damaged one: name a copy made by `backup`")


class UnusableFileError(DatabaseFault):
    """An embedded database, or its lock, can't be opened and written. `why` is the system's own word."""

    def __init__(self, file: Path, error: OSError) -> None:
        self.why = error.strerror or type(error).__name__
        super().__init__(
            f"{file} can't be used: {self.why}. VIDA_DATABASE_URL must name a file that this user may read and "
            "write, in a folder that it may write, on a disk with room"
        )


class SchemaOutdatedError(DatabaseFault):
    """A server database must be migrated first."""

    def __init__(self) -> None:
        super().__init__("the database does not have this version's schema: run `vida-coach migrate`")


class StoreFaultError(Exception):
    """The database refused a statement. Names the kind of refusal only: its text may hold what a user wrote."""


def named(error: BaseException | None) -> str:
    """What kind of error a driver has raised, in its own code: no text, which may hold what a user wrote."""
    if error is None:
        return ""
    cause = _cause(error)
    return getattr(cause, "sqlite_errorname", None) or _sqlstate(cause) or type(cause).__name__


def is_outage(error: BaseException) -> bool:
    """Whether the database does not answer, or can't do its work as a whole."""
    cause = _cause(error)
    state = _sqlstate(cause)
    if state in _HELD or state in (_SERIALIZATION, _TOO_SLOW):
        return False
    return isinstance(cause, _OUTAGES) or state in _OVER


def is_over(error: BaseException) -> bool:
    """Whether nothing more can be done in this session, even if its connection is there."""
    return _sqlstate(_cause(error)) in _OVER


def collided(error: BaseException) -> bool:
    """Whether another process was faster: unique violation, unmet condition, serialization failure."""
    cause = _cause(error)
    return _is_violation(cause) or _sqlstate(cause) == _SERIALIZATION


def is_held(error: BaseException) -> bool:
    """Whether another process holds what is needed, and may give it up in a moment."""
    return _sqlstate(_cause(error)) in _HELD


def translated(error: BaseException) -> Exception:
    """The error of the port that says the same."""
    if is_outage(error):
        return StoreUnavailable()
    cause = _cause(error)
    if _is_violation(cause):
        return Conflict()
    if is_held(error) or _sqlstate(cause) in (_SERIALIZATION, _TOO_SLOW):
        return StoreBusy()
    return StoreFaultError(type(cause).__name__)


def _is_violation(cause: BaseException) -> bool:
    return isinstance(cause, _VIOLATIONS) or _sqlstate(cause) == _UNMET


def _cause(error: BaseException) -> BaseException:
    """What the driver said."""
    orig = getattr(error, "orig", None)
    return orig if isinstance(orig, BaseException) else error


def _sqlstate(error: BaseException) -> str | None:
    state: str | None = getattr(error, "sqlstate", None)
    return state
