"""The command line of the suite."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from durability import file_system

from speed.bench import Bench, prepared, say
from speed.measures import cleanup, commits, growth, memory, replies, startup, streams
from speed.processes import BenchError
from speed.upstream import ROOT
from speed.verdict import Verdict, table

MEASURES: dict[str, Callable[[Bench], list[Verdict]]] = {
    "delta": streams.delta,
    "sustained": streams.sustained,
    "offered": streams.offered,
    "burst": replies.burst,
    "first-text": replies.first_text,
    "startup": startup.startup,
    "memory": memory.memory,
    "commits": commits.commits,
    "growth": growth.growth,
    "cleanup": cleanup.cleanup,
}
QUICK_ROUNDS = 1

DESCRIPTION = """\
Measure how fast the service is beside references that this starts itself, and print a table.

Everything runs on loopback: the server under test alone on one core, the provider of the tests as the model and a
load generator on the others. The service runs as `vida-coach serve`, with OpenAI's conversations and its record in
SQLite on a disk, synchronous=FULL. References take turns with it, round by round.
"""

EPILOG = """\
references
  null      grpc.aio, a constant text, nothing behind it      fastapi   FastAPI and the SDK's typed stream
  naive     grpc.aio and the SDK's typed stream               litellm   LiteLLM's proxy, /v1/responses
  nginx     a proxy that does not buffer
  Where one is not installed its rows say so. `make bench` installs fastapi and litellm, in .bench-venv.

measures
{measures}

how to read it
  A figure is a ratio within one round, the median of the rounds; the brackets hold the lowest and the highest.
  Absolute times are those of one machine on one day. A delta's lateness is from its sending by the model to its
  arrival at the load generator. The load's side (generator and model) says how much of its core it took: above
  80 % a server's trouble may be its own, and no higher level is tried.

examples
  make bench-quick                                     does it run at all? some minutes
  make bench                                           everything; about two hours on two cores
  make bench BENCH_ARGS="--measures delta burst --rounds 5"

exit status
  0  measured, targets met or not     1  something could not be started or failed     2  wrong arguments
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "\n".join(f"  {name:10}  {(measure.__doc__ or '').strip()}" for name, measure in MEASURES.items())
    result = argparse.ArgumentParser(
        prog="python -m speed",
        description=DESCRIPTION,
        epilog=EPILOG.format(measures=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), metavar="NAME", help="default: all")
    add("--rounds", type=_positive, default=3, metavar="N", help=f"default: 3; with --quick {QUICK_ROUNDS}")
    add(
        "--folder",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="a disk for the databases; default: this checkout's",
    )
    add("--json", action="store_true", help="print everything that was measured as JSON")
    add("--quick", action="store_true", help="short runs at low levels: a smoke test, no measurement")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = parser().parse_args(arguments)
    rounds = QUICK_ROUNDS if options.quick else options.rounds
    verdicts: list[Verdict] = []
    failed = False
    try:
        with prepared(options.folder, rounds, quick=options.quick) as bench:
            for name in options.measures:
                say(f"{name} …")
                try:
                    verdicts += MEASURES[name](bench)
                except BenchError as error:
                    say(f"error: {error}")
                    failed = True
                    verdicts.append(Verdict(measure=name, what="everything", why=str(error)))
            others = bench.others
    except (BenchError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 1
    machine = (
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores, "
        f"{file_system(options.folder)}, {rounds} rounds{', quick: no measurement' if options.quick else ''}"
    )
    quiet = (
        f"Strangers took {statistics.median(others):.0%} of the server's core, {max(others):.0%} at the most: "
        "with more than a few percent no figure of many streams means anything."
    )
    if options.json:
        found = [verdict.as_json() for verdict in verdicts]
        print(json.dumps({"machine": machine, "others": others, "verdicts": found}, indent=2))
    else:
        print(f"{machine}\n{quiet}\n\n{table(verdicts)}")
    return int(failed)


def _positive(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
