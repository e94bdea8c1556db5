"""Copies of an embedded database: made while it is written to, and put in its place."""

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
        raise FileExistsError(17, "there is such a file", str(copy))
    with _made(copy) as part:
        _copy(database, part, progress)
        return part.stat().st_size


def restore(copy: Path, database: Path, progress: Progress) -> list[Path]:
    """Puts a copy in a database's place; returns where the files are now that were there.

    Nobody else may have the database open. The copy stays. Raises FileNotFoundError, UnreadableCopyError,
    DamagedBackupError, SchemaTooNewError, StoreUnavailable and OSError, and has changed nothing then.
    """
    moved: list[Path] = []
    with _made(database, lambda: moved.extend(_move_away(database))) as part:
        try:
            _copy(copy, part, progress)
            state = schema_state(f"sqlite:///{quote(str(part))}")
        except UnreadableDatabaseError as error:
            raise UnreadableCopyError(copy) from error
        if state is SchemaState.NEWER:
            raise SchemaTooNewError
        if state is SchemaState.EMPTY:
            raise UnreadableCopyError(copy)
    return moved


def _copy(source: Path, target: Path, progress: Progress) -> None:
    with _read(source) as reading, closing(sqlite3.connect(target, isolation_level=None)) as writing:
        reading.execute("BEGIN")
        (page,) = reading.execute("PRAGMA page_size").fetchone()
        reading.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # from here on it is one moment

        def tell(_: int, left: int, pages: int) -> None:
            progress((pages - left) * page, pages * page)

        reading.backup(writing, pages=_PAGES, progress=tell)
        writing.execute("PRAGMA journal_mode=DELETE")  # one file, with none beside it
        if writing.execute("PRAGMA quick_check").fetchall() != [("ok",)]:
            raise DamagedBackupError


def _move_away(database: Path) -> list[Path]:
    """Renames a database and what belongs to it, to names that nothing has."""
    number = 1
    while any(database.with_name(f"{database.name}.replaced-{number}{end}").exists() for end in ("", "-wal")):
        number += 1
    moved = []
    # The log first: a database without its log is an older one, a log without its database would be taken for
    # another's.
    for end in ("-wal", "-shm", ""):
        file = database.with_name(database.name + end)
        if file.exists():
            moved.append(file.rename(database.with_name(f"{database.name}.replaced-{number}{end}")))
    return moved


@contextmanager
def _made(file: Path, make_room: Callable[[], None] | None = None) -> Iterator[Path]:
    """A file beside it that takes its name if all goes well, and is gone if not.

    It is on the disk before anything else is touched: only then `make_room` takes away what has the name.
    """
    descriptor, name = mkstemp(prefix=f".{file.name}.", dir=file.parent)
    part = Path(name)
    try:
        yield part
        os.fsync(descriptor)
        if make_room is not None:
            make_room()
            part.rename(file)
        else:
            os.link(part, file)
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


@contextmanager
def _read(database: Path) -> Iterator[sqlite3.Connection]:
    """Opens a database to read, and neither writes to it nor checkpoints."""
    if not database.exists():
        raise FileNotFoundError(2, "there is no such file", str(database))
    require_database(database)
    uri = f"file:{quote(str(database))}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        try:
            yield connection
        except sqlite3.OperationalError as error:
            raise StoreUnavailable from error
        except sqlite3.DatabaseError as error:
            raise UnreadableDatabaseError from error
