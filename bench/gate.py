"""A few cheap ratios that tell when something has become much slower: part of `make check`, for half a minute."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

from durability import file_system  # noqa: E402
from speed.bench import IN_MEMORY  # noqa: E402
from speed.measures.commits import IN_FLIGHT, through_store  # noqa: E402
from speed.measures.startup import CLEANUP_HELP, IMPORTS  # noqa: E402
from speed.processes import clean_environment  # noqa: E402
from speed.recording import record  # noqa: E402
from speed.verdict import Verdict, table  # noqa: E402

from adapters.sql.schema import migrate  # noqa: E402

DESCRIPTION = """\
Check a few ratios, medians of one run on this machine. The bounds are generous: a machine that is busy with other
work passes, something that has become several times as slow does not.
"""

_TURNS = 300


def adapter() -> list[Verdict]:
    """What a delta costs in the OpenAI adapter, beside the SDK's typed stream."""
    script = str(ROOT / "bench" / "openai_adapter.py")
    command = [sys.executable, script, "--rounds", "2", "--deltas", "3000", "--streams", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean_environment({}))
    found: dict[str, Any] = json.loads(done.stdout)
    return [
        Verdict(
            measure="adapter",
            what=f"CPU per delta that comes {how}, in the SDK's typed stream's",
            figures=[own / typed for own, typed in zip(found[how]["adapter"], found[how]["typed"], strict=True)],
            target=bound,
        )
        for how, bound in (("together", 0.25), ("apart", 0.75))
    ]


def commits(folder: Path) -> list[Verdict]:
    """What commits that are shared gain on SQLite, which is nothing where nothing is durable."""
    what = f"turns committed a second, {IN_FLIGHT} in flight, in one by one's"
    if (kind := file_system(folder)) in IN_MEMORY:
        return [Verdict(measure="commits", what=what, why=f"this checkout is on {kind}")]
    url = f"sqlite:///{folder / 'recorded.db'}"
    migrate(url)
    recording = asyncio.run(record(url, _TURNS))
    rates: dict[int, list[float]] = {1: [], IN_FLIGHT: []}
    for number in range(3):
        for in_flight, found in rates.items():
            url = f"sqlite:///{folder / f'{number}-{in_flight}.db'}"
            migrate(url)
            found.append(asyncio.run(through_store(url, recording, in_flight)))
    return [
        Verdict(
            measure="commits",
            what=what,
            figures=[many / one for many, one in zip(rates[IN_FLIGHT], rates[1], strict=True)],
            target=1.5,
            at_most=False,
        )
    ]


def start() -> list[Verdict]:
    """What a command costs that needs none of the large libraries."""
    pairs = [(_cpu(CLEANUP_HELP), _cpu([sys.executable, "-c", IMPORTS])) for _ in range(4)]
    return [
        Verdict(
            measure="start",
            what=f"CPU of `cleanup --help`, in `{IMPORTS}`'s",
            figures=[own / base for own, base in pairs[1:]],  # the first finds cold files
            target=0.5,
        )
    ]


def _cpu(command: Sequence[str]) -> float:
    """Processor seconds of a command, to a hundredth."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=clean_environment({}))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> int:
    """Measures, prints, and returns the exit status."""
    argparse.ArgumentParser(
        prog="python bench/gate.py",
        description=DESCRIPTION,
        epilog="Exit status: 0 all bounds hold, 1 one does not or something failed, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT, ignore_cleanup_errors=True) as folder:
        verdicts = [*adapter(), *commits(Path(folder)), *start()]
    print(table(verdicts))
    return int(any(verdict.is_met is False for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
