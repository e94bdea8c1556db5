"""AdminService: what the operators' commands ask of the owner of an embedded database."""

from typing import Any, TypeAlias

import grpc

from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads
from core.use_cases.hold_user import HoldUser
from core.use_cases.read_erasures import Erasures, ReadErasures
from core.use_cases.report_usage import ReportUsage
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceServicer

_LINES = 500
"""Lines of a report in a message."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminService(AdminServiceServicer):
    """Served on the owner's Unix socket, and to callers that a policy lets administer."""

    def __init__(
        self, cleanup: CleanUpThreads, ttl_days: int, hold: HoldUser, erasures: ReadErasures, usage: ReportUsage
    ) -> None:
        self._cleanup = cleanup
        self._usage = usage
        self._ttl_days = ttl_days
        self._hold = hold
        self._erasures = erasures

    # A coroutine that writes: see AgentService.Chat.
    async def Cleanup(self, request: api.CleanupRequest, context: _Context) -> None:  # type: ignore[override]
        """Runs the cleanup, telling of every batch."""

        async def progress(expired: int, batches: int) -> None:
            step = api.CleanupProgress(expired=expired, batches=batches)
            await context.write(api.CleanupResponse(progress=step))

        cleanup = Cleanup(
            ttl_days=request.ttl_days if request.HasField("ttl_days") else self._ttl_days,
            delete_after_days=request.delete_after_days if request.HasField("delete_after_days") else None,
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
                    held=report.held,
                    batches=report.batches,
                    seconds=report.seconds,
                )
            )
        )

    async def HoldUser(self, request: api.HoldUserRequest, context: _Context) -> api.HoldUserResponse:
        """Holds or releases a user."""
        await self._hold(request.user_id, hold=request.hold)
        return api.HoldUserResponse()

    async def ListErasures(self, request: api.ListErasuresRequest, context: _Context) -> api.ListErasuresResponse:
        """Lists erasures."""
        return to_erasures(await self._erasures())

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


def to_erasures(erasures: Erasures) -> api.ListErasuresResponse:
    """Writes how erasures stand."""
    return api.ListErasuresResponse(
        receipts=map(mapping.to_receipt, erasures.receipts),
        copies_left=erasures.copies_left,
        copies=[
            api.CopyLeft(
                provider=copy.provider,
                ref=copy.ref,
                thread_id=copy.thread_id,
                tries=copy.tries,
                reason=copy.reason,
            )
            for copy in erasures.copies
        ],
    )
