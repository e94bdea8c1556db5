"""The guard around every handler: only who may call gets in, and whatever goes wrong leaves as a status of ours,
never as an exception's text."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health

from core.model.errors import CoreError, Overloaded
from core.model.trail import Trail, begin_trail, trail
from core.ports.system import Ids
from core.ports.telemetry import UNMEASURED, Telemetry
from entrypoints.grpc_api.access import Access, Admission
from entrypoints.grpc_api.call import Call
from entrypoints.grpc_api.errors import MalformedRequest, refuse, refuse_unforeseen

_log = logging.getLogger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


_HEALTH = f"/{health.SERVICE_NAME}/"

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)

_PEER_GONE = "ExecuteBatchError"
"""What the library raises, without a public name, where a write finds nobody."""


class _Undecodable:
    """Stands for a request that is not the message it should be."""


_UNDECODABLE = _Undecodable()


class Guard(grpc.aio.ServerInterceptor):
    """Wraps the handlers of every service, health and reflection included. Gives each call its request id.

    Of those that are no health checks, `most` calls are let through at a time; more raise Overloaded.
    """

    def __init__(self, ids: Ids, most: int, access: Access, telemetry: Telemetry = UNMEASURED) -> None:
        self._ids = ids
        self._most = most
        self._access = access
        self._telemetry = telemetry
        self._calls = 0
        self._bounded = 0  # those of them that are no health checks
        self._guarded: dict[str, _Handler] = {}
        self.idle = asyncio.Event()
        """Set while there is no call whose status has not been sent."""
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Returns the method's handler, guarded. What is set here holds for all of the call."""
        begin_trail(Trail(request_id=self._ids.new(), traceparent=_traceparent(handler_call_details)))
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method: the library answers UNIMPLEMENTED
        method = handler_call_details.method
        if (guarded := self._guarded.get(method)) is None:
            guarded = self._guarded[method] = self._guard(method, handler)
        return guarded

    def _guard(self, method: str, handler: Any) -> _Handler:
        decode = _tolerant(handler.request_deserializer)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._streams(method, handler.stream_stream), decode, handler.response_serializer
            )
        if handler.unary_stream is not None:
            # All of these write to their context, ours and the health service's.
            return grpc.unary_stream_rpc_method_handler(
                self._coroutine(method, handler.unary_stream), decode, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._coroutine(method, handler.unary_unary), decode, handler.response_serializer
        )

    def _coroutine(self, method: str, behavior: Any) -> Any:
        async def guarded(request: Any, context: _Context) -> Any:
            fate = self._begin(method, context)
            try:
                admission = await self._admitted(method, context)
                if request is _UNDECODABLE:
                    raise MalformedRequest
                admission.check(request)
                response = await behavior(request, Call(context, admission.caller))
            except Exception as error:  # noqa: BLE001 - the last line of defence
                await self._refuse(method, context, error)
            else:
                fate.answered = True
                return response

        return guarded

    def _streams(self, method: str, behavior: Any) -> Any:
        async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
            fate = self._begin(method, context)
            try:
                admission = await self._admitted(method, context)
                async for response in behavior(_checked(request, admission), Call(context, admission.caller)):
                    yield response
                fate.answered = True
            except Exception as error:  # noqa: BLE001 - the last line of defence
                await self._refuse(method, context, error)

        return guarded

    def _begin(self, method: str, context: _Context) -> "_Fate":
        fate = _Fate()
        begun = self._telemetry.time()
        bounded = not method.startswith(_HEALTH)

        def done(_: _Context) -> None:
            self._calls -= 1
            self._bounded -= bounded
            if not self._calls:
                self.idle.set()
            self._telemetry.called(method, fate.status(context), self._telemetry.time() - begun)

        self._calls += 1
        self._bounded += bounded
        self.idle.clear()
        context.add_done_callback(done)  # type: ignore[arg-type] # the stubs ask for a class of their own
        return fate

    async def _admitted(self, method: str, context: _Context) -> Admission:
        if self._bounded > self._most and not method.startswith(_HEALTH):
            raise Overloaded
        admission = await self._access.admit(method, context)
        begin_trail(replace(trail(), caller=admission.caller))
        return admission

    async def _refuse(self, method: str, context: _Context, error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if context.done() or type(error).__name__ == _PEER_GONE:
            _log.debug("%s: the client is gone", method)
            return
        if isinstance(error, CoreError):
            await refuse(context, error)
        request_id = trail().request_id
        _log.error("%s failed, request %s", method, request_id, exc_info=error)
        await refuse_unforeseen(context, request_id)


class _Fate:
    """What becomes of a call. `answered` says that its handler has come to its end."""

    __slots__ = ("answered",)

    def __init__(self) -> None:
        self.answered = False

    def status(self, context: _Context) -> str:
        """The name of the status of a call that has ended; one that was left is CANCELLED."""
        code = context.code()
        if code is None or code == grpc.StatusCode.OK:
            return "OK" if self.answered else "CANCELLED"
        return code.name if isinstance(code, grpc.StatusCode) else str(code)


def _traceparent(details: grpc.HandlerCallDetails) -> str:
    """The W3C trace that the caller says the call belongs to; empty where it says nothing of that form."""
    for name, value in details.invocation_metadata or ():
        if name == "traceparent" and isinstance(value, str) and _TRACEPARENT.fullmatch(value):
            return value
    return ""


async def _checked(requests: Any, admission: Admission) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _UNDECODABLE:
            raise MalformedRequest
        admission.check(request)
        yield request


def _tolerant(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """An exception of a decoder would reach the client as it is, so there must be none."""
    if decode is None:
        return None

    def decoded(request: bytes) -> Any:
        try:
            return decode(request)
        except Exception:  # noqa: BLE001 - decoders raise what they like
            return _UNDECODABLE

    return decoded
