"""Responses that are written whether anybody reads them or not."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from fake_provider.rendering import is_delta
from fake_provider.script import Answer, Gate
from fake_provider.wire import Connection, Json


class Writing:
    """A background response: the events that are written so far, and the response as it stands.

    `whole` are all events that will be written, `final` the response then; `ended` is called once, with its end.
    `gates` has those that it waits at.
    """

    def __init__(
        self,
        whole: list[Json],
        final: Json,
        answer: Answer,
        ended: Callable[[Json], None],
        gates: set[Gate],
        *,
        streamed: bool,
    ) -> None:
        self.whole = whole
        self.answer = answer
        self.streamed = streamed
        self.response: Json = whole[0]["response"]
        self.is_over = False
        self._gates = gates
        self._final = final
        self._ended = ended
        self._written: list[Json] = []
        self._changed = asyncio.Event()

    async def write(self) -> None:
        """Writes to the end at the pace of the script."""
        pauses = list(self.answer.pauses)
        deltas = 0
        for event in self.whole:
            is_last = event is self.whole[-1]
            while pauses and pauses[0].after == deltas and (deltas or is_delta(event) or is_last):
                gate = pauses.pop(0).gate
                gate.reached.set()
                self._gates.add(gate)
                await gate.released.wait()
                self._gates.discard(gate)
            if self.is_over:
                return
            deltas += is_delta(event)
            self._written.append(event)
            if is_last:
                self._end(self._final)
            else:
                self.response = event.get("response", self.response)
                self._tell()
            await asyncio.sleep(1 / self.answer.pace if self.answer.pace and is_delta(event) else 0)

    def cancel(self) -> None:
        """Ends it where it stands. What has ended stays as it is."""
        if not self.is_over:
            self._end({**self.response, "status": "cancelled", "usage": self.answer.used_when_cancelled})

    async def events(self, after: int, connection: Connection) -> AsyncGenerator[Json, None]:
        """The events with greater numbers, as they come. Raises Disconnected."""
        place = after + 1
        while True:
            changed = self._changed
            while place < len(self._written):
                yield self._written[place]
                place += 1
            if self.is_over:
                return
            if changed is self._changed:
                await connection.wait_for(changed)

    def _end(self, response: Json) -> None:
        self.is_over, self.response = True, response
        self._ended(response)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
