"""Starts `vida-coach` with the scripted coach, and kills it at a named point. Nothing in the product knows of it.

FAULT_FOLDER is where the effects of tools and the strikes are noted. FAULT_POINT=NAME#N strikes when the point
NAME is passed for the N-th time (default 1): the process notes it in FAULT_FOLDER/strikes and kills itself with
SIGKILL.

The points of a change to the record are OPERATION.before-commit and OPERATION.after-commit: the statements have
been executed and the transaction is about to be committed; it has been, and nobody has been told.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dependency_injector import providers
from sqlalchemy.engine.default import DefaultDialect

from adapters.sql import repositories
from adapters.sql.repositories import TurnLog, Turns
from adapters.tools.registry import Registry
from core.model.events import TextDelta, ToolAnswered, ToolCalled
from core.model.turn import Turn, TurnState
from core.ports.turns import LogAppend
from entrypoints.cli.main import main as vida_coach
from entrypoints.container import Container
from faults import scripted

OPERATIONS = (
    "accept",  # a turn that is at work at once
    "enqueue",  # a turn that waits in its thread
    "first-text",
    "later-text",
    "state",  # of the provider
    "tool-call",
    "tool-answer",
    "ending",
    "claim",  # of a turn that waited, or whose process is gone
    "release",
    "delete",  # of a thread
)
COMMITS = ("before-commit", "after-commit")
TOOLS = ("tool.before-effect", "tool.after-effect")


class _Striker:
    def __init__(self, folder: Path, point: str) -> None:
        name, _, number = point.partition("#")
        self._folder, self._name, self._number = folder, name, int(number or "1")
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pass_by(self, point: str, subject: str) -> None:
        """Dies here if this is the point and the time."""
        if point != self._name:
            return
        with self._lock:
            self._passed[point] += 1
            if self._passed[point] == self._number:
                with (self._folder / "strikes").open("a") as strikes:
                    strikes.write(f"{point} {subject} {os.getpid()}\n")
                os.kill(os.getpid(), signal.SIGKILL)


class _Changes(threading.local):
    """What the transaction of this thread has done so far: operations and their subjects."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []


_changes = _Changes()


def _after(owner: type[Any], method: str, operations: Callable[..., Iterator[tuple[str, str]]]) -> None:
    """Notes what a call of a repository's method has done, by its result and its arguments."""
    original = getattr(owner, method)

    def noted(self: Any, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        _changes.done.extend(operations(result, *arguments, **named))
        return result

    setattr(owner, method, noted)


def _note_changes() -> None:
    spoken: set[str] = set()

    def added(_: object, turn: Turn, *arguments: Any, **named: Any) -> Iterator[tuple[str, str]]:
        yield ("enqueue" if turn.state is TurnState.ACCEPTED else "accept"), turn.id

    def appended(result: Any, batch: list[LogAppend]) -> Iterator[tuple[str, str]]:
        for append in batch:
            if append.turn_id not in getattr(result, "accepted", result):
                continue
            for kind, operation in ((ToolCalled, "tool-call"), (ToolAnswered, "tool-answer")):
                if any(isinstance(event, kind) for event in append.events):
                    yield operation, append.turn_id
            if any(isinstance(event, TextDelta) for event in append.events):
                yield ("later-text" if append.turn_id in spoken else "first-text"), append.turn_id
                spoken.add(append.turn_id)

    def claimed(_: object, turn: Turn, owner: str) -> Iterator[tuple[str, str]]:
        yield ("claim" if owner else "release"), turn.id

    def ended(_: object, turn: Turn) -> Iterator[tuple[str, str]]:
        yield "ending", turn.id

    def saved(_: object, thread_id: str, *arguments: Any) -> Iterator[tuple[str, str]]:
        yield "state", thread_id

    def deleted(_: object, thread_id: str, *arguments: Any, **named: Any) -> Iterator[tuple[str, str]]:
        yield "delete", thread_id

    _after(Turns, "add", added)
    _after(Turns, "save_claim", claimed)
    _after(Turns, "save_ending", ended)
    _after(TurnLog, "append", appended)
    _after(repositories.Threads, "save_provider_state", saved)
    _after(repositories.Threads, "delete", deleted)


def _watch_commits(striker: _Striker) -> None:
    dialect: Any = DefaultDialect
    commit, rollback = dialect.do_commit, dialect.do_rollback

    def do_commit(self: Any, connection: Any) -> None:
        done, _changes.done = _changes.done, []
        for operation, subject in done:
            striker.pass_by(f"{operation}.before-commit", subject)
        commit(self, connection)
        for operation, subject in done:
            striker.pass_by(f"{operation}.after-commit", subject)

    def do_rollback(self: Any, connection: Any) -> None:
        _changes.done.clear()
        rollback(self, connection)

    dialect.do_commit, dialect.do_rollback = do_commit, do_rollback


def main(arguments: list[str]) -> int:
    """Runs a command line of `vida-coach`."""
    folder = Path(os.environ["FAULT_FOLDER"])
    if point := os.environ.get("FAULT_POINT"):
        striker = _Striker(folder, point)
        _note_changes()
        _watch_commits(striker)
        scripted.before_effect = lambda turn_id: striker.pass_by("tool.before-effect", turn_id)
        scripted.after_effect = lambda turn_id: striker.pass_by("tool.after-effect", turn_id)
    Container.agent.override(providers.Object(scripted.ScriptedCoach()))
    Container.catalog.override(providers.Object(scripted.CATALOG))
    Container.tools.override(providers.Object(Registry(scripted.tools(scripted.Effects(folder / "effects")))))
    return vida_coach(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
