"""Runs the provider by itself: `PYTHONPATH=tests python -m fake_provider [PORT]`."""

import asyncio
import sys
from contextlib import suppress

from fake_provider import FakeProvider


async def _main(port: int) -> None:
    async with FakeProvider(port=port) as provider:
        print(provider.base_url, flush=True)
        await provider.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
