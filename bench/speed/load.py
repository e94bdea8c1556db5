"""Running a load against a server, and what the run says of both."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from speed.loadgen import LIVE, Load, Outcome
from speed.processes import BenchError, Cores, Process, Usage, busy_seconds, started
from speed.servers import ENVIRONMENT, Server
from speed.upstream import Upstream

FULL = 0.8
"""The share of their core from which on the generator and the provider may be what limits a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A load, and what became of it. `cpu` is the server's processor time in seconds, `base` what it used before,
    `peak` what it used while all streams were live, or at the end if they never were. `cpu_live` and `deltas_live`
    are for the time from then to the end of the first stream.

    `beside` is how much of a core the generator and the provider took together, `others` how much of the server's
    core was taken by processes that are none of this.
    """

    server: str
    outcome: Outcome
    cpu: float
    base: Usage
    peak: Usage
    beside: float
    others: float
    cpu_live: float
    deltas_live: int

    @property
    def per_delta_live(self) -> float:
        """The server's microseconds per delta while all streams are live. Raises BenchError if they never were."""
        if not self.deltas_live:
            raise BenchError(f"{self.server}: its streams were never all live: {self.outcome.failed}")
        return self.cpu_live / self.deltas_live * 1e6

    @property
    def per_delta(self) -> float:
        """The server's microseconds per delta that arrived, everything included."""
        if not self.outcome.deltas:
            raise BenchError(f"{self.server}: nothing arrived: {self.outcome.failed}")
        return self.cpu / self.outcome.deltas * 1e6

    @property
    def is_trusted(self) -> bool:
        """Whether what limited it was the server, as far as one can tell."""
        return self.beside <= FULL


class Generator:
    """The load generator's process."""

    def __init__(self, process: Process, server_core: int) -> None:
        self._process = process
        self._core = server_core

    def run(
        self, server: Server, load: Load, upstream: Upstream, when_live: Callable[[], None] | None = None
    ) -> Run:
        """Runs a load to its end. `when_live` is called once all streams are live."""
        before, provider, begun = server.usage(), upstream.usage(), time.monotonic()
        busy = busy_seconds(self._core)
        self._process.say(json.dumps(asdict(load)))
        said = self._process.line(load.seconds + 60)
        peak = server.usage()
        if when_live is not None and said == LIVE:
            when_live()
        deltas_live = int(self._process.line(load.seconds + 60))
        cpu_live = server.usage().cpu - peak.cpu
        outcome = Outcome.read(self._process.line(load.seconds + 60))
        after, wall = server.usage(), time.monotonic() - begun
        cpu = after.cpu - before.cpu
        return Run(
            server=server.name,
            outcome=outcome,
            cpu=cpu,
            base=before,
            peak=peak,
            beside=outcome.busy + (upstream.usage().cpu - provider.cpu) / wall,
            others=max(0.0, busy_seconds(self._core) - busy - cpu) / wall,
            cpu_live=cpu_live,
            deltas_live=deltas_live,
        )


@contextlib.contextmanager
def generator(cores: Cores) -> Iterator[Generator]:
    """Runs one until left."""
    with started("generator", [sys.executable, "-m", "speed.loadgen"], cores.others, ENVIRONMENT) as process:
        yield Generator(process, cores.server)
