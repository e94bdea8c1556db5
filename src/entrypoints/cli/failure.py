"""How a command ends when it can't go on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

FAILED = 1
USAGE = 2
TRY_LATER = 75
BROKEN_PIPE = 141
"""What a shell reports of a command that SIGPIPE has ended."""


class Failure(Exception):
    """What went wrong and what to do next, for a person to read, and the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def abandon(*streams: TextIO) -> None:
    """Has what is still buffered go nowhere, so that leaving does not fail too."""
    for stream in streams:
        with suppress(OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)


@contextmanager
def explained() -> Iterator[None]:
    """Turns the faults that any command can meet into Failures. That nobody reads any more is not one of them."""
    from adapters.sql.errors import FAULTS, DatabaseFault, named
    from core.model.errors import StoreBusy, StoreUnavailable
    from entrypoints.ownership import DatabaseOwnedError
    from entrypoints.settings import SettingsError

    try:
        yield
    except SettingsError as error:
        raise Failure(str(error), USAGE) from error
    except DatabaseOwnedError as error:
        raise Failure(f"{error}: stop it, or try again when it is done") from error
    except DatabaseFault as error:
        raise Failure(str(error)) from error
    except StoreBusy as error:
        raise Failure("another process holds what this needs in the database: try again in a moment") from error
    except StoreUnavailable as error:
        name = named(error.__cause__) if isinstance(error.__cause__, FAULTS) else ""  # else the owner has said it
        raise Failure(
            f"the database does not answer{f', or can not do its work ({name})' if name else ''}: check "
            "VIDA_DATABASE_URL, or try `vida-coach doctor`"
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}") from error
