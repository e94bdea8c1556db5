"""What the suites of faults share: a PostgreSQL that may be broken, and the figures at the end."""

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator

import pytest

from faults.cluster import Cluster
from faults.figures import FIGURES, SIZE
from own_postgres import OwnPostgres

LOG_LINES = 200
"""Lines of the servers' log that are shown of a test that failed: the last ones."""
LONG = {
    "test_a_release_at_a_stop",
    "test_a_claim_by_recovery",
    "test_a_stop_without_a_database",
    "test_nobody_waits_for_slow_readers",
    "test_what_was_acknowledged_before_a_backup_is_in_it",
    "test_what_turns_take_is_given_back",
    "test_kills_behind_a_channel_that_shares_out_its_calls",
    "test_kills_behind_a_proxy",
    "test_a_proxy_sends_nothing_to_a_replica_that_drains",
    "test_no_canary_is_left_whatever_strikes",
}
"""Tests that a tiny run does without."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long tests out of a tiny run, and says so."""
    if SIZE == "tiny":
        left_out = [
            item for item in items if getattr(item, "originalname", "") in LONG and "faults" in item.path.parts
        ]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="module")
def breakable() -> Iterator[OwnPostgres]:
    """A PostgreSQL server of this module's own."""
    server = OwnPostgres()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def broken_url(breakable: OwnPostgres, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A database of this test's own in the PostgreSQL server that may be broken. It runs again afterwards."""
    name = f"vida_{abs(hash(request.node.nodeid)):x}"
    yield await asyncio.to_thread(breakable.create, name)
    await asyncio.to_thread(breakable.mend)
    await asyncio.to_thread(breakable.drop, name)


@pytest.fixture
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Server processes, all gone afterwards."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield made
    finally:
        await made.aclose()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows what the servers of a failed test had to say."""
    report = yield
    made = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(made, Cluster):
        log = made.folder / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        report.sections.append(("servers", "\n".join(lines[-LOG_LINES:])))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was found."""
    if FIGURES.suites and SIZE != "tiny":
        for line in FIGURES.report():
            terminalreporter.write_line(line)
