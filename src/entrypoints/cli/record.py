"""How a command works on the record: by itself, or through the process that owns an embedded database.

Either way it asks the same services of the API in the same words.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from entrypoints.cli.failure import Failure

if TYPE_CHECKING:
    import grpc

    from entrypoints.settings import Settings

T = TypeVar("T")

_START_WAIT = 10.0
"""Seconds to wait for an owner that holds the database but does not answer yet."""
_POLL_SECONDS = 0.1
_CONNECT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Record:
    """AdminService and UserService, called as their asynchronous stubs are. Raise CoreError, and Failure where the
    owner of the database could not do it."""

    admin: Any
    users: Any


def on_record(
    settings: "Settings",
    role: str,
    work: Callable[[Record], Coroutine[Any, Any, T]],
    *,
    alone: bool = False,
    replying: bool = False,
) -> T:
    """Does some work on the record, in this process or in the owner of an embedded database.

    `alone`: where a process of the same role holds the database there is no waiting for its end. `replying`: the
    work needs the provider. Raises DatabaseOwnedError where the owner stays and does not answer, DatabaseFault,
    what Record raises and what the work does.
    """

    async def run() -> T:
        async with _opened(settings, role, alone=alone, replying=replying) as record:
            return await work(record)

    return asyncio.run(run())


@asynccontextmanager
async def _opened(settings: "Settings", role: str, *, alone: bool, replying: bool) -> AsyncIterator[Record]:
    from adapters.sql.engines import database_file, is_embedded
    from adapters.sql.schema import migrate, require_current
    from entrypoints.container import opened
    from entrypoints.grpc_api.gen.vidacoach.admin.v1.admin_service_pb2_grpc import AdminServiceStub
    from entrypoints.grpc_api.gen.vidacoach.agents.v1.user_service_pb2_grpc import UserServiceStub
    from entrypoints.ownership import DatabaseOwnedError, Ownership

    async with AsyncExitStack() as stack:
        if not is_embedded(settings.database):
            await asyncio.to_thread(require_current, settings.database)
        else:
            database = database_file(settings.database)
            loop = asyncio.get_running_loop()
            deadline = loop.time() + _START_WAIT
            while True:
                try:
                    stack.enter_context(Ownership(database, role))
                    break
                except DatabaseOwnedError as owned:
                    if alone and owned.role == role:
                        raise
                    if (channel := await _reached(database)) is not None:
                        stack.push_async_callback(channel.close)
                        yield Record(_Owner(AdminServiceStub(channel)), _Owner(UserServiceStub(channel)))
                        return
                    if loop.time() >= deadline:
                        raise
                await asyncio.sleep(_POLL_SECONDS)  # the owner is starting or leaving
            await asyncio.to_thread(migrate, settings.database)
        container = await stack.enter_async_context(opened(settings, replying=replying))
        yield Record(_Here(container.admin_service()), _Here(container.user_service()))


async def _reached(database: Path) -> "grpc.aio.Channel | None":
    """A channel to the owner, if that listens."""
    import grpc

    from entrypoints.ownership import socket_path

    path = socket_path(database)
    if not path.exists():
        return None
    channel = grpc.aio.insecure_channel(f"unix:{path}")
    try:
        await asyncio.wait_for(channel.channel_ready(), _CONNECT_SECONDS)
    except TimeoutError:
        await channel.close()
        return None
    return channel


class _Here:
    """A service of this process."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        method = getattr(self._service, name)
        return lambda request: _CallHere(method, request)


class _CallHere:
    """A call of its own handler: awaited for one answer, iterated over for a stream."""

    def __init__(self, method: Callable[[Any, Any], Coroutine[Any, Any, Any]], request: Any) -> None:
        self._method = method
        self._request = request

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._method(self._request, None).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        written = _Written()
        task = asyncio.create_task(self._method(self._request, written))
        task.add_done_callback(lambda _: written.answers.put_nowait(None))
        try:
            while (answer := await written.answers.get()) is not None:
                yield answer
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Written:
    """Where a handler writes its stream. Nobody has to wait: the reader is in the same loop and reads at once."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def write(self, answer: Any) -> None:
        """Hands an answer over."""
        self.answers.put_nowait(answer)
        await asyncio.sleep(0)


class _Owner:
    """A service of the owner, over its socket."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        method = getattr(self._stub, name)
        return lambda request: _CallOwner(method(request))


class _CallOwner:
    """A call of the owner's, whose refusals are the errors that they were there."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        import grpc

        try:
            return await self._call
        except grpc.RpcError as error:
            raise _meaning(error) from error

    async def __aiter__(self) -> AsyncIterator[Any]:
        import grpc

        try:
            async for answer in self._call:
                yield answer
        except grpc.RpcError as error:
            raise _meaning(error) from error


def _meaning(error: "grpc.RpcError") -> Exception:
    """What the owner's refusal is to whoever runs a command."""
    import grpc

    from core.model import errors
    from entrypoints.client import ServiceError

    found = ServiceError.of(error)
    for field, problem in found.violations:
        return errors.InvalidField(field, problem)
    if found.reason == errors.TurnInProgress.reason:
        return errors.TurnInProgress(found.facts["turn_id"])
    if found.reason == errors.ProviderUnavailable.reason:
        return errors.ProviderUnavailable(found.retry_after)
    for known in (
        errors.CleanupRunning,
        errors.LegalHold,
        errors.StoreUnavailable,
        errors.ThreadNotFound,
        errors.TurnNotFound,
    ):
        if found.reason == known.reason:
            return known()
    if found.code is grpc.StatusCode.UNAVAILABLE and not found.reason:
        return Failure("the owner of the database has left in the middle: try again, and see what is done")
    return Failure(f"the owner of the database could not do it: {found}")
