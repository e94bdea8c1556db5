"""Waits for a server end, whatever has become of it.

The server's own limits end a statement that takes too long, and the kernel's end a connection to a machine that is
gone. Neither helps against a server that is there and stands still: the driver would wait for its answer for ever.
"""

import os
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Engine, PoolProxiedConnection, event

_LOOKS = 8
"""How many times within its patience a watchdog looks."""


class Line:
    """The wire of one connection. Whoever waits for the server does so within it."""

    def __init__(self, descriptor: int) -> None:
        # Its own descriptor of the same socket: nobody else can close it and have its number used anew.
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._lock = threading.Lock()
        self._since: float | None = None
        self.is_cut = False

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._since = None

    def has_waited(self, seconds: float) -> bool:
        """Whether somebody has waited so long."""
        since = self._since
        return since is not None and time.monotonic() - since > seconds

    def cut(self) -> None:
        """Ends the connection: whoever waits in it gets an error at once."""
        with self._lock, suppress(OSError):  # it may be closed already
            self.is_cut = True
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Frees what it holds of a connection that has been closed."""
        with self._lock:
            self._socket.close()


class Watchdog:
    """Cuts the lines on which somebody waits for longer than its patience, in seconds."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._lines: set[Line] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="store-watchdog", daemon=True)

    def watch(self, engine: Engine) -> None:
        """Watches every connection that a PostgreSQL engine opens, from its first statement on."""

        @event.listens_for(engine, "do_connect")
        def connect(dialect: Any, record: Any, arguments: Any, named: Any) -> Any:
            connection = dialect.connect(*arguments, **named)
            record.info["line"] = line = Line(connection.fileno())
            line.__enter__()  # the library's own first statements: they end where the line is entered again
            with self._lock:
                self._lines.add(line)
                if not self._thread.is_alive() and not self._closed.is_set():
                    self._thread.start()
            return connection

        @event.listens_for(engine, "close")
        def close(_: Any, record: Any) -> None:
            if line := record.info.pop("line", None):
                self._forget(line)

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(self._patience / _LOOKS):
            with self._lock:
                late = [line for line in self._lines if line.has_waited(self._patience)]
            for line in late:
                line.cut()
                self._forget(line)

    def _forget(self, line: Line) -> None:
        with self._lock:
            self._lines.discard(line)
        line.close()


_NO_LINE: AbstractContextManager[None] = nullcontext()


def line_of(connection: Connection | PoolProxiedConnection) -> AbstractContextManager[None]:
    """What to be within while waiting for a connection's server; nothing where there is none."""
    line: AbstractContextManager[None] = connection.info.get("line", _NO_LINE)
    return line


def is_cut(line: AbstractContextManager[None]) -> bool:
    """Whether a watchdog has cut it."""
    return isinstance(line, Line) and line.is_cut
