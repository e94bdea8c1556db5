"""The shipped agents load, a directory is laid over them, and every fault is reported at once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.catalog.loader import SHIPPED, CatalogError, load_catalog, load_definitions, with_assistant
from core.model.agent import Domain

Write = Callable[..., Path]


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """An operator's directory."""
    directory = tmp_path / "agents"
    directory.mkdir()
    return directory


def put(directory: Path, file: str, **keys: object) -> None:
    """Writes a definition; a key given as None is left out."""
    values: dict[str, object] = {
        "slug": file.removesuffix(".toml"),
        "version": 1,
        "name": "A coach",
        "instructions": "Coach well.",
        **keys,
    }
    lines = [f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None]
    (directory / file).write_text("".join(lines), encoding="utf-8")


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def faults_of(directory: Path, assistant_id: str = "") -> list[str]:
    with pytest.raises(CatalogError) as caught:
        load_catalog(directory, assistant_id)
    return caught.value.faults


@pytest.mark.parametrize("domain", list(Domain))
def test_every_domain_has_a_shipped_coach(domain: Domain) -> None:
    coach = load_catalog().by_domain[domain]
    assert coach.id == f"{domain}-v1"
    assert coach.domain is domain
    assert coach.tools == ("set_goal", "list_goals")
    assert coach.model == "default"
    assert coach.effort == "none"
    assert coach.verbosity in {"low", "medium"}


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_instructions_put_safety_first(file: Path) -> None:
    instructions = load_definitions().by_slug[file.stem].instructions
    assert 25 <= len([line for line in instructions.splitlines() if line.strip()]) <= 60
    for word in (
        "988",
        "116 123",
        "112",
        "911",
        "999",
        "findahelpline.com",
        "set_goal",
        "list_goals",
        "You are an AI",
    ):
        assert word in instructions
    headings = [line for line in instructions.splitlines() if line.startswith("#")]
    assert headings[0] == "# First of all: safety"


def test_shipped_directory_holds_the_four_domains_and_nothing_else() -> None:
    assert {file.name for file in SHIPPED.iterdir()} == {f"{domain}.toml" for domain in Domain}


def test_agents_are_sorted_by_domain() -> None:
    assert [agent.domain for agent in load_catalog().agents()] == list(Domain)


def test_a_directory_replaces_some_domains_only(agents: Path) -> None:
    put(
        agents, "walker.toml", domain="health", version=3, tools=["set_goal"], max_output_tokens=16, effort="xhigh"
    )
    catalog = load_catalog(agents)
    assert catalog.by_domain[Domain.HEALTH].id == "walker-v3"
    assert catalog.by_domain[Domain.HEALTH].tools == ("set_goal",)
    assert catalog.by_domain[Domain.CAREER].id == "career-v1"
    assert "health" not in load_definitions(agents).by_slug


def test_a_directory_may_raise_the_version_of_a_shipped_coach(agents: Path) -> None:
    put(agents, "career.toml", domain="career", version=2)
    assert load_catalog(agents).by_domain[Domain.CAREER].id == "career-v2"


def test_an_empty_directory_changes_nothing(agents: Path) -> None:
    assert load_catalog(agents).by_domain == load_catalog().by_domain


def test_a_definition_without_a_domain_serves_only_when_named(agents: Path) -> None:
    put(agents, "stoic.toml")
    assert load_catalog(agents).by_domain == load_catalog().by_domain
    assert {agent.id for agent in load_catalog(agents, "stoic").by_domain.values()} == {"stoic-v1"}


@pytest.mark.parametrize("assistant_id", ["career", "career-v1"])
def test_a_named_definition_serves_every_domain(assistant_id: str) -> None:
    catalog = with_assistant(load_definitions(), assistant_id)
    assert set(catalog.by_domain) == set(Domain)
    assert [agent.id for agent in catalog.agents()] == ["career-v1"]


