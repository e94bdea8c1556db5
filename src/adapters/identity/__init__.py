"""Who calls and for whom: certificates and keys in files, tokens and the keys that they are checked with.

What is here needs no library; the modules do.
"""

from dataclasses import dataclass

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
"""All that tokens may be allowed: signatures with a public key. With a shared secret whoever checks a token could
also sign one."""
MAX_TOKEN = 8_192
"""Characters of a token."""


class BadToken(Exception):
    """The token is not to be believed. `why` is for the log: a fixed word, nothing of the token."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class KeysUnavailable(Exception):
    """There are no keys to check a token with, or none that are new enough to be believed."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says that was checked."""

    subject: str
    client: str
    """Who asked for it (`azp`, else `client_id`); empty if it does not say."""
    expires: float
    """Seconds since 1970."""
