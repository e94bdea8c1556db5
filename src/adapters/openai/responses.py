"""Responses of the provider, from the first byte of an answer to the end, over as many connections as it takes."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, cast

import httpx2
from openai import AsyncOpenAI, omit

from adapters.openai.client import WATCHED
from adapters.openai.errors import Exchange, ProviderFault, Remedy, translated
from adapters.openai.reading import Reading
from adapters.openai.retry import Patience, Policy
from adapters.openai.round import usage_of
from adapters.openai.stream import Silence, SseSplitter, Watchdog, decoded, drain
from core.model.events import TextDelta
from core.model.turn import TurnReason, Usage
from core.ports.agent import CannotResume

STOP_SECONDS = 8.0

Call = Awaitable[Any]
"""A request for a streamed answer, sent when awaited: with the SDK's raw response, whose body is not read yet."""

_ENDED = frozenset({"completed", "incomplete", "failed"})
_REFUSED = frozenset({400, 404, 409, 410})
"""What a provider says of a response that has no stream (any more), or that there is nothing to stop."""

logger = logging.getLogger(__name__)

_NO_STREAMS = frozenset({"application/json", "text/html"})
"""Types of an answer that is whole, or a page of somebody in between. It would be the same if it were asked for
again. Any other may be a stream, whatever it is called."""


class Responses:
    """Reads and stops responses. `silence` bounds each connection."""

    def __init__(self, client: AsyncOpenAI, silence: Silence, policy: Policy) -> None:
        self._client = client
        self._silence = silence
        self._policy = policy

    async def read(self, call: Call, reading: Reading) -> AsyncGenerator[list[TextDelta], None]:
        """Reads an answer to its end, step by step. Raises ProviderFault.

        Closing it closes the connection: that stops a response that is not written in the background.
        """
        exchange = Exchange()
        splitter = SseSplitter()
        with translated(exchange), Watchdog(self._silence) as watchdog:
            response = (await watchdog.wait(call)).http_response
            exchange.opened = True
            exchange.request_id = response.headers.get("x-request-id", "")
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            body = _body(response)
            del call, response  # they hold the request and all that it says, which nobody needs any more
            async with aclosing(body), aclosing(_pieces(body)) as pieces:
                if kind in _NO_STREAMS:
                    raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
                while reading.end is None:
                    deltas = reading.read(await _events(pieces, splitter, watchdog))
                    exchange.started = True
                    watchdog.heard(all_said=reading.all_said)
                    yield deltas
                    if reading.has_gap:
                        raise ProviderFault(TurnReason.PROVIDER_TRUNCATED, Remedy.LOOK)
                    if reading.fault is not None:
                        raise reading.fault
                await drain(pieces)

    async def read_background(self, call: Call, reading: Reading) -> AsyncGenerator[list[TextDelta], None]:
        """Reads the answer to the request that begins a response in the background, and what follows it where
        the connection is lost."""
        try:
            async with aclosing(self.read(call, reading)) as steps:
                async for deltas in steps:
                    yield deltas
        except ProviderFault as fault:
            if reading.response_id is None or fault is reading.fault:
                raise
            response_id, patience = reading.response_id, Patience(self._policy)
            await _bear(fault, response_id, patience)
        else:
            return
        async with aclosing(self.resume(response_id, reading, patience)) as steps:
            async for deltas in steps:
                yield deltas

    async def resume(
        self, response_id: str, reading: Reading, patience: Patience | None = None
    ) -> AsyncGenerator[list[TextDelta], None]:
        """Reads a response that is written in the background, from where `reading` has come, to its end.

        Raises ProviderFault, and CannotResume where the provider does not have it any more.
        """
        patience = patience or Patience(self._policy)
        while True:
            cursor = reading.cursor
            if cursor is None:
                reading.rewind()
            reading.reopen()
            place = reading.place
            call = self._client.responses.with_raw_response.retrieve(
                response_id, stream=True, starting_after=omit if cursor is None else cursor, timeout=WATCHED
            )
            try:
                async with aclosing(self.read(call, reading)) as steps:
                    async for deltas in steps:
                        yield deltas
            except ProviderFault as fault:
                if fault is reading.fault:
                    raise
                lost = fault
            else:
                return
            if reading.place != place:
                patience = Patience(self._policy)
            elif (event := await self._last_event(response_id, lost)) is not None:
                reading.rewind()
                yield reading.read([event])
                if reading.fault is not None:
                    raise reading.fault
                return
            await _bear(lost, response_id, patience)

    async def _last_event(self, response_id: str, lost: ProviderFault) -> bytes | None:
        """The event with which a response has ended whose stream says no more, None if it has not.

        Streams are kept for some minutes, responses longer; and a stream does not say that it was cancelled.
        """
        try:
            with translated(Exchange()):
                async with asyncio.timeout(self._silence.first_event):
                    found = await self._client.responses.with_raw_response.retrieve(response_id)
            status = _status(found.content)
        except ProviderFault as fault:
            if fault.status == 404:
                _log("a response is gone", response_id, fault)
                raise CannotResume from fault
            return None
        if status in _ENDED:
            return _as_event(status, found.content)
        if status == "cancelled" or lost.status in _REFUSED:
            _log("a response has no stream", response_id, lost)
            raise CannotResume from lost
        return None

    async def complete(self, call: Awaitable[Any]) -> tuple[str, Usage]:
        """Reads the raw answer to a request that is not streamed: its whole text. Raises ProviderFault, also for
        half an answer."""
        with translated(Exchange()):
            found = await call
            status = _status(found.content)
        if status not in _ENDED:
            raise ProviderFault(TurnReason.PROVIDER_PROTOCOL)
        reading = Reading(follows_text=False)
        deltas = reading.read([_as_event(status, found.content)])
        if reading.fault is not None:
            raise reading.fault
        assert reading.end is not None
        if reading.end.shortfall is not None or any(delta.refusal for delta in deltas):
            raise ProviderFault(reading.end.shortfall or TurnReason.CONTENT_FILTERED)
        return "".join(delta.text for delta in deltas), reading.end.usage

    async def stop(self, response_id: str) -> Usage | None:
        """Cancels a response that is written in the background. Never fails, and takes STOP_SECONDS at most.

        Returns what a cancelled one has used where the provider says. One that had ended before was not cancelled:
        whoever has read its end knows what it has used.
        """
        patience = Patience(self._policy)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                while True:
                    try:
                        return await self._cancel(response_id)
                    except ProviderFault as fault:
                        if fault.status in _REFUSED:
                            return None
                        if not await patience.wait_to_look_again(fault):
                            _log("a response can't be stopped", response_id, fault)
                            return None
        except TimeoutError:
            logger.warning("a response can't be stopped in time: response_id=%s", response_id)
        except Exception as error:  # noqa: BLE001 - nobody could do anything about it
            logger.warning("a response can't be stopped: %s response_id=%s", type(error).__name__, response_id)
        return None

    async def _cancel(self, response_id: str) -> Usage | None:
        with translated(Exchange()):
            found = await self._client.responses.with_raw_response.cancel(response_id)
        response = decoded(found.content) or {}
        usage = response.get("usage")
        return usage_of(usage) if response.get("status") == "cancelled" and usage else None


