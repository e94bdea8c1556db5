"""Code that is written to wait, run by the event loop: where it waits, the loop goes on.

Waiting is the same call in a thread, where it blocks. A fiber has no thread: nobody has to be woken to take its
work or its answer, and it does not wait for the interpreter until the loop has done all else that it has to do.
"""

import asyncio
import select
from collections.abc import Callable
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

Resume = Callable[[], None]
Arm = Callable[[Resume], Resume]
"""Has a fiber resumed when what it waits for is there; returns how to leave off. Called outside of the fiber:
while its stack is in place that of the loop is not, and libuv has addresses in that."""


class Fiber:
    """Some work, begun and gone on with by `resume`, always in one and the same thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._greenlet = greenlet(work)
        self._leave_off: Resume | None = None

    @property
    def is_over(self) -> bool:
        """Whether the work is done."""
        over: bool = self._greenlet.dead
        return over

    def resume(self) -> None:
        """Runs the work until it waits, or ends."""
        if self._leave_off is not None:
            self._leave_off()
        arm: Arm | None = self._greenlet.switch()
        self._leave_off = None if arm is None else arm(self.resume)


def rest(seconds: float | None = None) -> None:
    """Called by a fiber's work: waits until somebody resumes it, at the latest when the time is over."""

    def arm(resume: Resume) -> Resume:
        return asyncio.get_running_loop().call_later(max(0.0, seconds or 0.0), resume).cancel

    _wait(None if seconds is None else arm)


class Readiness:
    """A socket, and the wait for it to be ready to be read, or also to be written to."""

    def __init__(self, descriptor: int, *, or_to_write: bool) -> None:
        self._descriptor = descriptor
        self._or_to_write = or_to_write
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN | (select.POLLOUT if or_to_write else 0))

    def wait(self) -> None:
        """Waits for it."""
        if getcurrent().parent is None:
            self._poll.poll()
        else:
            _wait(self._arm)

    def _arm(self, resume: Resume) -> Resume:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, resume)
        if self._or_to_write:
            loop.add_writer(self._descriptor, resume)

        def leave_off() -> None:
            loop.remove_reader(self._descriptor)
            if self._or_to_write:
                loop.remove_writer(self._descriptor)

        return leave_off


def apart(work: Callable[[], T]) -> T:
    """Runs what can't but block: where a fiber asks for it, in a thread."""
    if getcurrent().parent is None:
        return work()
    done: list[asyncio.Future[T]] = []

    def arm(resume: Resume) -> Resume:
        done.append(asyncio.get_running_loop().run_in_executor(None, work))
        done[0].add_done_callback(lambda _: resume())
        return _nothing

    _wait(arm)
    return done[0].result()


def _wait(arm: Arm | None) -> None:
    loop: Any = getcurrent().parent
    loop.switch(arm)


def _nothing() -> None:
    """There is nothing to leave off."""
