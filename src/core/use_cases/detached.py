"""Work that goes on when its caller leaves."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from core.model.errors import StoreBusy
from core.ports.store import Conflict

T = TypeVar("T")


class Detached(Generic[T]):
    """Runs changes to their end, whoever asked for them and has left since.

    A caller who leaves between a commit and what follows from it must not leave that undone.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[T]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of the work, for a caller who stays. Raises what the work does, StoreBusy for Conflict."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except Conflict:
            raise StoreBusy from None  # others were faster each time

    async def settle(self) -> None:
        """Waits for all that is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, task: "asyncio.Task[T]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # a refusal for a caller who has left is nobody's any more
