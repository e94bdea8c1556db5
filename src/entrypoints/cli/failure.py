"""How a command ends when it can't go on."""

from collections.abc import Iterator
from contextlib import contextmanager

FAILED = 1
USAGE = 2
TRY_LATER = 75


class Failure(Exception):
    """What went wrong and what to do next, for a person to read, and the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def explained() -> Iterator[None]:
    """Turns the faults that any command can meet into Failures."""
    from adapters.sql.errors import DatabaseFault, named
    from core.model.errors import StoreUnavailable
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
    except StoreUnavailable as error:
        name = named(error.__cause__)
        raise Failure(
            f"the database does not answer{f', or can not do its work ({name})' if name else ''}: check "
            "VIDA_DATABASE_URL, or try `vida-coach doctor`"
        ) from error
    except OSError as error:
        raise Failure(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}") from error
