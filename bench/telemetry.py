"""What measuring costs: nothing to speak of where nobody measures, and little where somebody does."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from opentelemetry.exporter.prometheus import PrometheusMetricReader  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402

from adapters.memory.store import MemoryStore  # noqa: E402
from adapters.telemetry import Moments  # noqa: E402
from core.ports.telemetry import UNMEASURED, Telemetry  # noqa: E402
from doubles import DONE, ManualClock, ScriptedAgent, service  # noqa: E402

DESCRIPTION = """\
Measure what telemetry costs, in the CPU of a turn. Turns run one after another in this process, in memory, without
gRPC: a real turn costs several times as much, so the shares of a real one are smaller. Medians of rounds in turn.
"""


class Counted:
    """Counts what the core asks of whoever measures, and passes it on to nobody."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(UNMEASURED, name)


async def cpu(telemetry: Telemetry, turns: int, pieces: int) -> float:
    """CPU seconds of a turn, from its message to its end."""
    agent = ScriptedAgent(default=[*["word "] * pieces, DONE])
    async with service(MemoryStore(ManualClock()), agent, telemetry=telemetry) as it:
        begun = time.process_time()
        for _ in range(turns):
            await it.events(await it.say())
        return (time.process_time() - begun) / turns


def measured() -> Moments:
    """Somebody who measures, as `serve` does, and keeps the spans in memory."""
    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    reader = PrometheusMetricReader(registry=CollectorRegistry())
    return Moments(MeterProvider([reader], shutdown_on_exit=False), tracers)


def per_call() -> float:
    """CPU seconds of a moment that nobody listens to, its look-up included."""
    turn: Any = object()
    times = 200_000
    begun = time.process_time()
    for _ in range(times):
        UNMEASURED.began(turn)
    return (time.process_time() - begun) / times


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=300, help="turns in a round (default: 300)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    options = parser.parse_args()
    counted = Counted()
    asyncio.run(cpu(counted, 1, 1))  # type: ignore[arg-type] # it answers to every name
    calls = sum(counted.calls.values())
    print(f"asked of whoever measures in a turn: {calls} calls, whatever the number of pieces")
    print(f"{'pieces of text':>14} {'unmeasured, µs':>15} {'calls, share of it':>19} {'measured, ratio':>16}")
    for pieces in (10, 100, 1_000):
        found: list[tuple[float, float]] = []
        for _ in range(options.rounds):
            turns = max(1, options.turns * 10 // (10 + pieces // 10))
            without = asyncio.run(cpu(UNMEASURED, turns, pieces))
            found.append((without, asyncio.run(cpu(measured(), turns, pieces))))
        without = statistics.median(one for one, _ in found)
        ratio = statistics.median(two / one for one, two in found)
        print(f"{pieces:>14} {without * 1e6:>15.0f} {calls * per_call() / without:>19.4%} {ratio:>16.2f}")


if __name__ == "__main__":
    main()
