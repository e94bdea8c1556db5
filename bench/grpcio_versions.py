"""Compare grpcio releases on this machine, so that the pin is a measurement and not a habit.

One command builds a throw-away environment per release, runs the same loopback load against each of them in
turn, and prints one table. The parent needs the standard library only; the children need grpcio only. No
protobuf is used: the handlers move plain bytes, so the numbers are those of the transport and of grpc.aio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_VERSIONS = ("1.82.3", "1.81.1", "1.85.1")
ABANDONED = 20
STREAMS = 16
PAYLOAD = b"x" * 64
SERVICE = "bench.Versions"
SERVER_START_SECONDS = 20.0
LOAD_SECONDS = 180.0

DESCRIPTION = """\
Measure grpcio releases side by side and print the ratios that decide a version pin.

For each release the script builds an empty environment in a temporary directory, starts a server and a client
from it on 127.0.0.1, and removes everything at the end. Releases take turns inside each round, and the order
rotates, so a busy machine disturbs all of them alike. One server and one client run at a time.
"""

EPILOG = """\
what is measured
  stream cpu      server CPU per message, 16 streams flat out, 64-byte messages    lower is better
  unary cpu       server CPU per unary call, 32 in flight                          lower is better
  unary seq       unary calls per second, one at a time                            higher is better
  unary x32       unary calls per second, 32 in flight                             higher is better
  abandoned       handlers still running after 20 client calls were dropped
                  without cancel(), collected, and given time to end               0 is right
  cancelled       the same 20 calls, ended with cancel()                           0 is right
  tasks left      server tasks left after half of the cancelled streams            0 is right
  rss/cancel      growth of the server's resident memory per cancelled stream      bytes
  heap/cancel     growth of the server's live native heap per cancelled stream     bytes, glibc only
  heap/swallow    the same when the handler swallows the cancellation              bytes, glibc only

how to read it
  A ratio is release / first release, paired inside each round, then the median. The brackets hold the lowest
  and the highest round. "=" marks a ratio whose brackets hold 1.00: that is noise, not a difference. A few
  rounds can fall on one side by luck, so name the first release twice: the second column is then the noise
  floor, and a ratio no further from 1.00 than that column is not a difference either.
  Resident memory moves in pages and keeps freed memory: trust the heap columns where the two disagree.

examples
  python bench/grpcio_versions.py
  python bench/grpcio_versions.py --versions 1.82.3 1.82.3 1.85.1     # with a noise floor
  python bench/grpcio_versions.py --versions 1.82.3 1.85.1 --rounds 5 --json > versions.json
  python bench/grpcio_versions.py --quick                             # does it run at all?

exit status
  0  measured     1  an environment or a run failed     2  wrong arguments
"""


class BenchError(Exception):
    """A release could not be installed or measured. The text is written for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much work one run does. The same for every release, so that the results compare."""

    messages_per_stream: int
    sequential_calls: int
    concurrent_calls: int
    cancels: int
    abandoned_wait: float


FULL = Load(4_500, 2_500, 9_600, 20_000, 2.0)
QUICK = Load(300, 200, 640, 1_000, 1.0)


# ---------------------------------------------------------------------------------------------------------
# Child, server side


def resident_bytes() -> int | None:
    """Return this process's resident memory, or None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _MallInfo2(ctypes.Structure):
    """The C library's answer to mallinfo2(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def heap_bytes() -> int | None:
    """Return the native heap bytes in use, or None where the C library cannot say."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


