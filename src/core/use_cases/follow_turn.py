"""Following a turn: replay what is committed behind a position, then go on live to the end."""

from collections.abc import AsyncGenerator, Sequence

from core.model.errors import InvalidField, PositionAhead, TurnNotFound
from core.model.events import LogEntry, TurnFinished
from core.model.turn import Turn
from core.ports.store import Store, Transaction
from core.use_cases.turn_feed import TurnFeeds


class FollowTurn:
    """Follows turns. `Chat` is accept and follow from 0: there is no other way to a client."""

    def __init__(self, store: Store, feeds: TurnFeeds) -> None:
        self._store = store
        self._feeds = feeds

    async def find(self, user_id: str, turn_id: str, after_position: int) -> Turn:
        """The user's turn, if it can be followed from there.

        Raises TurnNotFound, InvalidField for a negative position, PositionAhead for one beyond the log.
        """
        if after_position < 0:
            raise InvalidField("after_position", "must not be negative")
        turn = await self._store.read(lambda tx: tx.turns.get(user_id, turn_id))
        if turn is None:
            raise TurnNotFound
        if after_position > turn.last_position:
            raise PositionAhead
        return turn

    async def events(self, turn_id: str, after_position: int) -> AsyncGenerator[LogEntry, None]:
        """The committed events behind the position, exactly, each once, up to and with TurnFinished.

        Ends without an event where the position is the end of a turn that has ended. Text comes in pieces as
        large as there is at the time. Raises TurnNotFound where the turn is gone.
        """
        position = after_position
        feed = None
        # No wait of any length is open across a `yield`: whoever closes this generator does so from elsewhere.
        with self._feeds.news(turn_id) as news:
            news.position = position
            while True:
                if feed is None or feed.closed:
                    feed = self._feeds.get(turn_id)
                ended = False
                if feed is not None:
                    entries: Sequence[LogEntry] = feed.after(position)
                    ended = feed.ended
                else:
                    entries, ended = await self._stored(turn_id, position)
                for entry in entries:
                    yield entry
                    if isinstance(entry.event, TurnFinished):
                        return
                    position = entry.position
                news.position = position
                if ended:
                    return
                if feed is not None:
                    await feed.changed(position)
                elif not entries:
                    await news.wait(self._feeds.poll)

    async def _stored(self, turn_id: str, position: int) -> tuple[Sequence[LogEntry], bool]:
        def query(tx: Transaction) -> tuple[Sequence[LogEntry], bool]:
            turn = tx.turns.find(turn_id)
            if turn is None:
                raise TurnNotFound
            return tx.log.read(turn_id, position), turn.state.is_terminal

        return await self._store.read(query)
