"""Events on their way to one client, and what goes wrong there."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fake_provider.exchange import Exchange
from fake_provider.rendering import IN_THE_REPLY, as_bytes, is_delta, place_of
from fake_provider.script import Answer, Break
from fake_provider.wire import Connection, Disconnected, Json

if TYPE_CHECKING:
    from fake_provider.server import FakeProvider


class BrokenOff(Exception):
    """The answer has ended where the script says, before its end."""


@dataclass(slots=True, eq=False)
class Stream:
    """An open stream, and how far it is."""

    response_id: str
    conversation: str | None
    events: int = 0
    deltas: int = 0


class Sender:
    """Sends the events of one response to one client."""

    def __init__(self, provider: "FakeProvider", exchange: Exchange, answer: Answer, fault: Break | None) -> None:
        self._provider = provider
        self._exchange = exchange
        self._connection: Connection = exchange.connection
        self._answer = answer
        self._fault = None if fault is not None and fault.how in IN_THE_REPLY else fault
        self._byte_by_byte = answer.byte_by_byte
        self._byte_seconds = 0.0
        self._unnumbered = False

    async def send(self, events: AsyncIterator[Json], whole: Sequence[Json], begin: int, stream: Stream) -> None:
        """Sends `events`: those of `whole` from number `begin` on, as they come.

        Raises BrokenOff where the script ends them, Disconnected if the client left.
        """
        await self._begin()
        place = place_of(whole, self._fault.at) if self._fault is not None and self._fault.at else None
        if place is None and self._fault is not None and self._fault.after == 0:
            await self._strike(b"")
        number = begin
        async for event in events:
            copies = 1
            if self._is_due(place, number, stream.deltas):
                copies = await self._strike(as_bytes(event, self._answer))
            if self._unnumbered:
                event = {key: value for key, value in event.items() if key != "sequence_number"}
            for _ in range(copies):
                await self._send(as_bytes(event, self._answer))
            number += 1
            stream.events += 1
            stream.deltas += is_delta(event)
        await self._connection.end()

    def _is_due(self, place: int | None, number: int, deltas: int) -> bool:
        if self._fault is None:
            return False
        return number >= place if place is not None else deltas >= self._fault.after

    async def _begin(self) -> None:
        if self._answer.headers_gate is not None:
            await self._provider.wait_at(self._answer.headers_gate, self._connection)
        if self._fault is not None and self._fault.at == "header":
            fault = self._struck()
            if fault.how == "stall":
                await self._provider.wait_at(fault.gate, self._connection, fault.seconds)
            else:
                await (self._connection.close() if fault.how == "eof" else self._reset(b""))
                raise Disconnected
        await self._connection.begin(self._exchange.headers)

    def _struck(self) -> Break:
        """Takes the fault, and counts it."""
        fault, self._fault = self._fault, None
        assert fault is not None
        self._provider.strikes[fault.how] += 1
        return fault

    async def _strike(self, frame: bytes) -> int:
        """Lets something go wrong before `frame` is sent; returns how often it is to be sent.

        Raises BrokenOff or Disconnected if that is the end.
        """
        fault = self._struck()
        part = frame[: len(frame) // 2] or b"data: {"
        match fault.how:
            case "eof" | "half":
                if fault.how == "half":
                    await self._connection.send(part)
                await self._connection.end()
                raise BrokenOff
            case "cut":
                await self._reset(part)
                raise Disconnected
            case "malformed":
                await self._connection.send(b'data: {"type": "response.output_text.delta", "delta": \n\n')
            case "stall":
                await self._provider.wait_at(fault.gate, self._connection, fault.seconds)
            case "comments":
                await self._comments(fault)
            case "duplicate":
                return 2
            case "gap":
                return 0
            case "unnumbered":
                self._unnumbered = True
            case "slow":
                self._byte_by_byte, self._byte_seconds = True, fault.seconds or 0.0
        return 1

    async def _reset(self, part: bytes) -> None:
        if part:
            await self._connection.send(part)
        self._connection.reset()

    async def _comments(self, fault: Break) -> None:
        silence = asyncio.ensure_future(self._provider.wait_at(fault.gate, self._connection, fault.seconds))
        try:
            while not silence.done():
                await self._connection.send(b": keep-alive\n\n")
                await asyncio.wait({silence}, timeout=fault.every)
            await silence
        finally:
            silence.cancel()
            await asyncio.gather(silence, return_exceptions=True)

    async def _send(self, frame: bytes) -> None:
        if not self._byte_by_byte:
            return await self._connection.send(frame)
        for at in range(len(frame)):
            await self._connection.send(frame[at : at + 1])
            if self._byte_seconds:
                await asyncio.sleep(self._byte_seconds)
        return None
