"""Several servers on one database, and the addresses at which they can be asked."""

import asyncio
import random
from pathlib import Path

from faults.figures import FIGURES
from faults.process import ServerProcess, start

LEASE = 1.0
BUDGET = 20.0
DEADLINE = BUDGET + LEASE + 15
"""Seconds within which a turn in these tests must have ended, whatever happens to the servers."""


class Cluster:
    """Server processes. `addresses` holds those that clients may try, in no order that means anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[ServerProcess] = []
        self.addresses: list[str] = []

    async def start(
        self, database_url: str, point: str = "", listen: str = "127.0.0.1:0", **settings: str
    ) -> ServerProcess:
        """Starts one more server. One that is killed at its point before it listens is not among the addresses."""
        defaults = {"VIDA_DATABASE_URL": database_url, "VIDA_LEASE": str(LEASE), "VIDA_TURN_BUDGET": str(BUDGET)}
        server = await start(self.folder, point, listen, **{**defaults, **settings})
        self.servers.append(server)
        if server.address:
            self.addresses.append(server.address)
        return server

    def hide(self, server: ServerProcess) -> None:
        """Lets clients try it no more."""
        if server.address in self.addresses:
            self.addresses.remove(server.address)

    async def kill(self, server: ServerProcess) -> None:
        """kill -9; then clients try it no more."""
        await server.kill()
        self.forget(server)

    def forget(self, server: ServerProcess) -> None:
        """Drops a server that is gone."""
        self.hide(server)
        self.servers.remove(server)

    def another(self, address: str, chance: random.Random) -> str:
        """An address to try after `address`: another one if there is one. Empty if there is none at all."""
        others = [each for each in self.addresses if each != address] or self.addresses
        return chance.choice(others) if others else ""

    def strikes(self) -> list[list[str]]:
        """Where processes killed themselves: point, subject, process id."""
        file = self.folder / "strikes"
        return [line.split(" ") for line in file.read_text().splitlines()] if file.exists() else []

    async def struck(self, server: ServerProcess, point: str) -> None:
        """Waits until a server has killed itself, and counts that it did so at its point."""
        await server.gone()
        self.forget(server)
        name = point.partition("#")[0]
        assert [name, str(server.pid)] in [[strike[0], strike[2]] for strike in self.strikes()], (
            "it died elsewhere"
        )
        FIGURES.add("kill points", {f"at {name}": 1})

    async def aclose(self) -> None:
        """Kills what is left."""
        for server in self.servers:
            if server.alive:
                server.go_on()
        await asyncio.gather(*(server.kill() for server in self.servers))
