"""Where `vida-coach chat` finds its service."""

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import grpc

from adapters.sql.engines import database_file, is_embedded
from adapters.sql.errors import DatabaseFault
from core.model.errors import StoreUnavailable
from entrypoints.cli.embedded import EmbeddedServer
from entrypoints.cli.failure import USAGE, Failure
from entrypoints.client import connect, is_serving
from entrypoints.ownership import DatabaseOwnedError, Ownership, socket_path
from entrypoints.settings import Settings, SettingsError, is_loopback

CHECK_SECONDS = 2.0
"""How long a service may take to say that it is SERVING."""
_OWNER_SECONDS = 10.0
"""How long an owner may hold an embedded database without answering: it is starting, leaving, or short."""
_POLL_SECONDS = 0.1
_NO_PROXY = ("grpc.enable_http_proxy", 0)
_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - what it says is where to look on this machine


class Service(Protocol):
    """A service to talk to. A context manager: entering finds or starts it and raises Failure if there is none."""

    @property
    def target(self) -> str:
        """What a channel connects to."""

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """What it asks for, and is asked for; None: it speaks in the clear."""

    @property
    def record(self) -> str:
        """Where conversations are kept, for people."""

    def revive(self) -> None:
        """Does what can be done after the connection was lost. Never raises."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ServiceAt:
    """A service on the network, which somebody else runs."""

    def __init__(self, address: str, advice: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) <= 65_535:
            raise Failure(f"--server: must be HOST:PORT, not {address!r}", USAGE)
        self.target = address
        self.record = f"the service at {address}"
        self._advice = advice
        self.credentials = credentials

    def __enter__(self) -> Self:
        with open_channel(self.target, self.credentials) as channel:
            if not is_serving(channel, CHECK_SECONDS):
                raise Failure(f"no service answers at {self.target}: {self._advice}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing of it is ours."""

    def revive(self) -> None:
        """It can only come back by itself."""


class EmbeddedService:
    """The owner of an embedded database: the process that is, or else this one."""

    credentials = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file = database_file(settings.database)
        self._socket = socket_path(self._file)
        self._server: EmbeddedServer | None = None
        self.target = f"unix:{self._socket}"

    @property
    def record(self) -> str:
        """The file, as short as a person would write it."""
        file, home = self._file.absolute(), Path.home()
        return f"~/{file.relative_to(home)}" if file.is_relative_to(home) else str(file)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + _OWNER_SECONDS
        while not self._answers():
            try:
                self._own()
            except DatabaseOwnedError as owned:
                if time.monotonic() >= deadline:
                    raise Failure(
                        f"{owned}, and it does not answer on {self._socket}: stop it, or try again when it is done"
                    ) from owned
                time.sleep(_POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.stop()

    def revive(self) -> None:
        """Takes the place of an owner that has left: the socket stays the same."""
        # If this fails, somebody else is about to answer, or the client will say that nobody does.
        with contextlib.suppress(DatabaseOwnedError, DatabaseFault, SettingsError, StoreUnavailable, OSError):
            if self._server is None and not self._answers():
                self._own()

    def _answers(self) -> bool:
        if self._server is not None:
            return True
        if not self._socket.exists():
            return False
        with open_channel(self.target) as channel:
            return is_serving(channel, CHECK_SECONDS)

    def _own(self) -> None:
        with Ownership(self._file, "chat"):
            """Free at this moment: starting a service would wait long for a database that is not."""
        server = EmbeddedServer(self._settings, "chat")
        server.start()
        self._server = server


def service(settings: Settings, credentials: grpc.ChannelCredentials | None = None) -> Service:
    """The service of these settings."""
    if is_embedded(settings.database):
        return EmbeddedService(settings)
    return ServiceAt(
        on_this_machine(settings.listen),
        "start one with `vida-coach serve` (on a new database, `vida-coach migrate` first), "
        "or name another with --server",
        credentials,
    )


def open_channel(target: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A channel to a service. A proxy of the environment is not asked to reach this machine."""
    if is_near(target):
        return connect(target, _NO_PROXY, credentials=credentials)
    return connect(target, credentials=credentials)


def on_this_machine(listen: str) -> str:
    """Where an address that is listened on can be reached from this machine."""
    host, _, port = listen.rpartition(":")
    return f"{_ANY.get(host, host)}:{port}"


def is_near(target: str) -> bool:
    """Whether it can be reached from this machine alone."""
    return target.startswith("unix:") or is_loopback(target.rpartition(":")[0])
