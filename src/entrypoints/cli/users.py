"""`vida-coach users`."""

import argparse
import json
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from entrypoints.cli.failure import USAGE, Failure, explained
from entrypoints.cli.record import on_record

if TYPE_CHECKING:
    from entrypoints.cli.record import Record

REACH = "Give the service OPENAI_API_KEY (and OPENAI_BASE_URL) of that time; VIDA_PROVIDER may stay as it is."
"""How to have deleted what waits at a provider that is not configured."""

_ERASURES = "newest first; what providers still have is deleted by the running service"


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "users",
        help="export, erase or hold a user's data",
        description="What concerns a user as a whole. Works beside a running service, embedded or not.",
        epilog="exit codes: 0 done, 1 failed, 2 usage",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    export = commands.add_parser(
        "export",
        help="print all that is kept of a user as JSON lines",
        description="Prints the user, goals, threads, turns, messages, the bytes of images and files (base64) and "
        "usage, one JSON object a line, as ExportUserData streams them. Prints nothing for an unknown user.",
    )
    export.set_defaults(run=_command(_export))
    erase = commands.add_parser(
        "erase",
        help="erase a user for good",
        description="Erases a user's goals, threads, messages, images, files, turns and request ids, and prints a "
        "receipt. What the provider keeps is deleted by the running service, object by object, until it is gone: "
        "see `users erasures`.",
    )
    erase.add_argument("--dry-run", action="store_true", help="say what would be erased, change nothing")
    erase.set_defaults(run=_command(_erase))
    hold = commands.add_parser(
        "hold",
        help="put a user on legal hold",
        description="While a hold lasts, nothing of the user is erased: DeleteThread, EraseUser and `cleanup "
        "--delete-after-days` leave it all as it is.",
    )
    hold.set_defaults(run=_command(_hold))
    release = commands.add_parser("release", help="release a user from legal hold")
    release.set_defaults(run=_command(_release))
    for each in (export, erase, hold, release):
        each.add_argument("user", metavar="ID", help="the product's own reference to the user")
    erasures = commands.add_parser(
        "erasures", help="list erasures of users, and what providers still have", description=_ERASURES
    )
    erasures.set_defaults(run=_command(_erasures))
    for each in (erase, erasures):
        each.add_argument(
            "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
        )


def _command(
    work: "Callable[[Record, argparse.Namespace], Coroutine[Any, Any, None]]",
) -> Callable[[argparse.Namespace], int]:
    """A command that does some work on the record, and explains what goes wrong there."""

    def run(options: argparse.Namespace) -> int:
        with explained():
            from core.model.errors import InvalidField, LegalHold
            from core.model.user import check_user_id
            from entrypoints.observability import set_up_logging
            from entrypoints.settings import load_settings

            settings = load_settings()
            set_up_logging(settings)
            try:
                if "user" in options:
                    check_user_id(options.user)
                on_record(settings, "users", lambda record: work(record, options))
            except InvalidField as error:
                raise Failure(f"ID {error.problem}", USAGE) from error
            except LegalHold as error:
                raise Failure("the user is on legal hold: `vida-coach users release` ends that") from error
        return 0

    return run


async def _export(record: "Record", options: argparse.Namespace) -> None:
    from google.protobuf.json_format import MessageToJson

    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api

    async for piece in record.users.ExportUserData(api.ExportUserDataRequest(user_id=options.user)):
        sys.stdout.write(MessageToJson(piece, indent=None, preserving_proto_field_name=True) + "\n")


async def _erase(record: "Record", options: argparse.Namespace) -> None:
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api

    request = api.EraseUserRequest(user_id=options.user, dry_run=options.dry_run)
    receipt = (await record.users.EraseUser(request)).receipt
    if options.format == "json":
        print(json.dumps(_as_json(receipt)))
        return
    verb = "would erase" if options.dry_run else f"erasure {receipt.id}: erased"
    counts = ", ".join(f"{count} {kind}" for kind, count in _as_json(receipt)["erased"].items())
    print(f"{verb} {counts}; {receipt.copies_left} objects at the provider to delete")


async def _set_hold(record: "Record", user_id: str, *, hold: bool) -> None:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    await record.admin.HoldUser(api.HoldUserRequest(user_id=user_id, hold=hold))


async def _hold(record: "Record", options: argparse.Namespace) -> None:
    await _set_hold(record, options.user, hold=True)
    print("held", file=sys.stderr)


async def _release(record: "Record", options: argparse.Namespace) -> None:
    await _set_hold(record, options.user, hold=False)
    print("released", file=sys.stderr)


async def _erasures(record: "Record", options: argparse.Namespace) -> None:
    from entrypoints.grpc_api.gen.vidacoach.admin.v1 import admin_service_pb2 as api

    found = await record.admin.ListErasures(api.ListErasuresRequest())
    if options.format == "json":
        report = {
            "receipts": [_as_json(receipt) for receipt in found.receipts],
            "copies_left": found.copies_left,
            "copies": [
                {
                    "provider": copy.provider,
                    "ref": copy.ref,
                    "thread_id": copy.thread_id,
                    "tries": copy.tries,
                    "reason": copy.reason,
                }
                for copy in found.copies
            ],
            "waiting": dict(found.waiting),
        }
        print(json.dumps(report))
        return
    for receipt in found.receipts:
        values = _as_json(receipt)
        print(f"{values['requested_at']}  {receipt.id}  {values['state']}  {receipt.copies_left} at the provider")
    print(f"{found.copies_left} objects at providers to delete")
    for provider, count in sorted(found.waiting.items()):
        print(f"{count} of them wait: {provider} is not configured here. {REACH}")
    for copy in found.copies:
        print(f"  {copy.provider} {copy.ref}: {copy.tries} tries{f', {copy.reason}' if copy.reason else ''}")


def _as_json(receipt: Any) -> dict[str, Any]:
    from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as api

    counts = receipt.erased
    return {
        "id": receipt.id,
        "user_hash": receipt.user_hash,
        "state": api.ErasureState.Name(receipt.state).removeprefix("ERASURE_STATE_").lower(),
        "requested_at": receipt.requested_at.ToJsonString(),
        "finished_at": receipt.finished_at.ToJsonString() if receipt.HasField("finished_at") else None,
        "erased": {field.name: getattr(counts, field.name) for field in counts.DESCRIPTOR.fields},
        "copies_left": receipt.copies_left,
    }
