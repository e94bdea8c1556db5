"""What a delta costs in the OpenAI adapter, beside the SDK's own typed stream of the same replies."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

import aiohttp  # noqa: E402
import uvloop  # noqa: E402
from openai import AsyncOpenAI  # noqa: E402

from adapters.openai import OpenAIAgent, make_client  # noqa: E402
from core.model.agent import AgentDefinition, Domain  # noqa: E402
from core.model.events import TextDelta  # noqa: E402
from core.model.message import Message, Role, TextPart  # noqa: E402
from core.ports.agent import ReplyRequest  # noqa: E402
from fake_provider import provider  # noqa: E402 - the one beside this file, which starts the provider of the tests

BAR = 0.25
"""What a delta may cost in the adapter, in deltas of the typed stream."""
MODEL = "gpt-6-luna"
PIECE = "word "

TICK = 0.05
"""Seconds between two looks at a stream, where it is looked at by the tick."""

DESCRIPTION = """\
Measure the processor time that a delta of text costs until it is in this process as text: read from the socket,
split from the stream, decoded, checked. The provider is that of the tests, in a process of its own on 127.0.0.1.

typed     the SDK as it comes and its stream of typed events, which does none of the adapter's checks
adapter   OpenAIAgent.reply, with all of them, asked for the next event at once
ticked    the same, asked every 50 ms: what came meanwhile is one event

together: deltas arrive in large pieces, as from a provider that is faster than its reader.
apart:    each arrives by itself, as from a model that thinks.
N paced:  N such replies at a time, of 25 deltas a second each. A hundredth of a reply's set-up is in each.
set-up:   a whole reply of one delta, beside one POST with aiohttp and nothing else.
"""


async def typed(client: AsyncOpenAI) -> int:
    """Reads a reply through the SDK's typed events; returns the length of its text."""
    length = 0
    async with await client.responses.create(model=MODEL, input="Hello", stream=True) as events:
        async for event in events:
            if event.type == "response.output_text.delta":
                length += len(event.delta)
    return length


class Tick:
    """The same moments for all who wait."""

    def __init__(self) -> None:
        self._due: asyncio.Future[None] | None = None

    def wait(self) -> asyncio.Future[None]:
        """Waits for the next moment."""
        if self._due is None:
            loop = asyncio.get_running_loop()
            self._due = loop.create_future()
            loop.call_at((loop.time() // TICK + 1) * TICK, self._strike)
        return self._due

    def _strike(self) -> None:
        if self._due is not None:
            self._due.set_result(None)
        self._due = None


async def adapter(client: AsyncOpenAI, tick: Tick | None = None) -> int:
    """The same through the adapter."""
    agent = OpenAIAgent(client, model=MODEL, user_key="bench", state_mode="stateless")
    length = 0
    async with aclosing(agent.reply(_request())) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                length += len(event.text)
                if tick is not None:
                    await tick.wait()
    return length


def _request() -> ReplyRequest:
    async def history(data: int = 0) -> list[Message]:  # noqa: ARG001 - the port's
        return []

    definition = AgentDefinition(slug="career", version=1, domain=Domain.CAREER, name="Coach", instructions="")
    message = Message(
        id="m",
        thread_id="t",
        turn_id="u",
        index=1,
        role=Role.USER,
        content=(TextPart("Hello"),),
        partial=False,
        created_at=datetime.now(UTC),
    )
    return ReplyRequest(
        turn_id="u",
        thread_id="t",
        user_id="ada",
        domain=Domain.CAREER,
        definition=definition,
        message=message,
        history=history,
        tools=(),
    )


@dataclass(frozen=True)
class Load:
    """What the provider sends, in how many replies at a time, and how often that is measured."""

    name: str
    arguments: tuple[str, ...]
    deltas: int
    streams: int
    rounds: int
    ways: tuple[str, ...] = ("typed", "adapter")


async def measure(address: tuple[str, int], load: Load) -> dict[str, list[float]]:
    """Processor seconds per delta in each way, in turn."""
    tick = Tick()
    url = f"http://{address[0]}:{address[1]}/v1"
    found: dict[str, list[float]] = {way: [] for way in load.ways}
    async with (
        make_client("", url, load.streams) as ours,
        AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as theirs,
        aiohttp.ClientSession() as session,
    ):
        ways: dict[str, Callable[[], Awaitable[int]]] = {
            "typed": lambda: typed(theirs),
            "adapter": lambda: adapter(ours),
            "ticked": lambda: adapter(ours, tick),
            "bare": lambda: bare(session, f"{url}/responses", load.deltas * len(PIECE)),
        }
        for number in range(load.rounds + 1):
            for way in load.ways:
                began = time.process_time()
                lengths = await asyncio.gather(*(ways[way]() for _ in range(load.streams)))
                spent = time.process_time() - began
                if set(lengths) != {load.deltas * len(PIECE)}:
                    raise SystemExit(f"{load.name}, {way}: not all of the text has arrived")
                if number:  # the first round warms up
                    found[way].append(spent / load.deltas / load.streams)
    return found


async def bare(session: aiohttp.ClientSession, url: str, length: int) -> int:
    """Asks for a reply and reads its bytes; whether they say `length` characters is not looked at."""
    async with session.post(url, json={"model": MODEL, "input": "Hello", "stream": True}) as answer:
        await answer.read()
    return length


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=f"The bar is {BAR:g}. Exit status: 0 measured, 1 something failed, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each way reads a reply (%(default)s)")
    parser.add_argument("--deltas", type=int, default=10_000, help="of a reply (%(default)s)")
    parser.add_argument("--streams", type=int, nargs="*", default=[40, 200], help="that are paced (40 200)")
    parser.add_argument(
        "--asyncio", action="store_true", help="run on asyncio's own loop, not on uvloop as `serve`"
    )
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    options = parser.parse_args()
    all_ways = ("typed", "adapter", "ticked")
    apart = max(1, options.deltas // 10)
    loads = [
        Load("together", ("--flat-out",), options.deltas, 1, options.rounds),
        Load("apart", ("--pace", "1000"), apart, 1, options.rounds, all_ways),
        *(
            Load(f"{streams} paced", ("--pace", "25"), 100, streams, (options.rounds + 1) // 2, all_ways)
            for streams in options.streams
        ),
        Load("set-up", ("--flat-out",), 1, 1, 100 * options.rounds, ("typed", "adapter", "bare")),
    ]
    run = asyncio.run if options.asyncio else uvloop.run
    results = {}
    for load in loads:
        print(f"{load.name}: {load.deltas} deltas a reply", file=sys.stderr, flush=True)
        arguments = ("--deltas", str(load.deltas), "--piece", PIECE, *load.arguments)
        with provider("--listen", "127.0.0.1:0", *arguments) as address:
            results[load.name] = run(measure(address, load))
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'':10}" + "".join(f"{way + ', µs':>14}{'':8}" for way in (*all_ways, "bare")))
    for name, found in results.items():
        line, costs = f"{name:10}", {way: statistics.median(costs) for way, costs in found.items()}
        for way in (*all_ways, "bare"):
            cost = costs.get(way)
            ratio = "" if cost is None or way == "typed" else f"{cost / costs['typed']:8.2f}"
            line += f"{'' if cost is None else f'{cost * 1e6:.1f}':>14}{ratio:8}"
        print(line.rstrip())


if __name__ == "__main__":
    main()
