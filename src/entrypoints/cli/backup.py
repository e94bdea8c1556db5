"""`vida-coach backup` and `vida-coach restore`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from entrypoints.cli.failure import USAGE, Failure, explained

if TYPE_CHECKING:
    from adapters.sql import backup

_WAIT = 10.0
"""Seconds that a restore waits for another short command on the database."""
_SERVER = "this is for embedded databases: PostgreSQL has pg_dump and pg_restore, see docs/operations.md"


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds both commands."""
    parser = subparsers.add_parser(
        "backup",
        help="copy an embedded database while it is in use",
        description="Copies the embedded database of VIDA_DATABASE_URL, as it is at one moment, into one new "
        "file. The service may run: nobody is held up. The copy is checked, and is on the disk when the command "
        "ends; only you can read it. Every turn that was acknowledged before the command began is in it.",
        epilog="exit codes: 0 done, 1 failed, 2 usage",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the copy; must not exist")
    _add_format(parser)
    parser.set_defaults(run=back_up)
    parser = subparsers.add_parser(
        "restore",
        help="put a copy in an embedded database's place",
        description="Puts a copy made by `vida-coach backup` in the place of the database of VIDA_DATABASE_URL. "
        "The service must be stopped. The copy is checked first and stays; the files that are there are renamed, "
        "not removed. At the next start, turns that were at work when the copy was made are brought to their end. "
        "Whoever was erased since then has to be erased again.",
        epilog="exit codes: 0 done, 1 failed, 2 usage",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the copy")
    _add_format(parser)
    parser.set_defaults(run=restore)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
    )


def back_up(options: argparse.Namespace) -> int:
    """Runs `backup`."""
    with explained():
        from adapters.sql import backup

        begun = time.monotonic()
        database = _database()
        size = backup.back_up(database, options.file, _shown("copied"))
        seconds = round(time.monotonic() - begun, 3)
        if options.format == "json":
            print(
                json.dumps(
                    {"database": str(database), "file": str(options.file), "bytes": size, "seconds": seconds}
                )
            )
        else:
            print(f"{options.file}: {size:,} bytes in {seconds} s, checked")
    return 0


def restore(options: argparse.Namespace) -> int:
    """Runs `restore`."""
    with explained():
        from adapters.sql import backup
        from entrypoints.ownership import Ownership

        database = _database()
        with Ownership(database, "restore", _WAIT):
            moved = backup.restore(options.file, database, _shown("restored"))
        if options.format == "json":
            print(
                json.dumps({"database": str(database), "file": str(options.file), "moved": list(map(str, moved))})
            )
        else:
            print(f"{database} is {options.file} now")
            for file in moved:
                print(f"what was there is {file}")
    return 0


def _database() -> Path:
    from adapters.sql.engines import database_file, is_embedded
    from entrypoints.settings import load_settings

    url = load_settings().database
    if not is_embedded(url):
        raise Failure(_SERVER, USAGE)
    return database_file(url)


def _shown(what: str) -> "backup.Progress":
    """Says on a terminal how far it is."""
    shown = sys.stderr.isatty()

    def tell(done: int, of: int) -> None:
        if shown:
            end = "\n" if done == of else ""
            print(f"\r{what} {done / 2**20:,.0f} of {of / 2**20:,.0f} MiB", end=end, file=sys.stderr, flush=True)

    return tell
