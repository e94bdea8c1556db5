"""What callers are called, and what the rules of a policy let them do."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adapters.identity.certificates import CertificateFault, CertificateFiles, Certificates, read
from certificates import Authority, Issuer, Pair
from entrypoints.grpc_api.access import MAX_NAME, certificate_name
from entrypoints.grpc_api.methods import named_methods
from entrypoints.grpc_api.tls import Reloaded
from entrypoints.identity import faults
from entrypoints.policy import LOOKED_AT_EVERY, Policy, PolicyFault, PolicyFile, Rule, read_policy
from entrypoints.settings import load_settings


@pytest.mark.parametrize(
    ("identity", "name"),
    [
        ({"peer_uri": [b"spiffe://a/b"], "peer_dns": [b"d"], "x509_common_name": [b"c"]}, "spiffe://a/b"),
        ({"peer_uri": [b"https://a/b"]}, "https://a/b"),
        ({"peer_dns": [b"d.example", b"e.example"], "x509_common_name": [b"c"]}, "dns:d.example"),
        ({"x509_common_name": [b"c"]}, "cn:c"),
        ({"x509_common_name": [b"local"]}, "cn:local"),
        ({"x509_common_name": ["José".encode()]}, "cn:José"),
        ({}, None),
        ({"x509_common_name": [b""]}, None),
        ({"peer_uri": [b"spiffe://a/b", b"spiffe://a/c"]}, None),
        ({"peer_uri": [b"token:x"]}, None),
        ({"peer_uri": [b"token:x://y"]}, None),
        ({"peer_uri": [b"local"], "x509_common_name": [b"c"]}, None),
        ({"peer_uri": [b"spiffe://a/\n"]}, None),
        ({"peer_dns": [b"//x"]}, None),
        ({"x509_common_name": [b"//x"]}, None),
        ({"x509_common_name": [b"a\0b"]}, None),
        ({"x509_common_name": [b"\xff"]}, None),
        ({"x509_common_name": [b"x" * (MAX_NAME - 3)]}, "cn:" + "x" * (MAX_NAME - 3)),
        ({"x509_common_name": [b"x" * (MAX_NAME - 2)]}, None),
    ],
    ids=str,
)
def test_a_certificate_names_its_holder(identity: dict[str, list[bytes]], name: str | None) -> None:
    assert certificate_name(identity) == name


def test_the_first_rule_that_fits_holds() -> None:
    exact, some, rest = (
        Rule("spiffe://a/b", any_user=True, methods=("AgentService/Chat", "ThreadService/*")),
        Rule("spiffe://a/*", any_user=False),
        Rule("dns:*", any_user=False, methods=(), admin=True),
    )
    policy = Policy((exact, some, rest))
    assert policy.rule("spiffe://a/b") is exact
    assert policy.rule("spiffe://a/bc") is policy.rule("spiffe://a/") is some
    assert policy.rule("spiffe://ab") is policy.rule("dns") is policy.rule("") is None
    assert policy.administered
    assert not Policy((exact, some)).administered
    assert [exact.allows(name) for name in ("AgentService/Chat", "AgentService/ChatX", "ThreadService/X")] == [
        True,
        False,
        True,
    ]
    assert some.allows("AgentService/GetTurn")
    assert not rest.allows("AgentService/GetTurn")


def policy_faults(file: Path, text: str, *, tokens: bool = True) -> list[str]:
    file.write_text(text)
    with pytest.raises(PolicyFault) as error:
        read_policy(file, named_methods(), tokens=tokens)
    return error.value.faults


def test_a_policy_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(
        '[[caller]]\nname = "a"\nusers = "token"\n'
        '[[caller]]\nname = "*"\nusers = "any"\n'
        'methods = ["AgentService/*", "ThreadService/GetThread"]\nadmin = true\n'
    )
    assert read_policy(file, named_methods(), tokens=True).rules == (
        Rule("a", any_user=False, methods=("*",), admin=False),
        Rule("*", any_user=True, methods=("AgentService/*", "ThreadService/GetThread"), admin=True),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["needs [[caller]] entries"]),
        ("caller = 7", ["needs [[caller]] entries"]),
        ("[caller]\nname = 'a'", ["needs [[caller]] entries"]),
        ("callers = []", ["there is no key 'callers'", "needs [[caller]] entries"]),
        ("[[caller]", ["is no TOML"]),
        ("[[caller]]", ["caller 1: name must be", "caller 1: users must be"]),
        ("[[caller]]\nname='a'\nusers='all'", ["caller 1: users must be"]),
        ("[[caller]]\nname='*a*'\nusers='any'", ["caller 1: name must be"]),
        ("[[caller]]\nname=''\nusers='any'", ["caller 1: name must be"]),
        ("[[caller]]\nname=7\nusers='any'\nadmin='yes'", ["caller 1: name must be", "caller 1: admin must be"]),
        ("[[caller]]\nname='a'\nusers='any'\nmethod=[]", ["caller 1: there is no key 'method'"]),
        ("[[caller]]\nname='a'\nusers='any'\nmethods=['Chat', 7, '']", ["caller 1: there is no method"] * 3),
        ("[[caller]]\nname='a'\nusers='any'\nmethods=['AdminService/*']", ["caller 1: there is no method"]),
        ("[[caller]]\nname='a'\nusers='any'\n[[caller]]\nname='b'", ["caller 2: users must be"]),
    ],
)
def test_a_policy_that_says_nothing_sensible(text: str, expected: list[str], tmp_path: Path) -> None:
    found = policy_faults(tmp_path / "policy.toml", text)
    assert len(found) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(found, expected, strict=True))


def test_tokens_must_be_there_to_bind_a_caller_to(tmp_path: Path) -> None:
    (fault,) = policy_faults(tmp_path / "policy.toml", "[[caller]]\nname='a'\nusers='token'", tokens=False)
    assert "VIDA_AUTH_ISSUER" in fault


def test_the_file_is_looked_at_every_second(tmp_path: Path) -> None:
    file, now = tmp_path / "policy", 100.0

    def one_rule(file: Path) -> Policy:
        return Policy((Rule(file.read_text(), any_user=True),))

    def named(*names: str) -> list[str]:
        return [name for name in names if policy.rule(name) is not None]

    file.write_text("a")
    policy = PolicyFile(file, one_rule, lambda: now)
    for seconds, text, before in ((101.0, "bb", "a"), (102.0, "ccc", "bb")):
        file.write_text(text)
        now = seconds - 0.1 * LOOKED_AT_EVERY
        assert named(text, before) == [before]
        now = seconds
        assert named(text, before) == [text]


@pytest.fixture
def files(tmp_path: Path) -> CertificateFiles:
    authority = Authority()
    authority.issue(name="server").write(tmp_path / "cert", tmp_path / "key")
    (tmp_path / "ca").write_bytes(authority.pem)
    return CertificateFiles(tmp_path / "cert", tmp_path / "key", tmp_path / "ca")


Spoil = Callable[[CertificateFiles], object]
SPOILT: dict[str, tuple[Spoil, str, str]] = {
    "no certificate file": (lambda it: it.certificate.unlink(), "certificate", "can't be read"),
    "no key file": (lambda it: it.key.unlink(), "key", "can't be read"),
    "no certificate": (lambda it: it.certificate.write_text("canary"), "certificate", "no certificate"),
    "half a certificate": (
        lambda it: it.certificate.write_bytes(it.certificate.read_bytes()[:99]),
        "certificate",
        "no c",
    ),
    "no key": (lambda it: it.key.write_text("canary"), "key", "no private key"),
    "another key": (lambda it: it.key.write_bytes(Authority().issue(name="x").key), "key", "does not belong"),
    "no client CA": (lambda it: it.client_ca and it.client_ca.write_text("canary"), "client CA", "no certificate"),
    "a huge file": (lambda it: it.certificate.write_bytes(b"x" * (2**20 + 1)), "certificate", "larger"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_files_that_do_not_fit_are_named(name: str, files: CertificateFiles) -> None:
    spoil, part, problem = SPOILT[name]
    read(files)
    spoil(files)
    with pytest.raises(CertificateFault, match=problem) as fault:
        read(files)
    assert fault.value.part == part
    assert "canary" not in str(fault.value)


def test_certificates_know_until_when_they_are_valid(files: CertificateFiles) -> None:
    assert abs(read(files).valid_until - datetime.now(UTC) - timedelta(days=1)) < timedelta(minutes=5)
    assert b"PRIVATE" not in repr(read(files)).encode()


def test_files_are_read_again_only_when_they_change(
    files: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloaded = Reloaded(files)
    reads: list[object] = []

    def counted(it: CertificateFiles) -> Certificates:
        reads.append(it)
        return read(it)

    monkeypatch.setattr("entrypoints.grpc_api.tls.read", counted)
    assert reloaded.fetch() is None
    assert reads == []
    old, second = read(files), Authority().issue(name="second")
    Pair(second.certificate, old.key).write(files.certificate, files.key)
    assert reloaded.fetch() is None
    assert reloaded.fetch() is None
    assert len(reads) == 1  # not at every handshake
    second.write(files.certificate, files.key)
    assert reloaded.fetch() is not None
    assert reloaded.held.certificate == second.certificate
    assert reloaded.fetch() is None
    assert len(reads) == 2


def test_all_faults_of_all_files_are_told_at_once(
    tmp_path: Path, files: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, policy = tmp_path / "keys", tmp_path / "policy"
    keys.write_text(Issuer().jwks)
    policy.write_text('[[caller]]\nname = "*"\nusers = "token"\n')
    for name, value in {
        "VIDA_TLS_CERT": files.certificate,
        "VIDA_TLS_KEY": files.key,
        "VIDA_TLS_CLIENT_CA": files.client_ca,
        "VIDA_AUTH_ISSUER": "x",
        "VIDA_AUTH_AUDIENCE": "x",
        "VIDA_AUTH_JWKS": keys,
        "VIDA_AUTH_POLICY": policy,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert faults(load_settings()) == []
    Pair(b"", b"").write(files.certificate, files.key)
    keys.write_text("{}")
    policy.unlink()
    found = faults(load_settings())
    assert [fault.partition(":")[0] for fault in found] == ["VIDA_TLS_CERT", "VIDA_AUTH_JWKS", "VIDA_AUTH_POLICY"]
