"""The server: services, health, reflection, identity and bounds on one address."""

import asyncio
import math
import os
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.ports.system import Ids
from core.ports.telemetry import UNMEASURED, Telemetry
from entrypoints.grpc_api.access import Access
from entrypoints.grpc_api.connections import close_connections
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import agent_service_pb2, thread_service_pb2, user_service_pb2
from entrypoints.grpc_api.gen.vidacoach.agents.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from entrypoints.grpc_api.gen.vidacoach.agents.v1.thread_service_pb2_grpc import (
    add_ThreadServiceServicer_to_server,
)
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import add_UserServiceServicer_to_server
from entrypoints.grpc_api.guard import Guard
from entrypoints.grpc_api.probes import Probes
from entrypoints.grpc_api.services.admin import AdminService
from entrypoints.grpc_api.services.agents import AgentService
from entrypoints.grpc_api.services.health import HealthService
from entrypoints.grpc_api.services.threads import ThreadService
from entrypoints.grpc_api.services.users import UserService

_PENDING = 20_000
"""Calls that wait to be picked up. The library's own bound of 1,000 sheds bursts as CANCELLED."""
_PICKED_UP = 7_200
"""Seconds that a call may wait to be picked up: longer than any caller does, whose own deadline still holds.
The library's own bound of 30 ends those who wait in an overload CANCELLED, as if they had asked for that."""


_HEADERS = 2**14
"""Octets of metadata that a call may bring; a token takes a few thousand."""
_HANDSHAKE = 10_000
"""Milliseconds that a new connection has to say what it is."""
_NEVER = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What callers may ask of a server. Past a bound nobody else notices."""

    request_bytes: int
    connections: int
    """Those beyond it are closed at once."""
    streams: int
    """Calls at a time on one connection. Clients of gRPC keep more to themselves until there is room."""
    calls: int
    """Calls at a time on all connections, health checks apart. Those beyond it are refused OVERLOADED."""
    stream_seconds: float
    """How long a call may last; a connection that is to be closed waits as long."""
    connection_seconds: float
    """After which a connection is asked to close (give or take a tenth), so that replicas share the load anew;
    inf: never."""


class Server:
    """One listening server: `access` says who may call what; without `credentials` it speaks in the clear."""

    def __init__(
        self,
        *,
        agents: AgentService,
        threads: ThreadService,
        users: UserService,
        ids: Ids,
        bounds: Bounds,
        reflected: bool,
        access: Access,
        credentials: grpc.ServerCredentials | None = None,
        channelz: bool = False,
        admin: AdminService | None = None,
        telemetry: Telemetry = UNMEASURED,
    ) -> None:
        # A call whose path is no UTF-8 never comes to us: the library refuses it, logs that, and where the caller
        # has left prints a traceback as well, past every log, as often as somebody likes.
        cygrpc.traceback = SimpleNamespace(**{**vars(traceback), "print_exc": lambda: None})
        self._guard = Guard(ids, bounds.calls, access, telemetry)
        self._credentials = credentials
        self._address: int | Path | None = None
        self._probes: Probes | None = None
        self._server = grpc.aio.server(
            interceptors=[self._guard],
            options=[
                ("grpc.enable_channelz", int(channelz)),
                ("grpc.so_reuseport", 0),  # two servers would share a port in silence
                ("grpc.max_receive_message_length", bounds.request_bytes),
                ("grpc.max_metadata_size", _HEADERS),
                ("grpc.absolute_max_metadata_size", _HEADERS),
                ("grpc.max_allowed_incoming_connections", bounds.connections),
                ("grpc.max_concurrent_streams", bounds.streams),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE),
                ("grpc.max_connection_age_ms", _age(bounds.connection_seconds)),
                ("grpc.max_connection_age_grace_ms", round(bounds.stream_seconds * 1_000) + _HANDSHAKE),
                ("grpc.server.max_pending_requests", _PENDING),
                ("grpc.server.max_pending_requests_hard_limit", _PENDING),
                ("grpc.server_max_unrequested_time_in_server", _PICKED_UP),
                # A peer that is gone is noticed within 25 s; the ping time-out is what makes it so.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ],
        )
        names = []
        add_AgentServiceServicer_to_server(agents, self._server)
        names.append(agent_service_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name)
        add_ThreadServiceServicer_to_server(threads, self._server)
        names.append(thread_service_pb2.DESCRIPTOR.services_by_name["ThreadService"].full_name)
        add_UserServiceServicer_to_server(users, self._server)
        names.append(user_service_pb2.DESCRIPTOR.services_by_name["UserService"].full_name)
        if admin is not None:
            add_AdminServiceServicer_to_server(admin, self._server)
            names.append(admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name)
        self._names = ["", *names]
        self._health = HealthService()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflected:
            shown = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(shown, self._server)
        if channelz:
            from grpc_channelz.v1.channelz import add_channelz_servicer

            add_channelz_servicer(self._server)

    async def start(self, address: str) -> int:
        """Listens on HOST:PORT and says SERVING; returns the port. Raises OSError if it can't listen there."""
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(
                f"can't listen on {address}: VIDA_LISTEN or --listen must name an address of this machine, and a "
                "port that is free"
            ) from error
        self._address = port
        await self._serve()
        return port

    async def start_on_socket(self, path: Path) -> None:
        """Listens on a Unix socket that only this user can open, and says SERVING."""
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            await self._server.stop(None)
            raise OSError(f"can't listen on {path}") from error
        finally:
            os.umask(before)
        self._address = path
        await self._serve()

    async def start_probes(self, address: str) -> None:
        """Answers health checks on another HOST:PORT as well, in the clear, until the end of `stop`. Raises
        OSError if it can't listen there."""
        self._probes = Probes(self._health)
        await self._probes.start(address)

    def refuse(self) -> None:
        """Says NOT_SERVING, for good."""
        self._health.refuse()

    async def stop(self, grace: float) -> None:
        """Lets calls finish for `grace` seconds, then ends them UNAVAILABLE, and so those that come meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._guard.idle.wait()
        if self._address is not None:
            close_connections(self._address)
        await self._server.stop(None)
        if self._probes is not None:
            await self._probes.stop()

    async def _serve(self) -> None:
        self._health.serve(self._names)  # so that whoever gets in is told
        await self._server.start()


def _age(seconds: float) -> int:
    """In milliseconds; the library takes the largest number for none."""
    return _NEVER if math.isinf(seconds) else round(seconds * 1_000)
