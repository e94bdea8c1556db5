"""The service within a command: it owns the embedded database and listens on its socket alone."""

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from entrypoints.settings import Settings

DRAIN_SECONDS = 2.0
"""How long a person who quits may wait for other clients' turns; their own has ended or is cancelled by then."""


class EmbeddedServer:
    """Serves from `start` to `stop`, in a thread with a loop of its own. Use as a context manager."""

    def __init__(self, settings: "Settings", role: str) -> None:
        self._settings = settings.model_copy(update={"drain_seconds": min(settings.drain, DRAIN_SECONDS)})
        self._role = role
        self._up = threading.Event()
        self._stopping = threading.Event()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        # A daemon: a person who interrupts even the way out is not held back.
        self._thread = threading.Thread(target=self._run, name="embedded-server", daemon=True)

    def start(self) -> None:
        """Returns when the service answers. Raises what `entrypoints.hosting.hosted` raises."""
        self._thread.start()
        try:
            self._up.wait()
        except BaseException:
            self._ask_to_stop()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self) -> None:
        """Lets other clients' turns finish for a moment and gives the database back. Raises what went wrong."""
        self._ask_to_stop()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ask_to_stop(self) -> None:
        self._stopping.set()
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped by itself
                self._loop.call_soon_threadsafe(self._stop.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asked
            self._error = error
        finally:
            self._up.set()

    async def _serve(self) -> None:
        from entrypoints.hosting import hosted

        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        async with hosted(self._settings, self._role, listen=None):
            self._up.set()
            if not self._stopping.is_set():  # else: asked before there was a loop to tell
                await self._stop.wait()
