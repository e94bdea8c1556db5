"""Ports to the machine."""

from abc import abstractmethod
from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time for records. Nothing that decides who owns a turn may use it: that is database time."""

    @abstractmethod
    def now(self) -> datetime:
        """The time in UTC, time zone set."""


class Ids(Protocol):
    """Makes identifiers."""

    @abstractmethod
    def new(self) -> str:
        """A UUIDv7 in its canonical text form. Later ones of one process sort after earlier ones."""
