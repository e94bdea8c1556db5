"""Reads agent definitions from TOML files: ours, and an operator's directory laid over them."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.model.agent import DEFAULT_MODEL, AgentDefinition, Catalog, Domain

SHIPPED = Path(__file__).parent / "agents"

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")
MIN_OUTPUT_TOKENS = 16

_SLUG = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_KEYS = frozenset(
    {
        "slug",
        "version",
        "domain",
        "name",
        "model",
        "effort",
        "verbosity",
        "max_output_tokens",
        "tools",
        "instructions",
    }
)


class CatalogError(Exception):
    """The definitions can't be used. `faults` holds everything that is wrong with them, a sentence each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Definitions:
    """Every definition that was read.

    `catalog` says who serves each domain. `by_slug` also holds the definitions without a domain, which serve
    nobody until `with_assistant` names them.
    """

    catalog: Catalog
    by_slug: Mapping[str, AgentDefinition]


def load_catalog(directory: Path | None = None, assistant_id: str = "") -> Catalog:
    """The agents on offer: the shipped ones, those of `directory` over them, or the one that is named.

    Raises CatalogError with all faults.
    """
    definitions = load_definitions(directory)
    return with_assistant(definitions, assistant_id) if assistant_id else definitions.catalog


def load_definitions(directory: Path | None = None) -> Definitions:
    """Reads the shipped files, then every *.toml of `directory`.

    A file for a domain replaces the shipped coach of that domain. A file without a domain adds a coach that
    can be named by its slug. Raises CatalogError with all faults of all files.
    """
    faults: list[str] = []
    shipped = _read_directory(SHIPPED, faults)
    added = _read_directory(directory, faults) if directory is not None else []
    faults += _clashes(shipped, added)
    if faults:
        raise CatalogError(faults)
    by_domain: dict[Domain, AgentDefinition] = {}
    for entry in [*shipped, *added]:
        if entry.serves is not None:
            by_domain[entry.serves] = entry.definition
    named = [entry.definition for entry in [*_kept(shipped, added), *added]]
    return Definitions(Catalog(by_domain), {definition.slug: definition for definition in named})


def with_assistant(definitions: Definitions, assistant_id: str) -> Catalog:
    """A catalog in which one definition serves every domain, named by slug (`career`) or id (`career-v1`).

    Raises CatalogError: there is no such definition, or the id is one of OpenAI's own.
    """
    choices = ", ".join(sorted(definitions.by_slug))
    if assistant_id.startswith(("asst_", "pmpt_")):
        gone = (
            "an OpenAI assistant, but OpenAI shut the Assistants API down on 2026-08-26"
            if assistant_id.startswith("asst_")
            else "an OpenAI reusable prompt, but OpenAI shuts reusable prompts down on 2026-11-30"
        )
        fault = (
            f"OPENAI_ASSISTANT_ID names {gone}. Name one of our agent definitions instead: {choices}."
            " To keep its instructions, put them into a TOML file in VIDA_AGENTS_DIR."
        )
        raise CatalogError([fault])
    for definition in definitions.by_slug.values():
        if assistant_id in (definition.slug, definition.id):
            return Catalog(dict.fromkeys(Domain, definition))
    raise CatalogError([f"OPENAI_ASSISTANT_ID names no agent definition. There are: {choices}."])


@dataclass(frozen=True, slots=True)
class _Entry:
    file: str
    serves: Domain | None
    definition: AgentDefinition


def _read_directory(directory: Path, faults: list[str]) -> list[_Entry]:
    if not directory.is_dir():
        faults.append(f"{directory}: is not a directory")
        return []
    entries = []
    for path in sorted(directory.glob("*.toml")):
        entry = _read_file(path, faults)
        if entry is not None:
            entries.append(entry)
    faults += _repeated(entries)
    return entries


def _read_file(path: Path, faults: list[str]) -> _Entry | None:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        faults.append(f"{path.name}: can't be read ({error.strerror})")
        return None
    except UnicodeDecodeError:
        faults.append(f"{path.name}: is not UTF-8")
        return None
    except tomllib.TOMLDecodeError as error:
        faults.append(f"{path.name}: is not valid TOML ({error})")
        return None
    reader = _Reader(table)
    entry = _Entry(path.name, reader.domain(), reader.definition())
    faults += [f"{path.name}: {fault}" for fault in reader.faults]
    return None if reader.faults else entry


