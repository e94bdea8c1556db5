"""What followers of a turn share while it runs in this process."""

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

from core.model.events import LogEntry, TurnFinished, after, merged, place


class TurnFeed:
    """The committed events of a running turn, from the first one on.

    Followers pull by position, so a slow one holds nothing but its cursor and next time gets a longer piece.
    A feed is closed where this process can no longer tell what follows; the store then has the rest.
    """

    def __init__(self, entries: Sequence[LogEntry]) -> None:
        self._entries = list(entries)
        self._positions = [entry.position for entry in entries]
        self._changed = asyncio.Event()
        self.closed = False

    def publish(self, entries: Sequence[LogEntry]) -> None:
        """Adds what was committed. Entries continue where the last ones ended."""
        self._entries.extend(entries)
        self._positions.extend(entry.position for entry in entries)
        self._wake()

    def close(self) -> None:
        """Sends the followers to the store, unless the end has been published."""
        if not self.ended:
            self.closed = True
        self._wake()

    @property
    def ended(self) -> bool:
        """Whether the turn's last event has been published."""
        return isinstance(self._entries[-1].event, TurnFinished)

    def after(self, position: int) -> list[LogEntry]:
        """What follows `position`, in the fewest entries."""
        rest = after(self._entries[bisect_right(self._positions, position) :], position)
        return place(merged(entry.event for entry in rest), position)

    async def changed(self, position: int) -> None:
        """Waits until there is something after `position`, or there will be nothing more here."""
        while self._positions[-1] <= position and not (self.closed or self.ended):
            await self._changed.wait()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class TurnFeeds:
    """The feeds of all turns that run in this process."""

    def __init__(self) -> None:
        self._feeds: dict[str, TurnFeed] = {}

    def open(self, turn_id: str, entries: Sequence[LogEntry]) -> TurnFeed:
        """Begins a turn's feed with the events committed so far."""
        feed = self._feeds[turn_id] = TurnFeed(entries)
        return feed

    def get(self, turn_id: str) -> TurnFeed | None:
        """The feed of a turn that runs here."""
        return self._feeds.get(turn_id)

    def drop(self, turn_id: str) -> None:
        """Forgets a feed; those who hold it can read it to the end."""
        if feed := self._feeds.pop(turn_id, None):
            feed.close()
