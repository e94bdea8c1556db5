"""Processes on one record in simulated time: whatever befalls them, every promise about turns holds."""

import asyncio
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import pytest

from faults.figures import SIZE, sized
from simulation.loop import DeadlockError, Host, simulate
from simulation.scenario import digests, play

SEED = os.environ.get("VIDA_TEST_SEED")
SEEDS = [int(SEED)] if SEED else range(sized("SIM_SEEDS", 75, 1_500, 100_000))
BATCH = 50
"""Seeds that a process is given at a time."""

LEAST = {
    "crashes": 30,
    "long pauses": 20,
    "partitions": 20,
    "outages": 20,
    "drains": 40,
    "hand-overs": 10,
    "hand-overs at once": 5,
    "take-overs": 20,
    "further attempts": 30,
    "restarts": 20,
    "resumed rounds": 3,
    "answers lost": 100,
    "lock waits": 50,
    "busy logs": 50,
    "interrupts": 50,
    "queue runs": 50,
    "deletions": 20,
    "deleted at work": 10,
    "cancels": 50,
    "attached": 100,
    "resumes": 500,
    "followed": 500,
    "followers of deleted turns": 10,
    "repeated effects": 2,
    "effects of book": 50,
    "completed": 300,
    "acknowledged": 500,
}
"""What 150 seeds have to bring about at least."""


def everywhere(batches: Sequence[Sequence[int]]) -> Iterator[Counter[str]]:
    """Plays batches on all processors, tells how far it is, and leaves the rest where one fails."""
    begun = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        try:
            played = as_completed([pool.submit(play, batch) for batch in batches])
            for number, batch in enumerate(played, 1):
                yield batch.result()
                if number % max(1, len(batches) // 100) == 0:
                    passed = time.monotonic() - begun
                    print(f"[{passed:6.0f} s] batch {number} of {len(batches)}", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(60 + len(SEEDS))
def test_whatever_befalls_processes_every_promise_holds() -> None:
    batches = [SEEDS[start : start + BATCH] for start in range(0, len(SEEDS), BATCH)]
    played = everywhere(batches) if SIZE == "large" and len(batches) > 1 else map(play, batches)
    counts = sum(played, Counter[str]())
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if len(SEEDS) >= 75:
        missing = {name: counts[name] for name, least in LEAST.items() if counts[name] < least * len(SEEDS) // 150}
        assert not missing, f"too little happened: {missing}"


def test_seeds_are_always_the_same_stories() -> None:
    """Also in another process, where strings have other hashes and objects other places."""
    seeds = [*SEEDS[-20:]]
    here = digests(seeds)
    assert digests(seeds) == here
    code = f"from simulation.scenario import digests; print(digests({seeds}), end='')"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=Path.cwd(), check=True
    )
    assert elsewhere.stdout == here


def test_time_jumps_and_a_deadlock_is_told() -> None:
    async def story() -> float:
        await asyncio.sleep(3_600)
        return asyncio.get_running_loop().time()

    async def stuck() -> None:
        await asyncio.get_running_loop().create_future()

    assert simulate(story(), lambda _: None) == 3_600
    with pytest.raises(DeadlockError, match="nothing is ready"):
        simulate(stuck(), lambda _: None)


def test_a_process_stops_goes_on_and_dies() -> None:
    async def story() -> list[float]:
        loop, seen = asyncio.get_running_loop(), list[float]()
        host = Host("p")

        async def work() -> None:
            while True:
                await asyncio.sleep(1)
                seen.append(loop.time())

        host.start(work())
        await asyncio.sleep(2.5)
        host.stop()
        await asyncio.sleep(10)
        host.go_on()
        await asyncio.sleep(1.1)
        host.kill()
        await asyncio.sleep(5)
        return seen

    assert simulate(story(), lambda _: None) == [1, 2, 12.5, 13.5]
