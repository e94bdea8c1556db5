"""Real server processes: started, watched until SERVING, stopped in every way there is."""

import asyncio
import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import entrypoints
import faults


def pythonpath() -> str:
    """Where a process of the tests finds the product and the tests."""
    return os.pathsep.join(str(Path(package.__path__[0]).parent) for package in (entrypoints, faults))


class ServerProcess:
    """`vida-coach serve` with the scripted coach, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    def pause(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    @property
    def memory(self) -> int:
        """MiB that it holds in memory."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["VmRSS"].split()[0]) // 1024

    @property
    def sockets(self) -> int:
        """How many sockets it has open."""
        count = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                count += descriptor.readlink().name.startswith("socket:")
        return count

    def limit_file_size(self, size: int) -> None:
        """Lets no file of the process grow beyond `size` bytes: the disk is full; -1 makes room again."""
        hard = resource.prlimit(self.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, hard))

    def ask_to_stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Sends it a signal to stop by."""
        if self.alive:
            self._process.send_signal(by)

    async def gone(self) -> int:
        """Waits until the process is gone; returns the exit code, negative for a signal."""
        return await self._process.wait()

    async def kill(self) -> None:
        """kill -9."""
        if self.alive:
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()

    async def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        self.ask_to_stop()
        return await self.gone()


async def start(folder: Path, point: str = "", listen: str = "127.0.0.1:0", **settings: str) -> ServerProcess:
    """Starts a server and waits until it says where it listens. Its log lines go to `folder`/log.

    With `point` it kills itself there; one that does so before it listens has the address "".
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "VIDA_"))}
    faulty = {"FAULT_FOLDER": str(folder), "FAULT_POINT": point, "PYTHONPATH": pythonpath()}
    with (folder / "log").open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "faults.points", "serve", "--listen", listen),
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            env={**environ, **faulty, **settings},
        )
    assert process.stdout is not None
    # The only line that it ever prints: the pipe can't fill up, and the process never waits for us to read.
    line = (await process.stdout.readline()).decode().strip()
    if not line.startswith("listening on "):
        code = await process.wait()
        if not point or code != -signal.SIGKILL:
            raise AssertionError(f"the server did not start: {(folder / 'log').read_text()[-2000:]}")
    return ServerProcess(process, line.removeprefix("listening on "))


@asynccontextmanager
async def attacked(address: str, attack: str, count: int) -> AsyncIterator[Counter[str]]:
    """Has a hostile client do what it does, and hold on to what it has until left. Yields what it counted."""
    enemy = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "faults.hostile", address, attack, str(count)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": pythonpath()},
    )
    try:
        assert enemy.stdout is not None
        yield Counter(json.loads(await enemy.stdout.readline()))
    finally:
        enemy.kill()
        await enemy.wait()
