"""`vida-coach provider`."""

import argparse
from typing import TYPE_CHECKING, Any

from entrypoints.cli.operating import EXIT_CODES, add_dry_run, add_format, command
from entrypoints.cli.shown import as_json, print_json

if TYPE_CHECKING:
    from entrypoints.cli.record import Record


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "provider",
        help="bring the provider's copy of a thread into step",
        description="What the provider keeps of threads. The transcript in SQL is the record, the provider's "
        "conversation a copy of it.",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(role="provider")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    reconcile = commands.add_parser(
        "reconcile",
        help="compare a thread's copy with the transcript, and repair or rebuild it",
        description="Compares the provider's conversation with the transcript now, whatever is known of it, and "
        "brings it into step: a little is repaired in place, else a new conversation is built. The service does "
        "the same before the next reply of a thread whose copy is in doubt. There is nothing to compare with the "
        "practice coach, and where OPENAI_STATE is response_chain or stateless. Refuses while a turn is at work.",
        epilog=EXIT_CODES,
    )
    reconcile.add_argument("thread", metavar="THREAD", help="the thread's id")
    add_dry_run(reconcile)
    add_format(reconcile)
    reconcile.set_defaults(run=command(_reconcile, replying=True))


async def _reconcile(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    request = api.ReconcileThreadRequest(thread_id=options.thread, dry_run=options.dry_run)
    answer = as_json(await record.admin.ReconcileThread(request))
    if options.format == "json":
        print_json({**answer, "dry_run": options.dry_run})
        return 0
    print(f"found: {_found(answer)}")
    verb = "would be" if options.dry_run else "was"
    print(
        {"NOTHING": "nothing to do", "REPAIRED": f"it {verb} repaired"}.get(answer["action"], f"it {verb} rebuilt")
    )
    return 0


def _found(answer: dict[str, Any]) -> str:
    sentence = {
        "NO_COPY": "no copy that could be out of step",
        "IN_STEP": "in step",
        "OUT_OF_STEP": f"{answer['items_behind']} items behind, {answer['items_ahead']} ahead",
        "UNKNOWN": "too different to repair",
        "GONE": "the provider does not know it any more",
    }[answer["found"]]
    orphaned = answer["orphaned_calls"]
    return sentence + (f"; {orphaned} calls of tools without an answer" if orphaned else "")
