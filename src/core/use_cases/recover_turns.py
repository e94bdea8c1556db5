"""Recovery: every process keeps its lease, notices turns that it has lost, and claims those that wait for one."""

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from core.model.errors import StoreBusy, StoreUnavailable
from core.model.events import traceparent_of
from core.model.trail import begin_trail, on_turn, trail
from core.model.turn import Turn, TurnReason
from core.ports.store import UNCLAIMED, Store, Transaction
from core.ports.system import Ids
from core.use_cases.claim_turn import ClaimedTurn, Why, claim_turn, is_free
from core.use_cases.end_turn import Ended, Ending, end_turn
from core.use_cases.turn_engine import TurnEngine
from core.use_cases.turn_feed import HINTED_POLL_SECONDS, TurnFeeds

_log = logging.getLogger(__name__)

_BATCH = 1_000
"""Turns that are looked at in one go."""
_AT_ONCE = 20
"""Claims under way at the same time."""
_LONGEST_PERIOD = 2.0
_SHORTEST_PAUSE = 0.05
_RETRY = 0.5
_LAST_WRITE = 2.0
_FOR_EVER = 10 * 365 * 24 * 3600.0


class RecoverTurns:
    """Claims turns for this process, from `start` to `stop`.

    `lease` are the seconds after which a process that is not heard of has lost its turns. `alone` says that no
    other process can work on this database: whatever another one holds was left behind, and no lease runs out.
    """

    def __init__(
        self, *, store: Store, engine: TurnEngine, feeds: TurnFeeds, ids: Ids, lease: float, alone: bool
    ) -> None:
        self._store = store
        self._engine = engine
        self._feeds = feeds
        self._ids = ids
        self._lease = _FOR_EVER if alone else lease
        self._period = min(_LONGEST_PERIOD, lease / 3)
        self._halt = lease - self._period
        """Seconds between two renewals after which leases of others may have run out for the same reason."""
        self._alone = alone
        self._owner = engine.claimant.owner
        self._random = random.Random(self._owner)  # noqa: S311 - an order, no secret
        self._watched_since = math.inf
        self._renewed = -math.inf
        self._has_lease = False
        self._suspects: set[str] = set()
        self._given_up: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Takes a lease, looks for turns once, and goes on doing so. Raises StoreUnavailable."""
        if self._alone:
            await self._store.write(lambda tx: tx.leases.end_others(self._owner))
        if self._store.listen(self._hear) or self._alone:  # alone, it hears of everything by itself
            self._feeds.poll = HINTED_POLL_SECONDS
        await self._renew()
        await self._take_stock()
        await self._claim_waiting()
        # Apart from each other: what there is to claim must not keep the lease waiting.
        self._tasks = [
            asyncio.create_task(self._keep_lease(), name="keep-lease"),
            asyncio.create_task(self._look_for_turns(), name="look-for-turns"),
        ]

    async def stop(self) -> None:
        """Ends the lease: nothing of this process is waited for."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_WRITE):
                await self._store.write(lambda tx: tx.leases.end(self._owner))
        except (StoreUnavailable, TimeoutError):
            _log.warning("the store does not answer: the lease runs out by itself")

    async def _keep_lease(self) -> None:
        reachable = True
        while True:
            await asyncio.sleep(self._period if reachable else _RETRY)
            try:
                await self._renew()
            except StoreUnavailable:
                if reachable:
                    _log.warning("the store does not answer: the lease can't be renewed")
                reachable = False
                self._renewed = -math.inf  # others may have had no answer either
            except Exception:  # noqa: BLE001 - whatever it is, the lease must be kept
                _log.exception("the lease can't be renewed")
            else:
                reachable = True

    async def _look_for_turns(self) -> None:
        loop = asyncio.get_running_loop()
        look_at = loop.time() + self._period
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._engine.waiting.wait()
            self._engine.waiting.clear()
            try:
                if loop.time() >= look_at:
                    look_at = loop.time() + self._period
                    await self._take_stock()
                await self._check_suspects()
                await self._claim_waiting()
            except StoreUnavailable:
                _log.debug("the store does not answer")  # the lease says so, louder
                look_at = loop.time() + _RETRY
            except Exception:  # noqa: BLE001 - whatever it is, the next look may succeed, and must be made
                _log.exception("turns can't be looked for")
            await asyncio.sleep(_SHORTEST_PAUSE)

    def _hear(self, turn_ids: frozenset[str]) -> None:
        """Takes hints from other processes."""
        if not turn_ids:
            self._feeds.tell_all()
        for turn_id in sorted(turn_ids):  # a set of words has another order in each process
            self._feeds.tell(turn_id)
        self._suspects.update(filter(self._engine.knows, turn_ids))
        if not turn_ids or UNCLAIMED in turn_ids or self._suspects:
            self._engine.waiting.set()

    async def _renew(self) -> None:
        if self._alone and self._has_lease:
            return
        loop = asyncio.get_running_loop()
        begun = loop.time()
        valid = await self._store.write(lambda tx: tx.leases.renew(self._owner, self._lease))
        if not valid or loop.time() - self._renewed >= self._halt:
            # New, or back after a pause, an outage or a halt of the store, which the others may have had as well:
            # each gets the time to renew its lease before anybody takes its turns.
            self._watched_since = loop.time()
        self._renewed = loop.time()
        self._has_lease = True
        self._engine.leased(begun + self._lease)

    async def _take_stock(self) -> None:
        """Stops what runs here and is no longer ours, and claims anew what is ours and does not run here, as a
        turn may whose acceptance was not answered; then what processes have left that are gone."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        ours = self._engine.held()

        def query(tx: Transaction) -> tuple[Mapping[str, int], Sequence[Turn], Sequence[Turn]]:
            held = tx.turns.held_by(self._owner)
            orphans = [turn_id for turn_id in held if not self._engine.knows(turn_id)]
            return held, _read(tx, orphans), _read(tx, tx.turns.abandoned(_BATCH))

        held, orphans, abandoned = await self._store.read(query)
        for turn_id, epoch in ours.items():
            if held.get(turn_id) != epoch and self._engine.held().get(turn_id) == epoch:
                self._engine.abandon(turn_id)
        await self._claim_all(orphans, Why.ORPHANED)
        # A store that is slow to answer, or did not, may have kept others from renewing as well.
        in_time = loop.time() - begun < self._halt and loop.time() - self._renewed < self._halt
        if self._alone or (in_time and loop.time() >= self._watched_since + self._lease):
            await self._claim_all(abandoned, Why.ABANDONED)

    async def _check_suspects(self) -> None:
        """Looks at turns that another process has touched."""
        suspects, self._suspects = self._suspects, set()
        ours = {turn_id: epoch for turn_id, epoch in self._engine.held().items() if turn_id in suspects}
        if ours:
            turns = await self._store.read(lambda tx: {turn_id: tx.turns.find(turn_id) for turn_id in ours})
            for turn_id, turn in turns.items():
                if turn is None or turn.epoch != ours[turn_id]:
                    self._engine.abandon(turn_id)

    async def _claim_waiting(self) -> None:
        full = self._engine.users_without_room()
        while True:
            waiting = await self._waiting(full)
            await self._claim_all(waiting, Why.WAITING)
            now_full = full | self._engine.users_without_room()
            if len(waiting) < _BATCH or now_full == full:
                return
            full = now_full  # turns of others may wait behind those of who has no place left

    async def _waiting(self, but_of: frozenset[str]) -> Sequence[Turn]:
        return await self._store.read(lambda tx: _read(tx, tx.turns.unclaimed(_BATCH, but_of=but_of)))

    async def _claim_all(self, turns: Sequence[Turn], why: Why) -> None:
        claims = [turn for turn in turns if not self._engine.knows(turn.id) and turn.id not in self._given_up]
        self._random.shuffle(claims)  # processes that look at the same time should not want the same ones
        for start in range(0, len(claims), _AT_ONCE):
            some = [self._claim(turn, why) for turn in claims[start : start + _AT_ONCE]]
            for outcome in await asyncio.gather(*some, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _claim(self, turn: Turn, why: Why) -> None:
        on_turn(turn)
        refusal = self._engine.reserve(turn.user_id)
        if refusal is not None and why is Why.WAITING:
            return
        outcome: ClaimedTurn | Ended | None = None

        def change(tx: Transaction) -> ClaimedTurn | Ended | None:
            return claim_turn(tx, self._ids, turn.id, self._engine.claimant, why, has_place=refusal is None)

        with self._engine.expecting(turn.id):
            try:
                outcome = await self._store.write(change)
            except StoreBusy:
                _log.debug("turn %s is held by somebody else", turn.id)  # at the next look it may be free
            except StoreUnavailable:
                raise
            except Exception:  # noqa: BLE001 - one broken turn must not keep the others waiting
                _log.exception("turn %s can't be claimed", turn.id)
                outcome = await self._give_up(turn, why)
            finally:
                if refusal is None and not isinstance(outcome, ClaimedTurn):
                    self._engine.release(turn.user_id)
            if isinstance(outcome, ClaimedTurn):
                begin_trail(replace(trail(), traceparent=traceparent_of(outcome.log)))
                _log.info("turn %s: attempt %d begins here", turn.id, outcome.turn.attempt)
                self._engine.run(outcome)
        if isinstance(outcome, Ended):
            _log.warning("turn %s was left by its process: %s", turn.id, outcome.turn.reason)
            self._feeds.tell(turn.id)
            self._engine.ended(outcome)

    async def _give_up(self, turn: Turn, why: Why) -> Ended | None:
        """Ends a turn that can't be claimed; where that can't be done either, it is left as it is."""

        def change(tx: Transaction) -> Ended | None:
            current = tx.turns.lock(turn.id)
            if current is None or not is_free(tx, current, self._owner, why):
                return None
            return end_turn(tx, self._ids, turn.id, Ending(reason=TurnReason.INTERNAL))

        try:
            return await self._store.write(change)
        except StoreUnavailable:
            raise
        except Exception:  # noqa: BLE001 - it is reported once and left as it is
            _log.exception("turn %s can't be ended", turn.id)
            self._given_up.add(turn.id)
            return None


def _read(tx: Transaction, turn_ids: Sequence[str]) -> Sequence[Turn]:
    return [turn for turn_id in turn_ids if (turn := tx.turns.find(turn_id))]
