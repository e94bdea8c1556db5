"""Code that is written to wait, run by the event loop: where it waits, the loop goes on.

Waiting is the same call in a thread, where it blocks. A fiber has no thread: nobody has to be woken to take its
work or its answer, and it does not wait for the interpreter until the loop has done all else that it has to do.
"""

import asyncio
import select
from collections.abc import Callable
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


class Fiber:
    """Some work, begun and gone on with by `resume`, always in one and the same thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._greenlet = greenlet(work)

    @property
    def is_over(self) -> bool:
        """Whether the work is done."""
        return self._greenlet.dead

    def resume(self) -> None:
        """Runs the work until it waits, or ends."""
        self._greenlet.switch()


def rest(seconds: float | None = None) -> None:
    """Called by a fiber's work: waits until somebody resumes it, at the latest when the time is over."""
    fiber = getcurrent()
    timer = None if seconds is None else asyncio.get_running_loop().call_later(max(0.0, seconds), fiber.switch)
    _go_on_without(fiber)
    if timer is not None:
        timer.cancel()


class Readiness:
    """A socket, and the wait for it to be ready to be read, or also to be written to."""

    def __init__(self, descriptor: int, *, or_to_write: bool) -> None:
        self._descriptor = descriptor
        self._or_to_write = or_to_write
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN | (select.POLLOUT if or_to_write else 0))

    def wait(self) -> None:
        """Waits for it."""
        fiber = getcurrent()
        if fiber.parent is None:
            self._poll.poll()
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, fiber.switch)
        if self._or_to_write:
            loop.add_writer(self._descriptor, fiber.switch)
        try:
            _go_on_without(fiber)
        finally:
            loop.remove_reader(self._descriptor)
            if self._or_to_write:
                loop.remove_writer(self._descriptor)


def apart(work: Callable[[], T]) -> T:
    """Runs what can't but block: where a fiber asks for it, in a thread."""
    fiber = getcurrent()
    if fiber.parent is None:
        return work()
    done = asyncio.get_running_loop().run_in_executor(None, work)
    done.add_done_callback(lambda _: fiber.switch())
    _go_on_without(fiber)
    return done.result()


def _go_on_without(fiber: greenlet) -> None:
    assert fiber.parent is not None
    fiber.parent.switch()
