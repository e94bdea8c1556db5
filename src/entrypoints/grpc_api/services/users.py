"""UserService."""

from datetime import date
from typing import Any, TypeAlias

import grpc

from core.use_cases.read_usage import ReadUsage, UsageQuery
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceServicer

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class UserService(UserServiceServicer):
    """What belongs to a user as a whole."""

    def __init__(self, usage: ReadUsage) -> None:
        self._usage = usage

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
