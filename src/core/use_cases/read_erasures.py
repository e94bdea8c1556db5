"""Reading how erasures stand."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.model.erasure import Copy, Receipt
from core.ports.store import Store

_MOST_RECEIPTS = 1_000
_MOST_COPIES = 100


@dataclass(frozen=True, slots=True)
class Erasures:
    """The newest receipts, newest first, and what providers still have of anything that was erased: how many
    objects, and those that were tried most often."""

    receipts: Sequence[Receipt]
    copies_left: int
    copies: Sequence[Copy]


class ReadErasures:
    """Reads receipts, and what is left to do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def __call__(self) -> Erasures:
        """How it stands now."""
        return await self._store.read(
            lambda tx: Erasures(
                tx.erasures.newest(_MOST_RECEIPTS), tx.copies.count_left(), tx.copies.left(_MOST_COPIES)
            )
        )
