"""PostgreSQL for tests: databases with the schema, and a server that can be stopped, started and frozen."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg

from adapters.sql.schema import migrate

_CONTROL = str(Path(__file__).with_name("control_postgres.py"))


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server and a migrated database in it that others are copied from."""

    url: str
    template: str

    def create(self, name: str) -> str:
        """A new database with the current schema."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{self.template}"'.encode())
        return self.sibling(name)

    def drop(self, name: str) -> None:
        """Removes a database, whoever is still connected."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())

    def empty(self, name: str) -> str:
        """A new database without a schema."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.sibling(name)

    def sibling(self, name: str) -> str:
        """The URL of another database of the server."""
        head, _, query = self.url.partition("?")
        return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


class Spares:
    """Databases that are made ahead while tests run, and removed behind them, by a thread."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._names = (f"vida_{os.getpid()}_{number}" for number in count())
        self._worker = ThreadPoolExecutor(1, "spares")
        self._ahead = self._make()
        self._removals: list[Future[None]] = []

    def _make(self) -> "Future[tuple[str, str]]":
        name = next(self._names)
        return self._worker.submit(lambda: (name, self._postgres.create(name)))

    @contextmanager
    def one(self) -> Iterator[str]:
        """The URL of a database of one's own."""
        name, url = self._ahead.result()
        self._ahead = self._make()
        try:
            yield url
        finally:
            self._removals.append(self._worker.submit(self._postgres.drop, name))

    def close(self) -> None:
        """Removes the last ones. Raises what went wrong behind a test."""
        self._postgres.drop(self._ahead.result()[0])
        self._worker.shutdown()
        for removal in self._removals:
            removal.result()


def templated(url: str) -> Postgres:
    """A server with a migrated database for copies."""
    postgres = Postgres(url, f"vida_template_{os.getpid()}")
    postgres.drop(postgres.template)
    migrate(postgres.empty(postgres.template))
    return postgres


class OwnPostgres:
    """PostgreSQL from the wheel in a folder of its own. It survives a crash of its own if it is `durable`."""

    def __init__(self, *, durable: bool = True) -> None:
        # Not below pytest's own folder, which other test runs on the machine tidy.
        self._place = tempfile.TemporaryDirectory(prefix="vida-pg-", ignore_cleanup_errors=True)
        self._folder = Path(self._place.name)
        self._frozen: list[int] = []
        self._running = False
        self._fsync = "on" if durable else "off"
        self._control("init")
        self.start()
        self.databases: Postgres = templated(f"postgresql://postgres:@/postgres?host={self._folder}")
        with psycopg.connect(self.databases.url) as connection:
            assert connection.execute("SHOW fsync").fetchone() == (self._fsync,)

    def create(self, name: str) -> str:
        """A new database with the current schema; returns its URL."""
        return self.databases.create(name)

    def drop(self, name: str) -> None:
        """Removes a database."""
        self.databases.drop(name)

    def start(self) -> None:
        """Starts the server, after recovery if it crashed."""
        self._control(
            "start", "-o", f'-h "" -k {self._folder} -c fsync={self._fsync}', "-l", str(self._folder / "log")
        )
        self._running = True

    def stop(self, mode: str) -> None:
        """Stops the server: `fast` ends all sessions, `immediate` is a crash."""
        self._control("stop", "-m", mode)
        self._running = False

    def demote(self) -> None:
        """Starts it anew as a standby: it can be read, until it is promoted."""
        self.stop("fast")
        (self._folder / "standby.signal").touch()
        self.start()

    def promote(self) -> None:
        """Makes a standby take writes."""
        with psycopg.connect(self.databases.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)

    def freeze(self) -> None:
        """SIGSTOP to all its processes, the one that makes new ones first: nothing answers, nothing breaks."""
        head = int((self._folder / "postmaster.pid").read_text().splitlines()[0])
        os.kill(head, signal.SIGSTOP)
        self._frozen = [head, *_children(head)]
        for pid in self._frozen[1:]:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        for pid in reversed(self._frozen):
            os.kill(pid, signal.SIGCONT)
        self._frozen = []

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen for a while."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def mend(self) -> None:
        """Makes it run, whatever was done to it."""
        self.thaw()
        if not self._running:
            self.start()

    def close(self) -> None:
        """Removes it."""
        self.thaw()
        if self._running:
            self.stop("immediate")
        self._place.cleanup()

    def _control(self, *arguments: str) -> None:
        with (self._folder.parent / f"{self._folder.name}.out").open("w+") as output:
            try:
                done = subprocess.run(
                    [sys.executable, _CONTROL, str(self._folder), *arguments],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
                output.seek(0)
                assert done.returncode == 0, output.read()
            finally:
                Path(output.name).unlink()


def _children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just gone
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found
