"""Where the operators' commands do what concerns users: here, or at the owner of an embedded database."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import grpc

from adapters.sql.engines import database_file, is_embedded
from adapters.sql.schema import migrate, require_current
from core.model.errors import LegalHold, StoreUnavailable
from core.model.user import check_user_id
from entrypoints.cli.failure import Failure
from entrypoints.client import ServiceError
from entrypoints.container import Container, opened
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as admin_api
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
from entrypoints.grpc_api.services.admin import to_erasures
from entrypoints.ownership import DatabaseOwnedError, Ownership, socket_path
from entrypoints.settings import Settings

_START_WAIT = 10.0
"""Seconds to wait for an owner that holds the database but does not answer yet."""


class Office(Protocol):
    """What can be done about users. Raises InvalidField, LegalHold, StoreUnavailable and Failure."""

    @abstractmethod
    def export(self, user_id: str) -> AsyncIterator[api.ExportUserDataResponse]:
        """All that is kept of a user."""

    @abstractmethod
    async def erase(self, user_id: str, *, dry_run: bool) -> api.ErasureReceipt:
        """Erases a user, or says what would be erased."""

    @abstractmethod
    async def hold(self, user_id: str, *, hold: bool) -> None:
        """Holds or releases a user."""

    @abstractmethod
    async def erasures(self) -> admin_api.ListErasuresResponse:
        """How erasures stand."""


@asynccontextmanager
async def open_office(settings: Settings) -> AsyncIterator[Office]:
    """Opens the one that can work on the database."""
    async with AsyncExitStack() as stack:
        if not is_embedded(settings.database):
            await asyncio.to_thread(require_current, settings.database)
            yield _Here(await stack.enter_async_context(opened(settings)))
            return
        database = database_file(settings.database)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _START_WAIT
        while True:
            try:
                stack.enter_context(Ownership(database, "users"))
            except DatabaseOwnedError:
                channel = grpc.aio.insecure_channel(f"unix:{socket_path(database)}")
                try:
                    await asyncio.wait_for(channel.channel_ready(), timeout=0.5)
                except TimeoutError:
                    await channel.close()
                    if loop.time() >= deadline:
                        raise
                    continue  # the owner is starting or leaving
                stack.push_async_callback(channel.close)
                yield _Owner(channel)
            else:
                await asyncio.to_thread(migrate, settings.database)
                yield _Here(await stack.enter_async_context(opened(settings)))
            return


class _Here(Office):
    """In this process, on the database."""

    def __init__(self, container: Container) -> None:
        self._container = container

    async def export(self, user_id: str) -> AsyncIterator[api.ExportUserDataResponse]:
        async for piece in self._container.export_user().pieces(user_id):
            yield mapping.to_exported(piece)

    async def erase(self, user_id: str, *, dry_run: bool) -> api.ErasureReceipt:
        return mapping.to_receipt(await self._container.erase_user_apart()(user_id, dry_run=dry_run))

    async def hold(self, user_id: str, *, hold: bool) -> None:
        await self._container.hold_user()(user_id, hold=hold)

    async def erasures(self) -> admin_api.ListErasuresResponse:
        return to_erasures(await self._container.erasures()())


class _Owner(Office):
    """At the owner, over its socket."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._users = UserServiceStub(channel)
        self._admin = AdminServiceStub(channel)

    async def export(self, user_id: str) -> AsyncIterator[api.ExportUserDataResponse]:
        check_user_id(user_id)
        try:
            async for piece in self._users.ExportUserData(api.ExportUserDataRequest(user_id=user_id)):
                yield piece
        except grpc.RpcError as error:
            raise _meaning(error) from error

    async def erase(self, user_id: str, *, dry_run: bool) -> api.ErasureReceipt:
        check_user_id(user_id)
        try:
            answer = await self._users.EraseUser(api.EraseUserRequest(user_id=user_id, dry_run=dry_run))
        except grpc.RpcError as error:
            raise _meaning(error) from error
        return answer.receipt

    async def hold(self, user_id: str, *, hold: bool) -> None:
        check_user_id(user_id)
        try:
            await self._admin.HoldUser(admin_api.HoldUserRequest(user_id=user_id, hold=hold))
        except grpc.RpcError as error:
            raise _meaning(error) from error

    async def erasures(self) -> admin_api.ListErasuresResponse:
        try:
            return await self._admin.ListErasures(admin_api.ListErasuresRequest())
        except grpc.RpcError as error:
            raise _meaning(error) from error


def _meaning(error: grpc.RpcError) -> Exception:
    """What the owner's answer is to whoever runs a command."""
    found = ServiceError.of(error)
    for known in (LegalHold, StoreUnavailable):
        if found.reason == known.reason:
            return known()
    return Failure(f"the owner of the database refused: {found}")
