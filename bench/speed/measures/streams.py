"""Many streams at the pace of a model: what a delta costs, how many one core bears, what more than that does."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from speed.bench import PACE, Bench, Field, say
from speed.load import FULL, Run
from speed.servers import PRODUCT, SERVERS, Server
from speed.verdict import Verdict

ADDED_MS = 250.0
FIRST_TEXT_MS = 1000.0
_OTHERS = 0.05
FEW = 40
"""Streams that no server here has trouble with."""
_LEAST = 5
"""Streams below which no level is tried."""
_FIRST_GUESS = {PRODUCT: 150, "naive": 120, "fastapi": 120, "litellm": 60, "nginx": 1000}


def steady(bench: Bench, server: Server, streams: int) -> Run:
    """So many streams, all live at once for a while."""
    ramp, hold = (4.0, 4.0) if bench.quick else (10.0, 30.0)
    deltas = math.ceil((ramp + hold) * PACE)
    run = bench.run(server, streams=streams, deltas=deltas, pace=PACE, ramp=ramp)
    say(f"  {server.name}, {streams} streams: {_told(run)}")
    return run


def delta(bench: Bench) -> list[Verdict]:
    """CPU per delta while 500 streams are live, beside null; and of everybody at a load that nobody minds."""
    streams = 100 if bench.quick else 500
    with bench.field(PRODUCT, "null") as found:
        runs = _rounds(bench, found, streams)
    whole = statistics.median(_ratios(runs[PRODUCT], runs["null"]))
    live = {name: [run.per_delta_live for run in each] for name, each in runs.items()}
    told = "; ".join(f"{name} {statistics.median(each):.0f} µs" for name, each in live.items())
    verdicts = [
        Verdict(
            measure="delta",
            what=f"CPU per delta while {streams} streams are live, in null grpc.aio",
            figures=[ours / theirs for ours, theirs in zip(live[PRODUCT], live["null"], strict=True)],
            target=0.9,
            detail=f"{told}; of whole runs, with how streams begin and end: {whole:.2f} x",
            raw={name: [asdict(run) for run in each] for name, each in runs.items()},
        )
    ]
    with bench.field(*SERVERS) as found:
        runs = _rounds(bench, found, FEW)
    for name, each in runs.items():
        if name != PRODUCT:
            verdicts.append(
                Verdict(
                    measure="delta",
                    what=f"CPU per delta at {FEW} streams, in {name}",
                    figures=_ratios(runs[PRODUCT], each),
                    detail=f"{PRODUCT} {_per_delta(runs[PRODUCT])}; {name} {_per_delta(each)}",
                    raw={one: [asdict(run) for run in runs[one]] for one in (PRODUCT, name)},
                )
            )
    return verdicts + [
        Verdict(measure="delta", what=f"CPU per delta at {FEW} streams, in {name}", why=f"not installed: {why}")
        for name, why in found.missing.items()
    ]


@dataclass(frozen=True, slots=True)
class Sustained:
    """How many streams a server bears, and whether more could not be tried."""

    streams: int
    at_least: bool
    run: Run | None


def sustained(bench: Bench) -> list[Verdict]:
    """The most streams that go well on one core, beside LiteLLM and the naive server."""
    with bench.field(*(name for name in SERVERS if name != "null")) as found:
        levels: dict[str, list[Sustained]] = {name: [] for name in found.servers}
        for server in bench.turns(found):
            before = levels[server.name]
            guess = before[-1].streams if before else _FIRST_GUESS[server.name]
            before.append(_most(bench, server, max(guess, 2 * _LEAST), step=1.25 if before else 2.0))
            say(f"  {server.name} sustains {_level(before[-1])}")
    verdicts = []
    for name, target in (("litellm", 8.0), ("naive", 5.0), ("fastapi", None), ("nginx", None)):
        what = f"streams sustained on one core, in {name}'s"
        if name in found.missing:
            verdicts.append(Verdict(measure="sustained", what=what, why=f"not installed: {found.missing[name]}"))
            continue
        pairs = list(zip(levels[PRODUCT], levels[name], strict=True))
        verdicts.append(
            Verdict(
                measure="sustained",
                what=what,
                figures=[ours.streams / theirs.streams for ours, theirs in pairs if theirs.streams],
                target=target,
                at_most=False,
                why="it sustains none" if not all(theirs.streams for _, theirs in pairs) else "",
                detail=f"{PRODUCT} {_levels(levels[PRODUCT])}; {name} {_levels(levels[name])}",
                raw={one: [asdict(level) for level in levels[one]] for one in (PRODUCT, name)},
            )
        )
    return verdicts


def offered(bench: Bench) -> list[Verdict]:
    """Far more than one core bears: nothing may fail."""
    streams = 400 if bench.quick else 2000
    with bench.field(PRODUCT) as found:
        runs = _rounds(bench, found, streams)[PRODUCT]
    return [
        Verdict(
            measure="offered",
            what=f"{streams} streams offered to one core: failed",
            figures=[streams - run.outcome.completed for run in runs],
            target=0,
            unit="",
            detail="; ".join(_told(run) for run in runs),
            raw=[asdict(run) for run in runs],
        )
    ]


def goes_well(run: Run, streams: int) -> bool:
    """The rule: none fails, all are live at once, deltas and first texts come in time."""
    outcome = run.outcome
    return (
        outcome.completed == outcome.live == streams
        and outcome.added is not None
        and outcome.first_text is not None
        and outcome.added.p99 <= ADDED_MS
        and outcome.first_text.p99 <= FIRST_TEXT_MS
    )


def _most(bench: Bench, server: Server, guess: int, step: float) -> Sustained:
    """Goes up by steps while it goes well, or down until it does; then halves what is left in between."""
    fine = 1.6 if bench.quick else 1.1
    best: Run | None = None
    good, bad, level = 0, 0, guess
    while level >= _LEAST and level not in (good, bad):
        run = steady(bench, server, level)
        if goes_well(run, level):
            good, best = level, run
        else:
            bad = level
        if good and not run.is_trusted:
            return Sustained(good, True, best)
        if not bad:
            level = math.ceil(good * step)
        elif not good:
            level = math.floor(bad / step)
        elif bad / good > fine:
            level = round(math.sqrt(good * bad))
        else:
            break
    return Sustained(good, False, best)


def _rounds(bench: Bench, found: Field, streams: int) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {name: [] for name in found.servers}
    for server in bench.turns(found):
        runs[server.name].append(steady(bench, server, streams))
    return runs


def _ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    return [one.per_delta / other.per_delta for one, other in zip(ours, theirs, strict=True)]


def _per_delta(runs: Sequence[Run]) -> str:
    each = sorted(run.per_delta for run in runs)
    trusted = "" if all(run.is_trusted for run in runs) else " (beside a busy load generator)"
    return f"{each[len(each) // 2]:.0f} µs{trusted}"


def _level(found: Sustained) -> str:
    return f"{'at least ' if found.at_least else ''}{found.streams}"


def _levels(found: Sequence[Sustained]) -> str:
    return "/".join(map(_level, found))


def _told(run: Run) -> str:
    outcome = run.outcome
    added = f"added p99 {outcome.added.p99:.0f} ms" if outcome.added else "no delta"
    first = f"first text p99 {outcome.first_text.p99:.0f} ms" if outcome.first_text else "no text"
    failed = f", failed {outcome.failed}" if outcome.failed else ""
    merged = outcome.deltas / max(1, outcome.messages)
    others = f"; others on its core {run.others:.0%}" if run.others > _OTHERS else ""
    load = f"; the load's side {run.beside:.0%} of a core{'' if run.is_trusted else f', over {FULL:.0%}'}"
    return f"{run.per_delta:.0f} µs/delta, {merged:.1f} deltas/message, {added}, {first}{failed}{load}{others}"
