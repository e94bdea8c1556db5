"""Users: the calling product's own references."""

from dataclasses import dataclass
from datetime import datetime

from core.model.errors import InvalidField

MAX_USER_ID = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A user. `held_since` is set while a legal hold keeps everything of theirs."""

    id: str
    created_at: datetime
    held_since: datetime | None = None


def check_user_id(user_id: str) -> None:
    """Raises InvalidField unless the reference has 1 to MAX_USER_ID characters, none of them U+0000."""
    if not 1 <= len(user_id) <= MAX_USER_ID:
        raise InvalidField("user_id", f"must have 1 to {MAX_USER_ID} characters")
    if "\0" in user_id:
        raise InvalidField("user_id", "must not contain U+0000")
