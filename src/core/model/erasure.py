"""Erasures: what was deleted for good, and what the provider still has of it."""

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from core.model.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much was erased here, or would be."""

    threads: int = 0
    turns: int = 0
    messages: int = 0
    attachments: int = 0
    goals: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            threads=self.threads + other.threads,
            turns=self.turns + other.turns,
            messages=self.messages + other.messages,
            attachments=self.attachments + other.attachments,
            goals=self.goals + other.goals,
        )


@dataclass(frozen=True, slots=True)
class ErasedThread:
    """What was erased with a thread, and those of its turns that had not ended."""

    counts: Counts
    unfinished: tuple[Turn, ...]


class ErasureState(StrEnum):
    """How far an erasure has come."""

    RUNNING = "running"
    HELD = "held"
    """A legal hold has come in between: it goes on when that is released."""
    AT_PROVIDER = "at_provider"
    """Nothing is left here; the provider still has copies."""
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An erasure of a user. It names nobody: who knows the user's id can tell by `user_hash` that it is theirs.

    `copies_left` are the objects that the provider still has of what was erased.
    """

    id: str
    user_hash: str
    requested_at: datetime
    finished_at: datetime | None = None
    held: bool = False
    erased: Counts = field(default_factory=Counts)
    copies_left: int = 0

    @property
    def state(self) -> ErasureState:
        """How far it has come."""
        if self.finished_at is None:
            return ErasureState.HELD if self.held else ErasureState.RUNNING
        return ErasureState.AT_PROVIDER if self.copies_left else ErasureState.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """An object that a provider has of an erased thread, by the provider's own id.

    `tries` counts attempts to delete it; `reason` says in a few fixed words why the last one failed.
    """

    provider: str
    ref: str
    thread_id: str
    tries: int = 0
    reason: str = ""


def user_hash(erasure_id: str, user_id: str) -> str:
    """SHA-256 of a user's id, salted with the erasure's: two erasures of one user do not look alike."""
    return hashlib.sha256(f"{erasure_id}:{user_id}".encode()).hexdigest()