class _Reader:
    """Takes a definition out of a TOML table, keeping account of every fault."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table
        self.faults = [f"unknown key {key!r}" for key in sorted(table.keys() - _KEYS)]

    def domain(self) -> Domain | None:
        value = self._table.get("domain")
        if value is None or (isinstance(value, str) and value in set(Domain)):
            return Domain(value) if value else None
        self.faults.append(f"domain must be one of {', '.join(Domain)}")
        return None

    def definition(self) -> AgentDefinition:
        value = self._table.get("domain")
        return AgentDefinition(
            slug=self._text("slug", "a lower-case name such as 'career'", _SLUG),
            version=self._number("version", None, 1),
            domain=Domain(value) if isinstance(value, str) and value in set(Domain) else Domain.GENERAL,
            name=self._text("name", "the coach's name for people").strip(),
            instructions=self._text("instructions", "what the coach is told").strip(),
            model=self._text("model", "'default' or a model's name", default=DEFAULT_MODEL),
            effort=self._choice("effort", EFFORTS),
            verbosity=self._choice("verbosity", VERBOSITIES),
            max_output_tokens=self._number("max_output_tokens", 2048, MIN_OUTPUT_TOKENS),
            tools=self._tools(),
        )

    def _text(
        self, key: str, meaning: str, pattern: re.Pattern[str] | None = None, default: str | None = None
    ) -> str:
        value = self._table.get(key, default)
        if value is None:
            self.faults.append(f"{key} is missing: {meaning}")
        elif not isinstance(value, str) or not value.strip() or "\0" in value:
            self.faults.append(f"{key} must be text: {meaning}")
        elif pattern is not None and not pattern.fullmatch(value):
            self.faults.append(f"{key} must match {pattern.pattern}")
        else:
            return value
        return ""

    def _number(self, key: str, default: int | None, minimum: int) -> int:
        value = self._table.get(key, default)
        if value is None:
            self.faults.append(f"{key} is missing: a whole number from {minimum}")
        elif not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 2**31:
            self.faults.append(f"{key} must be a whole number from {minimum}")
        else:
            return value
        return minimum

    def _choice(self, key: str, choices: Iterable[str]) -> str:
        value = self._table.get(key)
        if value is None:
            return ""
        if isinstance(value, str) and value in choices:
            return value
        self.faults.append(f"{key} must be one of {', '.join(choices)}, or absent")
        return ""

    def _tools(self) -> tuple[str, ...]:
        value = self._table.get("tools", [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.faults.append("tools must be a list of tool names")
            return ()
        if not all(_TOOL_NAME.fullmatch(name) for name in value):
            self.faults.append(f"tools must hold names that match {_TOOL_NAME.pattern}")
        if len(set(value)) < len(value):
            self.faults.append("tools names a tool twice")
        return tuple(value)


def _repeated(entries: list[_Entry]) -> list[str]:
    """What two files of one directory both claim."""

    def files(match: Iterable[_Entry]) -> str:
        return " and ".join(entry.file for entry in match)

    domains = Counter(entry.serves for entry in entries if entry.serves is not None)
    slugs = Counter(entry.definition.slug for entry in entries)
    ids = Counter(entry.definition.id for entry in entries)
    faults = [
        f"{files(e for e in entries if e.serves is domain)}: two definitions for the domain {domain}"
        for domain, count in domains.items()
        if count > 1
    ]
    for slug, count in slugs.items():
        if count > 1:
            same = [entry for entry in entries if entry.definition.slug == slug]
            what = "id" if any(ids[entry.definition.id] > 1 for entry in same) else "slug"
            faults.append(f"{files(same)}: two definitions with the {what} {getattr(same[0].definition, what)!r}")
    return faults


def _kept(shipped: list[_Entry], added: list[_Entry]) -> list[_Entry]:
    """The shipped entries that the added ones do not replace."""
    replaced = {entry.serves for entry in added}
    return [entry for entry in shipped if entry.serves not in replaced]


def _clashes(shipped: list[_Entry], added: list[_Entry]) -> list[str]:
    """Where a directory's definitions and the shipped ones can't both be meant."""
    ours = {entry.definition.id: entry.definition for entry in shipped}
    kept = {entry.definition.slug for entry in _kept(shipped, added)}
    faults = []
    for entry in added:
        definition = entry.definition
        if definition.id in ours and definition != ours[definition.id]:
            # A database may hold the shipped text under this id already, and a stored version never changes.
            faults.append(
                f"{entry.file}: duplicate id {definition.id!r}, which is the shipped coach's:"
                " use another slug, or a higher version"
            )
        elif definition.slug in kept:
            faults.append(f"{entry.file}: the slug {definition.slug!r} is the shipped coach's: use another one")
    return faults
