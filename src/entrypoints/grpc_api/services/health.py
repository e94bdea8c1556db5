"""Health checks: which services are SERVING, for whoever asks and whoever watches."""

import asyncio
from collections.abc import Iterable
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HealthService:
    """Says of each service what it was told last; of one that it was told nothing of, that it is not there.

    The library's own holds a lock while it writes to a watcher: one that takes nothing would keep the service from
    saying that it stops, and so from stopping.
    """

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self._changed = asyncio.Event()

    def serve(self, services: Iterable[str]) -> None:
        """These are SERVING from now on; the empty name stands for all of them."""
        self._change(dict.fromkeys(services, health_pb2.HealthCheckResponse.SERVING))

    def refuse(self) -> None:
        """All are NOT_SERVING from now on."""
        self._change(dict.fromkeys(self._states, health_pb2.HealthCheckResponse.NOT_SERVING))

    async def Check(self, request: Any, context: _Context) -> Any:
        """Answers once."""
        state = self._states.get(request.service)
        if state is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=state)

    # A coroutine that writes: see AgentService.Chat.
    async def Watch(self, request: Any, context: _Context) -> None:
        """Writes what holds, and again when that has become something else."""
        told = None
        while True:
            changed = self._changed
            state = self._states.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if state == told:
                await changed.wait()
            else:
                await context.write(health_pb2.HealthCheckResponse(status=state))
                told = state

    def _change(self, states: dict[str, Any]) -> None:
        self._states = states
        self._changed.set()
        self._changed = asyncio.Event()
