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
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

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

DESCRIPTION = """\
Measure the processor time that a delta of text costs until it is in this process as text: read from the socket,
split from the stream, decoded, checked. The provider is that of the tests, in a process of its own on 127.0.0.1.

typed     the SDK's stream of typed events, which does none of the adapter's checks
adapter   OpenAIAgent.reply, with all of them

together: deltas arrive in large pieces, as from a provider that is faster than its reader.
apart:    each arrives by itself, as from a model that thinks. Reading from the socket then costs both alike.
"""


async def typed(client: AsyncOpenAI) -> int:
    """Reads a reply through the SDK's typed events; returns the length of its text."""
    length = 0
    async with await client.responses.create(model=MODEL, input="Hello", stream=True) as events:
        async for event in events:
            if event.type == "response.output_text.delta":
                length += len(event.delta)
    return length


async def adapter(client: AsyncOpenAI) -> int:
    """The same through the adapter."""
    agent = OpenAIAgent(client, model=MODEL, user_key="bench", state_mode="stateless")
    length = 0
    async with aclosing(agent.reply(_request())) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                length += len(event.text)
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


async def measure(address: tuple[str, int], deltas: int, rounds: int) -> dict[str, list[float]]:
    """Processor seconds per delta of both ways, in turn."""
    ways: dict[str, Callable[[AsyncOpenAI], Awaitable[int]]] = {"typed": typed, "adapter": adapter}
    found: dict[str, list[float]] = {way: [] for way in ways}
    async with make_client("", f"http://{address[0]}:{address[1]}/v1", max_connections=2) as client:
        for number in range(rounds + 1):
            for way, read in ways.items():
                began = time.process_time()
                length = await read(client)
                spent = time.process_time() - began
                if length != deltas * len(PIECE):
                    raise SystemExit(f"{way}: {length} characters of {deltas * len(PIECE)} arrived")
                if number:  # the first round warms up
                    found[way].append(spent / deltas)
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=f"The bar is {BAR:g}. Exit status: 0 measured, 1 something failed, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each way reads a reply (%(default)s)")
    parser.add_argument("--deltas", type=int, default=10_000, help="of a reply (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    options = parser.parse_args()
    loads = {
        "together": (("--flat-out",), options.deltas),
        "apart": (("--pace", "1000"), max(1, options.deltas // 10)),
    }
    results = {}
    for name, (arguments, deltas) in loads.items():
        print(f"{name}: {deltas} deltas a reply", file=sys.stderr, flush=True)
        with provider("--listen", "127.0.0.1:0", "--deltas", str(deltas), "--piece", PIECE, *arguments) as address:
            results[name] = asyncio.run(measure(address, deltas, options.rounds))
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'':10}{'typed, µs':>12}{'adapter, µs':>14}{'ratio':>8}")
    for name, found in results.items():
        before, after = (statistics.median(found[way]) for way in ("typed", "adapter"))
        print(f"{name:10}{before * 1e6:12.1f}{after * 1e6:14.1f}{after / before:8.2f}")


if __name__ == "__main__":
    main()
