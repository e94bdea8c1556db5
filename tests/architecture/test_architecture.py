"""What holds the layers, the API and the repository together."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

import adapters.openai
import core.model.errors
from core.model.agent import Domain
from core.model.erasure import ErasureState
from core.model.errors import CoreError
from core.model.message import Role
from core.model.thread import ThreadState
from core.model.turn import BusyPolicy, TurnReason, TurnState
from entrypoints.grpc_api import mapping
from entrypoints.grpc_api.errors import STATUS
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import resources_pb2 as pb
from entrypoints.grpc_api.gen.vidacoach.agents.v1 import user_service_pb2 as users_api

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    """Runs a tool in the repository."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_imports_point_down_only() -> None:
    done = run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_generated_code_is_up_to_date() -> None:
    done = run(sys.executable, "scripts/generate_protos.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["core", "adapters", "entrypoints"])
def test_our_packages_are_the_ones_in_this_repository(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin == str(SRC / name / "__init__.py")


def test_the_core_needs_no_library() -> None:
    modules = sorted(
        ".".join(path.relative_to(SRC).with_suffix("").parts) for path in (SRC / "core").rglob("*.py")
    )
    code = f"import sys; sys.path[:] = [{str(SRC)!r}, *(p for p in sys.path if 'site-packages' not in p)]\n"
    code += "".join(f"import {module.removesuffix('.__init__')}\n" for module in modules)
    done = run(sys.executable, "-S", "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import sys, entrypoints.cli.main; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    heavy = {"grpc", "sqlalchemy", "openai", "alembic", "pydantic", "dependency_injector", "google", "psycopg"}
    heavy |= {"jwt", "cryptography", "aiohttp"}
    assert set(done.stdout.split()) & heavy == set()


def subclasses(of: type[CoreError]) -> Iterator[type[CoreError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from subclasses(kind)


def test_every_error_has_a_status_a_reason_and_a_message() -> None:
    kinds = [kind for kind in subclasses(CoreError) if "reason" in vars(kind)]
    assert set(kinds) == set(STATUS)
    # The first is never raised; the others look to callers as what they are a kind of.
    others = {
        core.model.errors.RetryableError,
        core.model.errors.StoreBusy,
        core.model.errors.QuotaSpent,
    }
    assert set(subclasses(CoreError)) - set(kinds) == others
    assert len({kind.reason for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert re.fullmatch(r"[A-Z_]+", kind.reason)
        assert re.fullmatch(r"[A-Z][^{}%]+\.", kind.message)
        assert STATUS[kind] not in {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL}
    retryable = {kind for kind in kinds if issubclass(kind, core.model.errors.RetryableError)}
    assert {STATUS[kind] for kind in retryable} <= {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }


def test_the_status_of_a_reason_is_part_of_the_api() -> None:
    assert {kind.reason: status.name for kind, status in STATUS.items()} == {
        "MALFORMED_REQUEST": "INVALID_ARGUMENT",
        "INVALID_FIELD": "INVALID_ARGUMENT",
        "UNAUTHENTICATED": "UNAUTHENTICATED",
        "CALLER_NOT_ALLOWED": "PERMISSION_DENIED",
        "NOT_SUPPORTED": "UNIMPLEMENTED",
        "THREAD_NOT_FOUND": "NOT_FOUND",
        "TURN_NOT_FOUND": "NOT_FOUND",
        "AGENT_NOT_FOUND": "NOT_FOUND",
        "REQUEST_ID_REUSED": "ALREADY_EXISTS",
        "TURN_IN_PROGRESS": "ABORTED",
        "CLEANUP_RUNNING": "ABORTED",
        "LEGAL_HOLD": "FAILED_PRECONDITION",
        "POSITION_AHEAD": "OUT_OF_RANGE",
        "QUEUE_FULL": "RESOURCE_EXHAUSTED",
        "QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED",
        "OVERLOADED": "UNAVAILABLE",
        "DRAINING": "UNAVAILABLE",
        "PROVIDER_UNAVAILABLE": "UNAVAILABLE",
        "IDENTITY_UNAVAILABLE": "UNAVAILABLE",
        "STORE_UNAVAILABLE": "UNAVAILABLE",
        "LEASE_LOST": "UNAVAILABLE",
    }


def test_every_reason_has_a_message() -> None:
    messages = {reason: reason.message for reason in TurnReason}
    assert len(set(messages.values())) == len(TurnReason)
    for reason, message in messages.items():
        assert reason.value == reason.name
        assert re.fullmatch(r"[A-Z][^{}%]+\.", message)
        assert isinstance(reason.retryable, bool)


def names(of: Any) -> set[str]:
    """The values of a protobuf enum, without its zero."""
    assert isinstance(of, EnumTypeWrapper)
    assert of.values()[0] == 0
    assert of.keys()[0].endswith("_UNSPECIFIED")
    return set(of.keys()[1:])


@pytest.mark.parametrize(
    ("ours", "prefix", "theirs", "table"),
    [
        (Domain, "DOMAIN", pb.Domain, mapping.DOMAINS),
        (TurnState, "TURN_STATE", pb.TurnState, mapping.TURN_STATES),
        (ThreadState, "THREAD_STATE", pb.ThreadState, mapping.THREAD_STATES),
        (Role, "ROLE", pb.Role, mapping.ROLES),
        (ErasureState, "ERASURE_STATE", users_api.ErasureState, mapping.ERASURE_STATES),
    ],
    ids=["domains", "turn states", "thread states", "roles", "erasure states"],
)
def test_every_value_is_mapped_to_the_one_of_its_name(
    ours: type[Enum], prefix: str, theirs: Any, table: dict[Enum, int]
) -> None:
    assert {one: theirs.Name(number) for one, number in table.items()} == {
        one: f"{prefix}_{one.name}" for one in ours
    }
    assert set(map(theirs.Name, table.values())) == names(theirs)


def test_what_comes_in_is_mapped_back() -> None:
    assert {mapping.domain_of(number) for number in mapping.DOMAINS.values()} == set(Domain)
    for domain, number in mapping.DOMAINS.items():
        assert mapping.domain_of(number) is domain
    for state, state_number in mapping.THREAD_STATES.items():
        assert mapping.states_of([state_number]) == {state}
    policies = {pb.BusyPolicy.Name(number): policy for number, policy in mapping.BUSY_POLICIES.items()}
    assert policies == {
        "BUSY_POLICY_UNSPECIFIED": BusyPolicy.REJECT,
        **{f"BUSY_POLICY_{policy.name}": policy for policy in BusyPolicy},
    }
    assert set(policies) == set(pb.BusyPolicy.keys())


def tracked() -> list[Path]:
    """The files of the repository, those to come included."""
    done = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    assert done.returncode == 0, done.stderr
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_holds_a_machines_paths_or_package_indexes() -> None:
    here = str(ROOT)
    patterns = {
        "a package index": r"--(?:extra-)?index-url|--find-links|--trusted-host",
        "an address of an index": r"https?://[^\s\"']*/(?:simple|pypi|artifactory|nexus)(?:/|\b)",
        "a home": r"/(?:home|Users)/[a-z][a-z0-9_.-]*/|/roo[t]/",
        "this checkout": re.escape(here) + r"\b",
        "a key": r"\bsk-[A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY",
    }
    files = tracked()
    assert ROOT / "requirements.lock" in files
    wrong = []
    for path in files:
        if path == Path(__file__):
            continue
        text = path.read_bytes().decode("utf-8")  # and every file is text
        wrong += [
            f"{path.relative_to(ROOT)}: {what}: {found.group()[:60]}"
            for what, pattern in patterns.items()
            for found in re.finditer(pattern, text)
        ]
    assert wrong == []


def test_agents_and_migrations_are_part_of_the_package() -> None:
    for folder, kind in (("adapters/catalog/agents", "toml"), ("adapters/sql/migrations/versions", "py")):
        assert list((SRC / folder).glob(f"*.{kind}"))
    assert Path(adapters.openai.__file__).is_relative_to(SRC)
