"""Where the service's processor time goes: of a delta among many streams, and of a short turn.

One command starts everything itself, as `make bench` does: the service on one core, the model and the load
generator on the others. The service samples its own stack whenever it has used another two milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.002
TURN_DELTAS = 10
IN_FLIGHT = 64

LOOP = "the event loop, and what C does below it (gRPC's core, sockets)"
PLACES = {
    "/core/": "core: engine, log, feeds",
    "/adapters/openai/": "adapters/openai: events to text",
    "/adapters/sql/": "adapters/sql and its driver",
    "/sqlalchemy/": "adapters/sql and its driver",
    "/psycopg/": "adapters/sql and its driver",
    "/sqlite3/": "adapters/sql and its driver",
    "/adapters/": "other adapters",
    "/aiohttp/": "HTTP to the provider: aiohttp, httpx2, the SDK",
    "/httpx2/": "HTTP to the provider: aiohttp, httpx2, the SDK",
    "/openai/": "HTTP to the provider: aiohttp, httpx2, the SDK",
    "/yarl/": "HTTP to the provider: aiohttp, httpx2, the SDK",
    "/entrypoints/grpc_api/": "gRPC and its messages",
    "/grpc/": "gRPC and its messages",
    "/google/protobuf/": "gRPC and its messages",
}
"""Where a sample belongs: to the innermost frame of a file in one of these; asyncio's are their callers'."""

DESCRIPTION = """\
Print where the service's processor time goes.

Two loads: many streams at 25 deltas a second, and turns of 10 deltas that come at once, 64 in flight. Each in a
new thread, with OpenAI's conversations, SQLite on a disk and one core for the service.
"""

EPILOG = """\
how to read it
  A sample is taken whenever the service has used another 2 ms, in Python's main thread, when the instruction at
  work is done; it belongs to the innermost file of a known place. Microseconds are the thread's processor time by
  share of samples. Other threads are told by what the kernel counted for them.

examples
  python bench/profiling.py
  python bench/profiling.py --streams 200 --json
  python bench/profiling.py --source ../earlier-checkout/src         # the same of other code

exit status
  0  measured     1  something could not be started or failed     2  wrong arguments
"""


# In the service's process


def serve(out: Path) -> None:
    """`vida-coach serve`, which writes to a file where its time went between SIGUSR1 and SIGUSR2."""
    from entrypoints.cli.main import main

    samples: dict[str, float] = defaultdict(float)
    before: dict[str, float] = {}
    last = 0.0

    def sample(_: int, frame: FrameType | None) -> None:
        # The signal comes for what all threads have used: what is counted is this one's share of it.
        nonlocal last
        now = time.thread_time()
        samples[_place(frame)] += now - last
        last = now

    def begin(_: int, __: FrameType | None) -> None:
        nonlocal last
        samples.clear()
        last = time.thread_time()
        before.update(_thread_seconds())
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)

    def end(_: int, __: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        used = {name: seconds - before.get(name, 0.0) for name, seconds in _thread_seconds().items()}
        half = out.with_suffix(".half")
        half.write_text(json.dumps({"samples": samples, "threads": used}))
        half.replace(out)

    signal.signal(signal.SIGPROF, sample)
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    sys.argv = ["vida-coach", "serve", "--listen", "127.0.0.1:0"]
    sys.exit(main())


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        place = _place_of(frame.f_code.co_filename)
        if place:
            return place
        frame = frame.f_back
    return LOOP


@functools.cache
def _place_of(file: str) -> str:
    return next((place for part, place in PLACES.items() if part in file), "")


def _thread_seconds() -> dict[str, float]:
    """Processor time of this process's threads so far, those without a name of Python's together."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(int(task.name), "threads of gRPC's core")
        used[name] += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # type: ignore[assignment] # seconds
    return dict(used)


# Beside it