@pytest.mark.parametrize(
    ("assistant_id", "words"),
    [
        ("asst_abc123", ["2026-08-26", "Assistants API", "career, general, health, relationship"]),
        ("pmpt_abc123", ["2026-11-30", "reusable prompts", "career, general, health, relationship"]),
        ("career-v9", ["career, general, health, relationship"]),
        ("nobody", ["career, general, health, relationship"]),
    ],
)
def test_an_assistant_that_is_not_ours_is_refused_with_what_to_do(assistant_id: str, words: list[str]) -> None:
    with pytest.raises(CatalogError) as caught:
        load_catalog(None, assistant_id)
    assert len(caught.value.faults) == 1
    for word in words:
        assert word in caught.value.faults[0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": 1}, "unknown key 'temperature'"),
        ({"instructions": None}, "instructions is missing"),
        ({"instructions": "  "}, "instructions must be text"),
        ({"name": None}, "name is missing"),
        ({"slug": "Bad Slug"}, "slug must match"),
        ({"slug": "a" * 33}, "slug must match"),
        ({"slug": 7}, "slug must be text"),
        ({"version": 0}, "version must be a whole number from 1"),
        ({"version": "1"}, "version must be a whole number from 1"),
        ({"version": True}, "version must be a whole number from 1"),
        ({"version": None}, "version is missing"),
        ({"domain": "finance"}, "domain must be one of career, health, relationship, general"),
        ({"domain": 3}, "domain must be one of"),
        ({"effort": "huge"}, "effort must be one of none, minimal, low, medium, high, xhigh, max"),
        ({"verbosity": "max"}, "verbosity must be one of low, medium, high"),
        ({"max_output_tokens": 15}, "max_output_tokens must be a whole number from 16"),
        ({"model": ""}, "model must be text"),
        ({"tools": "set_goal"}, "tools must be a list"),
        ({"tools": [1]}, "tools must be a list"),
        ({"tools": ["a b"]}, "tools must hold names"),
        ({"tools": ["a", "a"]}, "tools names a tool twice"),
    ],
)
def test_a_fault_is_named_with_its_file(agents: Path, keys: dict[str, object], words: str) -> None:
    put(agents, "bad.toml", **keys)
    faults = faults_of(agents)
    assert len(faults) == 1
    assert faults[0].startswith("bad.toml: ")
    assert words in faults[0]


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max", None])
def test_every_effort_may_be_chosen(agents: Path, effort: str | None) -> None:
    put(agents, "mine.toml", domain="career", effort=effort)
    assert load_catalog(agents).by_domain[Domain.CAREER].effort == (effort or "")


def test_all_faults_of_all_files_are_reported_at_once(agents: Path) -> None:
    put(agents, "a.toml", version=0, effort="huge", instructions=None)
    put(agents, "b.toml", domain="moon")
    (agents / "c.toml").write_text("slug = ", encoding="utf-8")
    (agents / "d.toml").write_bytes(b"\xff\xfe")
    faults = faults_of(agents)
    assert len(faults) == 6
    assert [fault.split(":")[0] for fault in faults].count("a.toml") == 3


def test_two_definitions_for_one_domain_are_a_fault(agents: Path) -> None:
    put(agents, "a.toml", domain="career")
    put(agents, "b.toml", domain="career")
    assert faults_of(agents) == ["a.toml and b.toml: two definitions for the domain career"]


@pytest.mark.parametrize(("version", "what"), [(1, "id 'same-v1'"), (2, "slug 'same'")])
def test_two_definitions_with_one_name_are_a_fault(agents: Path, version: int, what: str) -> None:
    put(agents, "a.toml", slug="same")
    put(agents, "b.toml", slug="same", version=version)
    assert faults_of(agents) == [f"a.toml and b.toml: two definitions with the {what}"]


def test_a_shipped_version_can_not_be_given_other_content(agents: Path) -> None:
    put(agents, "career.toml", domain="career", version=1)
    assert "duplicate id 'career-v1'" in faults_of(agents)[0]


def test_a_shipped_slug_can_not_be_used_beside_it(agents: Path) -> None:
    put(agents, "career.toml", domain="health", version=2)
    assert "the slug 'career' is the shipped coach's" in faults_of(agents)[0]


def test_a_missing_directory_is_a_fault(tmp_path: Path) -> None:
    assert "is not a directory" in faults_of(tmp_path / "nowhere")[0]
