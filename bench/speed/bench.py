"""A run of the suite: its cores, its folder, the model and the load generator, which all measures share."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from durability import file_system

from speed.load import Generator, Run, generator
from speed.loadgen import Load
from speed.processes import BenchError, Cores
from speed.servers import SERVERS, Missing, Server, Surroundings
from speed.upstream import Upstream, upstream

PACE = 25.0
"""Deltas a second of a stream that is spoken at the pace of a model."""
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
"""File systems on which nothing is durable."""
_WARM_UP = 20
_STALL = 2.0
"""Seconds for which the load generator may not come to run. A run with a longer pause says nothing."""
_TRIES = 3
_QUIET = 300.0
"""Seconds that replies of an earlier run may take to end."""
_UNKNOWN_METHOD = "/none"
_UNIMPLEMENTED = "status 12"


def say(text: str) -> None:
    """Tells the person how far it is."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Field:
    """The servers of a measure that run, and why others do not."""

    servers: dict[str, Server]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measures share. `quick` asks for a smoke test, with less of everything."""

    cores: Cores
    folder: Path
    upstream: Upstream
    generator: Generator
    rounds: int
    quick: bool
    others: list[float] = field(default_factory=list)
    """Of each run, the share of the server's core that strangers took."""

    @contextlib.contextmanager
    def field(self, *names: str, database: str | None = None) -> Iterator[Field]:
        """Starts servers, warms them up, and stops them. The service has a new record, or the one given."""
        with contextlib.ExitStack() as stack:
            found = Field({})
            for name in names:
                place = stack.enter_context(self.room())
                around = Surroundings(frozenset([self.cores.server]), self.upstream, place, database)
                try:
                    found.servers[name] = server = stack.enter_context(SERVERS[name](around))
                except Missing as missing:
                    found.missing[name] = str(missing)
                    continue
                warm = self.run(server, streams=_WARM_UP, deltas=10, pace=PACE, in_flight=5)
                if warm.outcome.failed:
                    raise BenchError(f"{name} can't be measured: {warm.outcome.failed}")
            yield found

    @contextlib.contextmanager
    def room(self) -> Iterator[Path]:
        """A folder on the disk, removed at the end."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def run(
        self,
        server: Server,
        *,
        streams: int,
        deltas: int,
        pace: float | None,
        ramp: float = 0.0,
        in_flight: int | None = None,
        seconds: float | None = None,
        method: str | None = None,
        threads: Sequence[tuple[str, str]] = (),
        when_live: Callable[[], None] | None = None,
    ) -> Run:
        """Runs a load: see Load. Unless told otherwise it may take three times as long as it should, plus 60 s."""
        planned = ramp + (deltas / pace if pace else 0.0) * (streams / in_flight if in_flight else 1)
        self.upstream.answer(deltas, pace)
        load = Load(
            address=server.address,
            protocol=server.protocol,
            streams=streams,
            deltas=deltas,
            pace=pace,
            ramp=ramp,
            in_flight=in_flight,
            seconds=60 + 3 * planned if seconds is None else seconds,
            threads=threads,
            **({} if method is None else {"method": method}),
        )
        for _ in range(1 if when_live else _TRIES):
            self.upstream.await_quiet(_QUIET)  # a turn of the service goes on when its caller is gone
            found = self.generator.run(server, load, self.upstream, when_live)
            if not threads:
                self.upstream.forget()
                self.upstream.answer(deltas, pace)
            self.others.append(found.others)
            if found.outcome.stall <= _STALL:
                return found
            say(f"  {server.name}: the machine stood still for {found.outcome.stall:.1f} s, once more")
        raise BenchError("the machine stands still: somebody stops its processes, or it is far too busy")

    def turns(self, found: Field, rounds: int | None = None) -> Iterator[Server]:
        """Every server in every round; the order rotates, so that a busy machine disturbs all of them alike."""
        for number in range(self.rounds if rounds is None else rounds):
            first = number % len(found.servers)
            servers = list(found.servers.values())
            yield from servers[first:] + servers[:first]

    def direct(self) -> Server:
        """The model itself, without a server in between."""
        return Server("direct", "sse", self.upstream.address, self.upstream.process)


@contextlib.contextmanager
def prepared(folder: Path, rounds: int, *, quick: bool) -> Iterator[Bench]:
    """Starts what all measures share. Raises BenchError where nothing is durable."""
    kind = file_system(folder)
    if kind in IN_MEMORY:
        raise BenchError(f"{folder} is {kind}, where nothing is durable; name a disk with --folder")
    cores = Cores.pick()
    with (
        tempfile.TemporaryDirectory(prefix=".bench-", dir=folder, ignore_cleanup_errors=True) as name,
        upstream(cores.others) as model,
        generator(cores) as load,
    ):
        bench = Bench(cores, Path(name), model, load, rounds, quick)
        _check(bench)
        yield bench


def _check(bench: Bench) -> None:
    """The generator's own reading of statuses, against a server whose answer is known."""
    with bench.field("null") as found:
        refused = bench.run(found.servers["null"], streams=3, deltas=1, pace=None, method=_UNKNOWN_METHOD)
    if refused.outcome.failed != {_UNIMPLEMENTED: 3}:
        raise BenchError(f"the load generator took a refusal for {refused.outcome.failed}")
