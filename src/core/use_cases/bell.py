"""Waiting for the next time that something happens."""

import asyncio


class Bell:
    """Each stroke wakes those who wait at the time; who comes later waits for the next one.

    There are several for every turn: it is as small as that can be, and an asyncio.Event is not.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Waits for the next stroke."""
        stroke = asyncio.get_running_loop().create_future()
        self._waiting.append(stroke)
        try:
            await stroke
        except asyncio.CancelledError:
            if stroke in self._waiting:
                self._waiting.remove(stroke)
            raise

    def ring(self) -> None:
        """Wakes whoever waits."""
        waiting, self._waiting = self._waiting, []
        for stroke in waiting:
            if not stroke.done():
                stroke.set_result(None)
