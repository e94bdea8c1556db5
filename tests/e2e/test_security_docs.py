"""What docs/security.md shows is run as it stands, on another port."""

import asyncio
import re
import subprocess
from pathlib import Path

import pytest

from certificates import AUDIENCE, ISSUER, Issuer
from doubles import ScriptedAgent
from entrypoints.client import connect_async, tls
from entrypoints.grpc_api.methods import named_methods
from entrypoints.policy import read_policy
from harness import served

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
ADDRESS = "localhost:50051"


def examples(language: str) -> list[str]:
    """The blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_policy_is_one(tmp_path: Path) -> None:
    (example,) = examples("toml")
    (tmp_path / "policy.toml").write_text(example)
    app, batch, operator = read_policy(tmp_path / "policy.toml", named_methods(), tokens=True).rules
    assert (app.any_user, batch.any_user, operator.admin) == (False, True, True)


@pytest.fixture
def files() -> None:
    """What the example makes, and what somebody else brings."""
    make, _ = examples("sh")
    done = subprocess.run(["sh", "-ec", make], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [file.stat().st_mode & 0o077 for file in Path().glob("*.key")] == [0, 0, 0]
    issuer = Issuer()
    Path("token").write_text(issuer.token("user-42"))
    Path("keys").write_text(issuer.jwks)


async def test_the_certificates_are_good_for_the_commands_and_the_client(
    files: None, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, commands = examples("sh")
    settings = dict(re.findall(r"(VIDA_\w+)=(\S+)", commands))
    assert set(settings) == {"VIDA_TLS_CERT", "VIDA_TLS_KEY", "VIDA_TLS_CLIENT_CA"}
    identity = {"VIDA_AUTH_ISSUER": ISSUER, "VIDA_AUTH_AUDIENCE": AUDIENCE, "VIDA_AUTH_JWKS": "keys"}
    for name, value in {**settings, **identity, "VIDA_DATABASE_URL": sqlite_url}.items():
        monkeypatch.setenv(name, value)
    (python,) = examples("python")
    credentials = tls(*map(Path, re.findall(r"--(?:ca|cert|key) (\S+)", commands)))
    async with served(ScriptedAgent(), channel_to=lambda at: connect_async(at, credentials=credentials)) as client:
        assert python.count(ADDRESS) == 1
        program = compile(python.replace(ADDRESS, client.address), "docs/security.md", "exec")
        await asyncio.to_thread(exec, program, {})
    assert capsys.readouterr().out.startswith("[")
