"""AdminService: what the operators' commands ask of the owner of an embedded database."""

from typing import Any, TypeAlias

import grpc

from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads
from core.use_cases.report_usage import ReportUsage
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceServicer

_LINES = 500
"""Lines of a report in a message."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminService(AdminServiceServicer):
    """Served on the owner's Unix socket, and to callers that a policy lets administer."""

    def __init__(self, cleanup: CleanUpThreads, usage: ReportUsage, ttl_days: int) -> None:
        self._cleanup = cleanup
        self._usage = usage
        self._ttl_days = ttl_days

    # A coroutine that writes: see AgentService.Chat.
    async def Cleanup(self, request: api.CleanupRequest, context: _Context) -> None:  # type: ignore[override]
        """Runs the cleanup, telling of every batch."""

        async def progress(expired: int, batches: int) -> None:
            step = api.CleanupProgress(expired=expired, batches=batches)
            await context.write(api.CleanupResponse(progress=step))

        cleanup = Cleanup(
            ttl_days=request.ttl_days if request.HasField("ttl_days") else self._ttl_days,
            batch_size=request.batch_size or None,
            dry_run=request.dry_run,
            domain=mapping.domain_of(request.domain),
        )
        report = await self._cleanup(cleanup, progress)
        await context.write(
            api.CleanupResponse(
                report=api.CleanupReport(
                    cutoff=report.cutoff.isoformat(),
                    dry_run=report.dry_run,
                    expired=report.expired,
                    deleted=report.deleted,
                    batches=report.batches,
                    seconds=report.seconds,
                )
            )
        )

    async def ReportUsage(self, request: api.ReportUsageRequest, context: _Context) -> None:  # type: ignore[override]
        """Adds up the ledger."""
        report = await self._usage(mapping.report_query(request))
        for start in range(0, max(1, len(report.lines)), _LINES):
            await context.write(
                api.ReportUsageResponse(
                    since_day=report.since.isoformat(),
                    until_day=report.until.isoformat(),
                    currency=report.currency,
                    lines=map(mapping.to_report_line, report.lines[start : start + _LINES]),
                )
            )