def _body(response: httpx2.Response) -> httpx2.Response | httpx2.AsyncByteStream:
    """What is closed at the end: the body, or the response where it decodes it, as hardly anybody compresses."""
    if "content-encoding" in response.headers:
        return response
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    return response.stream


def _pieces(body: httpx2.Response | httpx2.AsyncByteStream) -> AsyncGenerator[bytes, None]:
    """Its bytes as they come."""
    if isinstance(body, httpx2.Response):
        return body.aiter_bytes()
    return cast("AsyncGenerator[bytes, None]", aiter(body))  # the client has made one of it


async def _events(pieces: AsyncIterator[bytes], splitter: SseSplitter, watchdog: Watchdog) -> list[bytes]:
    """The next events that have come as a whole. Raises ProviderFault where there are no more."""
    while splitter.fault is None and (piece := await watchdog.wait(anext(pieces, None))) is not None:
        if events := splitter.feed(piece):
            return events
    raise splitter.fault or ProviderFault(TurnReason.PROVIDER_TRUNCATED, Remedy.LOOK)


def _status(response: bytes) -> str:
    """What a response says of itself, "" for nothing. Raises ProviderFault."""
    status = (decoded(response) or {}).get("status")
    return status if isinstance(status, str) else ""


def _as_event(status: str, response: bytes) -> bytes:
    """The last event of a response that has ended, as its stream would say it."""
    return b'{"type": "response.%s", "response": %s}' % (status.encode(), response)


async def _bear(fault: ProviderFault, response_id: str, patience: Patience) -> None:
    """Waits until a response may be looked for again. Raises the fault where that was done often enough.

    It has no remedy then: the response is still being written, and must not be asked for a second time.
    """
    _log("lost sight of a response", response_id, fault)
    if not await patience.wait_to_look_again(fault):
        fault.remedy = Remedy.NONE
        raise fault


def _log(what: str, response_id: str, fault: ProviderFault) -> None:
    logger.warning(
        "%s: reason=%s status=%s code=%s request_id=%s response_id=%s",
        what,
        fault.reason.value,
        fault.status,
        fault.code,
        fault.request_id,
        response_id,
    )
