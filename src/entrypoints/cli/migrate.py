"""`vida-coach migrate`."""

import argparse
import sys

from entrypoints.cli.failure import explained

_WAIT = 60.0
"""Seconds to wait for another short command on an embedded database."""


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "migrate",
        help="bring the database to this version's schema",
        description="Brings the database of VIDA_DATABASE_URL to this version's schema, in one transaction. "
        "Run it before the first `serve` on PostgreSQL and after every upgrade; an embedded database is "
        "migrated by whatever opens it. Safe to run twice, or beside itself.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Runs the command."""
    with explained():
        from adapters.sql.engines import database_file, is_embedded
        from adapters.sql.schema import SchemaState, migrate
        from entrypoints.ownership import Ownership
        from entrypoints.settings import load_settings

        url = load_settings().database
        if is_embedded(url):
            with Ownership(database_file(url), "migrate", _WAIT):
                before = migrate(url)
        else:
            before = migrate(url)
    done = "already up to date" if before is SchemaState.CURRENT else f"up to date (was {before.value})"
    print(f"the database is {done}", file=sys.stderr)
    return 0
