"""What the operators' commands have in common: how they run, and what goes wrong."""

import argparse
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from entrypoints.cli.failure import USAGE, Failure, explained
from entrypoints.cli.record import on_record

if TYPE_CHECKING:
    from entrypoints.cli.record import Record

EXIT_CODES = "exit codes: 0 done, 1 failed or refused, 2 usage"
NO_CONTENT = (
    "Shows ids, states, times and counts alone: never what anybody wrote, no titles, and no values of metadata."
)

_MOST = 1_000
"""As many as the API lists."""

Work = Callable[["Record", argparse.Namespace], Coroutine[Any, Any, int]]


def add_format(parser: argparse.ArgumentParser) -> None:
    """Adds --format."""
    parser.add_argument(
        "--format", choices=["text", "json"], default="text", help="what stdout gets (default: text)"
    )


def add_limit(parser: argparse.ArgumentParser) -> None:
    """Adds --limit."""
    parser.add_argument(
        "--limit", type=_limit, default=50, metavar="N", help=f"at most so many, 1 to {_MOST} (default: 50)"
    )


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"must be 1 to {_MOST}")
    return int(text)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds --dry-run."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds --force."""
    parser.add_argument(
        "--force",
        action="store_true",
        help="also where a living process is at work: whatever it still writes is refused",
    )


def command(work: Work, *, replying: bool = False) -> Callable[[argparse.Namespace], int]:
    """A command that does some work on the record; `replying`: it needs the provider."""

    def run(options: argparse.Namespace) -> int:
        with explained():
            from core.model import errors
            from entrypoints.observability import set_up_logging
            from entrypoints.settings import load_settings

            settings = load_settings()
            set_up_logging(settings)
            try:
                return on_record(settings, options.role, lambda record: work(record, options), replying=replying)
            except errors.InvalidField as error:
                raise Failure(f"{error.field} {error.problem}", USAGE) from error
            except errors.TurnInProgress as error:
                raise Failure(_busy(error.turn_id, may_force="force" in options)) from error
            except errors.ProviderUnavailable as error:
                raise Failure(
                    "the provider can't be asked now: see the log, or try `vida-coach doctor`"
                ) from error
            except (errors.ThreadNotFound, errors.TurnNotFound) as error:
                raise Failure(error.message) from error

    return run


def _busy(turn_id: str, *, may_force: bool) -> str:
    if may_force:
        return f"a living process is at work on turn {turn_id}: wait, or cancel it; --force takes it away"
    return f"turn {turn_id} has not ended, or began meanwhile: try again later, and see `vida-coach turns list`"
