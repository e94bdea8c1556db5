"""Waiting for a store that does not answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from core.model.errors import StoreUnavailable

_RETRY_FIRST = 0.05
_RETRY_MAX = 1.0

T = TypeVar("T")


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Tries until the store answers. The turn's budget, or the end of the process, bounds it."""
    wait = _RETRY_FIRST
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            await asyncio.sleep(wait)
            wait = min(_RETRY_MAX, wait * 2)
