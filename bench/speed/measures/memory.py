"""What an open stream holds, and whether all of it comes back."""

from __future__ import annotations

import time
from dataclasses import asdict

from speed.bench import Bench, say
from speed.load import Run
from speed.processes import BenchError, Usage
from speed.servers import PRODUCT, Server
from speed.verdict import Verdict

WAVES = 3
_PACE = 0.2
_BACK_SECONDS = 60.0
"""How long connections and descriptors may take to go when the streams have ended."""


def memory(bench: Bench) -> list[Verdict]:
    """Memory of an open stream at a slow pace, beside null and LiteLLM; three waves, and what is left of them."""
    many, few = (200, 50) if bench.quick else (5000, 400)
    waves: dict[str, list[Run]] = {}
    left: dict[str, Usage] = {}
    connections = 0
    for name, streams in ((PRODUCT, many), ("null", many), ("litellm", few)):
        with bench.field(name) as found:
            if name in found.missing:
                waves[name] = []
                missing = found.missing[name]
                continue
            server = found.servers[name]
            idle = bench.upstream.counts()["connections"]
            waves[name] = [_wave(bench, server, streams) for _ in range(WAVES if name == PRODUCT else 1)]
            if name == PRODUCT:
                left[name] = _settled(bench, server, waves[name][0].base, idle)
                connections = bench.upstream.counts()["connections"] - idle
    own = _per_stream(waves[PRODUCT][0])
    peaks = [run.peak.rss for run in waves[PRODUCT]]
    raw = {name: [asdict(run) for run in each] for name, each in waves.items()}
    null = _per_stream(waves["null"][0])
    verdicts = [
        Verdict(
            measure="memory",
            what=f"memory of an open stream at {many}, in null's",
            figures=[own / null],
            target=2.0,
            detail=f"{PRODUCT} {own:.0f} KiB, null {null:.0f} KiB a stream",
            raw=raw,
        )
    ]
    what = f"memory of an open stream, in litellm's at {few}"
    if waves["litellm"]:
        theirs = _per_stream(waves["litellm"][0])
        detail = f"litellm {theirs:.0f} KiB a stream"
        verdicts.append(Verdict(measure="memory", what=what, figures=[own / theirs], target=0.3, detail=detail))
    else:
        verdicts.append(Verdict(measure="memory", what=what, why=f"not installed: {missing}"))
    base = waves[PRODUCT][0].base
    return [
        *verdicts,
        Verdict(
            measure="memory",
            what="peak of the third wave, in the first's",
            figures=[peaks[-1] / peaks[0]],
            target=1.05,
            detail="peaks "
            + ", ".join(f"{peak / 2**20:.0f} MiB" for peak in peaks)
            + f"; before {base.rss / 2**20:.0f} MiB, after {left[PRODUCT].rss / 2**20:.0f} MiB",
        ),
        Verdict(
            measure="memory",
            what="descriptors of the service that the waves left open",
            figures=[left[PRODUCT].descriptors - base.descriptors],
            target=0,
            unit="",
        ),
        Verdict(
            measure="memory",
            what="connections to the model that the waves left open",
            figures=[connections],
            target=0,
            unit="",
        ),
    ]


def _wave(bench: Bench, server: Server, streams: int) -> Run:
    """Opens all of them, and keeps them open until all speak. Raises BenchError if they never are at once."""
    ramp, hold = (5.0, 10.0) if bench.quick else (100.0, 60.0)
    run = bench.run(server, streams=streams, deltas=round((ramp + hold) * _PACE), pace=_PACE, ramp=ramp)
    if run.outcome.failed or run.outcome.live != streams:
        raise BenchError(f"{server.name}: {run.outcome.live} of {streams} streams live, {run.outcome.failed}")
    say(f"  {server.name}: {streams} streams, {_per_stream(run):.0f} KiB each, {run.peak.rss / 2**20:.0f} MiB")
    return run


def _per_stream(run: Run) -> float:
    """KiB."""
    return (run.peak.rss - run.base.rss) / run.outcome.live / 1024


def _settled(bench: Bench, server: Server, base: Usage, idle: int) -> Usage:
    """What it holds once connections are closed, or after all the time that they may take."""
    deadline = time.monotonic() + _BACK_SECONDS
    while time.monotonic() < deadline:
        now = server.usage()
        if now.descriptors <= base.descriptors and bench.upstream.counts()["connections"] <= idle:
            break
        time.sleep(0.5)
    return server.usage()
