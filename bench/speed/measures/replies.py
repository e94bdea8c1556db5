"""One reply at a time: how long until it says something, and how fast a long one comes."""

from __future__ import annotations

import statistics
from dataclasses import asdict

from durability import sqlite_place, timed

from speed.bench import Bench, say
from speed.load import Run
from speed.processes import BenchError
from speed.servers import PRODUCT, Server
from speed.verdict import Verdict

_FIRST_PACE = 50.0
_BURST_DELTAS = 20_000


def first_text(bench: Bench) -> list[Verdict]:
    """Time that a server adds to the first text of a reply, one at a time, in new threads, beside LiteLLM."""
    turns = 20 if bench.quick else 100
    others = ("null", "naive", "fastapi", "litellm")
    added: dict[str, list[float]] = {}
    bare: list[float] = []
    with bench.field(PRODUCT, *others) as found, bench.room() as folder, sqlite_place(folder) as place:
        assert place.bare is not None
        for _ in range(bench.rounds):
            direct = _first_text(bench, bench.direct(), turns)
            bare.append(statistics.median(timed(place.bare) for _ in range(turns)) * 1000)
            say(f"  direct {direct:.2f} ms, a bare commit {bare[-1]:.2f} ms")
            for server in bench.turns(found, rounds=1):
                own = 0.0 if server.name == "null" else direct  # the null server asks no model
                added.setdefault(server.name, []).append(_first_text(bench, server, turns) - own)
                say(f"  {server.name} adds {added[server.name][-1]:.2f} ms")
    raw = {"added_ms": added, "bare_commit_ms": bare}
    if "litellm" in found.missing:
        why = f"not installed: {found.missing['litellm']}"
        return [Verdict(measure="first-text", what="added to the first text, in LiteLLM's", why=why, raw=raw)]
    pairs = zip(added[PRODUCT], added["litellm"], bare, strict=True)
    return [
        Verdict(
            measure="first-text",
            what="added to the first text less two bare commits, in litellm's",
            figures=[(ours - 2 * commit) / theirs for ours, theirs, commit in pairs],
            target=0.25,
            detail="; ".join(f"{name} {statistics.median(each):.2f} ms" for name, each in added.items())
            + f"; a bare commit {statistics.median(bare):.2f} ms",
            raw=raw,
        )
    ]


def burst(bench: Bench) -> list[Verdict]:
    """One reply of 20,000 deltas, which come as fast as they are read, beside the naive server."""
    runs: dict[str, list[Run]] = {}
    with bench.field(PRODUCT, "null", "naive", "fastapi", "litellm") as found:
        for server in bench.turns(found):
            runs.setdefault(server.name, []).append(_burst(bench, server))
    rates = {name: [_BURST_DELTAS / _seconds(run) for run in each] for name, each in runs.items()}
    verdicts = [
        Verdict(
            measure="burst",
            what=f"deltas a second of one stream flat out, in {name}'s",
            figures=[ours / theirs for ours, theirs in zip(rates[PRODUCT], each, strict=True)],
            target=30.0 if name == "naive" else None,
            at_most=False,
            detail=f"{PRODUCT} {statistics.median(rates[PRODUCT]):,.0f} a second; "
            f"{name} {statistics.median(each):,.0f}",
            raw={one: [asdict(run) for run in runs[one]] for one in (PRODUCT, name)},
        )
        for name, each in rates.items()
        if name != PRODUCT
    ]
    return verdicts + [
        Verdict(measure="burst", what=f"deltas a second, in {name}'s", why=f"not installed: {why}")
        for name, why in found.missing.items()
    ]


def _first_text(bench: Bench, server: Server, turns: int) -> float:
    """The median in milliseconds."""
    run = bench.run(server, streams=turns, deltas=2, pace=_FIRST_PACE, in_flight=1)
    if run.outcome.failed or run.outcome.first_text is None:
        raise BenchError(f"{server.name}: {run.outcome.failed}")
    return run.outcome.first_text.p50


def _burst(bench: Bench, server: Server) -> Run:
    """The median of three is a run's figure: a single one is over too soon."""
    run = bench.run(server, streams=3, deltas=_BURST_DELTAS, pace=None, in_flight=1, seconds=180)
    if run.outcome.failed:
        raise BenchError(f"{server.name}: {run.outcome.failed}")
    say(f"  {server.name}: {_BURST_DELTAS / _seconds(run):,.0f} deltas/s")
    return run


def _seconds(run: Run) -> float:
    assert run.outcome.turns is not None
    return run.outcome.turns.p50 / 1000
