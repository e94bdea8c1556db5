"""Simulated time: a loop whose clock jumps to the next timer, and processes in it that stop, go on and die."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(Exception):
    """Nothing can ever happen any more: no task can go on, and no timer runs."""


class Host:
    """What a simulated process's tasks have in common: they stop, go on and die together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = False
        self.dead = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.held: list[asyncio.Handle] = []
        self.context = copy_context()
        self.context.run(_HOST.set, self)
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, VirtualLoop)
        self.loop.hosts.append(self)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs work in this process."""
        return self.loop.create_task(work, context=self.context.copy())

    def stop(self) -> None:
        """Lets nothing of it go on, as SIGSTOP does. Its timers run out meanwhile."""
        self.stopped = True

    def go_on(self) -> None:
        """Lets everything go on that has become due."""
        assert isinstance(self.loop, VirtualLoop)
        self.stopped = False
        held, self.held = self.held, []
        self.loop.resume(held)

    def kill(self) -> None:
        """Ends everything. What it still does to tidy up reaches nobody: whoever it may ask looks at `dead`."""
        self.dead = True
        self.go_on()
        for task in list(self.tasks):
            task.cancel()


_HOST: ContextVar[Host | None] = ContextVar("host", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs tasks in the same order every time. Raises DeadlockError where nothing is ready and no timer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: list[Host] = []
        self._now = 0.0
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> Sequence[tuple[selectors.SelectorKey, int]]:
        """Waits in no time."""
        if timeout is None:
            raise DeadlockError(f"at {self._now:.3f} s: nothing is ready, and no timer runs")
        if timeout > 0:
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        return ()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        context = copy_context() if context is None else context
        handle = super().call_soon(callback, *args, context=context)
        self._guard(handle, context.get(_HOST), callback, args)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        context = copy_context() if context is None else context
        handle = super().call_at(when, callback, *args, context=context)
        self._guard(handle, context.get(_HOST), callback, args)
        return handle

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        task = super().create_task(coro, name=name, context=context)
        host = _HOST.get() if context is None else context.get(_HOST)
        if host is not None:
            host.tasks[task] = None
            task.add_done_callback(host.tasks.pop)
        return task

    def resume(self, handles: Sequence[asyncio.Handle]) -> None:
        """Makes what was held ready, in order."""
        self._ready.extend(handles)  # type: ignore[attr-defined]

    def _guard(self, handle: Any, host: Host | None, callback: Callable[..., object], args: Any) -> None:
        if host is not None:
            handle._callback, handle._args = self._step, (host, handle, callback, args)

    def _step(self, host: Host, handle: asyncio.Handle, callback: Callable[..., object], args: Any) -> None:
        if host.stopped:
            host.held.append(handle)
        else:
            callback(*args)

    def _process_events(self, events: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """There are no threads."""


def simulate(main: Coroutine[Any, Any, T], surprised: Callable[[BaseException], None]) -> T:
    """Runs a simulation from time 0 to its end. `surprised` is told of exceptions that nobody caught."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        surprised(context.get("exception") or RuntimeError(context["message"]))

    loop = VirtualLoop()
    loop.set_exception_handler(handle)
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(_tidy(loop))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _tidy(loop: VirtualLoop) -> None:
    """Ends what a simulation that failed has left."""
    rest = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for host in loop.hosts:
        host.kill()
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
