"""Users: the calling product's own references."""

from core.model.errors import InvalidField

MAX_USER_ID = 128


def check_user_id(user_id: str) -> None:
    """Raises InvalidField unless the reference has 1 to MAX_USER_ID characters, none of them U+0000."""
    if not 1 <= len(user_id) <= MAX_USER_ID:
        raise InvalidField("user_id", f"must have 1 to {MAX_USER_ID} characters")
    if "\0" in user_id:
        raise InvalidField("user_id", "must not contain U+0000")
