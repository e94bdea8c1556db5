"""The port to the record: everything durable, behind transactions.

A state change is a plain synchronous function over a Transaction. `await store.write(change)` runs it; a group
of changes may share one commit. Such functions therefore do nothing but read and write through the transaction:
they may be run again, in another transaction, if the first attempt was rolled back.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol, TypeVar

from core.ports.agents import AgentVersions
from core.ports.erasures import Copies, Erasures
from core.ports.goals import Goals
from core.ports.ledger import Ledger
from core.ports.threads import Messages, Threads, Users
from core.ports.turns import Leases, TurnLog, Turns

T = TypeVar("T")


UNCLAIMED = "unclaimed"
"""A hint that some turn waits for a process."""


class Conflict(Exception):
    """A change breaks a rule of uniqueness that the store keeps by itself."""


class Transaction(Protocol):
    """The repositories, all within one transaction. Not to be kept after the function has returned."""

    @property
    @abstractmethod
    def users(self) -> Users: ...

    @property
    @abstractmethod
    def agents(self) -> AgentVersions: ...

    @property
    @abstractmethod
    def threads(self) -> Threads: ...

    @property
    @abstractmethod
    def messages(self) -> Messages: ...

    @property
    @abstractmethod
    def turns(self) -> Turns: ...

    @property
    @abstractmethod
    def log(self) -> TurnLog: ...

    @property
    @abstractmethod
    def goals(self) -> Goals: ...

    @property
    @abstractmethod
    def ledger(self) -> Ledger: ...

    @property
    @abstractmethod
    def leases(self) -> Leases: ...

    @property
    @abstractmethod
    def erasures(self) -> Erasures: ...

    @property
    @abstractmethod
    def copies(self) -> Copies: ...

    @abstractmethod
    def now(self) -> datetime:
        """The store's own time in UTC: the same for all processes that share the database."""

    @abstractmethod
    def about_now(self) -> datetime:
        """The same, or up to 50 ms behind: it is not asked for each time. For what has no order with anything."""


class Store(Protocol):
    """Runs functions in transactions. Used from one event loop."""

    @abstractmethod
    async def write(self, change: Callable[[Transaction], T]) -> T:
        """Runs a change and returns its result once that is durable.

        All or nothing: whatever `change` raises is raised here and leaves no trace, also where other changes
        share the commit. Changes of one process take effect in the order in which they were submitted; one
        that collides with another process's is run again, and raises Conflict if that does not help, or StoreBusy
        if the other one holds on to what it needs; the changes behind it do not wait for it. Raises
        StoreUnavailable if the store does not answer; it is then unknown whether the change took effect.
        Cancelling the caller does not stop a change that has been submitted.
        """

    @abstractmethod
    async def read(self, query: Callable[[Transaction], T]) -> T:
        """Runs a query on one consistent state that includes every change committed before the call."""

    @abstractmethod
    async def purge(self) -> bool:
        """Has what is deleted vanish from the store's own files as well, as far as that is the store's to do.

        False where readers are in the way: try again a moment later. Of PostgreSQL's files its server takes care.
        """

    @abstractmethod
    def exclusive(self, name: str) -> AbstractAsyncContextManager[bool]:
        """Holds a named lock over all processes of the database; yields False at once if another holds it.

        The lock is free when its holder's process is gone.
        """

    @abstractmethod
    def listen(self, heard: Callable[[frozenset[str]], None]) -> bool:
        """Calls `heard`, in the running loop, with the ids of turns that another process has changed.

        UNCLAIMED is among them where a turn waits for a process. Hints, no more: they may be lost, late or
        doubled, and none comes before its change can be read. An empty set says that some may have been lost.
        Returns whether hints will come; if not, one has to look.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Waits for submitted changes, then frees everything."""