class Handlers:
    """The methods under test. `running` counts the stream handlers that have started and not yet ended."""

    def __init__(self) -> None:
        self.running = 0

    async def echo(self, request: bytes, _context: object) -> bytes:
        """Return the request."""
        return request

    async def flood(self, request: bytes, _context: object) -> AsyncIterator[bytes]:
        """Send as many small messages as the request asks for, as fast as the client takes them."""
        for _ in range(int(request)):
            yield PAYLOAD

    async def hold(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        """Send one message, then wait to be cancelled and let the cancellation through."""
        self.running += 1
        try:
            yield PAYLOAD
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def swallow(self, _request: bytes, _context: object) -> AsyncIterator[bytes]:
        """Send one message, then wait to be cancelled and swallow the cancellation, as careless code does."""
        self.running += 1
        try:
            yield PAYLOAD
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return
        finally:
            self.running -= 1

    async def stats(self, _request: bytes, _context: object) -> bytes:
        """Return this process's own figures after a full collection."""
        cpu = time.process_time()
        gc.collect()
        figures = {
            "cpu": cpu,
            "rss": resident_bytes(),
            "heap": heap_bytes(),
            "running": self.running,
            "tasks": len(asyncio.all_tasks()),
        }
        return json.dumps(figures).encode()


async def serve() -> None:
    """Serve on a free loopback port, print the port, and stop when standard input closes."""
    grpc: Any = importlib.import_module("grpc")
    aio: Any = importlib.import_module("grpc.aio")
    handlers = Handlers()
    server = aio.server(options=(("grpc.so_reuseport", 0),))
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(handlers.echo),
        "Stats": grpc.unary_unary_rpc_method_handler(handlers.stats),
        "Flood": grpc.unary_stream_rpc_method_handler(handlers.flood),
        "Hold": grpc.unary_stream_rpc_method_handler(handlers.hold),
        "Swallow": grpc.unary_stream_rpc_method_handler(handlers.swallow),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def wait_for_parent() -> None:
        sys.stdin.buffer.read()
        with contextlib.suppress(RuntimeError):  # the loop is already gone
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_parent, daemon=True).start()
    await stop.wait()
    await server.stop(0)


# ---------------------------------------------------------------------------------------------------------
# Child, client side


@dataclass(frozen=True, slots=True)
class Stats:
    """The server's own figures at one moment."""

    cpu: float
    rss: int | None
    heap: int | None
    running: int
    tasks: int


