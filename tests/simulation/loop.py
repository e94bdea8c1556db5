"""Simulated time: a loop whose clock jumps to the next timer, and processes in it that stop, go on and die."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
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
        self.held: list[_Step] = []
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
    """Runs tasks in the same order every time. Raises DeadlockError where nothing is ready and no timer runs.

    It keeps its own queues, as there are no sockets, signals and threads to look after.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hosts: list[Host] = []
        self._now = 0.0
        self._due: deque[_Step] = deque()
        self._timers: list[tuple[float, int, _Step]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        step = _Step(callback, args, copy_context() if context is None else context, self._now)
        self._due.append(step)
        return step

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        step = _Step(callback, args, copy_context() if context is None else context, when)
        heappush(self._timers, (when, next(self._numbers), step))
        return step

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        when = self._now + delay
        step = _Step(callback, args, copy_context() if context is None else context, when)
        heappush(self._timers, (when, next(self._numbers), step))
        return step

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        task = super().create_task(coro, name=name, context=context)
        host = _HOST.get() if context is None else context.get(_HOST)
        if host is not None:
            host.tasks[task] = None
            task.add_done_callback(host.tasks.pop)
        return task

    def resume(self, held: "Sequence[_Step]") -> None:
        """Makes what was held ready, in order."""
        self._due.extend(held)

    def _run_once(self) -> None:
        """Goes on until somebody stops the loop. A timer that has run out comes behind what is ready."""
        due, timers = self._due, self._timers
        while not self._stopping:  # type: ignore[attr-defined]
            if not due:
                self._wait()
            while timers and timers[0][0] <= self._now:
                due.append(heappop(timers)[2])
            step = due.popleft()
            if step.dropped:
                continue
            if step.host is not None and step.host.stopped:
                step.host.held.append(step)
                continue
            try:
                step.context.run(step.callback, *step.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio does
                self.call_exception_handler({"message": "a call failed", "exception": error})

    def _wait(self) -> None:
        """Waits for the next timer that is still wanted, in no time."""
        timers = self._timers
        while timers and timers[0][2].dropped:
            heappop(timers)
        if not timers:
            raise DeadlockError(f"at {self._now:.3f} s: nothing is ready, and no timer runs")
        self._now = max(self._now, timers[0][0])

    def _write_to_self(self) -> None:
        """There are no threads."""

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Does at once what a thread would do."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever waits for it is told
            done.set_exception(error)
        return done


class _Step(asyncio.TimerHandle):
    """A call that the loop owes somebody. It is held as long as its process is stopped."""

    __slots__ = ("args", "at", "callback", "context", "dropped", "host")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, at: float
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.host = context.get(_HOST)
        self.at = at
        self.dropped = False

    def when(self) -> float:
        return self.at

    def cancel(self) -> None:
        self.dropped = True

    def cancelled(self) -> bool:
        return self.dropped


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
