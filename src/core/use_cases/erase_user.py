"""Erasing a user: thread after thread, each in a transaction of its own, to the end whoever leaves."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import timedelta

from core.model.erasure import Counts, ErasedThread, Receipt, user_hash
from core.model.errors import LegalHold, StoreUnavailable
from core.model.turn import Turn
from core.model.user import check_user_id
from core.ports.erasures import OpenErasure
from core.ports.store import Store, Transaction
from core.ports.system import Ids
from core.use_cases.detached import Detached
from core.use_cases.erase_thread import erase_thread
from core.use_cases.patience import patiently

_log = logging.getLogger(__name__)

_PAGE = 100
"""Threads that are looked for in one go."""
_LAST_STEPS = 5.0
"""Seconds that a stop gives to erasures."""
_TRIES = 20
"""Looks at a user whom others keep adding threads to, before the erasure is left to be gone on with later."""


class EraseUser:
    """Erases users: the profile, goals, threads, messages with what is attached, turns, logs and request ids.

    What their turns have cost stays in the ledger's sums, without their name.

    What is accepted for the user meanwhile is erased with the rest, or begins anew after it. `gone` is told of
    every turn that had not ended, `erased` that something was erased. An erasure that nobody has been at for
    `left_after` seconds was left by its process.
    """

    def __init__(
        self,
        *,
        store: Store,
        ids: Ids,
        gone: Callable[[Turn], None],
        erased: Callable[[], None],
        left_after: float = 30.0,
    ) -> None:
        self._store = store
        self._ids = ids
        self._gone = gone
        self._erased = erased
        self._left_after = timedelta(seconds=left_after)
        self._here: set[str] = set()
        self._detached: Detached[Receipt] = Detached()

    async def __call__(self, user_id: str, *, dry_run: bool = False) -> Receipt:
        """Returns the receipt once nothing of the user can be read any more. An erasure that is under way is
        joined. A user of whom nothing is known gets a receipt of nothing. Raises LegalHold.

        `dry_run` changes nothing: the receipt has no id and says what would be erased.
        """
        check_user_id(user_id)
        if dry_run:
            return await self._store.read(lambda tx: _forecast(tx, user_id))
        return await self._detached.run(self._erase_from_the_start(user_id))

    async def settle(self) -> None:
        """Waits a moment for erasures that are under way here. What is left then goes on elsewhere or later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_STEPS):
                await self._detached.settle()

    async def go_on(self) -> None:
        """Goes on with what other processes, or this one before it was started again, have left."""
        for left in await self._store.read(lambda tx: tx.erasures.left(tx.now() - self._left_after, _PAGE)):
            try:
                if left.id not in self._here:
                    await self._erase(left)
            except LegalHold:
                _log.info("erasure %s is on hold", left.id)
            except StoreUnavailable:
                raise
            except Exception:  # noqa: BLE001 - one that breaks must not keep the others from being gone on with
                _log.exception("erasure %s can't be gone on with", left.id)

    async def _erase_from_the_start(self, user_id: str) -> Receipt:
        erasure_id = self._ids.new()

        def begin(tx: Transaction) -> OpenErasure:
            if tx.users.held(user_id):
                raise LegalHold
            return tx.erasures.open(erasure_id, user_id, tx.now())

        return await self._erase(await self._store.write(begin))

    async def _erase(self, erasure: OpenErasure) -> Receipt:
        """Erases what there is. Raises LegalHold where one has come in between."""
        self._here.add(erasure.id)
        try:
            await self._erase_all(erasure)
        except _FinishedError:
            _log.info("erasure %s was finished by somebody else", erasure.id)
        finally:
            self._here.discard(erasure.id)
        self._erased()
        receipt = await self._store.read(lambda tx: tx.erasures.find(erasure.id))
        assert receipt is not None  # receipts are kept
        return receipt

    async def _erase_all(self, erasure: OpenErasure) -> None:
        for _ in range(_TRIES):
            while thread_ids := await self._store.read(
                lambda tx: tx.threads.ids_of(erasure.user_id, after="", limit=_PAGE)
            ):
                for thread_id in thread_ids:
                    await self._erase_thread(erasure, thread_id)
            if await patiently(lambda: self._store.write(lambda tx: _finish(tx, erasure))):
                return
        _log.warning("erasure %s meets new threads again and again", erasure.id)

    async def _erase_thread(self, erasure: OpenErasure, thread_id: str) -> None:
        def change(tx: Transaction) -> ErasedThread | None:
            erased = erase_thread(tx, erasure.user_id, thread_id, erasure_id=erasure.id)
            if erased is not None:
                _note(tx, erasure, erased.counts)
            return erased

        erased = await patiently(lambda: self._store.write(change))
        for turn in erased.unfinished if erased is not None else ():
            self._gone(turn)


class _FinishedError(Exception):
    """An erasure is over: what there is of its user has come since, and stays."""


def _note(tx: Transaction, erasure: OpenErasure, erased: Counts) -> None:
    """Notes what was erased, or has it taken back. Several may be at one erasure, and not all hear of its end."""
    if not tx.erasures.note(erasure.id, erased, tx.now()):
        raise _FinishedError


def _finish(tx: Transaction, erasure: OpenErasure) -> bool:
    """Erases what is no thread. False where threads have come meanwhile."""
    if tx.users.held(erasure.user_id):
        raise LegalHold
    if tx.threads.ids_of(erasure.user_id, after="", limit=1):
        return False
    _note(tx, erasure, Counts(goals=tx.goals.delete_of(erasure.user_id)))
    tx.ledger.forget(erasure.user_id)
    tx.users.remove(erasure.user_id)
    tx.erasures.finish(erasure.id, tx.now())
    return True


def _forecast(tx: Transaction, user_id: str) -> Receipt:
    if (user := tx.users.get(user_id)) is not None and user.held_since is not None:
        raise LegalHold
    erased, copies = tx.users.belongings(user_id)
    return Receipt(
        id="", user_hash=user_hash("", user_id), requested_at=tx.now(), erased=erased, copies_left=copies
    )
