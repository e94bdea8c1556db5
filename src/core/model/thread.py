"""Threads: persistent conversations."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from core.model.agent import Domain
from core.model.errors import InvalidField

MAX_TITLE = 200
MAX_METADATA_KEYS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


UNSYNCED = -1
"""`synced_to` of a copy that may hold anything."""


class ThreadState(StrEnum):
    """Whether a thread is in use."""

    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    """One user's persistent conversation with one agent version."""

    id: str
    user_id: str
    domain: Domain
    agent_id: str
    title: str
    state: ThreadState
    metadata: Mapping[str, str]
    last_message_at: datetime
    created_at: datetime
    message_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderState:
    """What is known of the provider's copy of a thread. SQL is the record; this copy is a cache.

    `synced_to` is the number of transcript lines that the copy is known to mirror: where it is less than the
    thread's own count, the copy is brought into step before it is used; UNSYNCED says that nothing is known of it.
    `begins_at` is the number of the first line in a conversation: what is before it did not fit.
    The copy is a conversation or a chain of responses, of which `response_id` is the last.
    """

    provider: str
    conversation_id: str | None = None
    response_id: str | None = None
    synced_to: int = 0
    begins_at: int = 1

    @property
    def refs(self) -> tuple[str, ...]:
        """The provider's ids of it."""
        return tuple(filter(None, (self.conversation_id, self.response_id)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What is left of a deleted thread: its id, and the erasure of its user that it went with (empty: none)."""

    thread_id: str
    erasure_id: str
    deleted_at: datetime


def check_metadata(metadata: Mapping[str, str], field: str) -> None:
    """Raises InvalidField where metadata breaks a bound or contains U+0000."""
    if len(metadata) > MAX_METADATA_KEYS:
        raise InvalidField(field, f"must have at most {MAX_METADATA_KEYS} keys")
    for key, value in metadata.items():
        if not 1 <= len(key) <= MAX_METADATA_KEY:
            raise InvalidField(field, f"keys must have 1 to {MAX_METADATA_KEY} characters")
        if len(value) > MAX_METADATA_VALUE:
            raise InvalidField(field, f"values must have at most {MAX_METADATA_VALUE} characters")
        if "\0" in key or "\0" in value:
            raise InvalidField(field, "must not contain U+0000")


def check_title(title: str, field: str) -> None:
    """Raises InvalidField where a title is too long or contains U+0000."""
    if len(title) > MAX_TITLE:
        raise InvalidField(field, f"must have at most {MAX_TITLE} characters")
    if "\0" in title:
        raise InvalidField(field, "must not contain U+0000")
