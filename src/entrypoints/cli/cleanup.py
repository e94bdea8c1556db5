"""`vida-coach cleanup`."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from entrypoints.cli.failure import TRY_LATER, USAGE, Failure, explained
from entrypoints.cli.record import on_record

if TYPE_CHECKING:
    from core.use_cases.clean_up_threads import Cleanup, CleanupReport
    from entrypoints.cli.record import Record
    from entrypoints.settings import Settings

_ROLE = "cleanup"

Progress = Callable[[int, int], None]


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "cleanup",
        help="expire threads that nobody has used for a while",
        description="Makes threads INACTIVE whose newest message is older than the time to live. They stay "
        "readable, and a new message wakes them; a thread with a turn that has not ended is never touched. Works "
        "in short transactions, beside traffic, and goes on where a stopped cleanup left off. Meant to be run "
        "daily.",
        epilog="exit codes: 0 done, 1 failed, 2 usage, 75 another cleanup is running",
    )
    parser.add_argument(
        "--ttl-days",
        type=int,
        metavar="N",
        help="days since the newest message (default: OPENAI_THREAD_TTL, 30); 0 expires every idle thread",
    )
    parser.add_argument(
        "--delete-after-days",
        type=int,
        metavar="N",
        help="also erase, for good, threads whose newest message is older than so many days (default: none)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="at most so many threads a transaction, oldest first (default: as many as take little time)",
    )
    parser.add_argument("--dry-run", action="store_true", help="count only, change nothing")
    parser.add_argument(
        "--domain", choices=["career", "health", "relationship", "general"], help="only threads of this domain"
    )
    parser.add_argument(
        "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    with explained():
        from core.model.agent import Domain
        from core.model.errors import CleanupRunning, InvalidField
        from core.use_cases.clean_up_threads import Cleanup
        from entrypoints.observability import set_up_logging
        from entrypoints.settings import load_settings

        settings = load_settings()
        set_up_logging(settings)
        cleanup = Cleanup(
            ttl_days=settings.openai_thread_ttl if options.ttl_days is None else options.ttl_days,
            delete_after_days=options.delete_after_days,
            batch_size=options.batch_size,
            dry_run=options.dry_run,
            domain=Domain(options.domain) if options.domain else None,
        )
        try:
            cleanup.check()
            report = _clean_up(settings, cleanup, _progress())
        except InvalidField as error:
            raise Failure(f"--{error.field.replace('_', '-')} {error.problem}", USAGE) from error
        except CleanupRunning as error:
            raise Failure("another cleanup is running: try again when it is done", TRY_LATER) from error
    if options.format == "json":
        print(json.dumps(_as_json(report, erasing=options.delete_after_days is not None)))
    else:
        verb = "would expire" if report.dry_run else "expired"
        print(
            f"{verb} {report.expired} threads idle since before {report.cutoff:%Y-%m-%d %H:%M:%S} UTC "
            f"({report.batches} batches, {report.seconds:.1f} s)"
        )
        if options.delete_after_days is not None:
            verb = "would erase" if report.dry_run else "erased"
            print(f"{verb} {report.deleted} threads; {report.held} more are kept by a legal hold")
    return 0


def _progress() -> Progress:
    if not sys.stderr.isatty():
        return lambda *_: None
    return lambda expired, batches: print(f"{expired} threads expired in {batches} batches …", file=sys.stderr)


def _as_json(report: "CleanupReport", *, erasing: bool) -> dict[str, object]:
    shown: dict[str, object] = {
        "cutoff": report.cutoff.isoformat(),
        "dry_run": report.dry_run,
        "expired": report.expired,
        "deleted": report.deleted,
        "batches": report.batches,
        "seconds": report.seconds,
    }
    return {**shown, "held": report.held} if erasing else shown


def _clean_up(settings: "Settings", cleanup: "Cleanup", progress: Progress) -> "CleanupReport":
    from core.model.errors import CleanupRunning
    from entrypoints.ownership import DatabaseOwnedError

    try:
        return on_record(settings, _ROLE, lambda record: _run(record, cleanup, progress), alone=True)
    except DatabaseOwnedError as owned:
        if owned.role == _ROLE:
            raise CleanupRunning from owned
        raise


async def _run(record: "Record", cleanup: "Cleanup", progress: Progress) -> "CleanupReport":
    from datetime import datetime

    from core.use_cases.clean_up_threads import CleanupReport
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
    from entrypoints.grpc_api.mapping import DOMAINS

    request = api.CleanupRequest(
        ttl_days=cleanup.ttl_days,
        delete_after_days=cleanup.delete_after_days,
        batch_size=cleanup.batch_size or 0,
        dry_run=cleanup.dry_run,
        domain=DOMAINS[cleanup.domain] if cleanup.domain else pb.DOMAIN_UNSPECIFIED,
    )
    report = None
    async for response in record.admin.Cleanup(request):
        if response.HasField("report"):
            report = response.report
        else:
            progress(response.progress.expired, response.progress.batches)
    assert report is not None  # a cleanup ends with it
    return CleanupReport(
        cutoff=datetime.fromisoformat(report.cutoff),
        dry_run=report.dry_run,
        expired=report.expired,
        deleted=report.deleted,
        held=report.held,
        batches=report.batches,
        seconds=report.seconds,
    )
