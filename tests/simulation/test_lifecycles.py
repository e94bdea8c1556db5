"""Whatever is done with turns and threads, in whatever order: the record says what a plain model says."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from adapters.memory.store import MemoryStore
from adapters.sql.store import SqlStore
from core.ports.store import Store
from faults.figures import SIZE, sized
from simulation.lifecycles import Lifecycles

STEPS = 50
MEMORY = sized("LIFECYCLES", 400, 1_000, 21_000)
SQLITE = sized("LIFECYCLES_SQLITE", 50, 200, 2_000)
"""Runs of at most so many steps."""

LEAST = (
    "attached",
    "queued",
    "interrupted",
    "claimed first",
    "claimed again",
    "claimed to go on",
    "released",
    "appended",
    "cancelled",
    "cancelled while waiting",
    "deleted",
    "deleted at work",
    "expired",
    "ended completed",
    "ended incomplete",
    "ended failed",
    "not again: INTERRUPTED",
    "not again: TOOL_OUTCOME_UNKNOWN",
    "not again: BUDGET_EXCEEDED",
    "refused QueueFull",
    "refused TurnInProgress",
    "refused RequestIdReused",
    "refused LeaseLost",
)
"""What must have been exercised."""


def exercise(machine: type[Lifecycles], examples: int) -> Counter[str]:
    """Runs a machine. The same story every time, unless the run is large."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        derandomize=SIZE != "large",
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)
    print(", ".join(f"{name} {count}" for name, count in sorted(machine.covered.items())))
    return machine.covered


@pytest.mark.timeout(60 + MEMORY)
def test_lifecycles_in_memory() -> None:
    class InMemory(Lifecycles):
        covered: ClassVar[Counter[str]] = Counter()

        def open(self) -> Store:
            return MemoryStore(self.clock)

    covered = exercise(InMemory, MEMORY)
    assert not [what for what in LEAST if covered[what] < 3]


@pytest.mark.timeout(60 + SQLITE * 3)
def test_lifecycles_on_sqlite(sqlite_template: Path, tmp_path: Path) -> None:
    class OnSqlite(Lifecycles):
        covered: ClassVar[Counter[str]] = Counter()

        def open(self) -> Store:
            self.folder = tempfile.TemporaryDirectory(dir=tmp_path)
            file = Path(self.folder.name) / "record.db"
            shutil.copy(sqlite_template, file)
            return SqlStore(f"sqlite:///{file}", self.clock)

        def teardown(self) -> None:
            super().teardown()
            self.folder.cleanup()

    covered = exercise(OnSqlite, SQLITE)
    assert sum(covered.values()) > 10 * SQLITE
