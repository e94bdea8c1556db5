"""Reading how erasures stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.model.erasure import Copy, Receipt
from core.ports.store import Store, Transaction

_MOST_RECEIPTS = 1_000
_MOST_COPIES = 100


@dataclass(frozen=True, slots=True)
class Erasures:
    """The newest receipts, newest first, and what providers still have of anything that was erased: how many
    objects, and those that were tried most often.

    Of those, `waiting` are at providers that are not configured here, by provider: nobody here erases them.
    """

    receipts: Sequence[Receipt]
    copies_left: int
    copies: Sequence[Copy]
    waiting: Mapping[str, int]


class ReadErasures:
    """Reads receipts, and what is left to do. `provider` is the one whose copies are erased here."""

    def __init__(self, store: Store, provider: str) -> None:
        self._store = store
        self._provider = provider

    async def __call__(self) -> Erasures:
        """How it stands now."""

        def read(tx: Transaction) -> Erasures:
            left = tx.copies.count_left()
            return Erasures(
                receipts=tx.erasures.newest(_MOST_RECEIPTS),
                copies_left=sum(left.values()),
                copies=tx.copies.left(_MOST_COPIES),
                waiting={provider: count for provider, count in left.items() if provider != self._provider},
            )

        return await self._store.read(read)
