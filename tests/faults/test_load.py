"""Many streams at once, some of whose readers are slow, and some of whom read nothing: nobody waits for them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from faults.checker import judge
from faults.client import Told, chat_request, stubs
from faults.cluster import DEADLINE, Cluster
from faults.figures import FIGURES, SIZE, chance, sized
from faults.process import attacked
from faults.scripted import expected
from harness import rest_of

SUITE = "load"
STREAMS = sized("LOAD_STREAMS", 40, 100, 2_000)
WAVES = sized("LOAD_WAVES", 3, 3, 8)
MOST_MEMORY = 256
"""KiB that a stream may cost the server, whatever its reader does."""
SPREAD = 16
"""MiB by which the same load may differ from one time to the next."""

pytestmark = pytest.mark.timeout(120 if SIZE != "large" else 600)


async def read(agents: Any, told: Told, *, after: asyncio.Event | None) -> None:
    """Reads a reply to its end; a slow reader takes one event and leaves the others for later."""
    call = agents.Chat(chat_request(told), timeout=DEADLINE)
    told.take((await call.read()).event)
    if after is not None:
        await after.wait()
    for response in await rest_of(call):
        told.take(response.event)


async def test_nobody_waits_for_slow_readers(cluster: Cluster, tmp_path: Path) -> None:
    draw, tolds = chance(SUITE), []
    url = f"sqlite:///{tmp_path / 'vida.db'}"
    server = await cluster.start(url)
    few = STREAMS // 10
    peaks = [server.memory]
    for wave in range(WAVES):
        quick = [Told(f"ada{n}", f"words:60 pace:20 {wave}") for n in range(STREAMS - 2 * few)]
        slow = [Told(f"bob{n}", f"words:60 pace:20 {wave}") for n in range(few)]
        async with (
            stubs(server.address) as (agents, _),
            attacked(server.address, "stalled_readers", few) as stalled,
        ):
            over = asyncio.Event()
            waiting = [asyncio.create_task(read(agents, told, after=over)) for told in slow]
            await asyncio.gather(*(read(agents, told, after=None) for told in quick))
            peaks.append(server.memory)
            assert stalled["deeds"] == few
            assert not any(task.done() for task in waiting), "the slow ones were not slow"
            over.set()
            await asyncio.gather(*waiting)
        for told in (*quick, *slow):
            assert told.turn.state == pb.TURN_STATE_COMPLETED
            assert told.text == expected(told.message)
        tolds += draw.sample(quick, min(len(quick), 20)) + slow[:20]
        FIGURES.add(SUITE, {"streams": len(quick), "slow readers": few, "readers of nothing": few})
    await judge(SUITE, url, cluster.addresses, tolds, draw)
    FIGURES.add(SUITE, {f"MiB at most in wave {wave}": peak for wave, peak in enumerate(peaks)})
    # The heap takes some waves to find its size; a leak goes on.
    base, first, settled, last = peaks[0], peaks[1], peaks[WAVES // 2], peaks[-1]
    assert first - base <= SPREAD + STREAMS * MOST_MEMORY / 1024
    assert last <= settled + SPREAD, "what a wave took has not been given back"
