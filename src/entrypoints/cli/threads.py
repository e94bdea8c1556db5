"""`vida-coach threads`."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from entrypoints.cli.operating import (
    EXIT_CODES,
    NO_CONTENT,
    add_dry_run,
    add_force,
    add_format,
    add_limit,
    command,
)
from entrypoints.cli.shown import as_json, print_json, print_table
from entrypoints.cli.turns import print_settled, print_turns

if TYPE_CHECKING:
    from entrypoints.cli.record import Record


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "threads",
        help="list, show and unlock threads",
        description=f"What an operator may know of threads. {NO_CONTENT}",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(role="threads")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listed = commands.add_parser(
        "list",
        help="list threads, the newest first",
        description=f"Lists threads in the order in which they were begun, the newest first. {NO_CONTENT}",
        epilog=EXIT_CODES,
    )
    listed.add_argument("--user", default="", metavar="ID", help="only this user's")
    listed.add_argument(
        "--domain", choices=["career", "health", "relationship", "general"], help="only of this one"
    )
    listed.add_argument("--state", choices=["active", "inactive"], help="only in this state (default: any)")
    add_limit(listed)
    listed.set_defaults(run=command(_list))
    show = commands.add_parser(
        "show",
        help="show a thread, its provider's copy and its unfinished turns",
        description=f"Shows one thread: how far the provider's copy is in step with the transcript in SQL, and "
        f"the turns that have not ended. {NO_CONTENT}",
        epilog=EXIT_CODES,
    )
    show.set_defaults(run=command(_show))
    unlock = commands.add_parser(
        "unlock",
        help="free a thread in which nothing goes on",
        description="Ends every turn of the thread that has not ended, as INTERRUPTED and with its partial text, "
        "so that the next message is taken; messages that wait go unanswered (`turns settle` ends one turn and "
        "lets those behind it go on). The provider's copy is compared with the transcript before the next reply. "
        "Refuses where a living process is at work.",
        epilog=EXIT_CODES,
    )
    add_force(unlock)
    add_dry_run(unlock)
    unlock.set_defaults(run=command(_unlock))
    for each in (show, unlock):
        each.add_argument("thread", metavar="ID", help="the thread's id")
    for each in (listed, show, unlock):
        add_format(each)


async def _list(record: "Record", options: argparse.Namespace) -> int:
    from core.model.agent import Domain
    from core.model.thread import ThreadState
    from entrypoints.grpc_api import mapping
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb

    request = api.ListThreadsRequest(
        user_id=options.user,
        domain=mapping.DOMAINS[Domain(options.domain)] if options.domain else pb.DOMAIN_UNSPECIFIED,
        state=mapping.THREAD_STATES[ThreadState(options.state)] if options.state else pb.THREAD_STATE_UNSPECIFIED,
        limit=options.limit,
    )
    found = await record.admin.ListThreads(request)
    if options.format == "json":
        print_json(as_json(found))
        return 0
    header = ("thread", "user", "domain", "state", "agent", "lines", "last message", "copy", "unfinished")
    print_table(header, map(_row, map(as_json, found.threads)), none="no threads")
    if len(found.threads) == options.limit:
        print(f"the newest {options.limit}: there may be more, see --limit", file=sys.stderr)
    return 0


def _row(thread: dict[str, Any]) -> tuple[object, ...]:
    return (
        thread["thread_id"],
        thread["user_id"],
        thread["domain"],
        thread["state"],
        thread["agent_id"],
        thread["message_count"],
        thread["last_message_at"],
        _copy(thread["copy"]),
        len(thread["unfinished_turns"]),
    )


def _copy(copy: dict[str, Any] | None) -> str:
    if copy is None:
        return "none"
    step = (
        "doubted" if copy["doubted"] else f"{copy['lines_behind']} behind" if copy["lines_behind"] else "in step"
    )
    return f"{copy['mode']}, {step}"


async def _show(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    found = (await record.admin.GetThread(api.GetThreadRequest(thread_id=options.thread))).thread
    thread = as_json(found)
    if options.format == "json":
        print_json(thread)
        return 0
    copy = thread["copy"]
    lines = {key: value for key, value in thread.items() if key not in ("copy", "unfinished_turns")}
    lines["copy"] = _copy(copy) + (f", {copy['provider']} {copy['ref']}" if copy else "")
    for key, value in lines.items():
        print(f"{key.replace('_', ' ')}: {value}")
    print_turns(thread["unfinished_turns"])
    return 0


async def _unlock(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    request = api.UnlockThreadRequest(thread_id=options.thread, force=options.force, dry_run=options.dry_run)
    unlocked = as_json(await record.admin.UnlockThread(request))
    if options.format == "json":
        print_json({**unlocked, "dry_run": options.dry_run})
        return 0
    for turn in unlocked["turns"]:
        print_settled(turn, dry_run=options.dry_run)
    if not unlocked["turns"]:
        print("no turn was unfinished")
    if unlocked["copy_doubted"]:
        verb = "would be" if options.dry_run else "is"
        print(f"the provider's copy {verb} compared with the transcript before the next reply")
    return 0
