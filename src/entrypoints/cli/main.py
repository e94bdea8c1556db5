"""The `vida-coach` command."""

import argparse
import os
import sys
from collections.abc import Sequence

from entrypoints.cli import (
    agents,
    backup,
    chat,
    cleanup,
    doctor,
    health,
    migrate,
    provider,
    serve,
    threads,
    turns,
    usage,
    users,
)
from entrypoints.cli.failure import Failure

_COMMANDS = (chat, serve, cleanup, users, usage, threads, turns, agents, provider, doctor, health, migrate, backup)


def command_line() -> argparse.ArgumentParser:
    """What it understands."""
    parser = argparse.ArgumentParser(
        prog="vida-coach",
        description="Coaching agents over gRPC: durable, resumable, streamed conversations on plain SQL.",
        epilog="With nothing configured, `vida-coach chat` talks to the practice coach: no key, no network.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0 done, 1 failed, 2 usage, 75 try again later."""
    # gRPC's own lines have no level, form or place of ours; what matters reaches callers as statuses.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    options = command_line().parse_args(arguments)
    try:
        code: int = options.run(options)
    except Failure as failure:
        print(f"vida-coach: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
