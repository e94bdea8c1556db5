"""A real server process: started, watched until SERVING, killed."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_SERVE = "import sys; from entrypoints.cli.main import main; sys.exit(main(['serve', '--listen', '127.0.0.1:0']))"
_SOURCE = Path(__file__).resolve().parents[2] / "src"


class ServerProcess:
    """`vida-coach serve` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def kill(self) -> None:
        """kill -9."""
        self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        return await self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None


async def start(log: Path, **settings: str) -> ServerProcess:
    """Starts a server and waits until it says where it listens. Its log lines go to a file."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "VIDA_"))}
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _SERVE,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            env={**environ, "PYTHONPATH": str(_SOURCE), **settings},
        )
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode().strip()
    if not line.startswith("listening on "):
        await process.wait()
        raise AssertionError(f"the server did not start, see {log}")
    return ServerProcess(process, line.removeprefix("listening on "))


@asynccontextmanager
async def server(log: Path, **settings: str) -> AsyncIterator[ServerProcess]:
    """A server that is gone afterwards."""
    running = await start(log, **settings)
    try:
        yield running
    finally:
        if running.alive:
            await running.kill()
