"""UserService."""

import asyncio
from contextlib import aclosing
from datetime import date
from typing import Any, TypeAlias

import grpc

from core.model.errors import Overloaded
from core.model.user import check_user_id
from core.use_cases.erase_user import EraseUser
from core.use_cases.export_user import ExportUser
from core.use_cases.places import Places
from core.use_cases.read_usage import ReadUsage, UsageQuery
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceServicer

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


_EXPORTS, _EXPORTS_OF_A_USER = 64, 2
_STALLED = 60.0
"""Seconds for which a reader of an export may take nothing."""


class UserService(UserServiceServicer):
    """What concerns a user as a whole."""

    def __init__(self, export: ExportUser, erase: EraseUser, usage: ReadUsage) -> None:
        self._export = export
        self._erase = erase
        self._usage = usage
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

    async def GetUsage(self, request: api.GetUsageRequest, context: _Context) -> api.GetUsageResponse:
        """Reads what a user's turns have cost."""
        query = UsageQuery(
            user_id=request.user_id,
            since=mapping.day_of(request.since_day, "since_day") or date.min,
            until=mapping.day_of(request.until_day, "until_day") or date.max,
        )
        page = await self._usage(query, request.page_size, request.page_token)
        return api.GetUsageResponse(
            days=map(mapping.to_daily_usage, page.lines),
            next_page_token=page.next_token,
            quotas=[mapping.to_quota(quota, page.resets_at) for quota in page.quotas],
        )
