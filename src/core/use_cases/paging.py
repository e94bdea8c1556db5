"""Pages: sizes, and opaque tokens that name a place and the query that it belongs to."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence

from core.model.errors import InvalidField

DEFAULT_PAGE = 50
MAX_PAGE = 200
_MAX_TOKEN = 1_024


def page_size(asked: int) -> int:
    """0 is DEFAULT_PAGE, more than MAX_PAGE is MAX_PAGE. Raises InvalidField for a negative number."""
    if asked < 0:
        raise InvalidField("page_size", "must not be negative")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def make_token(query: Sequence[object], place: Sequence[str | int]) -> str:
    """A token for a place in the results of a query."""
    return base64.urlsafe_b64encode(json.dumps([_digest(query, place), *place]).encode()).decode().rstrip("=")


def read_token(token: str, query: Sequence[object], kinds: Sequence[type]) -> list[str | int] | None:
    """The place that a token of this query names, None for an empty token.

    Raises InvalidField for a token of another query or one that was not made here.
    """
    if not token:
        return None
    problem = InvalidField("page_token", "is not a token of this query")
    if len(token) > _MAX_TOKEN:
        raise problem
    try:
        parts = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise problem from error
    if not isinstance(parts, list) or len(parts) != len(kinds) + 1:
        raise problem
    place = parts[1:]
    if any(type(value) is not kind for value, kind in zip(place, kinds, strict=True)):
        raise problem
    if parts[0] != _digest(query, place):
        raise problem
    return place


def _digest(query: Sequence[object], place: Sequence[object]) -> str:
    """Ties a place to its query. No secret: whoever forges a token still reads with their own user id."""
    return hashlib.sha256(json.dumps([query, place], default=str).encode()).hexdigest()[:16]