class Client:
    """Drives one server. `stats` uses its own channel, so a test channel can be dropped or closed freely."""

    def __init__(self, port: int) -> None:
        self._aio: Any = importlib.import_module("grpc.aio")
        self._target = f"127.0.0.1:{port}"
        self._control = self.channel()

    def channel(self) -> Any:
        """Return a new channel with a connection of its own."""
        options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
        return self._aio.insecure_channel(self._target, options=options)

    async def stats(self) -> Stats:
        """Return the server's own figures."""
        raw = await self._control.unary_unary(f"/{SERVICE}/Stats")(b"")
        return Stats(**json.loads(raw))

    async def settle(self, seconds: float) -> Stats:
        """Return the figures once no stream handler runs, or those of the last look when time is up."""
        deadline = time.monotonic() + seconds
        while True:
            stats = await self.stats()
            if stats.running == 0 or time.monotonic() > deadline:
                return stats
            await asyncio.sleep(0.1)

    async def stream_cpu(self, messages: int) -> float:
        """Return the server's CPU seconds per message with every stream flat out."""
        async with self.channel() as channel:
            flood = channel.unary_stream(f"/{SERVICE}/Flood")

            async def drain(count: int) -> int:
                return sum([1 async for _ in flood(str(count).encode())])

            await asyncio.gather(*(drain(max(1, messages // 10)) for _ in range(STREAMS)))
            before = await self.stats()
            got = sum(await asyncio.gather(*(drain(messages) for _ in range(STREAMS))))
            after = await self.stats()
        if got != messages * STREAMS:
            raise BenchError(f"expected {messages * STREAMS} messages, got {got}")
        return (after.cpu - before.cpu) / got

    async def unary(self, calls: int, workers: int) -> tuple[float, float]:
        """Return calls per second and the server's CPU seconds per call."""
        async with self.channel() as channel:
            echo = channel.unary_unary(f"/{SERVICE}/Echo")

            async def work(count: int) -> None:
                for _ in range(count):
                    await echo(PAYLOAD)

            await work(100)
            each = calls // workers
            before = await self.stats()
            start = time.perf_counter()
            await asyncio.gather(*(work(each) for _ in range(workers)))
            elapsed = time.perf_counter() - start
            after = await self.stats()
        return each * workers / elapsed, (after.cpu - before.cpu) / (each * workers)

    async def dropped(self, *, cancel: bool, seconds: float) -> int:
        """Drop 20 open calls, with or without cancel(), and return how many handlers still run."""
        async with self.channel() as channel:
            hold = channel.unary_stream(f"/{SERVICE}/Hold")

            async def open_and_drop() -> None:
                call = hold(b"")
                await call.read()
                if cancel:
                    call.cancel()

            await asyncio.gather(*(open_and_drop() for _ in range(ABANDONED)))
            gc.collect()
            left = (await self.settle(seconds)).running
        await self.settle(seconds)  # closing the channel ends what is left, so the next test starts clean
        return left

    async def cancel_streams(self, method: str, calls: int, workers: int = 32) -> None:
        """Open, read one message from, and cancel that many streams."""
        async with self.channel() as channel:
            stream = channel.unary_stream(f"/{SERVICE}/{method}")

            async def work(count: int) -> None:
                for _ in range(count):
                    call = stream(b"")
                    await call.read()
                    call.cancel()

            await asyncio.gather(*(work(calls // workers) for _ in range(workers)))
            await self.settle(5.0)

    async def close(self) -> None:
        """Close the control channel."""
        await self._control.close()


def _growth(before: int | None, after: int | None, calls: int) -> float | None:
    return None if before is None or after is None else (after - before) / calls


async def drive(port: int, load: Load) -> dict[str, float | None]:
    """Run every measurement once against the server on `port` and return the raw figures."""
    client = Client(port)
    half = load.cancels // 2
    stream_cpu = await client.stream_cpu(load.messages_per_stream)
    sequential, _ = await client.unary(load.sequential_calls, 1)
    concurrent, unary_cpu = await client.unary(load.concurrent_calls, 32)
    abandoned = await client.dropped(cancel=False, seconds=load.abandoned_wait)
    cancelled = await client.dropped(cancel=True, seconds=load.abandoned_wait)

    await client.cancel_streams("Hold", load.cancels // 10)  # the allocator's own warm-up is not a leak
    start = await client.stats()
    await client.cancel_streams("Hold", half)
    middle = await client.stats()
    await client.cancel_streams("Hold", half)
    end = await client.stats()

    await client.cancel_streams("Swallow", load.cancels // 10)
    swallow_start = await client.stats()
    await client.cancel_streams("Swallow", half)
    swallow_end = await client.stats()
    await client.close()
    return {
        "stream_cpu_us": stream_cpu * 1e6,
        "unary_cpu_us": unary_cpu * 1e6,
        "unary_seq_per_s": sequential,
        "unary_x32_per_s": concurrent,
        "abandoned_running": abandoned,
        "cancelled_running": cancelled,
        "tasks_left": middle.tasks - start.tasks,
        "rss_per_cancel": _growth(start.rss, end.rss, load.cancels),
        "heap_per_cancel": _growth(start.heap, end.heap, load.cancels),
        "heap_per_swallow": _growth(swallow_start.heap, swallow_end.heap, half),
    }


def child_main(role: str, port: int, quick: bool) -> int:
    """Be the server or the client. Standard output carries only the port, or one line of JSON."""
    if role == "serve":
        asyncio.run(serve())
    else:
        print(json.dumps(asyncio.run(drive(port, QUICK if quick else FULL))))
    return 0


# ---------------------------------------------------------------------------------------------------------
# Parent

RATIOS = ("stream_cpu_us", "unary_cpu_us", "unary_seq_per_s", "unary_x32_per_s")
VALUES = (
    "abandoned_running",
    "cancelled_running",
    "tasks_left",
    "rss_per_cancel",
    "heap_per_cancel",
    "heap_per_swallow",
)
TITLES = {
    "stream_cpu_us": "stream cpu",
    "unary_cpu_us": "unary cpu",
    "unary_seq_per_s": "unary seq",
    "unary_x32_per_s": "unary x32",
    "abandoned_running": "abandoned",
    "cancelled_running": "cancelled",
    "tasks_left": "tasks left",
    "rss_per_cancel": "rss/cancel",
    "heap_per_cancel": "heap/cancel",
    "heap_per_swallow": "heap/swallow",
}

WIDTH = 23  # of one column

Figures = dict[str, float | None]


def say(text: str) -> None:
    """Write progress where it does not mix with the result."""
    print(text, file=sys.stderr, flush=True)


def build(version: str, directory: Path) -> Path:
    """Create an environment that holds that grpcio release and return its interpreter."""
    python = directory / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    steps = (
        (sys.executable, "-m", "venv", "--without-pip", str(directory)),
        (*pip, "install", "-q", "--no-input", "--only-binary", ":all:", f"grpcio=={version}"),
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise BenchError(f"cannot install grpcio=={version}: {reason}")
    return python


@contextlib.contextmanager
def server(python: Path) -> Iterator[int]:
    """Run a server child and yield its port. The child has ended when the block is left."""
    command = [str(python), "-I", __file__, "--child", "serve"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise BenchError("the server has no pipes")
        watchdog = threading.Timer(SERVER_START_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            line = process.stdout.readline().strip()
            watchdog.cancel()
            if not line.isdigit():
                process.kill()
                process.wait()
                errors.seek(0)
                raise BenchError(f"the server did not start:\n{errors.read().strip()}")
            yield int(line)
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(python: Path, quick: bool) -> Figures:
    """Run one server and one client of that interpreter's release, and return the raw figures."""
    with server(python) as port:
        command = [str(python), "-I", __file__, "--child", "load", "--port", str(port)]
        if quick:
            command.append("--quick")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"the client did not finish within {LOAD_SECONDS:.0f} s") from error
    if done.returncode != 0:
        raise BenchError(f"the client failed:\n{done.stderr.strip()}")
    figures: Figures = json.loads(done.stdout)
    return figures


def labels(versions: Sequence[str]) -> list[str]:
    """Return one distinct label per entry: a repeated release gets `#2`, `#3` and so on."""
    seen: dict[str, int] = {}
    result = []
    for version in versions:
        seen[version] = seen.get(version, 0) + 1
        result.append(version if seen[version] == 1 else f"{version}#{seen[version]}")
    return result


def summarise(rounds: Sequence[dict[str, Figures]]) -> dict[str, dict[str, Any]]:
    """Return per label the medians, and the ratios to the first label as (low, median, high)."""
    names = list(rounds[0])
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        entry: dict[str, Any] = {"median": {}, "range": {}, "ratio": {}}
        for key in (*RATIOS, *VALUES):
            known = [value for figures in rounds if (value := figures[name][key]) is not None]
            entry["median"][key] = statistics.median(known) if known else None
            entry["range"][key] = [min(known), max(known)] if known else None
        for key in RATIOS:
            paired = [_ratio(figures[name][key], figures[names[0]][key]) for figures in rounds]
            low, middle, high = min(paired), statistics.median(paired), max(paired)
            same = low <= 1.0 <= high
            entry["ratio"][key] = {"low": low, "median": middle, "high": high, "noise": same}
        entry["cancels_abandoned_calls"] = entry["range"]["abandoned_running"][1] == 0
        entry["leaves_tasks"] = entry["range"]["tasks_left"][1] > 0
        result[name] = entry
    return result


def _ratio(value: float | None, base: float | None) -> float:
    if value is None or not base:
        raise BenchError("a figure is missing, so there is no ratio")
    return value / base


def table(summary: dict[str, dict[str, Any]], rounds: int) -> str:
    """Return the summary as plain text, at most 110 columns wide for up to four releases."""
    names = list(summary)
    lines = [
        f"grpcio releases, medians of {rounds} interleaved rounds, python {platform.python_version()}",
        "",
        f"{'':<14}" + "".join(f"{name:>{WIDTH}}" for name in names),
        f"ratio to {names[0]} [lowest, highest round], '=' is noise",
    ]
    for key in RATIOS:
        cells = []
        for name in names:
            ratio = summary[name]["ratio"][key]
            mark = "=" if ratio["noise"] else " "
            cells.append(f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{mark}")
        lines.append(f"{TITLES[key]:<14}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    lines.append("value [lowest, highest round]; memory in bytes per call")
    for key in VALUES:
        cells = []
        for name in names:
            spread = summary[name]["range"][key]
            middle = summary[name]["median"][key]
            cell = "unknown" if spread is None else f"{middle:.0f} [{spread[0]:.0f}, {spread[1]:.0f}] "
            cells.append(cell)
        lines.append(f"{TITLES[key]:<14}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    base = summary[names[0]]["median"]
    speed = (
        f"{names[0]} itself: {base['stream_cpu_us']:.1f} us/message, {base['unary_cpu_us']:.0f} us/call, "
        f"{base['unary_seq_per_s']:.0f} calls/s sequential, {base['unary_x32_per_s']:.0f} calls/s x32"
    )
    endless = [name for name in names if not summary[name]["cancels_abandoned_calls"]]
    leaking = [name for name in names if summary[name]["leaves_tasks"]]
    lines += ["", speed]
    lines.append(f"abandoned client calls never end: {', '.join(endless) or 'none'}")
    lines.append(f"cancelled streams leave tasks: {', '.join(leaking) or 'none'}")
    return "\n".join(line.rstrip() for line in lines)


def run(versions: Sequence[str], rounds: int, quick: bool) -> dict[str, Any]:
    """Install and measure every release and return the raw rounds with their summary."""
    names = labels(versions)
    with tempfile.TemporaryDirectory(prefix="grpcio-versions-") as directory:
        pythons: dict[str, Path] = {}
        for version in dict.fromkeys(versions):
            say(f"install grpcio=={version}")
            pythons[version] = build(version, Path(directory) / version)
        results: list[dict[str, Figures]] = []
        start = time.monotonic()
        for number in range(rounds):
            shift = number % len(names)
            order = [*range(shift, len(names)), *range(shift)]
            measured: dict[str, Figures] = {}
            for index in order:
                say(f"round {number + 1}/{rounds}: {names[index]}")
                measured[names[index]] = measure(pythons[versions[index]], quick)
            results.append({name: measured[name] for name in names})
        seconds = time.monotonic() - start
    say(f"measured in {seconds:.0f} s")
    return {
        "python": platform.python_version(),
        "rounds": rounds,
        "seconds": round(seconds, 1),
        "raw": results,
        "summary": summarise(results),
    }


def _version(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a release such as 1.82.3")
    return text


def _rounds(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 20")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command line. The child options are for the script itself and stay out of the help."""
    result = argparse.ArgumentParser(
        prog="python bench/grpcio_versions.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--versions",
        nargs="+",
        type=_version,
        default=list(DEFAULT_VERSIONS),
        metavar="V",
        help=f"releases to compare, the first is the base; default: {' '.join(DEFAULT_VERSIONS)}",
    )
    result.add_argument(
        "--rounds",
        type=_rounds,
        default=5,
        metavar="N",
        help="rounds, each runs every release once; default: 5",
    )
    result.add_argument("--json", action="store_true", help="print the raw rounds and the summary as JSON")
    result.add_argument("--quick", action="store_true", help="a tenth of the load: a smoke test only")
    result.add_argument("--child", choices=("serve", "load"), help=argparse.SUPPRESS)
    result.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(arguments)
    if options.child:
        return child_main(options.child, options.port, options.quick)
    try:
        report = run(options.versions, options.rounds, options.quick)
    except BenchError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    print(json.dumps(report, indent=2) if options.json else table(report["summary"], options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
