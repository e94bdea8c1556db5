"""End users' tokens: signed JSON Web Tokens (RFC 7519, RFC 8725)."""

import hashlib
import time
from collections import OrderedDict

import jwt
from jwt.exceptions import PyJWTError

from adapters.identity import MAX_TOKEN, BadToken, Token
from adapters.identity.keys import Keys, KeySet

LEEWAY = 10
"""Seconds that clocks may differ."""
_REMEMBERED = 10_000


class Tokens:
    """Believes tokens of one issuer for one audience."""

    def __init__(self, keys: Keys, issuer: str, audience: str, algorithms: frozenset[str]) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._algorithms = algorithms
        self._seen: OrderedDict[bytes, tuple[Token, KeySet]] = OrderedDict()

    async def read(self, text: str) -> Token:
        """What the token says. Raises BadToken, and KeysUnavailable where there is nothing to check it with."""
        if len(text) > MAX_TOKEN:
            raise BadToken("too long")
        keys = await self._keys.current()
        digest = hashlib.sha256(text.encode()).digest()
        known = self._seen.get(digest)
        if known is not None and known[1] is keys and time.time() < known[0].expires:
            return known[0]
        algorithm, kid = self._header(text)
        key = keys.find(kid, algorithm)
        if key is None:
            keys = await self._keys.after(keys)
            key = keys.find(kid, algorithm)
        if key is None:
            raise BadToken("unknown key")
        token = self._checked(text, key, algorithm)
        self._seen[digest] = token, keys
        self._seen.move_to_end(digest)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return token

    async def aclose(self) -> None:
        """Gives up a request for keys."""
        await self._keys.aclose()

    def _header(self, text: str) -> tuple[str, str | None]:
        try:
            header = jwt.get_unverified_header(text)
        except (PyJWTError, ValueError, RecursionError) as error:
            raise BadToken("malformed") from error
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise BadToken("algorithm")
        if kid is not None and not isinstance(kid, str):
            raise BadToken("malformed")
        return algorithm, kid

    def _checked(self, text: str, key: jwt.PyJWK, algorithm: str) -> Token:
        try:
            claims = jwt.decode(
                text,
                key,
                algorithms=[algorithm],
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY,
                options={"require": ["exp", "sub", "iss", "aud"]},
            )
            expires = float(claims["exp"]) + LEEWAY
        except PyJWTError as error:
            raise BadToken(_word(error)) from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:  # claims of unforeseen kinds
            raise BadToken("malformed") from error
        subject = claims["sub"]
        client = claims.get("azp") or claims.get("client_id") or ""
        if not isinstance(subject, str) or not subject or not isinstance(client, str):
            raise BadToken("malformed")
        return Token(subject, client, expires)


def _word(error: Exception) -> str:
    """The kind of error, which the library names well: ExpiredSignature, InvalidAudience …"""
    return type(error).__name__.removesuffix("Error")
