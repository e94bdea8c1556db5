"""A loop in which waiting takes no time."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualTime(asyncio.SelectorEventLoop):
    """A loop in which waiting takes no time: when nothing is ready, the clock jumps to the next timer."""

    def __init__(self) -> None:
        self._virtual = 1_000.0
        loop = self

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
                ready = super().select(0)
                if not ready and timeout is None:
                    raise AssertionError("everything waits for something that never comes")
                if not ready and timeout:
                    loop._virtual += timeout
                return ready

        super().__init__(Selector())

    def time(self) -> float:
        return self._virtual


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test in a loop with virtual time."""

    @functools.wraps(test)
    def run(**arguments: object) -> None:
        with asyncio.Runner(loop_factory=VirtualTime) as runner:
            runner.run(test(**arguments))

    return run
