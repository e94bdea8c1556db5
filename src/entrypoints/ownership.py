"""Who owns an embedded database: one process, for as long as it holds a lock beside the file."""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters.sql.engines import require_database
from adapters.sql.errors import UnusableFileError

_MAX_SOCKET_PATH = 100
"""Bytes; the kernel's limit is 108 with the final NUL."""
_SPECIAL = frozenset("%?#")
"""gRPC reads the path as a part of a URI."""
_POLL_SECONDS = 0.05
_LASTING = frozenset({"serve", "chat"})
"""Roles whose end is not worth waiting for."""


class DatabaseOwnedError(Exception):
    """Another process owns the database. `role` is the command that it runs, empty if it does not say."""

    def __init__(self, role: str, pid: int) -> None:
        holder = f"`vida-coach {role}`{f' (process {pid})' if pid else ''}" if role else "another process"
        super().__init__(f"the database is in use by {holder}")
        self.role = role
        self.pid = pid


class Ownership:
    """A lock that the kernel frees when its holder is gone, kill -9 included. Use as a context manager."""

    def __init__(self, database: Path, role: str, wait_seconds: float = 0.0) -> None:
        self._database = database = database.resolve()  # one lock by whatever name
        self._path = database.with_name(database.name + ".lock")
        self._role = role
        self._wait = wait_seconds
        self._descriptor = -1

    def take(self) -> None:
        """Takes the lock, waiting for a short command that holds it.

        Raises DatabaseOwnedError, UnreadableDatabaseError where the file is no database, and
        UnusableFileError where it, or the lock beside it, can't be opened and written.
        """
        try:
            self._take()
        except OSError as error:
            raise UnusableFileError(self._database, error) from error

    def _take(self) -> None:
        require_database(self._database)
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + self._wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                role, pid = self._holder(descriptor)
                if role in _LASTING or time.monotonic() >= deadline:
                    os.close(descriptor)
                    raise DatabaseOwnedError(role, pid) from None
                time.sleep(_POLL_SECONDS)
            else:
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"role": self._role, "pid": os.getpid()}).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Gives the lock back."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @staticmethod
    def _holder(descriptor: int) -> tuple[str, int]:
        try:
            holder = json.loads(os.pread(descriptor, 1024, 0))
            return str(holder["role"]), int(holder["pid"])
        except (ValueError, KeyError, TypeError):
            return "", 0  # it has only just taken the lock, or is leaving


def socket_path(database: Path) -> Path:
    """Where the owner of a database listens: beside the file, or in a private folder if that name won't do."""
    database = database.resolve()
    beside = database.with_name(database.name + ".sock")
    if len(os.fsencode(beside)) <= _MAX_SOCKET_PATH and not _SPECIAL & set(str(beside)):
        return beside
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"vida-coach-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{folder} must belong to this user alone")
    return folder / f"{hashlib.sha256(os.fsencode(database)).hexdigest()[:24]}.sock"
