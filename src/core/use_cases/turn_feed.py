"""What followers of a turn share while it runs in this process."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from core.model.events import LogEntry, TextDelta, TurnEvent, TurnFinished, after, merged, place
from core.use_cases.bell import Bell

POLL_SECONDS = 0.1
"""How often a turn that does not run in this process is looked at."""
HINTED_POLL_SECONDS = 1.0
"""The same where the store sends hints: one may get lost."""

_LONG = 4_096
"""Code points."""


class TurnFeed:
    """The committed events of a running turn, from the first one on.

    Followers pull by position, so a slow one holds nothing but its cursor and next time gets a longer piece.
    A feed is closed where this process can no longer tell what follows; the store then has the rest.
    """

    def __init__(self, entries: Sequence[LogEntry]) -> None:
        self._entries: list[LogEntry] = []
        self._extend(entries)
        self._changed = Bell()
        self.closed = False

    def publish(self, entries: Sequence[LogEntry]) -> None:
        """Adds what was committed. Entries continue where the last ones ended."""
        self._extend(entries)
        self._changed.ring()

    def close(self) -> None:
        """Sends the followers to the store, unless the end has been published."""
        if not self.ended:
            self.closed = True
        self._changed.ring()

    @property
    def events(self) -> list[TurnEvent]:
        """All that was committed."""
        return [entry.event for entry in self._entries]

    @property
    def position(self) -> int:
        """Where the committed events end."""
        return self._entries[-1].position

    @property
    def ended(self) -> bool:
        """Whether the turn's last event has been published."""
        return isinstance(self._entries[-1].event, TurnFinished)

    def after(self, position: int) -> list[LogEntry]:
        """What follows `position`, in the fewest entries."""
        rest = after(self._entries, position)
        return rest if len(rest) < 2 else place(merged([entry.event for entry in rest]), position)

    async def changed(self, position: int) -> None:
        """Waits until there is something after `position`, or there will be nothing more here."""
        while self.position <= position and not (self.closed or self.ended):
            await self._changed.wait()

    def _extend(self, entries: Iterable[LogEntry]) -> None:
        """Text joins the text before it: a turn that speaks has a few entries, however often it does."""
        for entry in entries:
            if self._entries and (whole := _joined(self._entries[-1].event, entry.event)) is not None:
                self._entries[-1] = LogEntry(entry.position, whole)
            else:
                self._entries.append(entry)


def _joined(event: TurnEvent, following: TurnEvent) -> TextDelta | None:
    """Two pieces of one text as one; None for anything else, and where that has become too long to copy."""
    if not isinstance(event, TextDelta) or not isinstance(following, TextDelta):
        return None
    if event.refusal is not following.refusal or len(event.text) > _LONG:
        return None
    return TextDelta(event.text + following.text, event.refusal)


class News:
    """Word that a turn may have changed: a hint, kept until it is waited for."""

    def __init__(self) -> None:
        self._told = False
        self._bell = Bell()
        self.position = 0
        """Up to where whoever waits has read."""

    def tell(self) -> None:
        """Wakes whoever waits."""
        self._told = True
        self._bell.ring()

    async def wait(self, seconds: float) -> None:
        """Waits for word, at most so long."""
        if not self._told:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._bell.wait()
        self._told = False


class TurnFeeds:
    """The feeds of all turns that run in this process, and those who wait for word of turns that do not."""

    def __init__(self) -> None:
        self._feeds: dict[str, TurnFeed] = {}
        self._waiting: dict[str, dict[News, None]] = {}
        self.poll = POLL_SECONDS

    def open(self, turn_id: str, entries: Sequence[LogEntry]) -> TurnFeed:
        """Begins a turn's feed with the events committed so far."""
        self.drop(turn_id)
        feed = self._feeds[turn_id] = TurnFeed(entries)
        self.tell(turn_id)
        return feed

    def get(self, turn_id: str) -> TurnFeed | None:
        """The feed of a turn that runs here."""
        return self._feeds.get(turn_id)

    def drop(self, turn_id: str) -> None:
        """Forgets a feed; those who hold it can read it to the end."""
        if feed := self._feeds.pop(turn_id, None):
            feed.close()

    @contextmanager
    def news(self, turn_id: str) -> Iterator[News]:
        """Listens for word of a turn."""
        news = News()
        self._waiting.setdefault(turn_id, {})[news] = None
        try:
            yield news
        finally:
            del self._waiting[turn_id][news]
            if not self._waiting[turn_id]:
                del self._waiting[turn_id]

    def tell(self, turn_id: str) -> None:
        """Passes on that a turn may have changed, to those first who came first."""
        for news in self._waiting.get(turn_id, ()):
            news.tell()

    def followers(self) -> int:
        """How many follow turns in this process."""
        return sum(map(len, self._waiting.values()))

    def lag(self) -> int:
        """How many positions of a turn that runs here wait for the follower who is the farthest behind."""
        return max(
            (
                feed.position - news.position
                for turn_id, waiting in self._waiting.items()
                if (feed := self._feeds.get(turn_id)) is not None
                for news in waiting
            ),
            default=0,
        )

    def tell_all(self) -> None:
        """Passes on that any turn may have changed."""
        for turn_id in list(self._waiting):
            self.tell(turn_id)
