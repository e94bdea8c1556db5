"""The keys that tokens are checked with: a set of JSON Web Keys (RFC 7517) in a file or behind a URL, cached."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from adapters.identity import KeysUnavailable

_log = logging.getLogger(__name__)

LIFETIME = 300.0
"""Seconds after which a set is asked for again. The old one serves until the new one is there."""
PAUSE = 30.0
"""Seconds from one request to the next, whatever asks for it: unknown key ids are no amplifier."""
KEPT = 4 * 3_600.0
"""Seconds that the last good set serves while no newer one can be had."""
_TIMEOUT = 5.0
_MAX_BYTES = 2**18

_CURVES = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521", "EdDSA": "Ed25519"}
"""An algorithm's curve; the others use RSA, which has none."""

Load: TypeAlias = Callable[[], Awaitable[bytes]]


class KeysFault(Exception):
    """A key set can't be had or used. The text says why, without what was read."""


class KeySet:
    """Public keys by key id and algorithm."""

    def __init__(self, keys: dict[tuple[str | None, str], PyJWK]) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """The key of this id; without an id, the only key for this algorithm."""
        if kid is not None:
            return self._keys.get((kid, algorithm))
        fitting = [key for (_, its), key in self._keys.items() if its == algorithm]
        return fitting[0] if len(fitting) == 1 else None


def parse(content: bytes, algorithms: frozenset[str]) -> KeySet:
    """The keys that can check one of these algorithms. Raises KeysFault, also where there is none of them."""
    try:
        entries = json.loads(content)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeysFault("is no JSON Web Key set") from error
    if not isinstance(entries, list):
        raise KeysFault("is no JSON Web Key set")
    keys: dict[tuple[str | None, str], PyJWK] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        if "d" in entry:
            raise KeysFault("holds a private key")
        kid = entry.get("kid")
        if kid is not None and not isinstance(kid, str):
            continue
        for algorithm in algorithms:
            if entry.get("alg", algorithm) == algorithm and entry.get("crv") == _CURVES.get(algorithm):
                key = _usable(entry, algorithm)
                if key is not None:
                    keys[kid, algorithm] = key
    if not keys:
        raise KeysFault("has no key for the allowed algorithms")
    return KeySet(keys)


def _usable(entry: dict[str, Any], algorithm: str) -> PyJWK | None:
    """None for a key of another kind, too short, or not whole."""
    try:
        key = PyJWK(entry, algorithm)
    except PyJWTError:
        return None
    return None if key.Algorithm.check_key_length(key.key) else key


class Keys:
    """One key set, kept fresh. It never asks twice at once, nor again within PAUSE seconds."""

    def __init__(
        self, load: Load, algorithms: frozenset[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load = load
        self._algorithms = algorithms
        self._clock = clock
        self._set: KeySet | None = None
        self._got = -KEPT
        self._asked: float | None = None
        self._asking: asyncio.Task[None] | None = None

    async def current(self) -> KeySet:
        """The set to check with. Waits only if there is none yet. Raises KeysUnavailable."""
        if self._clock() - self._got >= LIFETIME:
            asking = self._ask()
            if self._believed is None and asking is not None:
                await asyncio.shield(asking)
        believed = self._believed
        if believed is None:
            raise KeysUnavailable
        return believed

    async def after(self, old: KeySet) -> KeySet:
        """A set newer than one that lacks a key, or the same one if it may not be asked for again yet."""
        if self._set is old and (asking := self._ask()) is not None:
            await asyncio.shield(asking)
        return await self.current()

    async def aclose(self) -> None:
        """Gives up a request under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    @property
    def _believed(self) -> KeySet | None:
        return self._set if self._clock() - self._got < KEPT else None

    def _ask(self) -> asyncio.Task[None] | None:
        """The request under way, or a new one if it is time."""
        if self._asking is not None and not self._asking.done():
            return self._asking
        now = self._clock()
        if self._asked is not None and now - self._asked < PAUSE:
            return None
        self._asked = now
        self._asking = asyncio.create_task(self._renew())
        return self._asking

    async def _renew(self) -> None:
        try:
            self._set = parse(await self._load(), self._algorithms)
        except KeysFault as fault:
            _log.warning("the key set of VIDA_AUTH_JWKS %s; the last good one serves on, if there is one", fault)
        else:
            self._got = self._clock()


def from_file(file: Path) -> Load:
    """Reads a key set from a file."""

    async def load() -> bytes:
        return await asyncio.to_thread(read_file, file)

    return load


def read_file(file: Path) -> bytes:
    """What a file holds. Raises KeysFault."""
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_BYTES)
    except OSError as error:
        raise KeysFault(f"can't be read ({type(error).__name__})") from error


def from_url(url: str) -> Load:
    """Fetches a key set within seconds: no redirect is followed, no more read than a key set can have.

    Proxies and trusted authorities are those of the environment.
    """

    async def load() -> bytes:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_TIMEOUT), trust_env=True) as session,
                session.get(url, allow_redirects=False, headers={"accept": "application/json"}) as response,
            ):
                if response.status != 200:
                    raise KeysFault(f"was answered with HTTP {response.status}")
                content = await response.content.read(_MAX_BYTES + 1)
                while len(content) <= _MAX_BYTES and (more := await response.content.read(_MAX_BYTES)):
                    content += more
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a proxy that is no URL
            raise KeysFault(f"can't be fetched ({type(error).__name__})") from error
        if len(content) > _MAX_BYTES:
            raise KeysFault("is larger than a key set")
        return content

    return load
