"""The statements of turns, as the service's own store runs them, to be run again by others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from threading import local
from typing import Any, TypeVar

from dependency_injector import providers

from adapters.sql.session import Session
from adapters.sql.statement import Parameters, Statement
from adapters.sql.store import SqlStore
from adapters.system import Clock
from core.model.events import TurnFinished
from core.model.message import TextPart
from core.model.turn import TurnState
from core.ports.store import Transaction
from core.use_cases.accept_message import IncomingMessage
from entrypoints.container import Container, running
from entrypoints.settings import Settings
from speed.processes import BenchError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A statement, how the store asked for it, and its parameters: several sets where it runs several times."""

    kind: str
    statement: Statement
    parameters: Sequence[Parameters]


Step = list[Call]
"""What belongs together: one transaction where nothing is grouped."""
Turn = list[Step]


@dataclass(frozen=True, slots=True)
class Recording:
    """What must be there before the turns, and the turns. Each is in a thread of its own."""

    before: list[Step]
    turns: list[Turn]


class _Recorder(SqlStore):
    """A store that notes what its changes do."""

    def __init__(self, url: str) -> None:
        self.steps: list[Step] = []
        super().__init__(url, Clock())

    async def write(self, change: Callable[[Transaction], T]) -> T:
        def noted(tx: Transaction) -> T:
            _current.step = step = []
            try:
                return change(tx)
            finally:
                _current.step = None
                if step:
                    self.steps.append(step)

        return await super().write(noted)


_current = local()
"""The step of this thread, if it is in one."""


async def record(url: str, turns: int) -> Recording:
    """Lets the service answer so many messages in new threads, one by one, with short replies."""
    settings = Settings(
        VIDA_DATABASE_URL=url, VIDA_PROVIDER="practice", VIDA_PRACTICE_WORDS_PER_SECOND=0, _env_file=None
    )
    store = _Recorder(url)
    Container.store.override(providers.Object(store))
    try:
        with _noting():
            async with running(settings) as container:
                before, found = store.steps, []
                for number in range(turns):
                    store.steps = []
                    await _turn(container, f"user-{number}")
                    found.append(store.steps)
                store.steps = []
    finally:
        Container.store.reset_override()
    return Recording(before, found)


async def _turn(container: Container, user: str) -> None:
    accepted = await container.accept()(IncomingMessage(user_id=user, content=(TextPart("I feel stuck."),)))
    ending = None
    async with aclosing(container.follow().events(accepted.turn.id, 0)) as log:
        async for entry in log:
            if isinstance(entry.event, TurnFinished):
                ending = entry.event.turn.state
    if ending is not TurnState.COMPLETED:
        raise BenchError(f"a turn to be recorded ended {ending}")


@contextlib.contextmanager
def _noting() -> Iterator[None]:
    """Has every session note what it is asked in a step."""
    own = {name: getattr(Session, name) for name in ("run", "rows", "count", "count_each")}

    def noting(kind: str) -> Callable[..., Any]:
        def noted(session: Session, statement: Statement, parameters: Any = None) -> Any:
            given = {} if parameters is None else parameters
            step = getattr(_current, "step", None)
            if step is not None:
                step.append(Call(kind, statement, given if kind == "count_each" else [given]))
            return own[kind](session, statement, given)

        return noted

    for name in own:
        setattr(Session, name, noting(name))
    try:
        yield
    finally:
        for name, method in own.items():
            setattr(Session, name, method)
