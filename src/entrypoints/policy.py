"""What each caller may do: the rules of VIDA_AUTH_POLICY."""

import logging
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.identity.files import stamp

_log = logging.getLogger(__name__)

LOOKED_AT_EVERY = 1.0
"""Seconds between two looks at whether the file has changed."""

_KEYS = {"name": str, "users": str, "methods": list, "admin": bool}
_USERS = {"any": True, "token": False}


class PolicyFault(Exception):
    """The file can't be used; all that is wrong with it, one sentence each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Rule:
    """What the callers of one name may do. A name or a method that ends with `*` stands for all that begin so."""

    name: str
    any_user: bool
    """Whether they may act for any user without a token, else for the token's subject alone."""
    methods: tuple[str, ...] = ("*",)
    """`Service/Method`."""
    admin: bool = False
    """Whether they may call AdminService, which `methods` says nothing of."""

    def allows(self, method: str) -> bool:
        """Whether they may call this `Service/Method`."""
        return any(_fits(pattern, method) for pattern in self.methods)


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, of which the first that fits a caller holds. Where none does, the caller may do nothing."""

    rules: tuple[Rule, ...]

    def rule(self, caller: str) -> Rule | None:
        """The rule for a caller."""
        return next((rule for rule in self.rules if _fits(rule.name, caller)), None)

    @property
    def administered(self) -> bool:
        """Whether anybody may call AdminService."""
        return any(rule.admin for rule in self.rules)


class PolicyFile:
    """The rules of a file, read anew when it changes. One that can't be used changes nothing."""

    def __init__(
        self, file: Path, read: Callable[[Path], Policy], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises PolicyFault."""
        self._file = file
        self._read = read
        self._clock = clock
        self._look_at = clock() + LOOKED_AT_EVERY
        self._stamp = stamp(file)
        self._held = read(file)

    def rule(self, caller: str) -> Rule | None:
        """The rule for a caller, by what the file held a second ago or less."""
        if self._clock() >= self._look_at:
            self._look()
        return self._held.rule(caller)

    @property
    def administered(self) -> bool:
        """Whether anybody may call AdminService, now or by rules that are still to come."""
        return True

    def _look(self) -> None:
        self._look_at = self._clock() + LOOKED_AT_EVERY
        found = stamp(self._file)
        if found == self._stamp:
            return
        self._stamp = found  # of before the reading: what changes meanwhile is read again
        try:
            self._held = self._read(self._file)
        except PolicyFault as fault:
            _log.error("the new policy is not taken, the one before stays in force: %s", fault)
        else:
            _log.info("a new policy is in force, of %d rules", len(self._held.rules))


def read_policy(file: Path, methods: frozenset[str], *, tokens: bool) -> Policy:
    """Reads the file. Raises PolicyFault for keys, values and methods that do not exist.

    `methods` are all that there are, as `Service/Method`, but for AdminService's; `tokens` says whether there are
    any.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyFault([f"can't be read ({type(error).__name__})"]) from error
    except ValueError as error:  # neither UTF-8 nor TOML; the library's words say where and quote one character
        raise PolicyFault(["is no TOML"]) from error
    entries = document.pop("caller", [])
    faults = [f"there is no key {key!r}" for key in document]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise PolicyFault([*faults, "needs [[caller]] entries"])
    rules = []
    for number, entry in enumerate(entries, 1):
        wrong = _wrong(entry, methods, tokens)
        faults += [f"caller {number}: {fault}" for fault in wrong]
        if not wrong:
            rules.append(
                Rule(
                    name=entry["name"],
                    any_user=_USERS[entry["users"]],
                    methods=tuple(entry.get("methods", ("*",))),
                    admin=entry.get("admin", False),
                )
            )
    if faults:
        raise PolicyFault(faults)
    return Policy(tuple(rules))


def _wrong(entry: dict[str, Any], methods: frozenset[str], tokens: bool) -> list[str]:
    faults = [f"there is no key {key!r}" for key in entry if key not in _KEYS]
    faults += [
        f"{key} must be a {kind.__name__}"
        for key, kind in _KEYS.items()
        if key in entry and not isinstance(entry[key], kind)
    ]
    if faults:
        return faults
    name, users = entry.get("name", ""), entry.get("users")
    if not name or "*" in name[:-1]:
        faults.append("name must be a caller's name, or end with its only *")
    if users not in _USERS:
        faults.append('users must be "any" or "token"')
    elif users == "token" and not tokens:
        faults.append('users = "token" needs VIDA_AUTH_ISSUER')
    for pattern in entry.get("methods", ()):
        if not isinstance(pattern, str) or not any(_fits(pattern, method) for method in methods):
            faults.append(f"there is no method {pattern!r} (AdminService is for admin = true)")
    return faults


def _fits(pattern: str, text: str) -> bool:
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern
