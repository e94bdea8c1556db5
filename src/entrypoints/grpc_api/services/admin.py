"""AdminService: what the operators' commands ask of the owner of an embedded database."""

from typing import Any, TypeAlias

import grpc

from core.model.thread import ThreadState
from core.use_cases.clean_up_threads import Cleanup, CleanUpThreads
from core.use_cases.hold_user import HoldUser
from core.use_cases.oversee import Oversee, ThreadsQuery, TurnsQuery
from core.use_cases.publish_agents import Outcome, PublishAgents
from core.use_cases.read_erasures import Erasures, ReadErasures
from core.use_cases.reconcile_thread import ReconcileThread
from core.use_cases.report_usage import ReportUsage
from core.use_cases.settle_turn import SettleTurn
from entrypoints.grpc_api import facts, mapping
from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceServicer

_LINES = 500
"""Lines of a report in a message."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AdminService(AdminServiceServicer):
    """Served on the owner's Unix socket, and to callers that a policy lets administer."""

    def __init__(
        self,
        *,
        cleanup: CleanUpThreads,
        ttl_days: int,
        hold: HoldUser,
        erasures: ReadErasures,
        usage: ReportUsage,
        oversee: Oversee,
        settle: SettleTurn,
        agents: PublishAgents,
        reconcile: ReconcileThread,
    ) -> None:
        self._cleanup = cleanup
        self._usage = usage
        self._ttl_days = ttl_days
        self._hold = hold
        self._erasures = erasures
        self._oversee = oversee
        self._settle = settle
        self._agents = agents
        self._reconcile = reconcile

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

    async def ListThreads(self, request: api.ListThreadsRequest, context: _Context) -> api.ListThreadsResponse:
        """Lists threads."""
        query = ThreadsQuery(
            user_id=request.user_id,
            domain=mapping.domain_of(request.domain),
            states=mapping.states_of([request.state]) if request.state else frozenset(ThreadState),
            limit=request.limit,
        )
        found = await self._oversee.threads(query)
        return api.ListThreadsResponse(threads=map(facts.to_thread_facts, found))

    async def GetThread(self, request: api.GetThreadRequest, context: _Context) -> api.GetThreadResponse:
        """Reads a thread."""
        found = await self._oversee.thread(mapping.id_of(request.thread_id, "thread_id"))
        return api.GetThreadResponse(thread=facts.to_thread_facts(found))

    async def UnlockThread(self, request: api.UnlockThreadRequest, context: _Context) -> api.UnlockThreadResponse:
        """Frees a thread."""
        thread_id = mapping.id_of(request.thread_id, "thread_id")
        unlocked = await self._settle.thread(thread_id, force=request.force, dry_run=request.dry_run)
        return api.UnlockThreadResponse(
            turns=map(facts.to_settled, unlocked.turns), copy_doubted=unlocked.copy_doubted
        )

    async def ListTurns(self, request: api.ListTurnsRequest, context: _Context) -> api.ListTurnsResponse:
        """Lists turns that have not ended."""
        query = TurnsQuery(user_id=request.user_id, stuck=request.stuck, limit=request.limit)
        found = await self._oversee.turns(query)
        return api.ListTurnsResponse(turns=map(facts.to_turn_facts, found))

    async def SettleTurn(self, request: api.SettleTurnRequest, context: _Context) -> api.SettleTurnResponse:
        """Ends a turn."""
        turn_id = mapping.id_of(request.turn_id, "turn_id")
        ended = await self._settle.turn(turn_id, force=request.force, dry_run=request.dry_run)
        return api.SettleTurnResponse(turn=facts.to_settled(ended))

    async def ListAgentVersions(
        self, request: api.ListAgentVersionsRequest, context: _Context
    ) -> api.ListAgentVersionsResponse:
        """Lists agent versions."""
        return api.ListAgentVersionsResponse(
            versions=[
                api.AgentVersionFacts(definition=facts.to_definition(one.definition), threads=one.threads)
                for one in await self._agents.versions()
            ]
        )

    async def PublishAgents(
        self, request: api.PublishAgentsRequest, context: _Context
    ) -> api.PublishAgentsResponse:
        """Puts agent versions on record."""
        definitions = [facts.definition_of(one) for one in request.definitions]
        publications = await self._agents(definitions, dry_run=request.dry_run)
        outcomes = {publication.outcome for publication in publications}
        return api.PublishAgentsResponse(
            publications=map(facts.to_publication, publications),
            published=not request.dry_run and Outcome.NEW in outcomes and Outcome.CHANGED not in outcomes,
        )

    async def ReconcileThread(
        self, request: api.ReconcileThreadRequest, context: _Context
    ) -> api.ReconcileThreadResponse:
        """Brings the provider's copy of a thread into step."""
        thread_id = mapping.id_of(request.thread_id, "thread_id")
        reconciled = await self._reconcile(thread_id, dry_run=request.dry_run)
        found = reconciled.found
        return api.ReconcileThreadResponse(
            found=found.standing.value,
            items_behind=found.behind,
            items_ahead=found.ahead,
            orphaned_calls=found.orphaned_calls,
            action=reconciled.action.value,
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
        waiting=erasures.waiting,
    )
