"""Reading one response over one connection after the other."""

from collections.abc import Iterable
from dataclasses import replace
from io import StringIO

from adapters.openai.errors import ProviderFault
from adapters.openai.round import RoundEnd, RoundReader
from core.model.events import TextDelta
from core.ports.agent import CannotResume


class Reading:
    """One response as far as it has been read.

    `known` is text of it that was read before. It comes again, must be the same, and is not handed out. `again`
    says that all of it can be had again.
    """

    def __init__(self, *, follows_text: bool, known: str = "", again: bool = False) -> None:
        self._follows_text = follows_text
        self._again = again
        self._said = StringIO()
        self._said.write(known)
        self._steps = 0
        self.rewind()

    def rewind(self) -> None:
        """The response comes again from its beginning: what was said of it is known."""
        self._reader = RoundReader(follows_text=self._follows_text, again=self._again)
        self._known = self._said.getvalue()
        self._recalled = 0

    @property
    def end(self) -> RoundEnd | None:
        """How the response ended, if it has."""
        return self._reader.end

    @property
    def fault(self) -> ProviderFault | None:
        """How the response itself failed, or broke the protocol."""
        return self._reader.fault

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to read."""
        return self.end is not None or self.fault is not None

    @property
    def all_said(self) -> bool:
        """Whether only the end is missing."""
        return self._reader.all_said

    @property
    def has_gap(self) -> bool:
        """Whether events are missing that can be had again: those behind `cursor`."""
        return self._reader.has_gap

    @property
    def oddities(self) -> str:
        """What was odd about the events, to be logged; "" for nothing."""
        counts = {"duplicates": self._reader.duplicates, "gaps": self._reader.gaps}
        return " ".join(f"{name}={count}" for name, count in counts.items() if count)

    def reopen(self) -> None:
        """What follows `cursor` comes again."""
        self._reader.reopen()

    @property
    def response_id(self) -> str | None:
        """The response's name, once it has come."""
        return self._reader.response_id

    @property
    def cursor(self) -> int | None:
        """The number of the last event; None where events have none, or none has come."""
        return self._reader.sequence if self._reader.sequence >= 0 else None

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come: grows with every step forward, and with nothing else."""
        return self._steps, self._reader.sequence

    def read(self, events: Iterable[bytes]) -> list[TextDelta]:
        """Takes the data of some events and returns the text that they add.

        Raises CannotResume where the response has become another one than what is known of it.
        """
        deltas = self._reader.read(events)
        if self._recalled < len(self._known):
            deltas = self._unknown(deltas)
            if self.end is not None and self._recalled < len(self._known):
                raise CannotResume
        for delta in deltas:
            self._said.write(delta.text)
            self._steps += 1
        return deltas

    def _unknown(self, deltas: Iterable[TextDelta]) -> list[TextDelta]:
        unknown = []
        for delta in deltas:
            again = delta.text[: len(self._known) - self._recalled]
            if not self._known.startswith(again, self._recalled):
                raise CannotResume
            self._recalled += len(again)
            if len(again) < len(delta.text):
                unknown.append(replace(delta, text=delta.text[len(again) :]))
        return unknown
