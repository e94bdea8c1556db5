"""Settling: operators end turns that do not go on by themselves, as anybody else would end them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from core.model.errors import ThreadNotFound, TurnInProgress, TurnNotFound
from core.model.thread import UNSYNCED
from core.model.turn import Turn, TurnReason, TurnState
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.use_cases.detached import Detached
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.oversee import holder_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unlocked:
    """The turns of a thread that were ended, and whether the provider's copy is to be looked at."""

    turns: Sequence[Ended]
    copy_doubted: bool


class SettleTurn:
    """Ends turns INTERRUPTED, keeping the partial text: one, or all of a thread.

    A turn at which a living process is at work, or that waits for such a one, is left to it unless forced. `took`
    hears of every turn that was ended. `alone` says that no process is at work on this database. With a dry run
    all is done and taken back.
    """

    def __init__(self, *, store: Store, ids: Ids, took: Callable[[Ended], object], alone: bool) -> None:
        self._store = store
        self._ids = ids
        self._took = took
        self._alone = alone
        self._settling: Detached[Ended] = Detached()
        self._unlocking: Detached[Unlocked] = Detached()

    async def turn(self, turn_id: str, *, force: bool = False, dry_run: bool = False) -> Ended:
        """Ends a turn. Idempotent. Raises TurnNotFound and TurnInProgress."""
        return await self._settling.run(self._settle(turn_id, force=force, dry_run=dry_run))

    async def thread(self, thread_id: str, *, force: bool = False, dry_run: bool = False) -> Unlocked:
        """Ends all that has not ended in a thread, messages that wait included, and has the provider's copy looked
        at before the next reply. Raises ThreadNotFound and TurnInProgress."""
        return await self._unlocking.run(self._unlock(thread_id, force=force, dry_run=dry_run))

    async def _settle(self, turn_id: str, *, force: bool, dry_run: bool) -> Ended:
        ended = await self._change(partial(self._end, turn_id, force), dry_run=dry_run)
        if not dry_run:
            self._took(ended)
        return ended

    async def _unlock(self, thread_id: str, *, force: bool, dry_run: bool) -> Unlocked:
        unlocked = await self._change(partial(self._end_all, thread_id, force), dry_run=dry_run)
        if not dry_run:
            for ended in unlocked.turns:
                self._took(ended)
        return unlocked

    def _end(self, turn_id: str, force: bool, tx: Transaction) -> Ended:
        turn = tx.turns.lock(turn_id)
        if turn is None:
            raise TurnNotFound
        if not turn.state.is_terminal and not force:
            self._require_nobody(tx, tx.turns.unfinished(turn.thread_id))
        return end_turn(tx, self._ids, turn_id, Ending(reason=TurnReason.INTERRUPTED))

    def _end_all(self, thread_id: str, force: bool, tx: Transaction) -> Unlocked:
        found = tx.threads.find(thread_id)
        if found is None or tx.threads.lock(found.user_id, thread_id) is None:
            raise ThreadNotFound
        unfinished = tx.turns.unfinished(thread_id)
        if not force:
            self._require_nobody(tx, unfinished)
        # From the last to the first: none becomes the next of its thread in between.
        ended = [
            end_turn(tx, self._ids, turn.id, Ending(reason=TurnReason.INTERRUPTED)) for turn in unfinished[::-1]
        ]
        copy = tx.threads.provider_state(thread_id)
        if copy is not None:
            tx.threads.save_provider_state(thread_id, replace(copy, synced_to=UNSYNCED))
        return Unlocked(ended[::-1], copy_doubted=copy is not None)

    def _require_nobody(self, tx: Transaction, unfinished: Sequence[Turn]) -> None:
        for turn in unfinished:
            if turn.state is not TurnState.ACCEPTED and holder_of(tx, turn, alone=self._alone).alive:
                raise TurnInProgress(turn.id)

    async def _change(self, change: Callable[[Transaction], T], *, dry_run: bool) -> T:
        if not dry_run:
            return await self._store.write(change)
        rehearsed: list[T] = []

        def rehearse(tx: Transaction) -> None:
            rehearsed.append(change(tx))
            raise _TakenBackError

        try:
            await self._store.write(rehearse)
        except _TakenBackError:
            return rehearsed[-1]
        raise AssertionError("a rehearsal never ends well")


class _TakenBackError(Exception):
    """Nothing of a change is to stay."""
