"""How long the commands take to start, beside what importing their libraries takes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from speed.bench import Bench, say
from speed.processes import clean_environment
from speed.servers import Surroundings, product
from speed.verdict import Verdict

IMPORTS = "import grpc, openai, sqlalchemy"
CLEANUP_HELP = [str(Path(sys.executable).with_name("vida-coach")), "cleanup", "--help"]


def startup(bench: Bench) -> list[Verdict]:
    """`serve` until it serves, and `cleanup --help`, beside `python -c 'import grpc, openai, sqlalchemy'`."""
    times: dict[str, list[float]] = {"imports": [], "serve": [], "cleanup --help": []}
    ways: dict[str, Callable[[], float]] = {
        "imports": lambda: _command([sys.executable, "-c", IMPORTS]),
        "serve": lambda: _serve(bench),
        "cleanup --help": lambda: _command(CLEANUP_HELP),
    }
    for number in range(max(3, bench.rounds * 3) + 1):
        for name, way in ways.items():
            seconds = way()
            if number:  # the first of each finds cold files
                times[name].append(seconds)
    base = statistics.median(times["imports"])
    say("  " + "; ".join(f"{name} {statistics.median(each):.2f} s" for name, each in times.items()))
    return [
        Verdict(
            measure="startup",
            what=f"{what}, in an import of three libraries'",
            figures=[own / other for own, other in zip(times[name], times["imports"], strict=True)],
            target=target,
            detail=f"{statistics.median(times[name]):.2f} s; `{IMPORTS}` {base:.2f} s",
            raw=times,
        )
        for name, what, target in (
            ("serve", "`serve` until it serves, its database there", 1.5),
            ("cleanup --help", "`cleanup --help`", 0.5),
        )
    ]


def _command(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=clean_environment({}))
    return time.perf_counter() - begun


def _serve(bench: Bench) -> float:
    folder = bench.folder / "startup"
    folder.mkdir(exist_ok=True)
    begun = time.perf_counter()
    around = Surroundings(bench.cores.others | {bench.cores.server}, bench.upstream, folder)
    with product(around):
        return time.perf_counter() - begun
