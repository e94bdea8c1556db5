"""The port to what a provider keeps of conversations."""

from abc import abstractmethod
from typing import Protocol


class CopyStays(Exception):
    """The provider has not deleted it. `reason` is a few fixed words: a status, a code, never what was said.

    `retry_after` are the seconds after which to try again, where the provider has said so. `refused` says that
    trying again helps only once somebody has changed something: a key, a permission.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.refused = refused


class ProviderCopies(Protocol):
    """Deletes what a provider keeps. One instance serves the process, concurrently."""

    @property
    @abstractmethod
    def provider(self) -> str:
        """Its name, as it is noted with the copies."""

    @abstractmethod
    async def erase(self, ref: str) -> None:
        """Deletes an object with all that hangs on it and would stay behind. What is gone already is no failure;
        interrupted, it may be begun again. Raises CopyStays, and nothing else."""
