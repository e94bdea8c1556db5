"""Copies of an embedded database: made while it is written to, and put in its place."""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import mkstemp
from urllib.parse import quote

from adapters.sql.engines import require_database
from adapters.sql.errors import DatabaseFault, SchemaTooNewError, UnreadableCopyError, UnreadableDatabaseError
from adapters.sql.schema import SchemaState, schema_state
from core.model.errors import StoreUnavailable

_PAGES = 2_560
"""Pages between two words of progress: 10 MiB of the usual size."""
_BESIDE = ("-wal", "-journal", "-shm")
"""What belongs to a database, in files beside it."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
"""What a file system says that gives a file one name only."""

Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many."""


class DamagedBackupError(DatabaseFault):
    """A copy that is not whole."""

    def __init__(self) -> None:
        super().__init__("the copy is damaged: check the disks, and keep the copies that there are")


def back_up(database: Path, copy: Path, progress: Progress) -> int:
    """Copies a database as it is at one moment into one new file; returns its size in bytes.

    Whoever writes to the database is not held up. The copy is complete, checked and on the disk when it gets its
    name, and only its owner can read it. Raises FileExistsError, FileNotFoundError, UnreadableDatabaseError,
    DamagedBackupError, StoreUnavailable and OSError.
    """
    if copy.exists():
        raise FileExistsError(errno.EEXIST, "there is such a file", str(copy))
    with _beside(copy) as part:
        _copy(database, part, progress)
        _sync(part)
        size = part.stat().st_size
        _name(part, copy)
        _sync(copy.parent)
        return size


def restore(copy: Path, database: Path, progress: Progress) -> list[Path]:
    """Puts a copy in a database's place; returns where the files are now that were there.

    Nobody else may have the database open. The copy stays. Raises FileNotFoundError, UnreadableCopyError,
    DamagedBackupError, SchemaTooNewError, StoreUnavailable and OSError, and has changed nothing then.
    """
    database = database.resolve()  # what belongs to it lies beside the file itself, not beside a link to it
    with _beside(database) as part:
        try:
            _copy(copy, part, progress)
            state = schema_state(f"sqlite:///{quote(str(part))}")
        except UnreadableDatabaseError as error:
            raise UnreadableCopyError(copy) from error
        if state is SchemaState.NEWER:
            raise SchemaTooNewError
        if state is SchemaState.EMPTY:
            raise UnreadableCopyError(copy)
        _sync(part)
        with _moved_away(database) as moved:
            part.rename(database)
        _sync(database.parent)
        return moved


def _copy(source: Path, target: Path, progress: Progress) -> None:
    with _read(source) as reading, closing(sqlite3.connect(target, isolation_level=None)) as writing:
        reading.execute("BEGIN")
        (page,) = reading.execute("PRAGMA page_size").fetchone()
        reading.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # from here on it is one moment

        def tell(_: int, left: int, pages: int) -> None:
            progress((pages - left) * page, pages * page)

        try:
            reading.backup(writing, pages=_PAGES, progress=tell)
            writing.execute("PRAGMA journal_mode=DELETE")  # one file, with none beside it
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:  # only what is written needs room
                raise OSError(errno.ENOSPC, "no room for the copy", str(target.parent)) from error
            raise
        if writing.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
            raise DamagedBackupError


@contextmanager
def _moved_away(database: Path) -> Iterator[list[Path]]:
    """Renames a database and what belongs to it, to names that nothing has; back again if what follows fails."""
    number = 1
    while any(_replaced(database, number, end).exists() for end in ("", *_BESIDE)):
        number += 1
    moved: list[tuple[Path, Path]] = []
    try:
        # The log first: a database without its log is an older one, a log without its database would be taken for
        # another's.
        for end in (*_BESIDE, ""):
            file, other = database.with_name(database.name + end), _replaced(database, number, end)
            if file.exists():
                file.rename(other)
                moved.append((file, other))
        yield [other for _, other in moved]
    except BaseException:
        for file, other in reversed(moved):
            other.rename(file)
        raise


def _replaced(database: Path, number: int, end: str) -> Path:
    return database.with_name(f"{database.name}.replaced-{number}{end}")


@contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A new file in the same folder, under a name that is gone afterwards."""
    descriptor, name = mkstemp(prefix=f".{file.name}.", dir=file.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _name(part: Path, file: Path) -> None:
    """Gives a file its name. Raises FileExistsError where something has it by now."""
    try:
        os.link(part, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        file.touch(mode=0o600, exist_ok=False)  # renaming alone would take another's place
        part.rename(file)


def _sync(place: Path) -> None:
    """Has a file, or the names in a folder, on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _read(database: Path) -> Iterator[sqlite3.Connection]:
    """Opens a database to read, and neither writes to it nor checkpoints."""
    if not database.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(database))
    require_database(database)
    uri = f"file:{quote(str(database))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        try:
            yield connection
        except sqlite3.OperationalError as error:
            raise StoreUnavailable from error
        except sqlite3.DatabaseError as error:
            raise UnreadableDatabaseError from error
