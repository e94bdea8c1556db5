"""UserService."""

import asyncio
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from core.model.errors import Overloaded
from core.model.user import check_user_id
from core.use_cases.erase_user import EraseUser
from core.use_cases.export_user import ExportUser
from core.use_cases.places import Places
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceServicer

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


_EXPORTS, _EXPORTS_OF_A_USER = 64, 2
_STALLED = 60.0
"""Seconds for which a reader of an export may take nothing."""


class UserService(UserServiceServicer):
    """Export and erase users."""

    def __init__(self, export: ExportUser, erase: EraseUser) -> None:
        self._export = export
        self._erase = erase
        self._places = Places(_EXPORTS, _EXPORTS_OF_A_USER)

    # A coroutine that writes: see AgentService.Chat.
    async def ExportUserData(  # type: ignore[override]
        self, request: api.ExportUserDataRequest, context: _Context
    ) -> None:
        """Streams what is kept of a user."""
        check_user_id(request.user_id)
        if (refusal := self._places.refusal(request.user_id)) is not None:
            raise refusal
        self._places.take(request.user_id)
        try:
            async with aclosing(self._export.pieces(request.user_id)) as pieces:
                async for piece in pieces:
                    await self._write(mapping.to_exported(piece), context)
        finally:
            self._places.give_back(request.user_id)

    async def _write(self, piece: api.ExportUserDataResponse, context: _Context) -> None:
        try:
            async with asyncio.timeout(_STALLED) as bound:
                await context.write(piece)
        except TimeoutError:
            if not bound.expired():
                raise
            raise Overloaded from None

    async def EraseUser(self, request: api.EraseUserRequest, context: _Context) -> api.EraseUserResponse:
        """Erases a user."""
        receipt = await self._erase(request.user_id, dry_run=request.dry_run)
        return api.EraseUserResponse(receipt=mapping.to_receipt(receipt))
