"""Processes of a run: started on a core of their own, watched through /proc, stopped."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120.0
STOP_SECONDS = 20.0
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class BenchError(Exception):
    """Something could not be started or measured. The text is written for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: the server under test alone, everything else beside it."""

    server: int
    others: frozenset[int]

    @classmethod
    def pick(cls) -> Cores:
        """The first core that this process may use for the server, the rest for the others."""
        first, *rest = sorted(os.sched_getaffinity(0))
        if not rest:
            raise BenchError("one core is not enough: the server needs one of its own")
        return cls(first, frozenset(rest))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and all its children have used. `cpu` in seconds, to a hundredth; `rss` in bytes."""

    cpu: float
    rss: int
    descriptors: int


class Process:
    """A running process. What it prints is read line by line; what it says on stderr is kept for its obituary."""

    def __init__(self, running: subprocess.Popen[str], errors: Path) -> None:
        self.pid = running.pid
        self._running = running
        self._errors = errors
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def say(self, line: str) -> None:
        """Writes a line to its stdin."""
        assert self._running.stdin is not None
        self._running.stdin.write(line + "\n")
        self._running.stdin.flush()

    def line(self, seconds: float = START_SECONDS) -> str:
        """The next line of its stdout. Raises BenchError if it ends, or says nothing for so long."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise BenchError(f"{self._name} said nothing for {seconds:g} s: {self.last_words}") from None
        if line is None:
            raise BenchError(f"{self._name} ended: {self.last_words}")
        return line

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._running.poll() is None

    def usage(self) -> Usage:
        """What it has used so far, with all its children."""
        ticks = pages = descriptors = 0
        for pid in _tree(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a child that has just gone
                place = Path(f"/proc/{pid}")
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                # Own time, and that of children that have ended and were waited for.
                ticks += sum(int(field) for field in fields[11:15])
                pages += int((place / "statm").read_text().split()[1])
                descriptors += len(os.listdir(place / "fd"))  # noqa: PTH208 - the names alone, without a stat each
        if not ticks and not self.is_running():
            raise BenchError(f"{self._name} ended: {self.last_words}")
        return Usage(ticks / _TICK, pages * _PAGE, descriptors)

    def stop(self) -> None:
        """SIGTERM to it and its children, and SIGKILL to what is left."""
        if self.is_running():
            for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._running.wait(seconds)
                    break
        for stream in (self._running.stdin, self._running.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    @property
    def last_words(self) -> str:
        """The end of what it said on stderr."""
        words = self._errors.read_text(errors="replace").strip().splitlines()
        return " | ".join(words[-3:]) or "no word of why"

    @property
    def _name(self) -> str:
        return self._errors.stem

    def _listen(self) -> None:
        assert self._running.stdout is not None
        with contextlib.suppress(ValueError):  # closed by `stop`
            for line in self._running.stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


@contextlib.contextmanager
def started(
    name: str, command: Sequence[str], cores: frozenset[int], environment: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """Runs a command on these cores from its first instruction on, in a session of its own, until left."""
    with tempfile.TemporaryDirectory(prefix="vida-bench-") as folder:
        errors = Path(folder, name)
        with errors.open("w") as sink, on(cores):
            running = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env=clean_environment(environment or {}),
                start_new_session=True,
            )
        process = Process(running, errors)
        try:
            yield process
        finally:
            process.stop()


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of the service and of its provider, and with these."""
    ours = ("VIDA_", "OPENAI_", "OTEL_", "LITELLM_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | dict(more)


def busy_seconds(core: int) -> float:
    """How long a core has worked, for whomever, since the machine was started."""
    with Path("/proc/stat").open() as lines:
        fields = next(line.split() for line in lines if line.startswith(f"cpu{core} "))
    user, nice, system, _, _, *rest = map(int, fields[1:9])  # without idle and waiting
    return (user + nice + system + sum(rest)) / _TICK


@contextlib.contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """Moves this thread to these cores; processes and threads that it starts there stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _tree(root: int) -> list[int]:
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                todo += map(int, children.read_text().split())
    return found
