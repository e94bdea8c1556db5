"""What operators may know of threads and turns of any user: ids, states, times and counts, no word of anybody."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from core.model.agent import Domain
from core.model.errors import InvalidField, ThreadNotFound
from core.model.thread import ProviderState, Thread, ThreadState
from core.model.turn import Turn, TurnState
from core.model.user import check_user_id
from core.ports.store import Store, Transaction
from core.ports.turns import Holder

MAX_LISTED = 1_000
DEFAULT_LISTED = 50
_PAGE = 500
GRACE = 15.0
"""Seconds that a turn may take to end, or to be claimed by another process, beyond its budget and the lease."""


class Stuck(StrEnum):
    """Why a turn does not go on by itself."""

    OVER_TIME = "OVER_TIME"
    """It is at work for longer than its budget, a lease and GRACE."""
    OWNER_GONE = "OWNER_GONE"
    """The lease of its process is over for longer than a lease and GRACE, and no other has claimed it."""
    UNCLAIMED = "UNCLAIMED"
    """It is the next of its thread for longer than it might take, and no process has claimed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFacts:
    """A turn that has not ended. `age` and `budget_used` are in seconds."""

    turn: Turn
    holder: Holder
    age: float
    budget_used: float
    budget: float
    stuck: Stuck | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadFacts:
    """A thread. Whoever shows it leaves out its title and metadata."""

    thread: Thread
    copy: ProviderState | None
    unfinished: Sequence[TurnFacts]


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsQuery:
    """Which threads; `user_id` empty: every user's. `limit` 0: DEFAULT_LISTED."""

    user_id: str = ""
    domain: Domain | None = None
    states: frozenset[ThreadState] = frozenset(ThreadState)
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnsQuery:
    """Which turns; `user_id` empty: every user's. `limit` 0: DEFAULT_LISTED."""

    user_id: str = ""
    stuck: bool = False
    limit: int = 0


class Oversee:
    """Reads threads and unfinished turns, whosever they are.

    A turn may take `budget` seconds and a process is given up after `lease`. `alone` says that no process is at
    work on this database: whoever holds a turn is gone.
    """

    def __init__(self, store: Store, *, budget: float, lease: float, alone: bool) -> None:
        self._store = store
        self._budget = budget
        self._lease = lease
        self._alone = alone

    async def threads(self, query: ThreadsQuery) -> Sequence[ThreadFacts]:
        """The newest threads first. Raises InvalidField."""
        limit = _checked(query.user_id, query.limit)

        def read(tx: Transaction) -> Sequence[ThreadFacts]:
            found = tx.threads.newest(query.user_id, query.domain, query.states, limit)
            return [self._thread(tx, thread) for thread in found]

        return await self._store.read(read)

    async def thread(self, thread_id: str) -> ThreadFacts:
        """One thread. Raises ThreadNotFound."""

        def read(tx: Transaction) -> ThreadFacts:
            thread = tx.threads.find(thread_id)
            if thread is None:
                raise ThreadNotFound
            return self._thread(tx, thread)

        return await self._store.read(read)

    async def turns(self, query: TurnsQuery) -> Sequence[TurnFacts]:
        """Turns that have not ended, the oldest first. Raises InvalidField."""
        limit = _checked(query.user_id, query.limit)

        def read(tx: Transaction) -> Sequence[TurnFacts]:
            now = tx.now()
            size = _PAGE if query.stuck else limit
            found: list[TurnFacts] = []
            after = ""
            while len(found) < limit:
                page = tx.turns.open(query.user_id, after, size)
                facts = [self._turn(tx, turn, now) for turn in page]
                found += [each for each in facts if each.stuck or not query.stuck]
                if len(page) < size:
                    break
                after = page[-1].id
            return found[:limit]

        return await self._store.read(read)

    def _thread(self, tx: Transaction, thread: Thread) -> ThreadFacts:
        now = tx.now()
        return ThreadFacts(
            thread=thread,
            copy=tx.threads.provider_state(thread.id),
            unfinished=[self._turn(tx, turn, now) for turn in tx.turns.unfinished(thread.id)],
        )

    def _turn(self, tx: Transaction, turn: Turn, now: datetime) -> TurnFacts:
        holder = holder_of(tx, turn, alone=self._alone)
        age = (now - turn.accepted_at).total_seconds()
        used = (now - turn.claimed_at).total_seconds() if turn.claimed_at else 0.0
        return TurnFacts(
            turn=turn,
            holder=holder,
            age=max(0.0, age),
            budget_used=max(0.0, used),
            budget=self._budget,
            stuck=self._stuck(tx, turn, holder, now, age, used),
        )

    def _stuck(
        self, tx: Transaction, turn: Turn, holder: Holder, now: datetime, age: float, used: float
    ) -> Stuck | None:
        longest = self._budget + self._lease + GRACE
        if turn.state is TurnState.ACCEPTED:
            is_next = tx.turns.unfinished(turn.thread_id)[0].id == turn.id
            return Stuck.UNCLAIMED if is_next and age > longest else None
        if not holder.alive:
            over = (now - holder.until).total_seconds() if holder.until is not None and not self._alone else used
            if over > self._lease + GRACE:
                return Stuck.OWNER_GONE
        return Stuck.OVER_TIME if used > longest else None


def holder_of(tx: Transaction, turn: Turn, *, alone: bool) -> Holder:
    """Who has claimed a turn; nobody is alive where it is known that no process is at work on the database."""
    holder = tx.turns.holder(turn.id)
    return Holder(holder.owner, holder.alive and not alone, holder.until)


def _checked(user_id: str, limit: int) -> int:
    if user_id:
        check_user_id(user_id)
    if not 0 <= limit <= MAX_LISTED:
        raise InvalidField("limit", f"must be 1 to {MAX_LISTED}")
    return limit or DEFAULT_LISTED
