"""The guard around every handler: only who may call gets in, and whatever goes wrong leaves as a status of ours,
never as an exception's text."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health

from core.model.errors import CoreError, Overloaded
from core.ports.system import Ids
from entrypoints.grpc_api.access import Access, Admission
from entrypoints.grpc_api.call import Call
from entrypoints.grpc_api.errors import MalformedRequest, refuse, refuse_unforeseen

_log = logging.getLogger(__name__)

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


_HEALTH = f"/{health.SERVICE_NAME}/"

_PEER_GONE = "ExecuteBatchError"
"""What the library raises, without a public name, where a write finds nobody."""


class _Undecodable:
    """Stands for a request that is not the message it should be."""


_UNDECODABLE = _Undecodable()


class Guard(grpc.aio.ServerInterceptor):
    """Wraps the handlers of every service, health and reflection included.

    Of those that are no health checks, `most` calls are let through at a time; more raise Overloaded.
    """

    def __init__(self, ids: Ids, most: int, access: Access) -> None:
        self._ids = ids
        self._most = most
        self._access = access
        self._calls = 0
        self.idle = asyncio.Event()
        """Set while there is no call whose status has not been sent."""
        self.idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Returns the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method: the library answers UNIMPLEMENTED
        decode = _tolerant(handler.request_deserializer)
        method = handler_call_details.method
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
            self._count(context)
            try:
                self._keep_bound(method)
                admission = await self._access.admit(method, context)
                if request is _UNDECODABLE:
                    raise MalformedRequest
                admission.check(request)
                return await behavior(request, Call(context, admission.caller))
            except Exception as error:  # noqa: BLE001 - the last line of defence
                await self._refuse(method, context, error)

        return guarded

    def _streams(self, method: str, behavior: Any) -> Any:
        async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
            self._count(context)
            try:
                self._keep_bound(method)
                admission = await self._access.admit(method, context)
                async for response in behavior(_checked(request, admission), Call(context, admission.caller)):
                    yield response
            except Exception as error:  # noqa: BLE001 - the last line of defence
                await self._refuse(method, context, error)

        return guarded

    def _count(self, context: _Context) -> None:
        def done(_: _Context) -> None:
            self._calls -= 1
            if not self._calls:
                self.idle.set()

        self._calls += 1
        self.idle.clear()
        context.add_done_callback(done)  # type: ignore[arg-type] # the stubs ask for a class of their own

    def _keep_bound(self, method: str) -> None:
        if self._calls > self._most and not method.startswith(_HEALTH):
            raise Overloaded

    async def _refuse(self, method: str, context: _Context, error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if context.done() or type(error).__name__ == _PEER_GONE:
            _log.debug("%s: the client is gone", method)
            return
        if isinstance(error, CoreError):
            await refuse(context, error)
        request_id = self._ids.new()
        _log.error("%s failed, request %s", method, request_id, exc_info=error)
        await refuse_unforeseen(context, request_id)


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
