"""The `vida-coach` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TextIO

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
from entrypoints.cli.failure import BROKEN_PIPE, FAILED, Failure, abandon

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
        _flush()
    except Failure as failure:
        print(f"vida-coach: {failure}", file=sys.stderr)
        code = failure.code
    except BrokenPipeError:
        code = BROKEN_PIPE
    except OSError as error:  # what was printed last can't be written
        print(f"vida-coach: {error.strerror or error}", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        code = 130
    try:
        _flush()
    except OSError:
        abandon(sys.stdout)
    return code


def _flush() -> None:
    """Writes what is buffered. Left to the interpreter's end, a failure would change the exit code."""
    stdout: TextIO | None = sys.stdout  # None where it is closed
    if stdout is not None:
        stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
