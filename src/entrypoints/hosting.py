"""Running the service in a process: owning the database, the schema, the servers, and the way out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from adapters.sql.engines import database_file, is_embedded
from adapters.sql.schema import migrate, require_current
from entrypoints.container import Container, running
from entrypoints.grpc_api.server import Server
from entrypoints.identity import OWNER
from entrypoints.observability import log_loop_errors
from entrypoints.ownership import Ownership, socket_path
from entrypoints.settings import Settings, is_loopback

_OWNER_WAIT = 10.0
"""Seconds to wait for a short command that holds an embedded database."""
_LAST_CALLS = 2.0
"""Seconds that followers get to read the end of their turns when the service stops."""


@asynccontextmanager
async def hosted(
    settings: Settings, role: str, *, listen: str | None
) -> AsyncIterator[tuple[Container, str | None]]:
    """Serves until left: on `listen` if given, and an embedded database's owner on its socket.

    Yields the parts and the address listened on. Leaving drains: no new turns, the running ones may finish
    within VIDA_DRAIN. Raises DatabaseOwnedError, DatabaseFault, StoreUnavailable, SettingsError, OSError.
    """
    log_loop_errors(asyncio.get_running_loop())
    async with AsyncExitStack() as stack:
        embedded = is_embedded(settings.database)
        if embedded:
            database = database_file(settings.database)
            ownership = Ownership(database, role, _OWNER_WAIT)
            await asyncio.to_thread(ownership.take)
            stack.callback(ownership.release)
            await asyncio.to_thread(migrate, settings.database)
        else:
            await asyncio.to_thread(require_current, settings.database)
        container = await stack.enter_async_context(running(settings, watching=listen is not None))
        address = None
        servers: list[Server] = []
        access = OWNER if listen is None else container.access()
        stack.push_async_callback(access.aclose)
        grace = 0.0  # for a process that can't serve

        async def drain() -> None:
            for server in servers:
                server.refuse()
            container.engine().refuse()
            await container.accept().settle()
            await container.engine().drain(grace)
            await asyncio.gather(*(server.stop(_LAST_CALLS) for server in servers))

        stack.push_async_callback(drain)
        if embedded:
            # Only this user can open it: nobody need be asked who they are.
            admin = container.server(access=OWNER, on_socket=True, admin=container.admin_service())
            await admin.start_on_socket(socket_path(database))
            servers.append(admin)
        if listen is not None:
            host = listen.rpartition(":")[0]
            public = container.server(
                reflected=reflected(settings, host),
                channelz=settings.channelz,
                admin=container.admin_service() if access.administered else None,
            )
            servers.append(public)  # also what has begun only in part is stopped
            if settings.health_listen is not None:
                await public.start_probes(settings.health_listen)
            address = f"{host}:{await public.start(listen)}"
        grace = settings.drain
        yield container, address


def reflected(settings: Settings, host: str) -> bool:
    """Whether reflection is on: as set, else on loopback."""
    return settings.reflection if settings.reflection is not None else is_loopback(host)
