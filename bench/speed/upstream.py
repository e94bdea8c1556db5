"""The provider of the tests as the model behind every server: in a process of its own, told what to answer."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speed.processes import BenchError, Process, Usage, started

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gpt-6-luna"
PIECE = "word "


class Upstream:
    """The provider. Its deltas bear the time at which they were sent, unless they come flat out."""

    def __init__(self, process: Process, base_url: str) -> None:
        self.base_url = base_url
        self.address = base_url.removeprefix("http://").removesuffix("/v1")
        self.process = process
        self._control = base_url.removesuffix("/v1") + "/__fake__/"

    def answer(self, deltas: int, pace: float | None) -> None:
        """From here on every reply has so many deltas, `pace` a second; None: as fast as they are read."""
        load: dict[str, object] = {"deltas": deltas, "piece": PIECE}
        if pace is not None:
            load |= {"pace": pace, "stamps": True}
        self._ask("POST", "default", {"default": {"load": load}})

    def forget(self) -> None:
        """Drops all that it keeps: nothing of an earlier measure may cost the next one anything."""
        self._ask("POST", "reset", {})

    def await_quiet(self, seconds: float) -> None:
        """Waits until nobody is being answered. Raises BenchError if that takes longer."""
        deadline = time.monotonic() + seconds
        while running := self.counts()["running"]:
            if time.monotonic() > deadline:
                raise BenchError(f"{running} replies of an earlier run are still being written")
            time.sleep(0.1)

    def counts(self) -> dict[str, Any]:
        """What it says of itself."""
        return self._ask("GET", "", None)

    def usage(self) -> Usage:
        """What it has used."""
        return self.process.usage()

    def _ask(self, method: str, what: str, body: dict[str, object] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._control + what, data, method=method)
            ) as answer:
                return dict(json.load(answer))
        except OSError as error:
            raise BenchError(f"the provider of the tests: {error}") from error


@contextlib.contextmanager
def upstream(cores: frozenset[int]) -> Iterator[Upstream]:
    """Runs one until left."""
    environment = {"PYTHONPATH": str(ROOT / "tests")}
    with started("upstream", [sys.executable, "-m", "fake_provider"], cores, environment) as process:
        yield Upstream(process, process.line())
