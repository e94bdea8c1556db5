"""Health on an address of its own, for whoever asks in the clear, as kubelet does, beside a service with TLS."""

import grpc
from grpc_health.v1 import health_pb2_grpc

from entrypoints.grpc_api.services.health import HealthService

_CONNECTIONS = 100
_BYTES = 2**12
"""Octets of a request, and of the metadata that it may bring."""


class Probes:
    """Answers health checks and nothing else. It says of the service no more than whether it is SERVING."""

    def __init__(self, servicer: HealthService) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", _BYTES),
                ("grpc.max_metadata_size", _BYTES),
                ("grpc.absolute_max_metadata_size", _BYTES),
                ("grpc.max_allowed_incoming_connections", _CONNECTIONS),
                ("grpc.max_concurrent_streams", _CONNECTIONS),
            ]
        )
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)

    async def start(self, address: str) -> None:
        """Listens on HOST:PORT. Raises OSError if it can't listen there."""
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(
                f"can't listen on {address}: VIDA_HEALTH_LISTEN must name an address of this machine, and a port "
                "that is free"
            ) from error
        await self._server.start()

    async def stop(self) -> None:
        """Answers no more."""
        await self._server.stop(None)
