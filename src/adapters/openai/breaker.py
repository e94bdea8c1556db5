"""The circuit breaker: whether it makes sense to ask the provider at all."""

from collections.abc import Callable

FAILURES = 5
"""Failures in a row, of requests of the whole process, after which the provider counts as down."""
PAUSE = 10.0
"""Seconds between two looks whether it still is."""


class Breaker:
    """Closed while the provider works. Open after `failures` in a row: nobody asks for `pause` seconds. Then it is
    half open: one request per `pause` goes through, and the first that succeeds closes it.

    Only failures of the provider as a whole count, not what is wrong with one request. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float], *, failures: int = FAILURES, pause: float = PAUSE) -> None:
        self._clock = clock
        self._most = failures
        self._pause = pause
        self._failures = 0
        self._open_until: float | None = None

    def refusal(self) -> float | None:
        """Seconds until a request may go through; None where one may now."""
        if self._open_until is None or (left := self._open_until - self._clock()) <= 0:
            return None
        return left

    def admit(self) -> float | None:
        """The same for a request that goes out at once if it may: while half open, the next ones wait for it.

        A probe that never tells how it went holds nothing up: after the pause it is the next one's turn.
        """
        left = self.refusal()
        if left is None and self._open_until is not None:
            self._open_until = self._clock() + self._pause
        return left

    def succeeded(self) -> None:
        """The provider has answered a request."""
        self._failures, self._open_until = 0, None

    def failed(self) -> None:
        """The provider has failed a request, as it would any other."""
        self._failures += 1
        if self._failures >= self._most and self.refusal() is None:
            self._open_until = self._clock() + self._pause
