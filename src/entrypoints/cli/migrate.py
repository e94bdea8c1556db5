"""`vida-coach migrate`."""

import argparse
import sys

from entrypoints.cli.failure import Failure, explained


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
        from adapters.sql.schema import SchemaState, SchemaTooNewError, migrate
        from entrypoints.ownership import Ownership
        from entrypoints.settings import load_settings

        url = load_settings().database
        try:
            if is_embedded(url):
                with Ownership(database_file(url), "migrate"):
                    before = migrate(url)
            else:
                before = migrate(url)
        except SchemaTooNewError as error:
            raise Failure(str(error)) from error
    done = "already up to date" if before is SchemaState.CURRENT else f"up to date (was {before.value})"
    print(f"the database is {done}", file=sys.stderr)
    return 0