@dataclass(frozen=True, slots=True)
class Profile:
    """Seconds by place, and how many units of work they were for."""

    what: str
    unit: str
    units: int
    seconds: Mapping[str, float]

    def table(self) -> str:
        """For people."""
        whole = sum(self.seconds.values())
        lines = [f"{self.what}: {whole / self.units * 1e6:,.0f} µs of processor time a {self.unit}"]
        lines += [
            f"  {seconds / whole:5.0%} {seconds / self.units * 1e6:9,.1f} µs  {place}"
            for place, seconds in sorted(self.seconds.items(), key=lambda each: -each[1])
            if seconds / whole >= 0.005
        ]
        return "\n".join(lines)


@contextmanager
def profiled(around: object, source: Path, out: Path) -> Iterator[object]:
    """The service, sampling itself."""
    from speed.servers import Surroundings, product

    assert isinstance(around, Surroundings)
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(out)]
    with product(around, command, {"PYTHONPATH": str(source)}) as server:
        yield server


def measure(streams: int, source: Path, folder: Path) -> list[Profile]:
    """Runs both loads."""
    from speed.bench import PACE, prepared, say
    from speed.load import Run
    from speed.servers import PRODUCT, SERVERS, Server

    profiles = []
    with prepared(folder, 1, quick=False) as bench, bench.room() as room:
        out = room / "profile.json"
        SERVERS[PRODUCT] = functools.partial(profiled, source=source, out=out)  # type: ignore[assignment]
        with bench.field(PRODUCT) as found:
            server: Server = found.servers[PRODUCT]

            def watched(load: dict[str, object]) -> tuple[Run, dict[str, float]]:
                out.unlink(missing_ok=True)
                os.kill(server.process.pid, signal.SIGUSR1)
                run = bench.run(server, **load)  # type: ignore[arg-type]
                os.kill(server.process.pid, signal.SIGUSR2)
                if run.outcome.failed:
                    say(f"warning: {run.outcome.failed}")
                deadline = time.monotonic() + 10
                while not out.exists():
                    if time.monotonic() > deadline:
                        raise TimeoutError("the service wrote no profile")
                    time.sleep(0.05)
                return run, _by_place(json.loads(out.read_text()))

            ramp, hold = 10.0, 20.0
            say(f"{streams} streams …")
            run, seconds = watched(
                {"streams": streams, "deltas": math.ceil((ramp + hold) * PACE), "pace": PACE, "ramp": ramp}
            )
            merged = run.outcome.deltas / max(1, run.outcome.messages)
            what = f"A delta of {streams} streams, {merged:.1f} of them in a message"
            profiles.append(Profile(what, "delta", run.outcome.deltas, seconds))
            say("short turns …")
            turns = 40 * IN_FLIGHT
            run, seconds = watched({"streams": turns, "deltas": TURN_DELTAS, "pace": None, "in_flight": IN_FLIGHT})
            what = f"A turn of {TURN_DELTAS} deltas in a new thread, {IN_FLIGHT} in flight"
            profiles.append(Profile(what, "turn", run.outcome.completed, seconds))
    return profiles


def _by_place(told: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    threads = dict(told["threads"])
    main = threads.pop("MainThread")
    count = sum(told["samples"].values())
    found = {place: main * samples / count for place, samples in told["samples"].items()}
    return {**found, **{f"thread {name}": seconds for name, seconds in threads.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=500, metavar="N", help="live streams; default: 500")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "src", metavar="DIR", help="default: this checkout's"
    )
    parser.add_argument("--folder", type=Path, default=ROOT, metavar="DIR", help="a disk for the databases")
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
    sys.path += [str(ROOT / "bench"), str(ROOT / "tests")]
    from speed.processes import BenchError

    try:
        profiles = measure(options.streams, options.source.resolve(), options.folder)
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([{"what": each.what, "units": each.units, "seconds": each.seconds} for each in profiles]))
    else:
        print("\n\n".join(each.table() for each in profiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
