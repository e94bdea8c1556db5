"""`vida-coach turns`."""

import argparse
import sys
from collections.abc import Sequence
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

if TYPE_CHECKING:
    from entrypoints.cli.record import Record


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "turns",
        help="list turns that have not ended, and end those that are stuck",
        description=f"What an operator may know of turns that have not ended. {NO_CONTENT}",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(role="turns")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listed = commands.add_parser(
        "list",
        help="list turns that have not ended, the oldest first",
        description="Lists turns that have not ended: who has claimed each and whether that process is alive, and "
        f"how much of its budget is used up. {NO_CONTENT}",
        epilog=EXIT_CODES,
    )
    listed.add_argument(
        "--stuck",
        action="store_true",
        help="only those that do not go on by themselves: OVER_TIME (at work for longer than VIDA_TURN_BUDGET, "
        "VIDA_LEASE and 15 s), OWNER_GONE (nobody has claimed it within VIDA_LEASE and 15 s after its process's "
        "lease was over), UNCLAIMED (next in its thread, and no process has taken it in all that time)",
    )
    listed.add_argument("--user", default="", metavar="ID", help="only this user's")
    add_limit(listed)
    listed.set_defaults(run=command(_list))
    settle = commands.add_parser(
        "settle",
        help="end a turn",
        description="Ends a turn as INTERRUPTED and keeps its partial text: INCOMPLETE, or FAILED where there is "
        "none. A turn that has ended stays as it is. The next message that waits in the thread goes on. Refuses "
        "where a living process is at work on it, or on the one that it waits for.",
        epilog=EXIT_CODES,
    )
    settle.add_argument("turn", metavar="ID", help="the turn's id")
    add_force(settle)
    add_dry_run(settle)
    settle.set_defaults(run=command(_settle))
    for each in (listed, settle):
        add_format(each)


async def _list(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    request = api.ListTurnsRequest(user_id=options.user, stuck=options.stuck, limit=options.limit)
    found = as_json(await record.admin.ListTurns(request))
    if options.format == "json":
        print_json(found)
        return 0
    print_turns(found["turns"])
    if len(found["turns"]) == options.limit:
        print(f"the oldest {options.limit}: there may be more, see --limit", file=sys.stderr)
    return 0


def print_turns(turns: Sequence[dict[str, Any]]) -> None:
    """Prints turns that have not ended."""
    header = ("turn", "thread", "user", "state", "attempt", "epoch", "owner", "age", "budget used", "stuck")
    print_table(header, map(_row, turns), none="no unfinished turns")


def _row(turn: dict[str, Any]) -> tuple[object, ...]:
    owner = turn["owner"] or "none"
    return (
        turn["turn_id"],
        turn["thread_id"],
        turn["user_id"],
        turn["state"],
        turn["attempt"],
        turn["epoch"],
        f"{owner} ({'alive' if turn['owner_alive'] else 'gone'})" if turn["owner"] else owner,
        f"{turn['age_seconds']:.0f} s",
        f"{turn['budget_used_seconds']:.0f} of {turn['budget_seconds']:.0f} s",
        turn["stuck"] or "no",
    )


async def _settle(record: "Record", options: argparse.Namespace) -> int:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    request = api.SettleTurnRequest(turn_id=options.turn, force=options.force, dry_run=options.dry_run)
    turn = as_json((await record.admin.SettleTurn(request)).turn)
    if options.format == "json":
        print_json({**turn, "dry_run": options.dry_run})
    else:
        print_settled(turn, dry_run=options.dry_run)
    return 0


def print_settled(turn: dict[str, Any], *, dry_run: bool) -> None:
    """Prints how a turn ended."""
    state = turn["state"] + (f" ({turn['reason']})" if turn["reason"] else "")
    if turn["already"]:
        print(f"turn {turn['turn_id']} had ended before: {state}")
        return
    kept = "keeping its partial text" if turn["has_reply"] else "there was no text yet"
    print(f"turn {turn['turn_id']} {'would end' if dry_run else 'ended'}: {state}, {kept}")
