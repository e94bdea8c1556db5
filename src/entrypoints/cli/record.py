"""How a short command works on the record: by itself, or through the process that owns an embedded database."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from entrypoints.cli.failure import Failure

if TYPE_CHECKING:
    import grpc

    from entrypoints.settings import Settings

T = TypeVar("T")

_START_WAIT = 10.0
"""Seconds to wait for an owner that holds the database but does not answer yet."""
_POLL_SECONDS = 0.1


def on_record(
    settings: "Settings",
    role: str,
    here: Callable[[], T],
    ask: "Callable[[grpc.Channel], T]",
    *,
    alone: bool = False,
) -> T:
    """Does something on the record: `here`, or by asking the owner of an embedded database over a channel.

    `alone`: where a process of the same role holds the database there is no waiting for its end. Raises
    DatabaseOwnedError where the owner stays and does not answer, DatabaseFault, StoreUnavailable, and Failure
    where the owner could not do it.
    """
    from adapters.sql.engines import database_file, is_embedded
    from adapters.sql.schema import migrate, require_current
    from entrypoints.ownership import DatabaseOwnedError, Ownership

    if not is_embedded(settings.database):
        require_current(settings.database)
        return here()
    database = database_file(settings.database)
    deadline = time.monotonic() + _START_WAIT
    while True:
        try:
            with Ownership(database, role):
                migrate(settings.database)
                return here()
        except DatabaseOwnedError as owned:
            if alone and owned.role == role:
                raise
            try:
                return _asked(database, ask)
            except _SilentOwnerError:
                if time.monotonic() >= deadline:
                    raise owned from None
            time.sleep(_POLL_SECONDS)  # the owner is starting or leaving


class _SilentOwnerError(Exception):
    """The owner does not listen."""


def _asked(database: Path, ask: "Callable[[grpc.Channel], T]") -> T:
    import grpc

    from core.model.errors import StoreUnavailable
    from entrypoints.client import ServiceError
    from entrypoints.ownership import socket_path

    with grpc.insecure_channel(f"unix:{socket_path(database)}") as channel:
        try:
            return ask(channel)
        except grpc.RpcError as error:
            if ServiceError.of(error).reason == StoreUnavailable.reason:
                raise StoreUnavailable from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise _SilentOwnerError from error
            raise Failure(f"the owner of the database could not do it: {error.code().name}") from error
