"""What a person types and sees. Replies go to stdout, everything else to stderr, so that a pipe gets replies."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from entrypoints.cli.failure import abandon

PROMPT = "> "

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What could move a terminal's cursor, or worse. Tabs and line feeds are left."""


class Screen:
    """Where the conversation is shown. Raises BrokenPipeError when nobody reads any more.

    A file or a pipe gets a reply's text as it is, in UTF-8. A terminal gets no control characters; they are
    shown as U+FFFD, and a carriage return is a line's end.
    """

    def __init__(self, out: TextIO | None, err: TextIO | None) -> None:
        self._out = out or _nowhere()
        self._err = err or _nowhere()
        self.shows_replies = self._out.isatty()
        self._notes_beside = self.shows_replies and self._err.isatty()
        if isinstance(self._out, io.TextIOWrapper):
            self._out.reconfigure(encoding=None if self.shows_replies else "utf-8", errors="replace")
        self._held = ""
        self._open = False
        self._after_return = False

    def text(self, text: str) -> None:
        """More of a reply. Line feeds are held back until there is something to put after them."""
        if self.shows_replies:
            text = self._harmless(text)
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        if shown:
            self._out.write(shown)
            self._out.flush()
            self._open = True

    def end(self) -> None:
        """Ends a reply with exactly one line feed, if there was any of it."""
        if self._open or self._held:
            self._out.write("\n")
            self._out.flush()
        self._open = False
        self._held = ""
        self._after_return = False

    def note(self, text: str = "") -> None:
        """A line that is not a reply. In mid-reply, on a terminal, it gets a line of its own."""
        if self._open and self._notes_beside:
            self.end()
        if self._err.isatty():
            text = _CONTROLS.sub("\ufffd", text)
        self._err.write(f"{text}\n")
        self._err.flush()

    def prompt(self) -> None:
        """Asks for a line where the terminal's own editor can't."""
        self._err.write(PROMPT)
        self._err.flush()

    def abandon(self) -> None:
        """Nobody reads: what is still buffered goes nowhere."""
        abandon(self._out, self._err)

    def _harmless(self, text: str) -> str:
        if self._after_return:
            text = text.removeprefix("\n")  # the rest of a line end that was cut in two
        self._after_return = text.endswith("\r")
        return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


class Lines:
    """What is typed, or comes from a pipe, line by line.

    From a pipe it is UTF-8, invalid bytes become U+FFFD, and a line ends with LF, CR LF or CR.
    """

    def __init__(self, source: TextIO | None, screen: Screen) -> None:
        self._source = source
        self._screen = screen
        self.interactive = source is not None and source.isatty()
        self._edited = self.interactive and source is sys.stdin and screen.shows_replies
        if isinstance(source, io.TextIOWrapper):
            source.reconfigure(encoding=None if self.interactive else "utf-8-sig", errors="replace", newline=None)
        if self._edited:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` its editing and its history

    def read(self) -> str | None:
        """The next line, without its end; None when there are no more. Raises KeyboardInterrupt."""
        if self._source is None:
            return None
        if self._edited:
            try:
                return input(PROMPT)
            except EOFError:
                return None
        if self.interactive:
            self._screen.prompt()
        line = self._source.readline()
        return line.removesuffix("\n") if line else None


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")
